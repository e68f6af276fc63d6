//! MLA in its absorbed form over the paged cache.

use cudarc::driver::sys::CUfunction_attribute;

use super::error::Doing;
use super::kernels::Functions;
use super::kv_write::blocks;
use super::launch::{Argument, Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};
use crate::{KvFormat, KvGeometry, MlaShape};

/// Query rows of a step, on the device: row `r` sees the cache rows [`MlaShape::first`]`..contexts[r]` (its own included) of sequence
/// `sequences[r]`, whose blocks are `tables[sequences[r] * table_stride..]`.
#[derive(Clone, Copy)]
pub struct MlaRows<'a> {
    /// Blocks of every sequence `[sequences, table_stride]`.
    pub tables: View<'a, u32>,
    /// Blocks that a sequence has room for in `tables`.
    pub table_stride: usize,
    /// Which sequence each row belongs to.
    pub sequences: View<'a, u32>,
    /// Cache rows visible to each row.
    pub contexts: View<'a, u32>,
}

/// The kernel's parameters; `struct Attention` there.
#[repr(C)]
struct Attention {
    pool: u64,
    tables: u64,
    sequences: u64,
    contexts: u64,
    q_latent: u64,
    q_rope: u64,
    out: u64,
    layer_offset: u64,
    block_stride: u64,
    row_bytes: u32,
    block_tokens: u32,
    blocks: u32,
    table_stride: u32,
    heads: u32,
    latent: u32,
    rope: u32,
    scale: f32,
    first: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Attention {}

/// Which kernel attends. It follows from the cache's geometry, never from the batch: their bits differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// Any widths and format, f32 throughout.
    Plain,
    /// FP8 rows of 512 + 64 channels: bf16 operands on the matrix unit, f32 sums.
    Mma,
}

/// Heads of a block of the matrix kernel, and its shared memory: 64 queries and 64 rows of 576 bf16, 64×64 weights (each
/// row padded by 16 bytes), five floats a head.
const MMA_HEADS: usize = 64;
const MMA_SHARED: usize = (64 + 64) * (2 * 576 + 16) + 64 * (2 * 64 + 16) + 5 * 64 * 4;

/// Lets the matrix kernel have the shared memory it needs.
pub(super) fn prepare(functions: &Functions) -> Result<(), CudaError> {
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let bytes = MMA_SHARED as i32;
    functions.mla_attention_mma.set_attribute(attribute, bytes).doing("give a kernel shared memory")
}

impl Device {
    /// The kernel that attends over a cache of this geometry.
    pub fn attention_kernel(&self, geometry: &KvGeometry) -> AttentionKernel {
        let widths = geometry.format == KvFormat::Fp8 && (geometry.latent, geometry.rope) == (512, 64);
        // Rows are read 16 bytes at a time.
        let aligned = [geometry.row_bytes, geometry.layer_stride, geometry.block_stride]
            .into_iter()
            .all(|stride| stride.is_multiple_of(16));
        if self.has_wgmma && widths && aligned { AttentionKernel::Mma } else { AttentionKernel::Plain }
    }

    /// `out[r, h, :] = softmax((q_latent[r, h]·c + q_rope[r, h]·k) · scale) · c` over the cache rows that query row `r`
    /// sees. `q_latent` and `out` are `[rows, heads, latent]`, `q_rope` `[rows, heads, rope]`. An empty context gives
    /// zeros. A context longer than its table, or a block outside the pool, ends the context of the device; a sequence
    /// past the tables is the caller's to prevent. Which kernel runs says [`Self::attention_kernel`].
    ///
    /// # Panics
    /// If the lengths do not go together.
    #[allow(clippy::too_many_arguments)] // As on the CPU.
    pub fn mla_attention(
        &self,
        pool: View<'_, u8>,
        geometry: &KvGeometry,
        layer: usize,
        shape: MlaShape,
        rows: MlaRows<'_>,
        q_latent: View<'_, f32>,
        q_rope: View<'_, f32>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let queries = rows.contexts.len() * shape.heads;
        assert!(
            shape.latent == geometry.latent && shape.rope == geometry.rope,
            "widths of queries and cache"
        );
        assert_eq!(rows.sequences.len(), rows.contexts.len(), "a sequence a row");
        assert_eq!(q_latent.len(), queries * shape.latent, "latent queries");
        assert_eq!(q_rope.len(), queries * shape.rope, "rope queries");
        assert_eq!(out.len(), queries * shape.latent, "output");
        assert!(geometry.block_tokens > 0, "tokens in a block");
        let blocks = blocks(pool.len(), geometry, layer);
        if queries == 0 {
            return Ok(());
        }
        let arguments = Attention {
            pool: pool.address(),
            tables: rows.tables.address(),
            sequences: rows.sequences.address(),
            contexts: rows.contexts.address(),
            q_latent: q_latent.address(),
            q_rope: q_rope.address(),
            out: out.address(),
            layer_offset: (layer * geometry.layer_stride) as u64,
            block_stride: geometry.block_stride as u64,
            row_bytes: size(geometry.row_bytes),
            block_tokens: size(geometry.block_tokens),
            blocks: size(blocks),
            table_stride: size(rows.table_stride),
            heads: size(shape.heads),
            latent: size(shape.latent),
            rope: size(shape.rope),
            scale: shape.scale,
            first: size(shape.first),
        };
        if self.attention_kernel(geometry) == AttentionKernel::Mma {
            assert!(pool.address().is_multiple_of(16), "the pool starts at a multiple of 16 bytes");
            let heads = size(shape.heads.div_ceil(MMA_HEADS));
            let blocks = (size(rows.contexts.len()), heads, 1);
            let grid = Grid { blocks, threads: 256, shared: MMA_SHARED };
            // SAFETY: a thread block has a row and 64 heads; the kernel checks contexts and blocks.
            return unsafe { launch!(self, mla_attention_mma, grid; arguments) };
        }
        let grid = Grid::line(queries, 128).with_shared((2 * shape.latent + shape.rope) * size_of::<f32>());
        // SAFETY: a thread block a query; the kernel checks contexts and blocks.
        unsafe {
            match geometry.format {
                KvFormat::F32 => launch!(self, mla_attention_f32, grid; arguments),
                KvFormat::Bf16 => launch!(self, mla_attention_bf16, grid; arguments),
                KvFormat::Fp8 => launch!(self, mla_attention_fp8, grid; arguments),
            }
        }
    }
}
