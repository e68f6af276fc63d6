//! SwiGLU's product fused with the rounding for the next matrix product.

use super::launch::{Argument, Grid, launch, size};
use super::{Activations, CudaError, Device, InputFormat, View};
use crate::fp8::{self, BLOCK, ScaleFormat};

/// The kernel's parameters; `struct Swiglu` there.
#[repr(C)]
#[derive(Clone, Copy)]
struct Swiglu {
    x: u64,
    row_count: u64,
    y: u64,
    y_bf16: u64,
    codes: u64,
    scales: u64,
    warps: u32,
    dim: u32,
    power_of_two: u32,
    amax_min: f32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Swiglu {}

impl Device {
    /// `out = silu(gate) · up` for rows `x` `[rows, 2 * channels]` of gate, then up. With `row_count`, one number on the
    /// device, rows from that one on are left alone.
    ///
    /// # Panics
    /// If a length does not fit, or `out` wants parts.
    pub fn swiglu(
        &self,
        x: View<'_, f32>,
        row_count: Option<View<'_, u32>>,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let dim = out.channels();
        assert!(x.len().is_multiple_of(2 * dim), "{} values in rows of twice {dim}", x.len());
        let rows = x.len() / (2 * dim);
        if rows == 0 {
            return Ok(());
        }
        assert!(row_count.is_none_or(|count| !count.is_empty()), "a number of rows");
        out.inputs(rows);
        let mut swiglu = Swiglu {
            x: x.address(),
            row_count: row_count.map_or(0, |count| count.address()),
            y: 0,
            y_bf16: 0,
            codes: 0,
            scales: 0,
            warps: size(rows * dim.div_ceil(BLOCK)),
            dim: size(dim),
            power_of_two: 0,
            amax_min: fp8::ACTIVATION_AMAX_MIN,
        };
        match out.format() {
            InputFormat::F32 => swiglu.y = out.f32.view().address(),
            InputFormat::Bf16 => swiglu.y_bf16 = out.bf16.view().address(),
            InputFormat::Fp8(format) => {
                swiglu.power_of_two = u32::from(format == ScaleFormat::Ue8m0);
                swiglu.codes = out.codes.view().address();
                swiglu.scales = out.scales.view().address();
            }
            InputFormat::Parts => panic!("no product takes parts of an MLP's inside"),
        }
        // SAFETY: a warp of eight per 128 channels; lengths checked above.
        unsafe { launch!(self, swiglu, Grid::line((swiglu.warps as usize).div_ceil(8), 256); swiglu) }
    }
}
