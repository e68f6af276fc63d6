//! Encoding cache rows.

use super::launch::{Argument, Grid, launch, size};
use super::{CudaError, Device, RopeTable, View, ViewMut};
use crate::{KvFormat, KvGeometry, fp8};

/// How the kernels number formats.
fn number(format: KvFormat) -> u32 {
    match format {
        KvFormat::F32 => 0,
        KvFormat::Bf16 => 1,
        KvFormat::Fp8 => 2,
    }
}

/// Rows of one layer of the pool that are to be written.
pub struct CacheRows<'a, 'b> {
    /// The whole pool.
    pub pool: &'a mut ViewMut<'b, u8>,
    /// How it is laid out.
    pub geometry: &'a KvGeometry,
    /// Which layer.
    pub layer: usize,
    /// Block and row of each, `[m, 2]`. A block of `u32::MAX` is padding of the batch and writes nothing, any other slot
    /// outside the pool ends the context. No two rows may share a slot.
    pub slots: View<'a, u32>,
}

/// The kernels' parameters; `struct Cache` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cache {
    pool: u64,
    slots: u64,
    layer_offset: u64,
    block_stride: u64,
    format: u32,
    latent: u32,
    rope: u32,
    row_bytes: u32,
    payload_bytes: u32,
    blocks: u32,
    block_tokens: u32,
    amax_min: f32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Cache {}

impl Cache {
    fn new(rows: CacheRows<'_, '_>) -> Self {
        let CacheRows { pool, geometry, layer, slots } = rows;
        assert!(slots.len().is_multiple_of(2), "block and row");
        Self {
            pool: pool.address(),
            slots: slots.address(),
            layer_offset: (layer * geometry.layer_stride) as u64,
            block_stride: geometry.block_stride as u64,
            format: number(geometry.format),
            latent: size(geometry.latent),
            rope: size(geometry.rope),
            row_bytes: size(geometry.row_bytes),
            payload_bytes: size(geometry.payload_bytes()),
            blocks: size(blocks(pool.len(), geometry, layer)),
            block_tokens: size(geometry.block_tokens),
            amax_min: fp8::LATENT_AMAX_MIN,
        }
    }
}

impl Device {
    /// Writes `m` tokens' cache rows of one layer into the pool: `latent` `[m, latent]` (normed) and `rope` `[m, rope]`
    /// (rotated), encoded to the pool's format, padding zeroed: the bits of [`crate::Cpu::kv_write`].
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn kv_write(
        &self,
        cache: CacheRows<'_, '_>,
        latent: View<'_, f32>,
        rope: View<'_, f32>,
    ) -> Result<(), CudaError> {
        let (rows, geometry) = (cache.slots.len() / 2, cache.geometry);
        assert_eq!(latent.len(), rows * geometry.latent, "latent rows");
        assert_eq!(rope.len(), rows * geometry.rope, "rope rows");
        let cache = Cache::new(cache);
        if rows == 0 {
            return Ok(());
        }
        // SAFETY: a thread block a row; slots are checked in the kernel against blocks that lie inside the pool.
        unsafe { launch!(self, kv_write, Grid::line(rows, 128); cache, latent.address(), rope.address()) }
    }

    /// As [`Self::kv_write`] from projected rows `x` `[m, stride]`, whose first values are latent and key: the latent is
    /// normed with `weight` and `eps`, the key rotated.
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn latent_write(
        &self,
        cache: CacheRows<'_, '_>,
        x: View<'_, f32>,
        stride: usize,
        (weight, eps): (View<'_, f32>, f32),
        positions: View<'_, u32>,
        table: &RopeTable,
    ) -> Result<(), CudaError> {
        let (rows, geometry) = (positions.len(), cache.geometry);
        assert_eq!(cache.slots.len(), 2 * rows, "block and row");
        assert!(geometry.latent + geometry.rope <= stride, "a latent and a key in a row");
        assert!(
            rows == 0 || x.len() >= (rows - 1) * stride + geometry.latent + geometry.rope,
            "rows of {stride}"
        );
        assert!(weight.len() == geometry.latent && geometry.rope == 2 * table.pairs(), "widths of a row");
        let cache = Cache::new(cache);
        if rows == 0 {
            return Ok(());
        }
        let grid = Grid::line(rows, 128).with_shared((geometry.latent + geometry.rope) * size_of::<f32>());
        let (angles, positions_max) = table.addresses();
        // SAFETY: as above; positions are checked in the kernel.
        unsafe {
            launch!(self, latent_write, grid;
                cache, x.address(), size(stride), weight.address(), eps, positions.address(), angles, positions_max)
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
