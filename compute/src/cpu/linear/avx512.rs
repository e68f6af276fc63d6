//! Products in AVX-512: `vdpbf16ps` for bf16 and FP8 operands, FMA for f32 inputs.
//!
//! Tiles are 4 outputs wide. Up to [`DIRECT_ROWS`] rows, weights go from memory through the decoder straight into the
//! products: decoding is then a few instructions per cache line, and memory is what is waited for. With more rows a
//! *panel* of 4 weight rows and [`PANEL_K`] channels is decoded once into the level-1 cache and used for all rows of
//! the task, 3 at a time (12 block sums, 12 totals, 3 inputs and a weight fill 28 of the 32 registers); the totals wait
//! in scratch between panels. Per element, both ways do the same operations in the same order.
//!
//! `vdpbf16ps` reads and writes subnormals as zero. E4M3 values are never bf16 subnormals; bf16 weights below 1.2e-38
//! count as zero here.

// Tiles are indexed by row and output, in several arrays at a time.
#![allow(clippy::needless_range_loop)]

mod decode;

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use self::decode::{Arithmetic, Decode, F32FromF32};
use super::super::scratch;
use super::{Inputs, Output, PREFETCH_BYTES, Product, TASK_OUTPUTS, TASK_ROWS, Weights};
use crate::fp8::BLOCK;

/// Outputs of a tile.
const TILE: usize = 4;
/// Rows computed straight from memory; with 3 the decoder's tables no longer fit the registers.
const DIRECT_ROWS: usize = 2;
/// Rows of a panel's tile.
const PANEL_ROWS: usize = 3;
/// Channels of a panel: 4 rows of bf16 take 8 KiB, a quarter of the level-1 cache.
const PANEL_K: usize = 1024;

/// Computes outputs `outputs` of rows `rows`.
///
/// # Safety
/// The machine has [`crate::Isa::Avx512`]; nobody else writes these outputs; every input row is inside `product.x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
pub(super) unsafe fn compute(product: &Product<'_>, rows: Range<usize>, outputs: Range<usize>) {
    let (Weights::F32(w), Inputs::F32(x)) = (product.weights, product.x) else {
        unreachable!("other weights have a kernel of their own");
    };
    // SAFETY: the caller's promises, handed on with the operands' start addresses, which belong together.
    unsafe { Operands::new(F32FromF32, product, w.as_ptr().cast(), x.as_ptr().cast()).compute(rows, outputs) }
}

/// A product with its formats resolved.
struct Operands<'a, D> {
    decoder: D,
    product: &'a Product<'a>,
    weights: *const u8,
    inputs: *const u8,
}

/// Lane sums of a tile: `[row][output]`.
type Sums<const M: usize> = [[__m512; TILE]; M];

impl<'a, D: Decode> Operands<'a, D> {
    fn new(decoder: D, product: &'a Product<'a>, weights: *const u8, inputs: *const u8) -> Self {
        Self { decoder, product, weights, inputs }
    }

    /// Bytes of an input value.
    const INPUT_BYTES: usize = 64 / D::Arithmetic::LANES;
    /// Values that the decoder makes at a time.
    const STEP: usize = 2 * D::Arithmetic::LANES;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn compute(&self, rows: Range<usize>, outputs: Range<usize>) {
        // SAFETY: the caller's promises, handed on.
        unsafe {
            match rows.len() {
                0 => {}
                1 => self.direct::<1>(rows, outputs),
                DIRECT_ROWS => self.direct::<2>(rows, outputs),
                _ => scratch::with_f32(TASK_ROWS * TASK_OUTPUTS * 16 + TILE * PANEL_K, |scratch| {
                    self.panels(rows, outputs, scratch)
                }),
            }
        }
    }

    /// Start of weight row `n`; past the last one, the last one.
    fn weight_row(&self, n: usize) -> *const u8 {
        let n = n.min(self.product.n - 1);
        // SAFETY: inside the weights, which hold `n * k` values.
        unsafe { self.weights.add(n * self.product.k * D::BYTES) }
    }

