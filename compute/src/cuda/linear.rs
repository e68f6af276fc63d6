//! Matrix products: dense, two matrices side by side, one matrix per head, one per expert.

mod heads;
mod narrow;
mod operands;
mod parts;
mod wide;

pub(super) use heads::ROUNDED_SHARED;
pub(super) use narrow::narrow_shared;
pub use operands::{Inputs, Outputs};
pub(super) use parts::parts_shared;
pub(super) use wide::{HIGH, Map, WIDE};

use super::launch::{Argument, Grid, launch, size};
use super::matrix::{ExpertMatrices, Matrix, Stack};
use super::{CudaError, Device, Groups, View, ViewMut};
use crate::WeightFormat;
use crate::fp8::BLOCK;

/// The kernels' parameters; `struct Product` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    w: u64,
    w2: u64,
    w_scales: u64,
    w2_scales: u64,
    x: u64,
    x_scales: u64,
    rows: u64,
    out_rows: u64,
    tiles: u64,
    tile_count: u64,
    y: u64,
    x_rows: u32,
    m: u32,
    n: u32,
    n1: u32,
    k: u32,
    rows_per: u32,
    x_stride: u32,
    x_head: u32,
    heads: u32,
    w_vector: u32,
    x_vector: u32,
    y_bf16: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Product {}

/// Outputs and rows of a thread block of the plain kernels; their own numbers.
const OUTPUTS: usize = 4;
pub(super) const PLAIN_ROWS: usize = 8;

/// Which kernel multiplies by a matrix. It follows from the matrix and the inputs' format, never from the number of
/// rows: their bits differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearKernel {
    /// Any shape and format, f32 sums.
    Plain,
    /// Hopper's matrix unit: FP8 by FP8, `rows` in 64s, `cols` in 128s (sums of a 128-block have some 14 bits), or bf16 by
    /// bf16, both in 64s.
    Wgmma,
}

/// Output channels of a wgmma block; its tiles of rows and stages of their pipelines. The kernels' own numbers.
const CHANNELS: usize = 64;
const TILES: [(usize, usize); 3] = [(16, 8), (64, 6), (128, 4)];

/// Shared memory of a wgmma kernel: per stage 128 bytes a channel and row and (FP8) a scale a row, and what aligning takes.
pub(super) fn wgmma_shared(tile: usize) -> usize {
    stages_shared(tile, TILES[tile].1)
}

/// The same with so many stages.
fn stages_shared(tile: usize, stages: usize) -> usize {
    let rows = TILES[tile].0;
    1024 + stages * (128 * (CHANNELS + rows) + 4 * (rows + 4))
}

/// More than half of a multiprocessor's: a product with no more blocks than there are multiprocessors takes so much, so that no two of them
/// share one while others are idle. Without, blocks that start as the kernel before ends go to the multiprocessors that are free first.
pub(super) const ALONE_SHARED: usize = 116 * 1024;

/// What a bf16 product over `k` channels uses of that, 64 of them a stage: more of its blocks fit a multiprocessor. Two stages
/// at least, for the outputs take their place.
fn short_shared(tile: usize, k: usize) -> usize {
    stages_shared(tile, TILES[tile].1.min((k / 64).max(2)))
}

/// The smallest tile that holds `rows`, else the largest.
fn tile_for(rows: usize) -> usize {
    TILES.into_iter().position(|(tile, _)| rows <= tile).unwrap_or(TILES.len() - 1)
}

/// One or two matrices (or stacks of them), and what they are multiplied by.
struct Operands<'a> {
    first: &'a Stack,
    second: Option<&'a Stack>,
    inputs: Inputs<'a>,
}

