//! The SwiGLU MLP of dense layers and shared experts.

use compute::cuda::{Activations, Buffer, CudaError, Device, InputFormat};
use model::schema::MlpTensors;

use super::weights::{Linear, Weights};
use crate::error::EngineError;

/// `down(silu(gate x) * up x)`.
pub(super) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    pub fn load(weights: &mut Weights<'_, '_>, tensors: &MlpTensors) -> Result<Self, EngineError> {
        Ok(Self {
            gate: weights.linear(&tensors.gate_proj)?,
            up: weights.linear(&tensors.up_proj)?,
            down: weights.linear(&tensors.down_proj)?,
        })
    }

    /// What the input must be rounded to.
    pub fn input_format(&self) -> InputFormat {
        self.gate.input
    }

    /// `out[rows, hidden]`.
    pub fn forward(
        &self,
        device: &Device,
        work: &mut MlpWorkspace,
        input: &Activations,
        rows: usize,
        out: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let width = self.down.matrix.cols();
        let gate_up = &mut work.gate_up.slice_mut(0..rows * 2 * width);
        device.linear_pair(&self.gate.matrix, &self.up.matrix, input.inputs(rows), gate_up)?;
        device.swiglu(work.gate_up.slice(0..rows * 2 * width), None, &mut work.inside)?;
        let out = &mut out.slice_mut(0..rows * self.down.matrix.rows());
        device.linear(&self.down.matrix, work.inside.inputs(rows), out)
    }
}

/// Intermediate values of an [`Mlp`] of one width for up to `rows_max` rows.
pub(super) struct MlpWorkspace {
    gate_up: Buffer<f32>,
    inside: Activations,
}

impl MlpWorkspace {
    pub fn new(
        device: &Device,
        format: InputFormat,
        rows_max: usize,
        width: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            gate_up: device.alloc(rows_max * 2 * width)?,
            inside: Activations::new(device, format, rows_max, width.max(1))?,
        })
    }
}
