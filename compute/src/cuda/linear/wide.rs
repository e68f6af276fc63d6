//! FP8 products of many rows: tiles of 128 rows and 256 channels, operands by the tensor copy unit.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::Product;
use crate::cuda::error::Doing;
use crate::cuda::launch::{Argument, Grid, launch};
use crate::cuda::{CudaError, Device};

/// Channels and rows of a tile, and its shared memory: the kernel's own numbers.
const CHANNELS: usize = 256;
pub(super) const ROWS: usize = 128;
pub(in crate::cuda) const WIDE_SHARED: usize = 1024 + 4 * (128 * (CHANNELS + ROWS) + 4 * (ROWS + 4));
/// It runs where it has a tile for every multiprocessor, about.
const TILES_MIN: usize = 128;

/// Where the copy unit finds rows of bytes; `struct Map` in the kernel.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct Map(sys::CUtensorMap);

// SAFETY: 128 opaque bytes that the driver wrote, aligned as the kernel's parameter.
unsafe impl Argument for Map {}

impl Map {
    /// Boxes of `box_rows` rows and 128 bytes of a matrix `[rows, cols]` of bytes, laid out in shared memory as the matrix unit's 128-byte
    /// swizzle wants them. Rows past the last are zeros.
    pub(super) fn new(address: u64, rows: u64, cols: u64, box_rows: u32) -> Result<Self, CudaError> {
        Self::encode(address, [cols, rows], [cols], [128, box_rows])
    }

    /// The same with `blocks` such boxes side by side in K, one after the other in shared memory: corners are (0, row, block of K).
    pub(super) fn bundles(
        address: u64,
        rows: u64,
        cols: u64,
        (box_rows, blocks): (u32, u32),
    ) -> Result<Self, CudaError> {
        Self::encode(address, [128, rows, cols / 128], [cols, 128], [128, box_rows, blocks])
    }

    fn encode<const RANK: usize, const STRIDES: usize>(
        address: u64,
        sizes: [u64; RANK],
        strides: [u64; STRIDES],
        boxes: [u32; RANK],
    ) -> Result<Self, CudaError> {
        const { assert!(STRIDES + 1 == RANK, "a stride for every dimension but the first") };
        let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: out-pointer to a live map; arrays as long as the rank asks; the address is only read by kernels.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                RANK as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1; RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .doing("describe a matrix to the copy unit")?;
            Ok(Self(map.assume_init()))
        }
    }
}

impl Product {
    /// Whether [`Device::wide_product`] may compute this FP8 product, in tiles of `tile_rows` rows.
    pub(super) fn is_wide(&self, tile_rows: usize, row_tiles: usize) -> bool {
        // A half of its channels has one scale; outputs are stored 16 bytes at a time.
        let halves = self.n == self.n1 || self.n1.is_multiple_of(128);
        let tiles = (self.n as usize).div_ceil(CHANNELS) * row_tiles;
        tile_rows == ROWS && halves && self.y.is_multiple_of(16) && tiles >= TILES_MIN
    }
}

impl Device {
    /// The same bits as the kernels of fewer rows give, hence the number of rows may choose. `count`: matrices of a stack.
    ///
    /// # Safety
    /// The product is one of FP8 by FP8 whose lengths were checked, and [`Product::is_wide`].
    pub(super) unsafe fn wide_product(
        &self,
        product: Product,
        count: usize,
        row_tiles: usize,
    ) -> Result<(), CudaError> {
        assert!(product.x.is_multiple_of(16), "inputs start at a multiple of 16 bytes");
        let (n1, n2, k) = (u64::from(product.n1), u64::from(product.n - product.n1), u64::from(product.k));
        let w = Map::new(product.w, count as u64 * n1, k, 64)?;
        let w2 = if n2 > 0 { Map::new(product.w2, count as u64 * n2, k, 64)? } else { w };
        let x = Map::new(product.x, u64::from(product.x_rows), k, ROWS as u32)?;
        let tiles = (product.n as usize).div_ceil(CHANNELS) * row_tiles;
        let blocks = self.multiprocessors.min(tiles);
        let grid = Grid { shared: WIDE_SHARED, ..Grid::line(blocks, 384) };
        // SAFETY: the caller's promise; the maps cover the matrices.
        unsafe {
            if product.rows == 0 {
                launch!(self, linear_fp8_wide, grid; product, w, w2, x)
            } else {
                launch!(self, linear_fp8_wide_picked, grid; product, w, w2, x)
            }
        }
    }
}
