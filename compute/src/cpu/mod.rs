//! The CPU as a device: a thread pool, an instruction set, and the operators.

mod isa;
mod linear;
mod pool;
mod scratch;

pub use isa::Isa;
pub use pool::ThreadPool;

use crate::fp8::{self, ScaleFormat};
use crate::{
    KvFormat, KvSlot, KvView, KvViewMut, MlaRow, MlaShape, RopeRows, RopeTable, RoutingRule, reference,
};

/// Threads and instruction set; every operator is a method.
///
/// Slices of the wrong length are a programming error and panic; nothing that comes from a network or a file reaches
/// an operator unchecked.
pub struct Cpu {
    pool: ThreadPool,
    isa: Isa,
}

impl Cpu {
    /// A device of `threads` threads (the calling one included) with the best instruction set of the machine.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Self::new`] with a given instruction set, or the best below it that the machine has.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let isa = Isa::available().into_iter().filter(|&i| i <= isa).max().unwrap_or(Isa::Portable);
        Self { pool: ThreadPool::new(threads, "compute"), isa }
    }

    /// The instruction set in use; its name is part of the execution fingerprint.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The thread pool.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// `y = x / sqrt(mean(x²) + eps) · w` for `m` rows of `w.len()` values.
    pub fn rms_norm(&self, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        reference::rms_norm(x, w, eps, y);
    }

    /// `out = silu(gate) · up`, element by element.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        reference::silu_mul(gate, up, out);
    }

    /// `acc += x`, element by element.
    pub fn add_in_place(&self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len());
        for (acc, x) in acc.iter_mut().zip(x) {
            *acc += x;
        }
    }

    /// `acc += weight · x`, element by element: one expert's vector into a token's sum.
    pub fn add_scaled(&self, acc: &mut [f32], weight: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len());
        for (acc, x) in acc.iter_mut().zip(x) {
            *acc += weight * x;
        }
    }

    /// Rotates pairs `(x[2i], x[2i+1])` in place; they stay interleaved. `x` holds
    /// `positions.len() * rows.per_position` rows of `rows.stride` values.
    pub fn rope_interleaved(&self, x: &mut [f32], rows: RopeRows, positions: &[u32], table: &RopeTable) {
        reference::rope_interleaved(x, rows, positions, table);
    }

    /// Writes one token's cache row: `latent` (normed) and `rope` (rotated), encoded to the pool's format; FP8 scales
    /// are `max(amax, tiny) / 448` per 128 channels.
    pub fn kv_write(
        &self,
        view: &mut KvViewMut<'_>,
        layer: usize,
        slot: KvSlot,
        latent: &[f32],
        rope: &[f32],
    ) {
        let geometry = view.geometry;
        assert!(latent.len() == geometry.latent && rope.len() == geometry.rope);
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
                let (codes, scales) = front.split_at_mut(latent.len());
                let blocks = codes.chunks_mut(fp8::BLOCK).zip(latent.chunks(fp8::BLOCK));
                for ((codes, latent), scale_out) in blocks.zip(scales.chunks_exact_mut(4)) {
                    let amax = latent.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                    let scale = fp8::scale(amax, fp8::LATENT_AMAX_MIN, ScaleFormat::F32);
                    scale_out.copy_from_slice(&scale.to_le_bytes());
                    for (code, &x) in codes.iter_mut().zip(latent) {
                        *code = fp8::encode(x / scale);
                    }
                }
                write_bf16(back, rope);
            }
        }
    }

    /// MLA in its absorbed form: `out[r, h, :] = softmax((q_lat·c + q_rope·k) · scale) · c` over the cache rows of
    /// query `r`'s sequence. `q_lat` and `out` are `[rows, heads, latent]`, `q_rope` `[rows, heads, rope]`. A query
    /// with a context of zero gives zeros.
    #[allow(clippy::too_many_arguments)] // Six buffers of one operator; a struct would only rename them.
    pub fn mla_attention(
        &self,
        view: &KvView<'_>,
        layer: usize,
        shape: MlaShape,
        rows: &[MlaRow<'_>],
        q_lat: &[f32],
        q_rope: &[f32],
        out: &mut [f32],
    ) {
        reference::mla_attention(view, layer, shape, rows, q_lat, q_rope, out);
    }

    /// Chooses `rule.top_k` of `experts` for each row of `logits` `[m, experts]`: `ids` and `weights` `[m, top_k]`,
    /// in descending order of the (biased) score, ties by the lower id. `bias` `[experts]` counts for selection only.
    pub fn route(
        &self,
        logits: &[f32],
        experts: usize,
        bias: Option<&[f32]>,
        rule: &RoutingRule,
        ids: &mut [u16],
        weights: &mut [f32],
    ) {
        reference::route(logits, experts, bias, rule, ids, weights);
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
