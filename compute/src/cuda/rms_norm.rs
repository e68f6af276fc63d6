//! RMS norm.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};

impl Device {
    /// `y = x / sqrt(mean(x²) + eps) · w` for rows of `w.len()` values.
    ///
    /// # Panics
    /// If `x` and `y` differ in length or are no whole number of rows.
    pub fn rms_norm(
        &self,
        x: View<'_, f32>,
        w: View<'_, f32>,
        eps: f32,
        y: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        assert_eq!(x.len(), y.len(), "rows in and out");
        if x.is_empty() {
            return Ok(());
        }
        let dim = w.len();
        assert!(dim > 0 && x.len().is_multiple_of(dim), "{} values in rows of {dim}", x.len());
        let vector = x.rows_by_four(dim) && w.rows_by_four(dim) && y.view().rows_by_four(dim);
        // SAFETY: a thread block a row of `dim` values in all three.
        unsafe {
            launch!(self, rms_norm, Grid::line(x.len() / dim, 512);
                x.address(), w.address(), size(dim), u32::from(vector), eps, y.address())
        }
    }
}
