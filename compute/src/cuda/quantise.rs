//! Rows to what a matrix product takes.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};
use crate::fp8::{self, BLOCK, ScaleFormat};

impl Device {
    /// Quantises rows `x` `[m, k]` to E4M3 `codes` `[m, k]` with `scales` `[m, ceil(k/128)]`, as
    /// [`crate::Activations::prepare`] does: the same bits.
    ///
    /// # Panics
    /// If the lengths do not go together.
    pub fn quantise(
        &self,
        x: View<'_, f32>,
        k: usize,
        format: ScaleFormat,
        codes: &mut ViewMut<'_, u8>,
        scales: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        assert_eq!(x.len(), codes.len(), "values and codes");
        if x.is_empty() {
            return Ok(());
        }
        assert!(k > 0 && x.len().is_multiple_of(k), "{} values in rows of {k}", x.len());
        let blocks = x.len() / k * k.div_ceil(BLOCK);
        assert_eq!(scales.len(), blocks, "a scale per 128 channels");
        let power_of_two = u32::from(format == ScaleFormat::Ue8m0);
        let vector = u32::from(x.rows_by_four(k) && codes.view().rows_by_four(k));
        // SAFETY: a warp of eight per scale; lengths checked above.
        unsafe {
            launch!(self, quantise_e4m3, Grid::line(blocks.div_ceil(8), 256);
                x.address(), size(k), size(blocks), vector, fp8::ACTIVATION_AMAX_MIN, power_of_two,
                codes.address(), scales.address())
        }
    }

    /// Rounds every value to bf16 bits, nearest even.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn round_bf16(&self, x: View<'_, f32>, out: &mut ViewMut<'_, u16>) -> Result<(), CudaError> {
        assert_eq!(x.len(), out.len(), "values in and out");
        if x.is_empty() {
            return Ok(());
        }
        // SAFETY: a thread a value, none past the length.
        unsafe {
            launch!(self, round_bf16, Grid::values(x.len()); x.address(), x.len() as u64, out.address())
        }
    }

    /// Rounds every value to the nearest bf16 in place: what a value suffers that goes over the wire as bf16.
    pub fn round_to_bf16(&self, x: &mut ViewMut<'_, f32>) -> Result<(), CudaError> {
        if x.is_empty() {
            return Ok(());
        }
        // SAFETY: a thread a value, none past the length.
        unsafe { launch!(self, round_bf16_in_place, Grid::values(x.len()); x.address(), x.len() as u64) }
    }
}
