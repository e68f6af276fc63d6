//! MLA in its absorbed form over the paged cache.

use crate::{KvFormat, KvGeometry, KvSlot, KvView, MlaRow, MlaShape, fp8};

/// Values of a cache row as attention reads them: latent (scaled), then rope.
pub fn decode_row(row: &[u8], geometry: &KvGeometry) -> Vec<f32> {
    let f32_at = |i: usize| f32::from_le_bytes([row[i], row[i + 1], row[i + 2], row[i + 3]]);
    let bf16_at = |i: usize| fp8::from_bf16(u16::from_le_bytes([row[i], row[i + 1]]));
    let (latent, rope) = (geometry.latent, geometry.rope);
    match geometry.format {
        KvFormat::F32 => (0..latent + rope).map(|i| f32_at(4 * i)).collect(),
        KvFormat::Bf16 => (0..latent + rope).map(|i| bf16_at(2 * i)).collect(),
        KvFormat::Fp8 => {
            let scaled = (0..latent).map(|i| fp8::decode(row[i]) * f32_at(latent + i / fp8::BLOCK * 4));
            scaled.chain((0..rope).map(|i| bf16_at(geometry.rope_offset() + 2 * i))).collect()
        }
    }
}

/// `out[r, h, :] = softmax_t((q_lat[r, h]·c_t + q_rope[r, h]·k_t) · scale) · c`, over the rows `first..context` of each
/// query's sequence; zero for an empty context.
pub fn mla_attention(
    view: &KvView<'_>,
    layer: usize,
    shape: MlaShape,
    rows: &[MlaRow<'_>],
    q_lat: &[f32],
    q_rope: &[f32],
    out: &mut [f32],
) {
    let geometry = view.geometry;
    for (r, row) in rows.iter().enumerate() {
        let cache: Vec<Vec<f32>> = (shape.first..row.context as usize)
            .map(|t| {
                let block = row.block_table[t / geometry.block_tokens];
                let slot = KvSlot { block, row: (t % geometry.block_tokens) as u32 };
                decode_row(view.row(layer, slot), &geometry)
            })
            .collect();
        for head in 0..shape.heads {
            let at = r * shape.heads + head;
            let q = [&q_lat[at * shape.latent..][..shape.latent], &q_rope[at * shape.rope..][..shape.rope]]
                .concat();
            let scores: Vec<f64> = cache.iter().map(|c| dot(&q, c) * f64::from(shape.scale)).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (i, out) in out[at * shape.latent..][..shape.latent].iter_mut().enumerate() {
                let value: f64 = weights.iter().zip(&cache).map(|(w, c)| w * f64::from(c[i])).sum();
                *out = if sum > 0.0 { (value / sum) as f32 } else { 0.0 };
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
