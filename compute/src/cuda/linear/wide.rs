//! FP8 products of many rows: tiles of 128 rows and 256 channels, or of 192 and 128 where they fill the multiprocessors better;
//! operands by the tensor copy unit.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::Product;
use crate::cuda::error::Doing;
use crate::cuda::launch::{Argument, Grid, launch, size};
use crate::cuda::{CudaError, Device};

/// A kernel's tile: 64 rows for each of `groups` multiplying warpgroups, 128 channels for each of `parts` chains, `stages` of
/// its pipeline; `cost` of a 128-block of K in it, in cycles of an H200. The kernels' own numbers.
pub(in crate::cuda) struct Tile {
    groups: usize,
    parts: usize,
    stages: usize,
    cost: usize,
}

pub(in crate::cuda) const WIDE: Tile = Tile { groups: 2, parts: 2, stages: 4, cost: 1440 };
pub(in crate::cuda) const HIGH: Tile = Tile { groups: 3, parts: 1, stages: 5, cost: 1120 };

impl Tile {
    const fn rows(&self) -> usize {
        64 * self.groups
    }

    const fn channels(&self) -> usize {
        128 * self.parts
    }

    /// Per stage 128 bytes a row and channel; scales of 16 rows and the parts, four times four of them, for each warp that
    /// multiplies; and what aligning takes.
    pub(in crate::cuda) const fn shared(&self) -> usize {
        let (stage, scales) = (128 * (self.rows() + self.channels()), 4 * 16 * (16 + self.parts));
        1024 + self.stages * stage + 4 * self.groups * scales
    }

    /// A block for each of so many tiles, as long as multiprocessors last.
    fn grid(&self, tiles: usize, multiprocessors: usize) -> Grid {
        Grid {
            shared: self.shared(),
            ..Grid::line(tiles.min(multiprocessors), 128 * (self.groups as u32 + 1))
        }
    }

    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows()) * n.div_ceil(self.channels())
    }

    /// Cycles that `m` rows by `n` channels take for a block of K: only the choice between tiles hangs on them.
    fn cycles(&self, m: usize, n: usize, multiprocessors: usize) -> usize {
        self.tiles(m, n).div_ceil(multiprocessors) * self.cost
    }
}

/// They run where they have a tile for every multiprocessor, about.
const TILES_MIN: usize = 128;

/// Where the copy unit finds rows of bytes; `struct Map` in the kernel.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Map(sys::CUtensorMap);

// SAFETY: 128 opaque bytes that the driver wrote, aligned as the kernel's parameter.
unsafe impl Argument for Map {}

impl Map {
    /// Boxes of `box_rows` rows and 128 bytes of a matrix `[rows, cols]` of bytes, laid out in shared memory as the matrix unit's 128-byte
    /// swizzle wants them. Rows past the last are zeros.
    pub(in crate::cuda) fn new(address: u64, rows: u64, cols: u64, box_rows: u32) -> Result<Self, CudaError> {
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
        let tiles = (self.n as usize).div_ceil(WIDE.channels()) * row_tiles;
        tile_rows == WIDE.rows() && halves && self.y.is_multiple_of(16) && tiles >= TILES_MIN
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
        let (m, n) = (product.m as usize, product.n as usize);
        let in_order = product.rows == 0 && product.out_rows == 0 && product.tiles == 0;
        let cycles = |tile: &Tile| tile.cycles(m, n, self.multiprocessors);
        let high = in_order && cycles(&HIGH) < cycles(&WIDE);
        let tile = if high { HIGH } else { WIDE };
        let x = Map::new(product.x, u64::from(product.x_rows), k, size(tile.rows()))?;
        let tiles = if high { tile.tiles(m, n) } else { n.div_ceil(tile.channels()) * row_tiles };
        let grid = tile.grid(tiles, self.multiprocessors);
        // SAFETY: the caller's promise; the maps cover the matrices.
        unsafe {
            match (high, product.rows == 0) {
                (true, _) => launch!(self, linear_fp8_high, grid; product, w, w2, x),
                (false, true) => launch!(self, linear_fp8_wide, grid; product, w, w2, x),
                (false, false) => launch!(self, linear_fp8_wide_picked, grid; product, w, w2, x),
            }
        }
    }
}
