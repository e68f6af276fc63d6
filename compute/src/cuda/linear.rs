//! Weights on the device, and matrix products.

use cudarc::driver::sys::CUfunction_attribute;

use super::error::Doing;
use super::kernels::Functions;
use super::launch::{Argument, Grid, launch, size};
use super::{Buffer, CudaError, Device, View, ViewMut};
use crate::WeightFormat;
use crate::fp8::BLOCK;
use crate::matrix::{HeadStorage, Storage};

/// A weight matrix `[rows, cols]` = `[out, in]` on the device, stored as [`crate::Matrix`] stores it.
pub struct Matrix {
    rows: usize,
    cols: usize,
    format: WeightFormat,
    weights: Buffer<u8>,
    scales: Buffer<f32>,
}

impl Matrix {
    /// Copies a matrix to the device.
    pub fn new(device: &Device, matrix: &crate::Matrix) -> Result<Self, CudaError> {
        let (weights, scales) = match &matrix.storage {
            Storage::F32(weights) => (upload_f32(device, weights)?, device.alloc(0)?),
            Storage::Bf16(weights) => (device.upload(weights)?, device.alloc(0)?),
            Storage::Fp8 { codes, scales } => (device.upload(codes)?, device.upload(scales)?),
            Storage::Panels { .. } => unreachable!("only what the CPU multiplies is arranged for it"),
        };
        Ok(Self { rows: matrix.rows(), cols: matrix.cols(), format: matrix.format(), weights, scales })
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        (self.weights.view().address(), self.scales.view().address())
    }
}

/// One matrix per head `[heads, out, in]` on the device, stored as [`crate::HeadMatrices`] stores it.
pub struct HeadMatrices {
    heads: usize,
    out_dim: usize,
    in_dim: usize,
    bf16: bool,
    weights: Buffer<u8>,
}

impl HeadMatrices {
    /// Copies the matrices to the device.
    pub fn new(device: &Device, matrices: &crate::HeadMatrices) -> Result<Self, CudaError> {
        let (bf16, weights) = match &matrices.storage {
            HeadStorage::F32(weights) => (false, upload_f32(device, weights)?),
            HeadStorage::Bf16(weights) => (true, device.upload(weights)?),
            HeadStorage::Fp8 { .. } | HeadStorage::Panels { .. } => {
                (false, upload_f32(device, &matrices.to_f32())?)
            }
        };
        let (heads, out_dim, in_dim) = (matrices.heads(), matrices.out_dim(), matrices.in_dim());
        Ok(Self { heads, out_dim, in_dim, bf16, weights })
    }
}

fn upload_f32(device: &Device, values: &[f32]) -> Result<Buffer<u8>, CudaError> {
    // SAFETY: the bytes of plain floats, for as long as they are borrowed; the host is little endian, as the device is.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
    device.upload(bytes)
}

/// Input rows `[m, k]` of a matrix product.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    /// As they are; goes with any weights.
    F32(View<'a, f32>),
    /// bf16 bits; goes with bf16 weights.
    Bf16(View<'a, u16>),
    /// E4M3 `[m, k]` and scales `[m, ceil(k/128)]`; goes with FP8 weights.
    Fp8 {
        /// Codes.
        codes: View<'a, u8>,
        /// A scale per 128 channels.
        scales: View<'a, f32>,
    },
}

impl Inputs<'_> {
    /// Rows of `k` channels.
    fn rows(&self, k: usize) -> usize {
        let values = match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::Fp8 { codes, .. } => codes.len(),
        };
        assert!(k > 0 && values.is_multiple_of(k), "{values} values in rows of {k}");
        let rows = values / k;
        if let Self::Fp8 { scales, .. } = self {
            assert_eq!(scales.len(), rows * k.div_ceil(BLOCK), "a scale per 128 channels");
        }
        rows
    }

    fn addresses(&self) -> (u64, u64) {
        match self {
            Self::F32(x) => (x.address(), 0),
            Self::Bf16(x) => (x.address(), 0),
            Self::Fp8 { codes, scales } => (codes.address(), scales.address()),
        }
    }

    fn rows_by_four(&self, k: usize) -> bool {
        match self {
            Self::F32(x) => x.rows_by_four(k),
            Self::Bf16(x) => x.rows_by_four(k),
            Self::Fp8 { codes, .. } => codes.rows_by_four(k),
        }
    }
}

