//! Rows sorted by their experts, and their results added up.

use super::launch::{Argument, Grid, launch, size};
use super::linear::LinearKernel;
use super::{Buffer, CudaError, Device, Outputs, Pinned, View, ViewMut};

/// The order in which a batch's assignments are computed: expert by expert, in tiles.
///
/// All of it is made and read on the device; the host knows only how many there can be at most.
pub struct Groups {
    /// Position to assignment.
    pub(super) order: Buffer<u32>,
    /// `(expert, first position, positions, 0)` of each tile.
    pub(super) tiles: Buffer<u32>,
    /// Positions and tiles in use.
    pub(super) totals: Buffer<u32>,
    experts: usize,
    rows: usize,
    tile_rows: usize,
}

impl Groups {
    /// Room for `assignments_max` assignments to `experts`.
    pub fn new(device: &Device, assignments_max: usize, experts: usize) -> Result<Self, CudaError> {
        Ok(Self {
            order: device.alloc(assignments_max)?,
            tiles: device.alloc(4 * assignments_max)?,
            totals: device.alloc(2)?,
            experts,
            rows: 0,
            tile_rows: 1,
        })
    }

    /// Assignments, those to no expert included.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// Tiles there are at most: one that is not full for each expert.
    pub(super) fn tiles_max(&self) -> usize {
        self.rows.min(self.experts + self.rows / self.tile_rows)
    }

    /// How many positions are in use: one number on the device.
    pub fn row_count(&self) -> View<'_, u32> {
        self.totals.slice(0..1)
    }
}

/// Where a kernel other than `group_rows` puts what that makes; all zero: nowhere. `struct Sorted` there.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Sorted {
    order: u64,
    tiles: u64,
    totals: u64,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Sorted {}

/// Groups that the host sorted, on their way to the device.
pub struct GroupStaging {
    order: Pinned<u32>,
    tiles: Pinned<u32>,
    totals: Pinned<u32>,
}

impl GroupStaging {
    /// Room for `assignments_max` assignments.
    pub fn new(device: &Device, assignments_max: usize) -> Result<Self, CudaError> {
        Ok(Self {
            order: device.pinned(assignments_max)?,
            tiles: device.pinned(4 * assignments_max)?,
            totals: device.pinned(2)?,
        })
    }
}

impl Device {
    /// Sorts rows into `groups` as the host has sorted them: position p reads row `rows[p]`, and `counts` are `(expert,
    /// positions)` of each expert in turn, none of them zero. The device takes it in order with its other work;
    /// `staging` stays as it is until [`Device::synchronize`].
    ///
    /// # Panics
    /// If there is no room for them, there is no such expert, or the counts are not as many as the rows.
    pub fn take_groups(
        &self,
        rows: &[u32],
        counts: impl ExactSizeIterator<Item = (usize, usize)>,
        kernel: LinearKernel,
        staging: &mut GroupStaging,
        groups: &mut Groups,
    ) -> Result<(), CudaError> {
        assert!(rows.len() <= groups.order.len() && rows.len() <= staging.order.len(), "{} rows", rows.len());
        groups.rows = rows.len();
        groups.tile_rows = self.group_tile(kernel, rows.len(), counts.len().max(1));
        staging.order[..rows.len()].copy_from_slice(rows);
        let (mut first, mut tiles) = (0, 0);
        for (expert, count) in counts {
            assert!(expert < groups.experts, "expert {expert} of {}", groups.experts);
            for start in (0..count).step_by(groups.tile_rows) {
                let tile = [expert, first + start, groups.tile_rows.min(count - start), 0].map(|x| x as u32);
                staging.tiles[4 * tiles..4 * tiles + 4].copy_from_slice(&tile);
                tiles += 1;
            }
            first += count;
        }
        assert_eq!(first, rows.len(), "a position for every row");
        staging.totals.copy_from_slice(&[rows.len() as u32, tiles as u32]);
        self.copy_in_later(&staging.order, &mut groups.order.slice_mut(0..rows.len()))?;
        self.copy_in_later(&staging.tiles, &mut groups.tiles.slice_mut(0..4 * tiles))?;
        self.copy_in_later(&staging.totals, &mut groups.totals.view_mut())
    }

    /// Sorts assignments `ids` by expert into `groups`, for products by `kernel`. An id of `u16::MAX` goes to no expert,
    /// any other past the experts ends the context.
    ///
    /// # Panics
    /// If `groups` has no room for them.
    pub fn group_rows(
        &self,
        ids: View<'_, u16>,
        kernel: LinearKernel,
        groups: &mut Groups,
    ) -> Result<(), CudaError> {
        let Sorted { order, tiles, totals } = self.group_room(ids.len(), kernel, groups);
        if ids.is_empty() {
            return Ok(());
        }
        let grid = Grid::line(1, 1024).with_shared(3 * groups.experts * size_of::<u32>());
        // SAFETY: one block; room for order and tiles was checked, the kernel checks ids and the number of tiles.
        unsafe {
            launch!(self, group_rows, grid;
                ids.address(), size(ids.len()), size(groups.experts), size(groups.tile_rows),
                size(groups.tiles_max()), order, tiles, totals)
        }
    }

