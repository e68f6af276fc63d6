//! The paged KV cache: memory for latents and rotated keys.
//!
//! The pool is `[block][layer][token]`: a block's layers lie together and one layer of a block is one contiguous piece,
//! which is what a hand-off moves. The format of a row is [`model::KvLayout`]'s business.
//!
//! Invariant: the pool knows nothing of sequences. Which sequence holds a block is decided by the one thread that owns
//! engine and [`crate::BlockPool`]; nobody else ever writes here.

use std::borrow::Cow;

use compute::{KvFormat as StoredFormat, KvGeometry, KvView, KvViewMut};
use model::{BlockId, KvFormat, KvLayout};

use crate::error::EngineError;

/// Memory of all KV blocks of a worker.
pub struct KvPool {
    layout: KvLayout,
    blocks: usize,
    bytes: Vec<u8>,
}

impl KvPool {
    /// Memory for `blocks` blocks of `layout`, all zero.
    pub fn new(layout: KvLayout, blocks: usize) -> Result<Self, EngineError> {
        let too_large = || EngineError::KvPoolTooLarge { blocks, block_bytes: layout.block_bytes() };
        // Block ids are u32 on the wire.
        if u32::try_from(blocks).is_err() {
            return Err(too_large());
        }
        let size = layout.block_bytes().checked_mul(blocks).ok_or_else(too_large)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| too_large())?;
        bytes.resize(size, 0);
        Ok(Self { layout, blocks, bytes })
    }

    /// How a row, a layer and a block are laid out.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The rows of one layer of one block: `block_tokens * row_bytes` bytes, copied where the pool is a device's.
    ///
    /// # Panics
    /// Where block or layer does not exist: both come from tables that their owner has checked.
    pub fn block_layer(&self, block: BlockId, layer: usize) -> Cow<'_, [u8]> {
        let start = self.offset(block, layer);
        Cow::Borrowed(&self.bytes[start..start + self.layout.layer_stride()])
    }

    /// Overwrites the first rows of one layer of one block; `rows` holds whole rows, at most a block of them.
    ///
    /// # Panics
    /// Where block or layer does not exist, or `rows` is no whole number of rows or longer than a block's layer.
    pub fn write_block_layer(&mut self, block: BlockId, layer: usize, rows: &[u8]) {
        assert!(rows.len().is_multiple_of(self.layout.row_bytes()), "{} bytes are no whole rows", rows.len());
        assert!(rows.len() <= self.layout.layer_stride(), "{} bytes exceed a block's layer", rows.len());
        let start = self.offset(block, layer);
        self.bytes[start..start + rows.len()].copy_from_slice(rows);
    }

    /// The first `bytes` bytes of one layer of one block, to be written in place. `None` where block or layer does not
    /// exist, or `bytes` is no whole number of rows or more than a block's layer has.
    pub fn block_layer_mut(&mut self, block: BlockId, layer: usize, bytes: usize) -> Option<&mut [u8]> {
        let whole = bytes.is_multiple_of(self.layout.row_bytes()) && bytes <= self.layout.layer_stride();
        let exists = (block.0 as usize) < self.blocks && layer < self.layout.layers;
        if !whole || !exists {
            return None;
        }
        let start = self.offset(block, layer);
        self.bytes.get_mut(start..start + bytes)
    }

    fn offset(&self, block: BlockId, layer: usize) -> usize {
        assert!((block.0 as usize) < self.blocks, "block {block} of {}", self.blocks);
        assert!(layer < self.layout.layers, "layer {layer} of {}", self.layout.layers);
        block.0 as usize * self.layout.block_bytes() + layer * self.layout.layer_stride()
    }

    /// The pool as the attention operators read it.
    pub(crate) fn view(&self) -> KvView<'_> {
        KvView { bytes: &self.bytes, geometry: geometry(&self.layout) }
    }

    /// The pool as the operator that stores rows writes it.
    pub(crate) fn view_mut(&mut self) -> KvViewMut<'_> {
        KvViewMut { geometry: geometry(&self.layout), bytes: &mut self.bytes }
    }
}

/// `compute` does not know `model`: the same facts in its words.
fn geometry(layout: &KvLayout) -> KvGeometry {
    KvGeometry {
        format: match layout.format {
            KvFormat::F32 => StoredFormat::F32,
            KvFormat::Bf16 => StoredFormat::Bf16,
            KvFormat::Fp8 => StoredFormat::Fp8,
        },
        latent: layout.latent,
        rope: layout.rope,
        row_bytes: layout.row_bytes(),
        layer_stride: layout.layer_stride(),
        block_stride: layout.block_bytes(),
        block_tokens: layout.block_tokens,
    }
}