/// The kernels' parameters; `struct Product` there.
#[repr(C)]
struct Product {
    w: u64,
    w_scales: u64,
    x: u64,
    x_scales: u64,
    rows: u64,
    y: u64,
    x_rows: u32,
    m: u32,
    n: u32,
    k: u32,
    w_vector: u32,
    x_vector: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Product {}

/// Outputs and rows of a thread block, and the rows a launch may have; the kernels' own numbers.
const OUTPUTS: usize = 4;
const ROWS: usize = 8;

impl Product {
    fn grid(&self, heads: usize) -> Grid {
        let row_tiles = (self.m as usize).div_ceil(ROWS);
        assert!(
            row_tiles <= 65_535 && heads <= 65_535,
            "{row_tiles} row tiles of {heads} heads in one launch"
        );
        let blocks = (self.n.div_ceil(OUTPUTS as u32), size(row_tiles), size(heads));
        Grid { blocks, threads: 32 * OUTPUTS as u32, shared: 0 }
    }
}

/// Which kernel multiplies by a matrix. It follows from the matrix and the inputs' format, never from the number of
/// rows: their bits differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearKernel {
    /// Any shape and format, f32 sums.
    Plain,
    /// Hopper's matrix unit: FP8 by FP8, `rows` in 64s, `cols` in 128s; sums of a 128-block have some 14 bits.
    Wgmma,
}

/// Tiles of the wgmma kernels: rows, and stages of their pipelines; the kernels' own numbers.
const WGMMA_TILES: [(usize, usize); 3] = [(16, 8), (64, 6), (128, 4)];
const WGMMA_CHANNELS: usize = 64;

/// Shared memory of a wgmma kernel: per stage 128 bytes a channel and row and a scale a row, and what aligning takes.
fn wgmma_shared((tile, stages): (usize, usize)) -> usize {
    1024 + stages * (128 * (WGMMA_CHANNELS + tile) + 4 * (tile + 4))
}

/// Lets the wgmma kernels have the shared memory they need.
pub(super) fn prepare(functions: &Functions) -> Result<(), CudaError> {
    let kernels =
        [&functions.linear_fp8_wgmma_16, &functions.linear_fp8_wgmma_64, &functions.linear_fp8_wgmma_128];
    for (kernel, tile) in kernels.into_iter().zip(WGMMA_TILES) {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = size(wgmma_shared(tile)) as i32;
        kernel.set_attribute(attribute, bytes).doing("give a kernel shared memory")?;
    }
    Ok(())
}

impl Device {
    /// The kernel that multiplies inputs of the matrix's own format by `w`.
    pub fn linear_kernel(&self, w: &Matrix) -> LinearKernel {
        let tiles = w.rows.is_multiple_of(WGMMA_CHANNELS) && w.cols.is_multiple_of(BLOCK);
        if self.has_wgmma && w.format == WeightFormat::Fp8 && tiles {
            LinearKernel::Wgmma
        } else {
            LinearKernel::Plain
        }
    }

    /// # Safety
    /// The product is one of FP8 by FP8 whose lengths were checked, and `linear_kernel` says wgmma.
    unsafe fn wgmma_product(&self, product: Product) -> Result<(), CudaError> {
        // 16 bytes are copied at a time. Weights start an allocation; inputs may be any part of one.
        assert!(product.x.is_multiple_of(16), "FP8 inputs start at a multiple of 16 bytes");
        let m = product.m as usize;
        let tile = WGMMA_TILES.into_iter().position(|(rows, _)| m <= rows).unwrap_or(WGMMA_TILES.len() - 1);
        let row_tiles = m.div_ceil(WGMMA_TILES[tile].0);
        assert!(row_tiles <= 65_535, "{row_tiles} row tiles in one launch");
        let grid = Grid {
            blocks: (product.n / WGMMA_CHANNELS as u32, size(row_tiles), 1),
            threads: 128,
            shared: wgmma_shared(WGMMA_TILES[tile]),
        };
        // SAFETY: the caller's promise; rows of the inputs are multiples of 128 bytes, hence aligned as the first.
        unsafe {
            match tile {
                0 => launch!(self, linear_fp8_wgmma_16, grid; product),
                1 => launch!(self, linear_fp8_wgmma_64, grid; product),
                _ => launch!(self, linear_fp8_wgmma_128, grid; product),
            }
        }
    }

