//! The paged KV cache: memory for latents and rotated keys, the host's or a device's.
//!
//! The pool is `[block][layer][token]`: a block's layers lie together and one layer of a block is one contiguous piece,
//! which is what a hand-off moves. The format of a row is [`model::KvLayout`]'s business.
//!
//! Invariant: the pool knows nothing of sequences. Which sequence holds a block is decided by the one thread that owns
//! engine and [`crate::BlockPool`]; nobody else ever writes here.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use compute::cuda::{self, Buffer};
use compute::{KvFormat as StoredFormat, KvGeometry, KvView, KvViewMut};
use model::{BlockId, KvFormat, KvLayout};

use crate::error::EngineError;
use device::DeviceMemory;

mod device;

/// Memory of all KV blocks of a worker.
pub struct KvPool {
    layout: KvLayout,
    blocks: usize,
    memory: Memory,
}

enum Memory {
    Host(Vec<u8>),
    Device(DeviceMemory),
}

impl KvPool {
    /// Memory of the host for `blocks` blocks of `layout`, all zero.
    pub fn new(layout: KvLayout, blocks: usize) -> Result<Self, EngineError> {
        let size = size_of_pool(&layout, blocks)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| too_large(&layout, blocks))?;
        bytes.resize(size, 0);
        Ok(Self { layout, blocks, memory: Memory::Host(bytes) })
    }

    /// Memory of a device for `blocks` blocks of `layout`, all zero.
    pub(crate) fn on_device(
        layout: KvLayout,
        blocks: usize,
        device: &Arc<cuda::Device>,
    ) -> Result<Self, EngineError> {
        let memory = DeviceMemory::new(device, &layout, size_of_pool(&layout, blocks)?)?;
        Ok(Self { layout, blocks, memory: Memory::Device(memory) })
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
    /// Where block or layer does not exist: both come from tables that their owner has checked. Where the device has
    /// failed, which ends the thread that owns it.
    pub fn block_layer(&self, block: BlockId, layer: usize) -> Cow<'_, [u8]> {
        let mut rows = Cow::Borrowed(&[][..]);
        self.each_block_layer(&[block], layer, &mut |_, found| rows = found);
        rows
    }

    /// As [`Self::block_layer`] for several blocks, which a device gives faster together: `each(i, rows)` for the i-th.
    ///
    /// # Panics
    /// As [`Self::block_layer`].
    pub fn each_block_layer<'a>(
        &'a self,
        blocks: &[BlockId],
        layer: usize,
        each: &mut dyn FnMut(usize, Cow<'a, [u8]>),
    ) {
        let mut ranges = blocks.iter().map(|&block| {
            let start = self.offset(block, layer);
            start..start + self.layout.layer_stride()
        });
        match &self.memory {
            Memory::Host(bytes) => {
                ranges.enumerate().for_each(|(index, range)| each(index, Cow::Borrowed(&bytes[range])));
            }
            Memory::Device(memory) => {
                let mut index = 0;
                memory.read(&mut ranges, |rows| {
                    each(index, Cow::Owned(rows.to_vec()));
                    index += 1;
                });
            }
        }
    }

    /// Overwrites the first rows of one layer of one block; `rows` holds whole rows, at most a block of them.
    ///
    /// # Panics
    /// As [`Self::block_layer`], or where `rows` is no whole number of rows or longer than a block's layer.
    pub fn write_block_layer(&mut self, block: BlockId, layer: usize, rows: &[u8]) {
        assert!(rows.len().is_multiple_of(self.layout.row_bytes()), "{} bytes are no whole rows", rows.len());
        assert!(rows.len() <= self.layout.layer_stride(), "{} bytes exceed a block's layer", rows.len());
        let start = self.offset(block, layer);
        let range = start..start + rows.len();
        match &mut self.memory {
            Memory::Host(bytes) => bytes[range].copy_from_slice(rows),
            Memory::Device(memory) => {
                memory.land(range).copy_from_slice(rows);
                memory.send();
            }
        }
    }

    /// The first `bytes` bytes of one layer of one block, to be written in place; what a device's pool had there is not
    /// shown, and the bytes reach it before anything else happens to the pool. `None` where block or layer does not
    /// exist, or `bytes` is no whole number of rows or more than a block's layer has.
    pub fn block_layer_mut(&mut self, block: BlockId, layer: usize, bytes: usize) -> Option<&mut [u8]> {
        let whole = bytes.is_multiple_of(self.layout.row_bytes()) && bytes <= self.layout.layer_stride();
        let exists = (block.0 as usize) < self.blocks && layer < self.layout.layers;
        if !whole || !exists {
            return None;
        }
        let start = self.offset(block, layer);
        match &mut self.memory {
            Memory::Host(pool) => pool.get_mut(start..start + bytes),
            Memory::Device(memory) => Some(memory.land(start..start + bytes)),
        }
    }

    /// Copies a block, all its layers, to `out`, [`KvLayout::block_bytes`] long.
    ///
    /// # Panics
    /// As [`Self::block_layer`], or where `out` has another length.
    pub fn read_block(&self, block: BlockId, out: &mut [u8]) {
        let range = self.whole(block);
        match &self.memory {
            Memory::Host(bytes) => out.copy_from_slice(&bytes[range]),
            Memory::Device(memory) => {
                memory.read(std::iter::once(range), |bytes| out.copy_from_slice(bytes));
            }
        }
    }

    /// Overwrites a block with what [`Self::read_block`] gave.
    ///
    /// # Panics
    /// As [`Self::write_block_layer`].
    pub fn write_block(&mut self, block: BlockId, bytes: &[u8]) {
        let range = self.whole(block);
        assert_eq!(bytes.len(), range.len(), "a whole block");
        match &mut self.memory {
            Memory::Host(pool) => pool[range].copy_from_slice(bytes),
            Memory::Device(memory) => memory.write(range, bytes),
        }
    }

    fn whole(&self, block: BlockId) -> Range<usize> {
        let start = self.offset(block, 0);
        start..start + self.layout.block_bytes()
    }

    fn offset(&self, block: BlockId, layer: usize) -> usize {
        assert!((block.0 as usize) < self.blocks, "block {block} of {}", self.blocks);
        assert!(layer < self.layout.layers, "layer {layer} of {}", self.layout.layers);
        block.0 as usize * self.layout.block_bytes() + layer * self.layout.layer_stride()
    }

    /// How the operators see the pool.
    pub(crate) fn geometry(&self) -> KvGeometry {
        geometry(&self.layout)
    }

    /// The pool as the CPU's attention operators read it.
    ///
    /// # Panics
    /// If it is a device's.
    pub(crate) fn view(&self) -> KvView<'_> {
        let Memory::Host(bytes) = &self.memory else {
            unreachable!("the CPU's engine has a pool of its own")
        };
        KvView { bytes, geometry: geometry(&self.layout) }
    }

    /// The pool as the CPU's operator that stores rows writes it.
    ///
    /// # Panics
    /// If it is a device's.
    pub(crate) fn view_mut(&mut self) -> KvViewMut<'_> {
        let Memory::Host(bytes) = &mut self.memory else {
            unreachable!("the CPU's engine has a pool of its own")
        };
        KvViewMut { geometry: geometry(&self.layout), bytes }
    }

    /// Sends what was last written in place to where it belongs: before a step that is replayed, which asks for nothing.
    pub(crate) fn settle(&mut self) {
        if let Memory::Device(memory) = &mut self.memory {
            memory.settle();
        }
    }

    /// The pool as a device's operators take it.
    ///
    /// # Panics
    /// If it is the host's.
    pub(crate) fn device_parts(&mut self) -> (KvGeometry, &mut Buffer<u8>) {
        let Memory::Device(memory) = &mut self.memory else {
            unreachable!("a device's engine has its pool on the device")
        };
        (geometry(&self.layout), memory.bytes())
    }
}

fn too_large(layout: &KvLayout, blocks: usize) -> EngineError {
    EngineError::KvPoolTooLarge { blocks, block_bytes: layout.block_bytes() }
}

fn size_of_pool(layout: &KvLayout, blocks: usize) -> Result<usize, EngineError> {
    // Block ids are u32 on the wire.
    u32::try_from(blocks).map_err(|_| too_large(layout, blocks))?;
    layout.block_bytes().checked_mul(blocks).ok_or_else(|| too_large(layout, blocks))
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
