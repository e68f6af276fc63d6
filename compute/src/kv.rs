//! The paged KV cache as the operators see it: bytes and a geometry.
//!
//! A row is the latent, then (FP8 only) one f32 scale per 128 latent channels, then the rotated key, padded to
//! `row_bytes`. Who owns blocks, and which sequence they belong to, is not known here.

use crate::fp8::BLOCK;

/// How a cache row is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// Latent and rope in f32.
    F32,
    /// Latent and rope in bf16.
    Bf16,
    /// Latent in E4M3 with an f32 scale per 128 channels, rope in bf16.
    Fp8,
}

/// Widths and strides of the pool. Row `row` of layer `layer` of block `block` starts at
/// `block * block_stride + layer * layer_stride + row * row_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Storage of a row.
    pub format: KvFormat,
    /// Latent channels.
    pub latent: usize,
    /// Rope channels.
    pub rope: usize,
    /// Bytes from one token's row to the next, padding included.
    pub row_bytes: usize,
    /// Bytes from one layer of a block to the next.
    pub layer_stride: usize,
    /// Bytes from one block to the next.
    pub block_stride: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
}

impl KvGeometry {
    /// Bytes of a row that carry values: latent, scales, rope; without padding.
    pub fn payload_bytes(&self) -> usize {
        let value = if self.format == KvFormat::F32 { 4 } else { 2 };
        match self.format {
            KvFormat::F32 | KvFormat::Bf16 => (self.latent + self.rope) * value,
            KvFormat::Fp8 => self.rope_offset() + self.rope * value,
        }
    }

    /// First byte of the rope part in a row.
    pub fn rope_offset(&self) -> usize {
        match self.format {
            KvFormat::F32 => self.latent * 4,
            KvFormat::Bf16 => self.latent * 2,
            KvFormat::Fp8 => self.latent + self.latent.div_ceil(BLOCK) * 4,
        }
    }

    /// First byte of a row in the pool.
    pub fn row_offset(&self, layer: usize, slot: KvSlot) -> usize {
        slot.block as usize * self.block_stride
            + layer * self.layer_stride
            + slot.row as usize * self.row_bytes
    }
}

/// Where one token's row lies: block of the pool, row in the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSlot {
    /// Block of the pool.
    pub block: u32,
    /// Row in the block, below `block_tokens`.
    pub row: u32,
}

/// The pool for reading.
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    /// The whole pool.
    pub bytes: &'a [u8],
    /// How it is laid out.
    pub geometry: KvGeometry,
}

impl KvView<'_> {
    /// The payload of one row.
    ///
    /// # Panics
    /// If the slot lies outside the pool.
    pub fn row(&self, layer: usize, slot: KvSlot) -> &[u8] {
        let start = self.geometry.row_offset(layer, slot);
        &self.bytes[start..start + self.geometry.payload_bytes()]
    }
}

/// The pool for writing.
pub struct KvViewMut<'a> {
    /// The whole pool.
    pub bytes: &'a mut [u8],
    /// How it is laid out.
    pub geometry: KvGeometry,
}

/// Widths of MLA in its absorbed form.
#[derive(Clone, Copy, Debug)]
pub struct MlaShape {
    /// Query heads; all share one key and value row per token.
    pub heads: usize,
    /// Latent channels, both key and value.
    pub latent: usize,
    /// Rope channels, key only.
    pub rope: usize,
    /// Softmax scale, YaRN's mscale² included.
    pub scale: f32,
    /// Cache rows before this one are never read. 0, but for an MTP layer, whose row 0 has no position.
    pub first: usize,
}

/// One query row: it sees the cache rows [`MlaShape::first`]`..context` of its sequence (its own included).
///
/// Consecutive rows that name the same `block_table` slice are computed together and share the decoding of the cache.
#[derive(Clone, Copy, Debug)]
pub struct MlaRow<'a> {
    /// Blocks of the sequence in order, at least `ceil(context / block_tokens)`.
    pub block_table: &'a [u32],
    /// Cache rows visible to the query.
    pub context: u32,
}