    /// `y[m, n] = Σ_k x[m, k] · w[n, k]`: any weights with f32 inputs, else weights and inputs of the same format. K is
    /// summed in 128-blocks in order; an FP8 block's sum is scaled by `s_x · s_w` before it is added. Which kernel runs
    /// says [`Self::linear_kernel`].
    ///
    /// # Panics
    /// If the formats do not go together, a length does not fit, or FP8 inputs for [`LinearKernel::Wgmma`] do not start
    /// at a multiple of 16 bytes.
    pub fn linear(&self, w: &Matrix, x: Inputs<'_>, y: &mut ViewMut<'_, f32>) -> Result<(), CudaError> {
        self.matrix_product(w, x, None, y)
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
        self.matrix_product(w, x, Some(row_index), y)
    }

    fn matrix_product(
        &self,
        w: &Matrix,
        x: Inputs<'_>,
        rows: Option<View<'_, u32>>,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let x_rows = x.rows(w.cols);
        let m = rows.map_or(x_rows, |rows| rows.len());
        assert_eq!(y.len(), m * w.rows, "output [{m}, {}]", w.rows);
        if y.is_empty() {
            return Ok(());
        }
        let ((weights, w_scales), (values, x_scales)) = (w.addresses(), x.addresses());
        let product = Product {
            w: weights,
            w_scales,
            x: values,
            x_scales,
            rows: rows.map_or(0, |rows| rows.address()),
            y: y.address(),
            x_rows: size(x_rows),
            m: size(m),
            n: size(w.rows),
            k: size(w.cols),
            // Weights start at an allocation's beginning.
            w_vector: u32::from(w.cols.is_multiple_of(4)),
            x_vector: u32::from(x.rows_by_four(w.cols)),
        };
        let grid = product.grid(1);
        // SAFETY: lengths checked above; row indices are checked in the kernel; null rows are all rows in order.
        unsafe {
            match (x, w.format) {
                (Inputs::F32(_), WeightFormat::F32) => launch!(self, linear_f32, grid; product),
                (Inputs::F32(_), WeightFormat::Bf16) => launch!(self, linear_bf16_f32, grid; product),
                (Inputs::F32(_), WeightFormat::Fp8) => launch!(self, linear_fp8_f32, grid; product),
                (Inputs::Bf16(_), WeightFormat::Bf16) => launch!(self, linear_bf16, grid; product),
                (Inputs::Fp8 { .. }, WeightFormat::Fp8) if self.linear_kernel(w) == LinearKernel::Wgmma => {
                    self.wgmma_product(product)
                }
                (Inputs::Fp8 { .. }, WeightFormat::Fp8) => launch!(self, linear_fp8, grid; product),
                (_, format) => panic!("inputs of another format than {format:?} weights"),
            }
        }
    }

    /// `y[m, h, o] = Σ_i x[m, h, i] · w[h, o, i]` in f32: `m` rows of one vector per head.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn head_matmul(
        &self,
        w: &HeadMatrices,
        x: View<'_, f32>,
        m: usize,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        assert_eq!(x.len(), m * w.heads * w.in_dim, "input [{m}, {}, {}]", w.heads, w.in_dim);
        assert_eq!(y.len(), m * w.heads * w.out_dim, "output [{m}, {}, {}]", w.heads, w.out_dim);
        if y.is_empty() {
            return Ok(());
        }
        let product = Product {
            w: w.weights.view().address(),
            w_scales: 0,
            x: x.address(),
            x_scales: 0,
            rows: 0,
            y: y.address(),
            x_rows: size(m),
            m: size(m),
            n: size(w.out_dim),
            k: size(w.in_dim),
            w_vector: u32::from(w.in_dim.is_multiple_of(4)),
            x_vector: u32::from(x.rows_by_four(w.in_dim)),
        };
        let grid = product.grid(w.heads);
        // SAFETY: lengths checked above.
        unsafe {
            if w.bf16 {
                launch!(self, linear_bf16_f32, grid; product)
            } else {
                launch!(self, linear_f32, grid; product)
            }
        }
    }
}
