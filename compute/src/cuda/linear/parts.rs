//! Products of f32 rows in three bf16 parts: the router's.

use super::{CHANNELS, LinearKernel, Product, wgmma_shared};
use crate::WeightFormat;
use crate::cuda::launch::{Grid, launch, size};
use crate::cuda::matrix::Matrix;
use crate::cuda::{CudaError, Device, View, ViewMut};

/// Channels of K that one slice sums up.
const SLICE: usize = 512;
/// Up to so many rows four warpgroups, each with a quarter of a slice, are faster than one.
const PARTS_ROWS: usize = 128;

/// Shared memory of a product of parts by four warpgroups: for each two stages of weights and six of rows.
pub(in crate::cuda) fn parts_shared(rows: usize) -> usize {
    1024 + 4 * 128 * (2 * CHANNELS + 6 * rows)
}

impl Device {
    /// Slices that [`Self::linear_parts`] gives for `k` channels.
    pub fn parts_slices(&self, k: usize) -> usize {
        k.div_ceil(SLICE)
    }

    /// Whether [`Self::linear_parts`] multiplies by `w`.
    pub fn takes_parts(&self, w: &Matrix) -> bool {
        w.format() == WeightFormat::Bf16 && self.linear_kernel(w) == LinearKernel::Wgmma
    }

    /// f32 rows by bf16 weights on the matrix unit: `x` `[m, 3, k]` holds each row as three bf16 parts
    /// ([`crate::cuda::InputFormat::Parts`]). `y` is `[slices, m, n]`, the sums over 512 channels each, for its reader to add
    /// in order.
    ///
    /// # Panics
    /// If a length does not fit or [`Self::takes_parts`] says no.
    pub fn linear_parts(
        &self,
        w: &Matrix,
        x: View<'_, u16>,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let (n, k) = (w.rows(), w.cols());
        assert!(self.takes_parts(w), "a matrix for the matrix unit");
        assert!(x.len().is_multiple_of(3 * k), "{} values in rows of three times {k}", x.len());
        let (m, slices) = (x.len() / (3 * k), self.parts_slices(k));
        assert_eq!(y.len(), slices * m * n, "output [{slices}, {m}, {n}]");
        if m == 0 {
            return Ok(());
        }
        let product = Product {
            x_stride: size(3 * k),
            ..Product::of(w.0.addresses().0, x.address(), y.address(), m, n, k)
        };
        // Few rows: a slice's channels side by side; many: in turn. The same bits.
        let (rows, threads, shared) = match m {
            0..=32 => (16, 512, parts_shared(16)),
            33..=PARTS_ROWS => (32, 512, parts_shared(32)),
            _ => (64, 128, wgmma_shared(1)),
        };
        let row_tiles = m.div_ceil(rows);
        assert!(row_tiles <= 65_535 && product.x.is_multiple_of(16), "{row_tiles} row tiles in one launch");
        let blocks = (product.n / CHANNELS as u32, size(row_tiles), size(slices));
        let grid = Grid { blocks, threads, shared };
        // SAFETY: lengths checked above.
        unsafe {
            match rows {
                16 => launch!(self, linear_parts_wgmma_16, grid; product),
                32 => launch!(self, linear_parts_wgmma_32, grid; product),
                _ => launch!(self, linear_parts_wgmma_64, grid; product),
            }
        }
    }
}
