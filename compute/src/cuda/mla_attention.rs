//! MLA in its absorbed form over the paged cache.

mod prompt;

use super::kv_write::blocks;
use super::launch::{Argument, Grid, launch, size};
use super::{Buffer, CudaError, Device, View, ViewMut};
use crate::{KvFormat, KvGeometry, MlaShape};

/// Query rows of a step, on the device: row `r` sees the cache rows [`MlaShape::first`]`..contexts[r]` (its own included) of the sequence
/// whose blocks are `tables[starts[r]..]`.
#[derive(Clone, Copy)]
pub struct MlaRows<'a> {
    /// Block tables, one after the other.
    pub tables: View<'a, u32>,
    /// Where each row's begins.
    pub starts: View<'a, u32>,
    /// Cache rows visible to each row.
    pub contexts: View<'a, u32>,
    /// No context is longer.
    pub context_max: usize,
    /// Of so many first entries of `tables` cache rows are decoded once for all query rows, if the kernel can; 0: by each
    /// query row. [`Self::worth_unpacking`] says when the one or the other takes less time; the bits are the same. No entry may
    /// then be of two rows with different `starts`, and none behind them of any row.
    pub unpacked: usize,
}

impl MlaRows<'_> {
    /// Whether to decode the cache rows of `entries` blocks of `block_tokens` tokens once, for query rows whose contexts add up
    /// to `contexts`: a prompt's rows, not those of a decode step.
    pub fn worth_unpacking(entries: usize, block_tokens: usize, contexts: usize) -> bool {
        contexts >= UNPACK_MIN.max(UNPACK_READS * entries * block_tokens)
    }
}

/// Queries and room for results, in the format that [`Device::attention_kernel`] takes.
pub enum MlaQueries<'a, 'b> {
    /// For [`AttentionKernel::Plain`].
    F32 {
        /// `[rows, heads, latent]`
        latent: View<'a, f32>,
        /// `[rows, heads, rope]`
        rope: View<'a, f32>,
        /// `[rows, heads, latent]`
        out: &'a mut ViewMut<'b, f32>,
    },
    /// For [`AttentionKernel::Wgmma`].
    Bf16 {
        /// `[rows, heads, latent]`
        latent: View<'a, u16>,
        /// `[rows, heads, rope]`
        rope: View<'a, u16>,
        /// `[rows, heads, latent]`
        out: &'a mut ViewMut<'b, u16>,
        /// For contexts of more than one part.
        parts: &'a mut MlaParts,
    },
}

/// Room for the parts of long contexts, which are computed apart and then added.
pub struct MlaParts {
    /// f16 bits.
    values: Buffer<u16>,
    sums: Buffer<f32>,
}

impl MlaParts {
    /// Room for `queries` queries (rows × heads) that see `context_max` tokens. Rows that do not fit at once are computed
    /// one after the other.
    pub fn new(device: &Device, queries: usize, context_max: usize) -> Result<Self, CudaError> {
        let parts = queries * Self::of(context_max);
        Ok(Self { values: device.alloc(parts * LATENT)?, sums: device.alloc(2 * parts)? })
    }

    /// Parts of a query that sees `context_max` tokens.
    pub fn of(context_max: usize) -> usize {
        context_max.div_ceil(SPLIT).max(1)
    }

    /// (query, part) pairs there is room for.
    fn len(&self) -> usize {
        self.sums.len() / 2
    }
}

/// The kernel's parameters; `struct Attention` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Attention {
    pool: u64,
    tables: u64,
    starts: u64,
    contexts: u64,
    q_latent: u64,
    q_rope: u64,
    out: u64,
    layer_offset: u64,
    block_stride: u64,
    row_bytes: u32,
    block_tokens: u32,
    blocks: u32,
    table_len: u32,
    heads: u32,
    latent: u32,
    rope: u32,
    scale: f32,
    first: u32,
    splits: u32,
    block_parts: u32,
    parts: u64,
    part_sums: u64,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Attention {}