/// Which rows go where.
#[derive(Clone, Copy)]
enum Order<'a> {
    /// All, in order.
    All,
    /// Those named.
    Named(View<'a, u32>),
    /// Each to its experts: row `order[p] / per` to position p.
    ToExperts(&'a Groups, usize),
    /// Position p back to `order[p]`.
    FromExperts(&'a Groups),
    /// Position p as it is.
    Sorted(&'a Groups),
}

impl Device {
    /// The kernel that multiplies inputs of the matrix's own format by `w`.
    pub fn linear_kernel(&self, w: &Matrix) -> LinearKernel {
        self.stack_kernel(&w.0)
    }

    /// As [`Self::linear_kernel`], for every expert's matrix.
    pub fn expert_kernel(&self, w: &ExpertMatrices) -> LinearKernel {
        self.stack_kernel(&w.0)
    }

    /// The kernel for a layer's experts, whose rows are sorted once for all their matrices: the matrix unit's where each of
    /// them fits it.
    pub fn experts_kernel(&self, matrices: [&ExpertMatrices; 3]) -> LinearKernel {
        let fit = matrices.iter().all(|w| self.expert_kernel(w) == LinearKernel::Wgmma);
        if fit { LinearKernel::Wgmma } else { LinearKernel::Plain }
    }

    fn stack_kernel(&self, w: &Stack) -> LinearKernel {
        let step = match w.format {
            WeightFormat::Fp8 => BLOCK,
            WeightFormat::Bf16 => 64,
            WeightFormat::F32 => return LinearKernel::Plain,
        };
        let tiles = w.rows.is_multiple_of(CHANNELS) && w.cols.is_multiple_of(step);
        if self.has_wgmma && tiles { LinearKernel::Wgmma } else { LinearKernel::Plain }
    }

    /// Rows of a tile for `m` rows by `n` channels: the tile that holds them, or a smaller one where its blocks still find a
    /// multiprocessor each. All give the same bits.
    fn dense_tile(&self, m: usize, n: usize) -> usize {
        let blocks = |tile: usize| n / CHANNELS * m.div_ceil(TILES[tile].0);
        let mut tile = tile_for(m);
        while tile > 0 && blocks(tile - 1) <= self.multiprocessors {
            tile -= 1;
        }
        TILES[tile].0
    }

    /// Rows that a tile of grouped rows has, for `rows` rows over `experts`.
    pub(super) fn group_tile(&self, kernel: LinearKernel, rows: usize, experts: usize) -> usize {
        match kernel {
            LinearKernel::Plain => PLAIN_ROWS,
            // Experts are not loaded evenly: some have twice the mean.
            LinearKernel::Wgmma => TILES[tile_for(2 * rows.div_ceil(experts))].0,
        }
    }

    /// `y[m, n] = Σ_k x[m, k] · w[n, k]`: any weights with f32 inputs, else weights and inputs of the same format. K is
    /// summed in 128-blocks in order; an FP8 block's sum is scaled by `s_x · s_w` before it is added. Which kernel runs
    /// says [`Self::linear_kernel`].
    ///
    /// # Panics
    /// If the formats do not go together, a length does not fit, or inputs for [`LinearKernel::Wgmma`] do not start
    /// at a multiple of 16 bytes.
    pub fn linear(&self, w: &Matrix, x: Inputs<'_>, y: &mut ViewMut<'_, f32>) -> Result<(), CudaError> {
        let operands = Operands { first: &w.0, second: None, inputs: x };
        self.multiply(operands, Order::All, Outputs::F32(y))
    }

    /// As [`Self::linear`] for the rows `row_index` of `x`: row `i` of `y` `[row_index.len(), n]` has the bits that
    /// `linear` gives row `row_index[i]`. An index past the rows ends the context.
    ///
    /// # Panics
    /// As [`Self::linear`].
    pub fn linear_rows(
        &self,
        w: &Matrix,
        x: Inputs<'_>,
        row_index: View<'_, u32>,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let operands = Operands { first: &w.0, second: None, inputs: x };
        self.multiply(operands, Order::Named(row_index), Outputs::F32(y))
    }

    /// Two products of the same inputs, side by side: `y[m, n1 + n2]`. Each has the bits of [`Self::linear`], if both
    /// matrices have the same kernel; else the plain kernel multiplies by both.
    ///
    /// # Panics
    /// As [`Self::linear`], or if the matrices differ in format or input width.
    pub fn linear_pair(
        &self,
        w: &Matrix,
        w2: &Matrix,
        x: Inputs<'_>,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let operands = Operands { first: &w.0, second: Some(&w2.0), inputs: x };
        self.multiply(operands, Order::All, Outputs::F32(y))
    }

    /// Each row by the matrices of its experts, sorted as `groups` says, for a kernel that [`Self::experts_kernel`] names: `y[p]`
    /// is row `order[p] / rows_per` of `x` by its expert's `w`, and beside it by its `w2` where there is one.
    ///
    /// # Panics
    /// As [`Self::linear_pair`].
    pub fn experts_in(
        &self,
        w: &ExpertMatrices,
        w2: Option<&ExpertMatrices>,
        x: Inputs<'_>,
        groups: &Groups,
        rows_per: usize,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let operands = Operands { first: &w.0, second: w2.map(|w| &w.0), inputs: x };
        self.multiply(operands, Order::ToExperts(groups, rows_per), Outputs::F32(y))
    }

    /// Sorted rows by their experts' matrices, and back to the order of assignments: `y[order[p]]` is row p of `x` by its
    /// expert's `w`.
    ///
    /// # Panics
    /// As [`Self::linear`].
    pub fn experts_out(
        &self,
        w: &ExpertMatrices,
        x: Inputs<'_>,
        groups: &Groups,
        y: Outputs<'_, '_>,
    ) -> Result<(), CudaError> {
        self.multiply(Operands { first: &w.0, second: None, inputs: x }, Order::FromExperts(groups), y)
    }

    /// Sorted rows by their experts' matrices, in the order of `groups`: `y[p]` is row p of `x` by its expert's `w`.
    ///
    /// # Panics
    /// As [`Self::linear`].
    pub fn experts_sorted(
        &self,
        w: &ExpertMatrices,
        x: Inputs<'_>,
        groups: &Groups,
        y: Outputs<'_, '_>,
    ) -> Result<(), CudaError> {
        self.multiply(Operands { first: &w.0, second: None, inputs: x }, Order::Sorted(groups), y)
    }

    fn multiply(
        &self,
        operands: Operands<'_>,
        order: Order<'_>,
        y: Outputs<'_, '_>,
    ) -> Result<(), CudaError> {
        let Operands { first: w, second: w2, inputs: x } = operands;
        assert!(
            w2.is_none_or(|w2| (w2.format, w2.cols, w2.count) == (w.format, w.cols, w.count)),
            "two matrices that read the same rows"
        );
        let x_rows = x.rows(w.cols);
        let n = w.rows + w2.map_or(0, |w2| w2.rows);
        let (m, groups) = match order {
            Order::All => (x_rows, None),
            Order::Named(rows) => (rows.len(), None),
            Order::ToExperts(groups, _) | Order::FromExperts(groups) | Order::Sorted(groups) => {
                (groups.rows(), Some(groups))
            }
        };
        assert_eq!(y.len(), m * n, "output [{m}, {n}]");
        if m * n == 0 {
            return Ok(());
        }
        assert!(groups.is_some() || w.count == 1, "rows sorted by expert");
        let (values, x_scales) = x.addresses();
        let (rows, rows_per, out_rows) = match order {
            Order::All | Order::Sorted(_) => (0, 1, 0),
            Order::Named(rows) => (rows.address(), 1, 0),
            Order::ToExperts(groups, per) => (groups.order.view().address(), per, 0),
            Order::FromExperts(groups) => (0, 1, groups.order.view().address()),
        };
        let (w_address, w_scales) = w.addresses();
        let (w2_address, w2_scales) = w2.map_or((0, 0), Stack::addresses);
        let product = Product {
            w: w_address,
            w2: w2_address,
            w_scales,
            w2_scales,
            x: values,
            x_scales,
            rows,
            out_rows,
            tiles: groups.map_or(0, |groups| groups.tiles.view().address()),
            tile_count: groups.map_or(0, |groups| groups.totals.slice(1..2).address()),
            y: y.address(),
            x_rows: size(x_rows),
            m: size(m),
            n: size(n),
            n1: size(w.rows),
            k: size(w.cols),
            rows_per: size(rows_per),
            x_stride: size(w.cols),
            x_head: 0,
            heads: 1,
            // Weights start at an allocation's beginning.
            w_vector: u32::from(w.cols.is_multiple_of(4)),
            x_vector: u32::from(x.rows_by_four(w.cols)),
            y_bf16: u32::from(matches!(y, Outputs::Bf16(_))),
        };
        let fits = [Some(w), w2].into_iter().flatten().all(|w| self.stack_kernel(w) == LinearKernel::Wgmma);
        // Rows sorted for the plain kernel are its own, whatever else would fit.
        let wgmma = fits && groups.is_none_or(|groups| groups.tile_rows() != PLAIN_ROWS);
        let kernel = match (x, w.format) {
            (Inputs::Fp8 { .. }, WeightFormat::Fp8) | (Inputs::Bf16(_), WeightFormat::Bf16) if wgmma => {
                LinearKernel::Wgmma
            }
            _ => LinearKernel::Plain,
        };
        let tile_rows = match (groups, kernel) {
            (Some(groups), _) => groups.tile_rows(),
            (None, LinearKernel::Plain) => PLAIN_ROWS,
            (None, LinearKernel::Wgmma) => self.dense_tile(m, n),
        };
        let row_tiles = groups.map_or(m.div_ceil(tile_rows), Groups::tiles_max);
        // SAFETY: lengths checked above; row indices are checked in the kernel; null rows are all rows in order.
        unsafe {
            match kernel {
                LinearKernel::Plain => self.plain_product(w.format, x, product, tile_rows, row_tiles, 1),
                LinearKernel::Wgmma
                    if w.format == WeightFormat::Fp8 && product.is_wide(tile_rows, row_tiles) =>
                {
                    self.wide_product(product, w.count, row_tiles)
                }
                LinearKernel::Wgmma if w.format == WeightFormat::Fp8 && self.is_narrow(&product) => {
                    self.narrow_product(product)
                }
                LinearKernel::Wgmma => self.wgmma_product(w.format, product, tile_rows, row_tiles, 1),
            }
        }
    }

    /// # Safety
    /// The product's lengths were checked.
    unsafe fn plain_product(
        &self,
        format: WeightFormat,
        x: Inputs<'_>,
        product: Product,
        tile_rows: usize,
        row_tiles: usize,
        heads: usize,
    ) -> Result<(), CudaError> {
        assert_eq!(tile_rows, PLAIN_ROWS, "rows were sorted for another kernel");
        assert!(row_tiles <= 65_535 && heads <= 65_535, "{row_tiles} row tiles of {heads} heads");
        let blocks = (product.n.div_ceil(OUTPUTS as u32), size(row_tiles), size(heads));
        let grid = Grid { blocks, threads: 32 * OUTPUTS as u32, shared: 0 };
        // SAFETY: the caller's promise.
        unsafe {
            match (x, format) {
                (Inputs::F32(_), WeightFormat::F32) => launch!(self, linear_f32, grid; product),
                (Inputs::F32(_), WeightFormat::Bf16) => launch!(self, linear_bf16_f32, grid; product),
                (Inputs::F32(_), WeightFormat::Fp8) => launch!(self, linear_fp8_f32, grid; product),
                (Inputs::Bf16(_), WeightFormat::Bf16) => launch!(self, linear_bf16, grid; product),
                (Inputs::Fp8 { .. }, WeightFormat::Fp8) => launch!(self, linear_fp8, grid; product),
                (_, format) => panic!("inputs of another format than {format:?} weights"),
            }
        }
    }

    /// # Safety
    /// The product is one of FP8 by FP8 or bf16 by bf16 whose lengths were checked, and `stack_kernel` says wgmma.
    unsafe fn wgmma_product(
        &self,
        format: WeightFormat,
        product: Product,
        tile_rows: usize,
        row_tiles: usize,
        heads: usize,
    ) -> Result<(), CudaError> {
        // 16 bytes are copied at a time. Weights start an allocation; inputs may be any part of one.
        assert!(product.x.is_multiple_of(16), "inputs start at a multiple of 16 bytes");
        assert!(row_tiles <= 65_535 && heads <= 65_535, "{row_tiles} row tiles of {heads} heads");
        let tile = tile_for(tile_rows);
        assert_eq!(TILES[tile].0, tile_rows, "rows were sorted for another kernel");
        let blocks = (product.n / CHANNELS as u32, size(row_tiles), size(heads));
        let alone = product.tiles == 0 && blocks.0 as usize * row_tiles <= self.multiprocessors;
        let shared = match format {
            WeightFormat::Bf16 => short_shared(tile, product.k as usize),
            _ if alone => wgmma_shared(tile).max(ALONE_SHARED),
            _ => wgmma_shared(tile),
        };
        let grid = Grid { blocks, threads: 128, shared };
        // SAFETY: the caller's promise; rows of the inputs are multiples of 128 bytes, hence aligned as the first.
        unsafe {
            match (format, tile) {
                (WeightFormat::Bf16, 0) => launch!(self, linear_bf16_wgmma_16, grid; product),
                (WeightFormat::Bf16, 1) => launch!(self, linear_bf16_wgmma_64, grid; product),
                (WeightFormat::Bf16, _) => launch!(self, linear_bf16_wgmma_128, grid; product),
                (_, 0) => launch!(self, linear_fp8_wgmma_16, grid; product),
                (_, 1) => launch!(self, linear_fp8_wgmma_64, grid; product),
                (_, _) => launch!(self, linear_fp8_wgmma_128, grid; product),
            }
        }
    }
}

impl Product {
    /// All rows of one unscaled matrix, in order.
    fn of(w: u64, x: u64, y: u64, m: usize, n: usize, k: usize) -> Self {
        Self {
            w,
            w2: 0,
            w_scales: 0,
            w2_scales: 0,
            x,
            x_scales: 0,
            rows: 0,
            out_rows: 0,
            tiles: 0,
            tile_count: 0,
            y,
            x_rows: size(m),
            m: size(m),
            n: size(n),
            n1: size(n),
            k: size(k),
            rows_per: 1,
            x_stride: size(k),
            x_head: 0,
            heads: 1,
            w_vector: u32::from(k.is_multiple_of(4)),
            x_vector: 0,
            y_bf16: 0,
        }
    }
}
