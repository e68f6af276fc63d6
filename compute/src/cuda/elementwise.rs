//! Operators that treat each value by itself: SwiGLU's product and sums.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};

impl Device {
    /// `out = silu(gate) · up`, element by element; `silu(g) = g / (1 + e^-g)`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(
        &self,
        gate: View<'_, f32>,
        up: View<'_, f32>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let len = out.len();
        assert!(gate.len() == up.len() && up.len() == len, "gate, up and output differ in length");
        if len == 0 {
            return Ok(());
        }
        // SAFETY: a thread a value, none past the length.
        unsafe {
            launch!(self, silu_mul, Grid::values(len);
                gate.address(), up.address(), len as u64, out.address())
        }
    }

    /// `sum += x`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_in_place(&self, sum: &mut ViewMut<'_, f32>, x: View<'_, f32>) -> Result<(), CudaError> {
        assert_eq!(sum.len(), x.len(), "sum and summand");
        if x.is_empty() {
            return Ok(());
        }
        // SAFETY: a thread a value, none past the length.
        unsafe {
            launch!(self, add_in_place, Grid::values(x.len()); sum.address(), x.address(), x.len() as u64)
        }
    }

    /// `sum += weight · x`, element by element, product and sum rounded separately.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_scaled(
        &self,
        sum: &mut ViewMut<'_, f32>,
        weight: f32,
        x: View<'_, f32>,
    ) -> Result<(), CudaError> {
        assert_eq!(sum.len(), x.len(), "sum and summand");
        if x.is_empty() {
            return Ok(());
        }
        // SAFETY: a thread a value, none past the length.
        unsafe {
            launch!(self, add_scaled, Grid::values(x.len());
                sum.address(), weight, x.address(), x.len() as u64)
        }
    }

    /// `out[t, :] = Σ_j weights[t, j] · x[t, j, :]`: the experts' vectors of each token, in top-k order from zero, each
    /// product and sum rounded. `x` is `[tokens, top_k, dim]`, `weights` `[tokens, top_k]`, `out` `[tokens, dim]`.
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn weighted_sum(
        &self,
        x: View<'_, f32>,
        weights: View<'_, f32>,
        top_k: usize,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        if out.is_empty() {
            return Ok(());
        }
        assert!(top_k > 0 && weights.len().is_multiple_of(top_k), "{top_k} weights a token");
        let tokens = weights.len() / top_k;
        assert!(tokens > 0 && out.len().is_multiple_of(tokens), "{tokens} rows of output");
        assert_eq!(x.len(), out.len() * top_k, "{top_k} vectors a token");
        let dim = out.len() / tokens;
        // SAFETY: a thread an output, none past the length; a token's vectors and weights were counted above.
        unsafe {
            launch!(self, weighted_sum, Grid::values(out.len());
                x.address(), weights.address(), size(top_k), size(dim), out.len() as u64, out.address())
        }
    }
}