    /// Start of row `m`'s input.
    fn input_row(&self, m: usize) -> *const u8 {
        // SAFETY: inside the inputs, by the promise to `compute`.
        unsafe { self.inputs.add(self.product.input_row(m) * self.product.x_stride * Self::INPUT_BYTES) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn direct<const M: usize>(&self, rows: Range<usize>, outputs: Range<usize>) {
        let k = self.product.k;
        // Tiles lie one behind the other: the same place of a later one.
        let ahead = PREFETCH_BYTES.next_multiple_of((TILE * k * D::BYTES).max(1));
        let inputs: [_; M] = std::array::from_fn(|m| self.input_row(rows.start + m));
        let input_scales: [_; M] = std::array::from_fn(|m| self.product.input_scales(rows.start + m));
        let mut n = outputs.start;
        while n < outputs.end {
            let weights: [_; TILE] = std::array::from_fn(|i| self.weight_row(n + i));
            let weight_scales = self.product.weight_scales(n);
            let mut totals: Sums<M> = [[_mm512_setzero_ps(); TILE]; M];
            for block in 0..self.product.k_blocks() {
                let valid = BLOCK.min(k - block * BLOCK);
                // SAFETY: `valid` values of the block are inside the rows.
                let sums = unsafe {
                    if valid == BLOCK {
                        // A constant: the compiler unrolls the loop and drops the masks.
                        self.direct_block::<M>(&weights, &inputs, block * BLOCK, BLOCK, ahead)
                    } else {
                        self.direct_block::<M>(&weights, &inputs, block * BLOCK, valid, ahead)
                    }
                };
                for m in 0..M {
                    let scale = block_scale(weight_scales, input_scales[m], block);
                    for i in 0..TILE {
                        totals[m][i] = promote(scale, sums[m][i], totals[m][i]);
                    }
                }
            }
            for m in 0..M {
                // SAFETY: this task's outputs.
                unsafe { store(&self.product.y, rows.start + m, n, outputs.end, totals[m]) }
            }
            n += TILE;
        }
    }

    /// Sums over channels `first..first + valid`, which lie in one block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn direct_block<const M: usize>(
        &self,
        weights: &[*const u8; TILE],
        inputs: &[*const u8; M],
        first: usize,
        valid: usize,
        ahead: usize,
    ) -> Sums<M> {
        let mut sums: Sums<M> = [[_mm512_setzero_ps(); TILE]; M];
        let mut at = 0;
        while at < valid {
            let column = first + at;
            for i in 0..TILE {
                // SAFETY: no more than `valid - at` values from `column` on are touched; a prefetch touches none.
                unsafe {
                    let w = weights[i].add(column * D::BYTES);
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(ahead).cast());
                    let w = self.decoder.load_pair(w, valid - at);
                    for m in 0..M {
                        let x = inputs[m].add(column * Self::INPUT_BYTES);
                        let x = D::Arithmetic::load_pair(x, valid - at);
                        sums[m][i] = D::Arithmetic::multiply_add(sums[m][i], x[0], w[0]);
                        sums[m][i] = D::Arithmetic::multiply_add(sums[m][i], x[1], w[1]);
                    }
                }
            }
            at += Self::STEP;
        }
        sums
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn panels(&self, rows: Range<usize>, outputs: Range<usize>, scratch: &mut [f32]) {
        let (panel, totals) = scratch.split_at_mut(TILE * PANEL_K);
        let panel = panel.as_mut_ptr().cast::<__m512i>();
        let totals = totals.as_mut_ptr().cast::<__m512>();
        let k = self.product.k;
        // At least one pass, so that an empty K writes zeros.
        for first in (0..k.max(1)).step_by(PANEL_K) {
            let width = PANEL_K.min(k - first);
            for (tile, n) in outputs.clone().step_by(TILE).enumerate() {
                // SAFETY: the panel holds 4 rows of `PANEL_K` values of at most 4 bytes; the scratch has a total for
                // each of at most `TASK_ROWS * TASK_OUTPUTS` elements, and vectors' alignment.
                unsafe {
                    self.fill_panel(panel, n, first, width);
                    let totals = totals.add(tile * rows.len() * TILE);
                    let mut m = 0;
                    while m < rows.len() {
                        let (row, totals) = (rows.start + m, totals.add(m * TILE));
                        m += match rows.len() - m {
                            1 => self.multiply_panel::<1>(panel, row, n, first, width, totals),
                            // Two pairs are quicker than three and one.
                            2 | 4 => self.multiply_panel::<2>(panel, row, n, first, width, totals),
                            _ => self.multiply_panel::<PANEL_ROWS>(panel, row, n, first, width, totals),
                        };
                    }
                }
            }
        }
        for (tile, n) in outputs.clone().step_by(TILE).enumerate() {
            for m in 0..rows.len() {
                // SAFETY: written above; this task's outputs.
                unsafe {
                    let totals = *totals.add((tile * rows.len() + m) * TILE).cast::<[__m512; TILE]>();
                    store(&self.product.y, rows.start + m, n, outputs.end, totals);
                }
            }
        }
    }

    /// Decodes channels `first..first + width` of weight rows `n..n + 4`; row `i` starts at `i * PANEL_K` values.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn fill_panel(&self, panel: *mut __m512i, n: usize, first: usize, width: usize) {
        // The next tile's, which will be wanted when this one is multiplied.
        let ahead = TILE * self.product.k * D::BYTES;
        for i in 0..TILE {
            let row = self.weight_row(n + i);
            let mut at = 0;
            while at < width {
                // SAFETY: `first + at < k`, and no more than `width - at` values from there are touched.
                unsafe {
                    let weights = row.add((first + at) * D::BYTES);
                    _mm_prefetch::<_MM_HINT_T1>(weights.wrapping_add(ahead).cast());
                    let pair = self.decoder.load_pair(weights, width - at);
                    let out = panel.add((i * PANEL_K + at) / D::Arithmetic::LANES);
                    _mm512_store_si512(out, pair[0]);
                    _mm512_store_si512(out.add(1), pair[1]);
                }
                at += Self::STEP;
            }
        }
    }

