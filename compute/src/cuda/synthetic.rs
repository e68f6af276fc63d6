//! Weights made on the device from a seed, for measurements without a checkpoint.

use super::launch::{Grid, launch};
use super::matrix::Stack;
use super::{CudaError, Device, ExpertMatrices, HeadMatrices, Matrix, ViewMut};
use crate::WeightFormat;

/// Blocks of a launch that fills memory.
const BLOCKS: usize = 132 * 16;
/// Standard deviation of E4M3 codes before their scale: the largest values stay below 448.
const CODES_DEVIATION: f32 = 64.0;

impl Device {
    /// About normal values.
    pub fn fill_normal(
        &self,
        out: &mut ViewMut<'_, f32>,
        seed: u64,
        mean: f32,
        deviation: f32,
    ) -> Result<(), CudaError> {
        if out.is_empty() {
            return Ok(());
        }
        let grid = Grid::line(BLOCKS, 256);
        // SAFETY: threads stride over the length.
        unsafe { launch!(self, synthetic_f32, grid; out.address(), out.len() as u64, seed, mean, deviation) }
    }

    /// About normal weights with a variance of one over the input width, so that a product keeps its inputs' size.
    pub fn fill_matrix(&self, matrix: &mut Matrix, seed: u64) -> Result<(), CudaError> {
        self.fill_stack(&mut matrix.0, seed)
    }

    /// As [`Self::fill_matrix`], other ones for each expert.
    pub fn fill_experts(&self, matrices: &mut ExpertMatrices, seed: u64) -> Result<(), CudaError> {
        self.fill_stack(&mut matrices.0, seed)
    }

    /// As [`Self::fill_matrix`], for each head.
    ///
    /// # Panics
    /// If the matrices are not bf16.
    pub fn fill_heads(&self, matrices: &mut HeadMatrices, seed: u64) -> Result<(), CudaError> {
        assert!(matrices.bf16, "bf16 matrices");
        let deviation = (matrices.in_dim as f32).sqrt().recip();
        let (address, len) = (matrices.weights.view().address(), matrices.weights.len() as u64 / 2);
        // SAFETY: threads stride over the length.
        unsafe { launch!(self, synthetic_bf16, Grid::line(BLOCKS, 256); address, len, seed, deviation) }
    }

    fn fill_stack(&self, stack: &mut Stack, seed: u64) -> Result<(), CudaError> {
        let deviation = (stack.cols as f32).sqrt().recip();
        let len = (stack.count * stack.rows * stack.cols) as u64;
        let (weights, scales) = stack.addresses();
        let grid = || Grid::line(BLOCKS, 256);
        // SAFETY: threads stride over the length, which is that of the allocations.
        unsafe {
            match stack.format {
                WeightFormat::F32 => {
                    launch!(self, synthetic_f32, grid(); weights, len, seed, 0.0f32, deviation)
                }
                WeightFormat::Bf16 => launch!(self, synthetic_bf16, grid(); weights, len, seed, deviation),
                WeightFormat::Fp8 => {
                    assert!(len.is_multiple_of(4), "weights in fours");
                    launch!(self, synthetic_e4m3, grid(); weights, len, seed, CODES_DEVIATION)?;
                    let (count, scale) = (stack.scales_len() as u64, deviation / CODES_DEVIATION);
                    launch!(self, synthetic_f32, grid(); scales, count, seed ^ 1, scale, 0.0f32)
                }
            }
        }
    }
}
