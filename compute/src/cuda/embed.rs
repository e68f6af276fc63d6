//! Looking tokens up.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, Matrix, View, ViewMut};
use crate::WeightFormat;

impl Device {
    /// `out[i, :] = w[tokens[i], :]`, multiplied out to f32. A token past the matrix ends the context.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn embed(
        &self,
        w: &Matrix,
        tokens: View<'_, u32>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        assert_eq!(out.len(), tokens.len() * w.cols(), "output [{}, {}]", tokens.len(), w.cols());
        if out.is_empty() {
            return Ok(());
        }
        let (weights, scales) = w.addresses();
        let blocks = (size(tokens.len()), size(w.cols().div_ceil(256)), 1);
        let (n, k, grid) = (size(w.rows()), size(w.cols()), Grid { blocks, threads: 256, shared: 0 });
        let (tokens, out) = (tokens.address(), out.address());
        // SAFETY: a thread a value of `out`; tokens are checked in the kernel.
        unsafe {
            match w.format() {
                WeightFormat::F32 => launch!(self, embed_f32, grid; weights, scales, tokens, n, k, out),
                WeightFormat::Bf16 => launch!(self, embed_bf16, grid; weights, scales, tokens, n, k, out),
                WeightFormat::Fp8 => launch!(self, embed_fp8, grid; weights, scales, tokens, n, k, out),
            }
        }
    }
}