    /// Room in `groups` for `assignments` that somebody will sort.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn group_room(&self, assignments: usize, kernel: LinearKernel, groups: &mut Groups) -> Sorted {
        assert!(assignments <= groups.order.len(), "{assignments} assignments");
        groups.rows = assignments;
        groups.tile_rows = self.group_tile(kernel, assignments, groups.experts);
        Sorted {
            order: groups.order.view().address(),
            tiles: groups.tiles.view().address(),
            totals: groups.totals.view().address(),
        }
    }

    /// `hidden[t] += shared[t] + Σ_j weights[t, j] · results[t, j]`, the experts' sum first, in top-k order, each product
    /// and sum rounded. `hidden` and `shared` are `[tokens, dim]`, `results` `[tokens, top_k, dim]`, `ids` and `weights`
    /// `[tokens, top_k]`. A token whose first id is `u16::MAX` stays as it is.
    ///
    /// # Panics
    /// If a length does not fit or `dim` is not in fours.
    pub fn combine(
        &self,
        hidden: &mut ViewMut<'_, f32>,
        shared: Option<View<'_, f32>>,
        results: Results<'_>,
        ids: View<'_, u16>,
        weights: View<'_, f32>,
        top_k: usize,
    ) -> Result<(), CudaError> {
        if hidden.is_empty() {
            return Ok(());
        }
        assert!(
            top_k > 0 && ids.len().is_multiple_of(top_k) && weights.len() == ids.len(),
            "{top_k} a token"
        );
        let tokens = ids.len() / top_k;
        assert!(tokens > 0 && hidden.len().is_multiple_of(tokens), "{tokens} rows");
        let dim = hidden.len() / tokens;
        assert!(dim.is_multiple_of(4), "{dim} channels, in fours");
        assert!(shared.is_none_or(|shared| shared.len() == hidden.len()), "a shared expert's row a token");
        assert!(tokens <= 65_535, "{tokens} tokens in one launch");
        let grid = Grid { blocks: (size(dim.div_ceil(1024)), size(tokens), 1), threads: 256, shared: 0 };
        let shared = shared.map_or(0, |shared| shared.address());
        let (hidden, ids, weights) = (hidden.address(), ids.address(), weights.address());
        let (top_k, dim) = (size(top_k), size(dim));
        // SAFETY: four channels a thread, none past the width; lengths checked above and below.
        unsafe {
            match results {
                Results::F32(x) => {
                    assert_eq!(x.len(), tokens * top_k as usize * dim as usize, "a result an assignment");
                    launch!(self, combine_f32, grid; hidden, shared, x.address(), ids, weights, top_k, dim)
                }
                Results::Bf16(x) => {
                    assert_eq!(x.len(), tokens * top_k as usize * dim as usize, "a result an assignment");
                    launch!(self, combine_bf16, grid; hidden, shared, x.address(), ids, weights, top_k, dim)
                }
            }
        }
    }
}

/// What experts gave back.
#[derive(Clone, Copy)]
pub enum Results<'a> {
    /// As it is.
    F32(View<'a, f32>),
    /// Rounded to bf16.
    Bf16(View<'a, u16>),
}

/// Room for what experts give back, in one of the two formats.
pub struct ResultBuffer {
    f32: Buffer<f32>,
    bf16: Buffer<u16>,
    is_bf16: bool,
}

impl ResultBuffer {
    /// Room for `len` values.
    pub fn new(device: &Device, bf16: bool, len: usize) -> Result<Self, CudaError> {
        let when = |is: bool| if is { len } else { 0 };
        Ok(Self { f32: device.alloc(when(!bf16))?, bf16: device.alloc(when(bf16))?, is_bf16: bf16 })
    }

    /// The first `len` values.
    pub fn results(&self, len: usize) -> Results<'_> {
        if self.is_bf16 {
            Results::Bf16(self.bf16.slice(0..len))
        } else {
            Results::F32(self.f32.slice(0..len))
        }
    }

    /// Takes values that were computed elsewhere, already rounded, by way of `staging`, which stays as it is until
    /// [`Device::synchronize`].
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn fill(
        &mut self,
        device: &Device,
        values: &[f32],
        staging: &mut ResultStaging,
    ) -> Result<(), CudaError> {
        let len = values.len();
        if self.is_bf16 {
            for (bits, &value) in staging.bf16[..len].iter_mut().zip(values) {
                *bits = crate::fp8::to_bf16(value);
            }
            device.copy_in_later(&staging.bf16, &mut self.bf16.slice_mut(0..len))
        } else {
            staging.f32[..len].copy_from_slice(values);
            device.copy_in_later(&staging.f32, &mut self.f32.slice_mut(0..len))
        }
    }

    /// The first `values.len()` values, once everything asked for before is done.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(
        &self,
        device: &Device,
        values: &mut [f32],
        staging: &mut ResultStaging,
    ) -> Result<(), CudaError> {
        let len = values.len();
        if self.is_bf16 {
            device.copy_out_later(self.bf16.slice(0..len), &mut staging.bf16)?;
            device.synchronize()?;
            for (value, &bits) in values.iter_mut().zip(&staging.bf16[..len]) {
                *value = crate::fp8::from_bf16(bits);
            }
        } else {
            device.copy_out_later(self.f32.slice(0..len), &mut staging.f32)?;
            device.synchronize()?;
            values.copy_from_slice(&staging.f32[..len]);
        }
        Ok(())
    }

    /// Page-locked room for `len` values of this format.
    pub fn staging(&self, device: &Device, len: usize) -> Result<ResultStaging, CudaError> {
        let when = |is: bool| if is { len } else { 0 };
        Ok(ResultStaging {
            f32: device.pinned(when(!self.is_bf16))?,
            bf16: device.pinned(when(self.is_bf16))?,
        })
    }

    /// Lets `work` write the first `len` values.
    pub fn write(
        &mut self,
        len: usize,
        work: impl FnOnce(Outputs<'_, '_>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if self.is_bf16 {
            work(Outputs::Bf16(&mut self.bf16.slice_mut(0..len)))
        } else {
            work(Outputs::F32(&mut self.f32.slice_mut(0..len)))
        }
    }
}

/// Results on their way to or from the device.
pub struct ResultStaging {
    f32: Pinned<f32>,
    bf16: Pinned<u16>,
}
