//! Products in AVX2 with FMA and F16C. Two weight rows are decoded to f32 into scratch and used for all rows of the task.

// Tiles are indexed by row and output, in several arrays at a time.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::scratch;
use super::{Inputs, Product, Weights};
use crate::fp8::{self, BLOCK};

/// Outputs of a tile.
const TILE: usize = 2;

/// Computes outputs `outputs` of rows `rows`.
///
/// # Safety
/// The machine has [`crate::Isa::Avx2`]; nobody else writes these outputs; every input row is inside `product.x`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn compute(product: &Product<'_>, rows: Range<usize>, outputs: Range<usize>) {
    let padded = product.k.next_multiple_of(BLOCK);
    scratch::with_f32(TILE * padded, |scratch| {
        let (first, second) = scratch.split_at_mut(padded);
        for n in outputs.clone().step_by(TILE) {
            let last = product.n - 1;
            decode_weights(product, n, first);
            decode_weights(product, (n + 1).min(last), second);
            let mut m = rows.start;
            while m < rows.end {
                // SAFETY: as above; rows and outputs of this task.
                unsafe {
                    let count = TILE.min(outputs.end - n);
                    if rows.end - m >= 2 {
                        tile::<2>(product, m, n, count, [first, second]);
                        m += 2;
                    } else {
                        tile::<1>(product, m, n, count, [first, second]);
                        m += 1;
                    }
                }
            }
        }
    });
}

/// Weight row `n` as f32 without its scales, zeros past K.
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_weights(product: &Product<'_>, n: usize, out: &mut [f32]) {
    let k = product.k;
    out[k..].fill(0.0);
    let out = &mut out[..k];
    match product.weights {
        Weights::F32(weights) => out.copy_from_slice(&weights[n * k..][..k]),
        Weights::Bf16(bytes) => {
            for (out, pair) in out.iter_mut().zip(bytes[2 * n * k..][..2 * k].chunks_exact(2)) {
                *out = fp8::from_bf16(u16::from_le_bytes([pair[0], pair[1]]));
            }
        }
        Weights::Fp8 { codes, .. } => {
            let (wide, rest) = out.as_chunks_mut::<16>();
            let (wide_codes, rest_codes) = codes[n * k..][..k].as_chunks::<16>();
            for (out, codes) in wide.iter_mut().zip(wide_codes) {
                decode_e4m3(codes, out);
            }
            for (out, &code) in rest.iter_mut().zip(rest_codes) {
                *out = fp8::decode(code);
            }
        }
    }
}

/// 16 codes to f32. Shifted into a half-precision number an E4M3 code is its value over 256, subnormals included;
/// NaN alone has to be put in.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn decode_e4m3(codes: &[u8; 16], out: &mut [f32; 16]) {
    // SAFETY: 16 bytes in, 16 values out.
    unsafe {
        let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
        let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7F));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
        let nan = _mm256_and_si256(
            _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F)),
            _mm256_set1_epi16(0x7C00),
        );
        let half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign), nan);
        let low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half));
        let scale = _mm256_set1_ps(256.0);
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(low, scale));
        _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_mul_ps(high, scale));
    }
}

/// Outputs `n..n + count` of rows `m..m + M`.
///
/// # Safety
/// As [`compute`]; the weights are padded to whole blocks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const M: usize>(
    product: &Product<'_>,
    m: usize,
    n: usize,
    count: usize,
    weights: [&[f32]; TILE],
) {
    let weight_scales = product.weight_scales(n);
    let input_scales: [_; M] = std::array::from_fn(|i| product.input_scales(m + i));
    let mut totals = [[_mm256_setzero_ps(); TILE]; M];
    for block in 0..product.k_blocks() {
        // Two sums per element hide the latency of the multiply-add.
        let mut even = [[_mm256_setzero_ps(); TILE]; M];
        let mut odd = [[_mm256_setzero_ps(); TILE]; M];
        let start = block * BLOCK;
        let mut padded = [[0.0; BLOCK]; M];
        let tail = product.k - start < BLOCK;
        if tail {
            for (i, padded) in padded.iter_mut().enumerate() {
                copy_inputs(product, m + i, start, padded);
            }
        }
        for at in (0..BLOCK).step_by(16) {
            for i in 0..M {
                // SAFETY: whole blocks of weights; inputs of a whole block, or of their padded copy.
                unsafe {
                    let (x0, x1) = if tail {
                        (
                            _mm256_loadu_ps(padded[i].as_ptr().add(at)),
                            _mm256_loadu_ps(padded[i].as_ptr().add(at + 8)),
                        )
                    } else {
                        let x = product.input_row(m + i) * product.x_stride + start + at;
                        (load_inputs(product, x), load_inputs(product, x + 8))
                    };
                    for j in 0..TILE {
                        let w = weights[j].as_ptr().add(start + at);
                        even[i][j] = _mm256_fmadd_ps(x0, _mm256_loadu_ps(w), even[i][j]);
                        odd[i][j] = _mm256_fmadd_ps(x1, _mm256_loadu_ps(w.add(8)), odd[i][j]);
                    }
                }
            }
        }
        for i in 0..M {
            let scale = match (weight_scales.get(block), input_scales[i].get(block)) {
                (Some(w), Some(x)) => w * x,
                (Some(w), None) => *w,
                _ => 1.0,
            };
            for j in 0..TILE {
                let sum = _mm256_add_ps(even[i][j], odd[i][j]);
                totals[i][j] = _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), totals[i][j]);
            }
        }
    }
    for i in 0..M {
        let values = totals[i].map(|total| horizontal_sum(total));
        // SAFETY: this task's outputs.
        unsafe { product.y.write(m + i, n, &values[..count]) }
    }
}

/// Eight input values from index `at` as f32.
///
/// # Safety
/// They are inside the inputs.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_inputs(product: &Product<'_>, at: usize) -> __m256 {
    // SAFETY: by the caller's promise.
    unsafe {
        match product.x {
            Inputs::F32(values) => _mm256_loadu_ps(values.as_ptr().add(at)),
            Inputs::Bf16(values) | Inputs::Fp8 { values, .. } => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.as_ptr().add(at).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}

/// The inputs of row `m` from channel `start` to K.
fn copy_inputs(product: &Product<'_>, m: usize, start: usize, out: &mut [f32; BLOCK]) {
    let at = product.input_row(m) * product.x_stride;
    let range = at + start..at + product.k;
    match product.x {
        Inputs::F32(values) => out[..range.len()].copy_from_slice(&values[range]),
        Inputs::Bf16(values) | Inputs::Fp8 { values, .. } => {
            for (out, &bits) in out.iter_mut().zip(&values[range]) {
                *out = fp8::from_bf16(bits);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn horizontal_sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
