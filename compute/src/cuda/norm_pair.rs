//! What an MTP module's projection takes: two rows normed apart and laid side by side.

use super::launch::{Argument, Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};

/// One side of [`Device::norm_pair`].
#[derive(Clone, Copy)]
pub struct NormHalf<'a> {
    /// `[rows, dim]`.
    pub x: View<'a, f32>,
    /// `[dim]`.
    pub weight: View<'a, f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// The kernel's parameter; `struct Half` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Half {
    x: u64,
    w: u64,
    eps: f32,
    unused: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Half {}

impl Half {
    fn new(half: &NormHalf<'_>) -> Self {
        Self { x: half.x.address(), w: half.weight.address(), eps: half.eps, unused: 0 }
    }
}

impl Device {
    /// `out[r] = [norm(left[r]), norm(right[r])]`, each as [`Self::rms_norm`] defines it; `out` is `[rows, 2 · dim]`.
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn norm_pair(
        &self,
        left: NormHalf<'_>,
        right: NormHalf<'_>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let dim = left.weight.len();
        assert!(dim > 0 && right.weight.len() == dim, "two norms of one width");
        assert!(left.x.len() == right.x.len() && out.len() == 2 * left.x.len(), "rows in and out");
        assert!(left.x.len().is_multiple_of(dim), "{} values in rows of {dim}", left.x.len());
        if out.is_empty() {
            return Ok(());
        }
        let grid = Grid::line(out.len() / dim, 512);
        // SAFETY: a thread block a half row of `dim` values, as many as were counted above.
        unsafe {
            launch!(self, norm_pair, grid; Half::new(&left), Half::new(&right), size(dim), out.address())
        }
    }
}
