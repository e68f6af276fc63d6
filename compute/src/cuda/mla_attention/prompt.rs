//! Attention of a prompt's rows: cache rows are decoded once, then read by all query rows.

use super::{Attention, HEADS, LATENT, MLA_SHARED, MlaParts};
use crate::cuda::launch::{Grid, launch, size};
use crate::cuda::linear::Map;
use crate::cuda::{CudaError, Device};

/// Bytes of a decoded row: latent in f16, key in bf16.
const ROW_BYTES: usize = 2 * (LATENT + 64);
/// Cache rows that a thread block decodes, and tokens of a tile: the kernels' own numbers.
const UNPACKED: usize = 16;
const TOKENS: u32 = 64;

impl Device {
    /// The same bits as [`Self::wgmma_attention`] gives, with the cache rows of the first `entries` entries of the tables decoded
    /// once. False, and nothing done, where that is not wanted or `parts` has no room for it.
    pub(super) fn prompt_attention(
        &self,
        attention: Attention,
        rows: usize,
        entries: usize,
        parts: &mut MlaParts,
    ) -> Result<bool, CudaError> {
        let (heads, splits, block_tokens) =
            (attention.heads as usize, attention.splits as usize, attention.block_tokens as usize);
        assert!(entries <= attention.table_len as usize, "more entries than the tables have");
        let groups = heads.div_ceil(HEADS);
        let blocks = (self.multiprocessors / groups).clamp(1, rows);
        // Room for decoded rows, then for the parts of an item a block; both as (query, part) pairs.
        let tokens = entries * block_tokens;
        let decoded = (tokens * ROW_BYTES).div_ceil(2 * LATENT);
        let stored = if splits > 1 { groups * blocks * HEADS * splits } else { 0 };
        // The kernels count rows, parts and their values in 32 bits.
        let countable = tokens.max(rows).max(stored * LATENT) < 1 << 31;
        if entries == 0 || decoded + stored > parts.len() || !countable {
            return Ok(false);
        }
        let (values, sums) = (parts.values.view().address(), parts.sums.view().address());
        let here = Attention {
            table_len: size(entries),
            parts: values + (decoded * LATENT * 2) as u64,
            part_sums: sums,
            ..attention
        };
        let map = Map::new(values, tokens as u64, ROW_BYTES as u64, TOKENS)?;
        let grid = Grid {
            blocks: (size(entries), size(block_tokens.div_ceil(UNPACKED)), 1),
            threads: 256,
            shared: 0,
        };
        // SAFETY: there is room for every token of `entries`; the kernel checks blocks.
        unsafe { launch!(self, mla_unpack, grid; here, size(rows), values) }?;
        let grid = Grid { blocks: (size(groups), size(blocks), 1), threads: 512, shared: MLA_SHARED };
        // SAFETY: the map covers what was decoded; there is room for a block's parts; the kernel checks contexts.
        unsafe { launch!(self, mla_prompt, grid; here, map, size(rows)) }?;
        Ok(true)
    }
}
