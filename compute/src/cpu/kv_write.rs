//! Encoding one token's cache row.

use super::Cpu;
use super::quantise::ScaleRule;
use crate::fp8::{self, BLOCK, ScaleFormat};
use crate::{KvFormat, KvSlot, KvViewMut};

/// FP8 scales of a row that fit the stack: 4,096 latent channels, eight times the largest model's.
const SCALES_MAX: usize = 32;

impl Cpu {
    /// Writes one token's cache row: `latent` (normed) and `rope` (rotated), encoded to the pool's format; FP8 scales
    /// are `max(amax, tiny) / 448` per 128 channels. Padding is zeroed.
    ///
    /// # Panics
    /// If the widths are not the geometry's, the slot lies outside the pool, or the latent is wider than 4,096.
    pub fn kv_write(
        &self,
        view: &mut KvViewMut<'_>,
        layer: usize,
        slot: KvSlot,
        latent: &[f32],
        rope: &[f32],
    ) {
        let geometry = view.geometry;
        assert!(latent.len() == geometry.latent && rope.len() == geometry.rope, "widths of a cache row");
        let start = geometry.row_offset(layer, slot);
        let row = &mut view.bytes[start..start + geometry.row_bytes];
        row[geometry.payload_bytes()..].fill(0);
        let (front, back) = row.split_at_mut(geometry.rope_offset());
        match geometry.format {
            KvFormat::F32 => {
                write_f32(front, latent);
                write_f32(back, rope);
            }
            KvFormat::Bf16 => {
                write_bf16(front, latent);
                write_bf16(back, rope);
            }
            KvFormat::Fp8 => {
                let (codes, scale_bytes) = front.split_at_mut(latent.len());
                let mut scales = [0.0; SCALES_MAX];
                let scales = &mut scales[..latent.len().div_ceil(BLOCK)];
                let rule = ScaleRule { amax_min: fp8::LATENT_AMAX_MIN, format: ScaleFormat::F32 };
                self.quantise_row(latent, rule, codes, scales);
                write_f32(scale_bytes, scales);
                write_bf16(back, rope);
            }
        }
    }
}

fn write_f32(out: &mut [u8], x: &[f32]) {
    for (out, x) in out.chunks_exact_mut(4).zip(x) {
        out.copy_from_slice(&x.to_le_bytes());
    }
}

fn write_bf16(out: &mut [u8], x: &[f32]) {
    for (out, &x) in out.chunks_exact_mut(2).zip(x) {
        out.copy_from_slice(&fp8::to_bf16(x).to_le_bytes());
    }
}
