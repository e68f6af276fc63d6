//! Products in plain Rust: 16 lanes that any compiler can vectorise.

use std::ops::Range;

use super::super::scratch;
use super::{Inputs, Product, Weights};
use crate::fp8::{self, BLOCK};

const LANES: usize = 16;

/// Computes outputs `outputs` of rows `rows`.
///
/// # Safety
/// Nobody else writes these outputs.
pub(super) unsafe fn compute(product: &Product<'_>, rows: Range<usize>, outputs: Range<usize>) {
    let padded = product.k.next_multiple_of(BLOCK);
    scratch::with_f32(padded, |weights| {
        weights[product.k..].fill(0.0);
        for n in outputs {
            decode_weights(product, n, &mut weights[..product.k]);
            let weight_scales = product.weight_scales(n);
            for m in rows.clone() {
                let value = dot(product, m, weights, weight_scales);
                // SAFETY: by the caller's promise.
                unsafe { product.y.write(m, n, &[value]) }
            }
        }
    });
}

fn decode_weights(product: &Product<'_>, n: usize, out: &mut [f32]) {
    let k = product.k;
    match product.weights {
        Weights::F32(weights) => out.copy_from_slice(&weights[n * k..][..k]),
        Weights::Bf16(bytes) => {
            for (out, pair) in out.iter_mut().zip(bytes[2 * n * k..][..2 * k].chunks_exact(2)) {
                *out = fp8::from_bf16(u16::from_le_bytes([pair[0], pair[1]]));
            }
        }
        Weights::Fp8 { codes, .. } => {
            for (out, &code) in out.iter_mut().zip(&codes[n * k..][..k]) {
                *out = fp8::decode(code);
            }
        }
    }
}

fn dot(product: &Product<'_>, m: usize, weights: &[f32], weight_scales: &[f32]) -> f32 {
    let start = product.input_row(m) * product.x_stride;
    let input_scales = product.input_scales(m);
    let mut total = [0.0f32; LANES];
    for (block, weights) in weights.chunks_exact(BLOCK).enumerate() {
        let mut x = [0.0f32; BLOCK];
        let range = start + block * BLOCK..start + product.k.min((block + 1) * BLOCK);
        match product.x {
            Inputs::F32(values) => x[..range.len()].copy_from_slice(&values[range]),
            Inputs::Bf16(values) | Inputs::Fp8 { values, .. } => {
                for (x, &bits) in x.iter_mut().zip(&values[range]) {
                    *x = fp8::from_bf16(bits);
                }
            }
        }
        let mut sum = [0.0f32; LANES];
        for (x, w) in x.chunks_exact(LANES).zip(weights.chunks_exact(LANES)) {
            for lane in 0..LANES {
                sum[lane] += x[lane] * w[lane];
            }
        }
        let scale = match (weight_scales.get(block), input_scales.get(block)) {
            (Some(w), Some(x)) => w * x,
            (Some(w), None) => *w,
            _ => 1.0,
        };
        for lane in 0..LANES {
            total[lane] += sum[lane] * scale;
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            total[lane] += total[lane + width];
        }
        width /= 2;
    }
    total[0]
}