/// Which kernel attends. It follows from the cache's geometry, never from the batch: their bits differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// Any widths and format, f32 throughout.
    Plain,
    /// FP8 rows of 512 + 64 channels in blocks of 16 or more: 16-bit operands on Hopper's matrix unit, f32 sums.
    Wgmma,
}

/// The matrix kernel's own numbers: heads of a block, tokens of a part, parts of a block at most, channels of a latent, the
/// fewest tokens of a cache block.
const HEADS: usize = 64;
const SPLIT: usize = 1024;
const PARTS_MAX: usize = 4;
const LATENT: usize = 512;
const BLOCK_TOKENS_MIN: usize = 16;
/// A cache row is worth decoding apart when so many query rows read it on average, and contexts are so long together: to decode
/// 4,096 rows takes some 15 µs and saves some 10 ns for every 64 of them that a query row's 128 heads read.
const UNPACK_READS: usize = 8;
const UNPACK_MIN: usize = 1 << 17;
/// Its shared memory: queries and two tiles of cache rows, nine pieces of 8 KiB each, weights, one piece, and alignment.
pub(super) const MLA_SHARED: usize = (3 * 9 + 1) * 8192 + 1024;

impl Device {
    /// The kernel that attends over a cache of this geometry.
    pub fn attention_kernel(&self, geometry: &KvGeometry) -> AttentionKernel {
        let widths =
            (geometry.latent, geometry.rope) == (LATENT, 64) && geometry.block_tokens >= BLOCK_TOKENS_MIN;
        // Rows are read 16 bytes at a time.
        let aligned = [geometry.row_bytes, geometry.layer_stride, geometry.block_stride]
            .into_iter()
            .all(|stride| stride.is_multiple_of(16));
        if self.has_wgmma && geometry.format == KvFormat::Fp8 && widths && aligned {
            AttentionKernel::Wgmma
        } else {
            AttentionKernel::Plain
        }
    }

    /// `out[r, h, :] = softmax((q_latent[r, h]·c + q_rope[r, h]·k) · scale) · c` over the cache rows that query row `r`
    /// sees. An empty context gives zeros. A context longer than its table or `context_max`, or a block outside the pool,
    /// ends the context of the device.
    ///
    /// # Panics
    /// If the lengths do not go together, or the queries' format is not that of [`Self::attention_kernel`].
    pub fn mla_attention(
        &self,
        pool: View<'_, u8>,
        geometry: &KvGeometry,
        layer: usize,
        shape: MlaShape,
        rows: MlaRows<'_>,
        queries: MlaQueries<'_, '_>,
    ) -> Result<(), CudaError> {
        let count = rows.contexts.len() * shape.heads;
        assert!(
            shape.latent == geometry.latent && shape.rope == geometry.rope,
            "widths of queries and cache"
        );
        assert_eq!(rows.starts.len(), rows.contexts.len(), "a table a row");
        let (lengths, (q_latent, q_rope, out)) = match &queries {
            MlaQueries::F32 { latent, rope, out } => {
                ((latent.len(), rope.len(), out.len()), (latent.address(), rope.address(), out.address()))
            }
            MlaQueries::Bf16 { latent, rope, out, .. } => {
                ((latent.len(), rope.len(), out.len()), (latent.address(), rope.address(), out.address()))
            }
        };
        let latents = count * shape.latent;
        assert_eq!(lengths, (latents, count * shape.rope, latents), "latent queries, rope queries, output");
        assert!(geometry.block_tokens > 0, "tokens in a block");
        let blocks = blocks(pool.len(), geometry, layer);
        if count == 0 {
            return Ok(());
        }
        let attention = Attention {
            pool: pool.address(),
            tables: rows.tables.address(),
            starts: rows.starts.address(),
            contexts: rows.contexts.address(),
            q_latent,
            q_rope,
            out,
            layer_offset: (layer * geometry.layer_stride) as u64,
            block_stride: geometry.block_stride as u64,
            row_bytes: size(geometry.row_bytes),
            block_tokens: size(geometry.block_tokens),
            blocks: size(blocks),
            table_len: size(rows.tables.len()),
            heads: size(shape.heads),
            latent: size(shape.latent),
            rope: size(shape.rope),
            scale: shape.scale,
            first: size(shape.first),
            parts: 0,
            part_sums: 0,
            splits: size(MlaParts::of(rows.context_max)),
            block_parts: 1,
        };
        match (queries, self.attention_kernel(geometry)) {
            (MlaQueries::Bf16 { parts, .. }, AttentionKernel::Wgmma) => {
                assert!(pool.address().is_multiple_of(16), "the pool starts at a multiple of 16 bytes");
                if !self.prompt_attention(attention, rows.contexts.len(), rows.unpacked, parts)? {
                    self.wgmma_attention(attention, rows.contexts.len(), parts)?;
                }
                Ok(())
            }
            (MlaQueries::F32 { .. }, AttentionKernel::Plain) => {
                let shared = (2 * shape.latent + shape.rope) * size_of::<f32>();
                self.plain_attention(attention, geometry.format, Grid::line(count, 128).with_shared(shared))
            }
            _ => panic!("queries in another format than the kernel's"),
        }
    }

