//! FP8 products of few rows: tiles that suit the number of multiprocessors, operands by the tensor copy unit.

use super::wide::Map;
use super::{CHANNELS, Product};
use crate::cuda::launch::{Grid, launch, size};
use crate::cuda::{CudaError, Device};
use crate::fp8::BLOCK;

/// A tile's rows and channels, the stages of its pipeline, the blocks of K of a stage and the multiplying warpgroups: the
/// kernels' own numbers.
struct Tile {
    rows: usize,
    channels: usize,
    stages: usize,
    bundle: usize,
    groups: u32,
}

const TILES: [Tile; 5] = [
    Tile { rows: 64, channels: 16, stages: 8, bundle: 2, groups: 1 },
    Tile { rows: 64, channels: 32, stages: 7, bundle: 2, groups: 1 },
    Tile { rows: 64, channels: 64, stages: 6, bundle: 2, groups: 1 },
    Tile { rows: 128, channels: 64, stages: 8, bundle: 1, groups: 2 },
    Tile { rows: 64, channels: 128, stages: 8, bundle: 1, groups: 2 },
];

/// Nanoseconds of a 128-block of K in a tile: so much, and one a row and channel; and one for so many outputs. Measured on an
/// H200; only the choice between tiles hangs on them.
const BLOCK_NS: usize = 40;
const OUTPUTS_A_NS: usize = 3;
/// Up to so many rows the kernel of 16 rows is as fast, if its blocks of 64 channels fill three quarters of the multiprocessors and
/// the weights are so many that reading them is what takes the time.
const SIXTEEN: usize = 16;
const SIXTEEN_WEIGHTS: usize = 24 << 20;

/// Shared memory of a kernel: per stage 128 bytes a row and channel, and what aligning takes.
pub(in crate::cuda) fn narrow_shared(tile: usize) -> usize {
    let Tile { rows, channels, stages, bundle, .. } = TILES[tile];
    1024 + stages * bundle * 128 * (rows + channels)
}

impl Device {
    /// Whether [`Self::narrow_product`] shall compute this FP8 product: rows in order, one matrix or two side by side.
    pub(super) fn is_narrow(&self, product: &Product) -> bool {
        let Product { y, x_scales, w_scales, w2_scales, .. } = *product;
        // Scales are read four at a time where a row has a multiple of four.
        let aligned = [y, x_scales, w_scales, w2_scales].iter().all(|at| at.is_multiple_of(16));
        let in_order = product.rows == 0 && product.out_rows == 0 && product.tiles == 0;
        let full = 4 * (product.n as usize / CHANNELS) >= 3 * self.multiprocessors
            && product.n as usize * product.k as usize >= SIXTEEN_WEIGHTS;
        aligned && in_order && !(full && product.m as usize <= SIXTEEN)
    }

    /// The tile whose blocks are through first. All give the same bits.
    fn narrow_tile(&self, m: usize, n: usize, k: usize) -> usize {
        let time = |tile: &Tile| {
            let rounds = (m.div_ceil(tile.rows) * n.div_ceil(tile.channels)).div_ceil(self.multiprocessors);
            let outputs = tile.rows * tile.channels;
            rounds * (outputs / OUTPUTS_A_NS + k / BLOCK * (BLOCK_NS + tile.rows + tile.channels))
        };
        (0..TILES.len()).min_by_key(|&tile| time(&TILES[tile])).unwrap_or(0)
    }

    /// The same bits as the kernels of other tiles give, hence the number of rows may choose.
    ///
    /// # Safety
    /// The product is one of FP8 by FP8 whose lengths were checked, and [`Self::is_narrow`].
    pub(super) unsafe fn narrow_product(&self, product: Product) -> Result<(), CudaError> {
        assert!(product.x.is_multiple_of(16), "inputs start at a multiple of 16 bytes");
        let (m, n, k) = (product.m as usize, product.n as usize, product.k as usize);
        let tile = self.narrow_tile(m, n, k);
        let Tile { rows, channels, bundle, groups, .. } = TILES[tile];
        // Rows that are not there would cost the copy unit as much as those that are.
        let (box_rows, box_channels) = (size(m.next_multiple_of(8).min(64)), size(channels.min(64)));
        let bundle = size(bundle);
        let (n1, n2, k) = (u64::from(product.n1), u64::from(product.n - product.n1), u64::from(product.k));
        let w = Map::bundles(product.w, n1, k, (box_channels, bundle))?;
        let w2 = if n2 > 0 { Map::bundles(product.w2, n2, k, (box_channels, bundle))? } else { w };
        let x = Map::bundles(product.x, u64::from(product.x_rows), k, (box_rows, bundle))?;
        let blocks = (m.div_ceil(rows) * n.div_ceil(channels)).min(self.multiprocessors);
        let grid = Grid { shared: narrow_shared(tile), ..Grid::line(blocks, 128 * groups + 64) };
        // SAFETY: the caller's promise; the maps cover the matrices.
        unsafe {
            match tile {
                0 => launch!(self, linear_fp8_narrow_64x16, grid; product, w, w2, x, box_rows),
                1 => launch!(self, linear_fp8_narrow_64x32, grid; product, w, w2, x, box_rows),
                2 => launch!(self, linear_fp8_narrow_64x64, grid; product, w, w2, x, box_rows),
                3 => launch!(self, linear_fp8_narrow_128x64, grid; product, w, w2, x, box_rows),
                _ => launch!(self, linear_fp8_narrow_64x128, grid; product, w, w2, x, box_rows),
            }
        }
    }
}