    /// Adds the panel's products with rows `m..m + M` to their totals; returns `M`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn multiply_panel<const M: usize>(
        &self,
        panel: *const __m512i,
        m: usize,
        n: usize,
        first: usize,
        width: usize,
        totals: *mut __m512,
    ) -> usize {
        let inputs: [_; M] = std::array::from_fn(|i| self.input_row(m + i));
        let input_scales: [_; M] = std::array::from_fn(|i| self.product.input_scales(m + i));
        let weight_scales = self.product.weight_scales(n);
        let totals = totals.cast::<Sums<M>>();
        // SAFETY: the caller's totals; those of the first panel are not there yet.
        let mut acc: Sums<M> = if first == 0 { [[_mm512_setzero_ps(); TILE]; M] } else { unsafe { *totals } };
        for start in (0..width).step_by(BLOCK) {
            let valid = BLOCK.min(width - start);
            // SAFETY: `valid` values of the block are inside the rows and the panel.
            let sums = unsafe {
                if valid == BLOCK {
                    // A constant: the compiler unrolls the loop and drops the masks.
                    Self::panel_block::<M>(panel, &inputs, first, start, BLOCK)
                } else {
                    Self::panel_block::<M>(panel, &inputs, first, start, valid)
                }
            };
            for m in 0..M {
                let scale = block_scale(weight_scales, input_scales[m], (first + start) / BLOCK);
                for i in 0..TILE {
                    acc[m][i] = promote(scale, sums[m][i], acc[m][i]);
                }
            }
        }
        // SAFETY: the caller's totals.
        unsafe { *totals = acc }
        M
    }

    /// Sums over channels `first + start..first + start + valid`, which lie in one block; the panel begins at `first`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn panel_block<const M: usize>(
        panel: *const __m512i,
        inputs: &[*const u8; M],
        first: usize,
        start: usize,
        valid: usize,
    ) -> Sums<M> {
        let mut sums: Sums<M> = [[_mm512_setzero_ps(); TILE]; M];
        let mut at = 0;
        while at < valid {
            let column = start + at;
            // Keeps the compiler from loading the whole block's inputs first, for which the registers do not suffice.
            compiler_fence(Ordering::SeqCst);
            // SAFETY: no more than `valid - at` inputs from there are touched, and the panel holds whole pairs.
            unsafe {
                let mut x = [[_mm512_setzero_si512(); 2]; M];
                for m in 0..M {
                    let input = inputs[m].add((first + column) * Self::INPUT_BYTES);
                    x[m] = D::Arithmetic::load_pair(input, valid - at);
                }
                for half in 0..2 {
                    for i in 0..TILE {
                        let w = panel.add((i * PANEL_K + column) / D::Arithmetic::LANES + half);
                        let w = _mm512_load_si512(w);
                        for m in 0..M {
                            sums[m][i] = D::Arithmetic::multiply_add(sums[m][i], x[m][half], w);
                        }
                    }
                }
            }
            at += Self::STEP;
        }
        sums
    }
}

/// The factor of a block's sum: weights' scale times inputs' scale, of those that there are.
#[inline]
pub(super) fn block_scale(weights: &[f32], inputs: &[f32], block: usize) -> Option<f32> {
    match (weights.get(block), inputs.get(block)) {
        (Some(w), Some(x)) => Some(w * x),
        (Some(w), None) => Some(*w),
        _ => None,
    }
}

/// Adds a block's sum to the totals.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn promote(scale: Option<f32>, sum: __m512, total: __m512) -> __m512 {
    match scale {
        Some(scale) => _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total),
        None => _mm512_add_ps(total, sum),
    }
}

/// Adds up the lanes of four totals, always in the same tree, and stores those of outputs before `end`.
///
/// # Safety
/// Nobody else writes these outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
unsafe fn store(y: &Output<'_>, m: usize, n: usize, end: usize, totals: [__m512; TILE]) {
    let mut quarter = totals.map(|t| {
        let half = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps::<1>(t));
        _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    });
    let [a, b, c, d] = &mut quarter;
    _MM_TRANSPOSE4_PS(a, b, c, d);
    let sums = _mm_add_ps(_mm_add_ps(*a, *b), _mm_add_ps(*c, *d));
    let mut values = [0.0; TILE];
    // SAFETY: four values of room; the store is the caller's right.
    unsafe {
        _mm_storeu_ps(values.as_mut_ptr(), sums);
        y.write(m, n, &values[..TILE.min(end - n)]);
    }
}
