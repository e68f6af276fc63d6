//! Encoding cache rows.

use super::launch::{Argument, Grid, launch, size};
use super::norm::{self, Norm};
use super::{Activations, CudaError, Device, RopeTable, View, ViewMut};
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

    /// As [`Self::kv_write`] from projected rows, whose latents are normed and keys rotated.
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn latent_write(&self, cache: CacheRows<'_, '_>, latents: LatentRows<'_>) -> Result<(), CudaError> {
        let rows = latents.positions.len();
        let (shared, latents) = (latents.shared(&cache), latents.checked(&cache));
        let cache = Cache::new(cache);
        if rows == 0 {
            return Ok(());
        }
        // SAFETY: as above; positions are checked in the kernel.
        unsafe { launch!(self, latent_write, Grid::line(rows, 128).with_shared(shared); cache, latents) }
    }

    /// [`Self::latent_write`] and, at the same time, [`Self::norm`] of the rows' first values, as many as `weight` has, into
    /// `output`: both have the bits that they have alone.
    ///
    /// # Panics
    /// As either.
    pub fn latent_write_and_norm(
        &self,
        cache: CacheRows<'_, '_>,
        latents: LatentRows<'_>,
        (weight, eps): (View<'_, f32>, f32),
        output: &mut Activations,
    ) -> Result<(), CudaError> {
        let rows = latents.positions.len();
        assert_eq!(latents.x.len(), rows * latents.stride, "projected rows");
        let mut norm = Norm::new(latents.x, latents.stride, weight, eps);
        let (shared, latents) = (latents.shared(&cache), latents.checked(&cache));
        let cache = Cache::new(cache);
        norm.round_into(rows, &mut [output]);
        norm.choose_loads();
        if rows == 0 {
            return Ok(());
        }
        let grid = Grid::line(2 * rows, norm::THREADS).with_shared(shared);
        // SAFETY: a thread block for each half of a row's work; as above, and as norm's.
        unsafe { launch!(self, latent_write_norm, grid; cache, latents, norm) }
    }
}

/// Projected rows `[m, stride]`: at `first` of each lie latent and key.
#[derive(Clone, Copy)]
pub struct LatentRows<'a> {
    /// All rows.
    pub x: View<'a, f32>,
    /// Values from row to row.
    pub stride: usize,
    /// Where a latent begins, in values from a row's beginning.
    pub first: usize,
    /// Weight and epsilon of the latent's norm.
    pub norm: (View<'a, f32>, f32),
    /// Position of each row.
    pub positions: View<'a, u32>,
    /// Its angles.
    pub table: &'a RopeTable,
}

/// The kernels' parameters; `struct Latents` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Latents {
    x: u64,
    w: u64,
    positions: u64,
    table: u64,
    stride: u32,
    positions_max: u32,
    eps: f32,
    unused: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Latents {}

impl LatentRows<'_> {
    /// Bytes of shared memory for a latent and a key.
    fn shared(&self, cache: &CacheRows<'_, '_>) -> usize {
        (cache.geometry.latent + cache.geometry.rope) * size_of::<f32>()
    }

    /// # Panics
    /// If lengths and widths do not go together.
    fn checked(self, cache: &CacheRows<'_, '_>) -> Latents {
        let Self { x, stride, first, norm: (weight, eps), positions, table } = self;
        let (rows, geometry) = (positions.len(), cache.geometry);
        let end = first + geometry.latent + geometry.rope;
        assert_eq!(cache.slots.len(), 2 * rows, "block and row");
        assert!(end <= stride, "a latent and a key in a row");
        assert!(rows == 0 || x.len() >= (rows - 1) * stride + end, "rows of {stride}");
        assert!(weight.len() == geometry.latent && geometry.rope == 2 * table.pairs(), "widths of a row");
        let (angles, positions_max) = table.addresses();
        Latents {
            x: x.address() + (first * size_of::<f32>()) as u64,
            w: weight.address(),
            positions: positions.address(),
            table: angles,
            stride: size(stride),
            positions_max,
            eps,
            unused: 0,
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