    fn plain_attention(&self, attention: Attention, format: KvFormat, grid: Grid) -> Result<(), CudaError> {
        // SAFETY: a thread block a query; the kernel checks contexts and blocks.
        unsafe {
            match format {
                KvFormat::F32 => launch!(self, mla_attention_f32, grid; attention),
                KvFormat::Bf16 => launch!(self, mla_attention_bf16, grid; attention),
                KvFormat::Fp8 => launch!(self, mla_attention_fp8, grid; attention),
            }
        }
    }

    /// Parts that one block computes, of `splits` for each of `queries`: those with which the blocks are through first. What a
    /// block does once takes about a third of a part's time. The bits are the same.
    fn block_parts(&self, queries: usize, splits: usize) -> usize {
        let time = |parts: usize| {
            (queries * splits.div_ceil(parts)).div_ceil(self.multiprocessors) * (3 * parts.min(splits) + 1)
        };
        (1..=PARTS_MAX).min_by_key(|&parts| time(parts)).unwrap_or(1)
    }

    fn wgmma_attention(
        &self,
        attention: Attention,
        rows: usize,
        parts: &mut MlaParts,
    ) -> Result<(), CudaError> {
        let (heads, splits) = (attention.heads as usize, attention.splits as usize);
        let at_once = if splits == 1 { rows } else { (parts.len() / (heads * splits)).min(rows) };
        assert!(at_once > 0, "no room for the parts of a row's {splits}");
        // A launch has at most 65,535 rows.
        for first in (0..rows).step_by(at_once.min(65_535)) {
            let count = at_once.min(65_535).min(rows - first);
            let queries = (first * heads) as u64;
            let block_parts = self.block_parts(heads.div_ceil(HEADS) * count, splits);
            let here = Attention {
                block_parts: size(block_parts),
                starts: attention.starts + 4 * first as u64,
                contexts: attention.contexts + 4 * first as u64,
                q_latent: attention.q_latent + queries * LATENT as u64 * 2,
                q_rope: attention.q_rope + queries * 64 * 2,
                out: attention.out + queries * LATENT as u64 * 2,
                parts: parts.values.view().address(),
                part_sums: parts.sums.view().address(),
                ..attention
            };
            let blocks = (size(heads.div_ceil(HEADS)), size(count), size(splits.div_ceil(block_parts)));
            let grid = Grid { blocks, threads: 512, shared: MLA_SHARED };
            // SAFETY: a thread block has a row, 64 heads and a part; there is room for every part of `count` rows; the
            // kernel checks contexts and blocks.
            unsafe { launch!(self, mla_attention_wgmma, grid; here) }?;
            if splits > 1 {
                let blocks = (attention.heads.div_ceil(4), size(count), 1);
                let grid = Grid { blocks, threads: 128, shared: 0 };
                // SAFETY: a warp a query; as above.
                unsafe { launch!(self, mla_combine, grid; here) }?;
            }
        }
        Ok(())
    }
}
