//! Encoding cache rows.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};
use crate::{KvFormat, KvGeometry, fp8};

/// How the kernels number formats.
fn number(format: KvFormat) -> u32 {
    match format {
        KvFormat::F32 => 0,
        KvFormat::Bf16 => 1,
        KvFormat::Fp8 => 2,
    }
}

impl Device {
    /// Writes `m` tokens' cache rows of one layer into the pool: `latent` `[m, latent]` (normed) and `rope` `[m, rope]`
    /// (rotated), encoded to the pool's format, padding zeroed: the bits of [`crate::Cpu::kv_write`]. `slots` `[m, 2]`
    /// are block and row; a block of `u32::MAX` is padding of the batch and writes nothing, any other slot outside the
    /// pool ends the context. No two rows may share a slot.
    ///
    /// # Panics
    /// If the lengths do not go together.
    #[allow(clippy::too_many_arguments)] // A pool, where, and what; a struct would only rename them.
    pub fn kv_write(
        &self,
        pool: &mut ViewMut<'_, u8>,
        geometry: &KvGeometry,
        layer: usize,
        slots: View<'_, u32>,
        latent: View<'_, f32>,
        rope: View<'_, f32>,
    ) -> Result<(), CudaError> {
        let rows = slots.len() / 2;
        assert_eq!(slots.len(), 2 * rows, "block and row");
        assert_eq!(latent.len(), rows * geometry.latent, "latent rows");
        assert_eq!(rope.len(), rows * geometry.rope, "rope rows");
        let blocks = blocks(pool.len(), geometry, layer);
        if rows == 0 {
            return Ok(());
        }
        // SAFETY: a thread block a row; slots are checked in the kernel against blocks that lie inside the pool.
        unsafe {
            launch!(self, kv_write, Grid::line(rows, 128);
                pool.address(), number(geometry.format), size(geometry.latent), size(geometry.rope),
                size(geometry.row_bytes), size(geometry.payload_bytes()),
                (layer * geometry.layer_stride) as u64, geometry.block_stride as u64, size(blocks),
                size(geometry.block_tokens), slots.address(), fp8::LATENT_AMAX_MIN, latent.address(),
                rope.address())
        }
    }
}

/// Whole blocks in a pool of `bytes`.
///
/// # Panics
/// If rows, layers and blocks of the geometry do not nest, or the layer is not in a block.
pub(super) fn blocks(bytes: usize, geometry: &KvGeometry, layer: usize) -> usize {
    assert!(geometry.payload_bytes() <= geometry.row_bytes, "a row's payload past the row");
    let layer_bytes = geometry.block_tokens * geometry.row_bytes;
    assert!(
        geometry.block_stride > 0 && layer * geometry.layer_stride + layer_bytes <= geometry.block_stride,
        "layer {layer} past its block"
    );
    bytes / geometry.block_stride
}
