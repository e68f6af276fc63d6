//! The SwiGLU MLP: dense layers, shared experts and routed experts alike.

use compute::{ActivationFormat, Activations, Cpu};
use model::schema::MlpTensors;

use super::{Linear, Loader, expect_input_format};
use crate::error::EngineError;

/// `down(silu(gate x) * up x)`.
pub(crate) struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    pub fn load(loader: &mut Loader<'_>, tensors: &MlpTensors) -> Result<Self, EngineError> {
        let gate = loader.linear(&tensors.gate_proj)?;
        let up = loader.linear(&tensors.up_proj)?;
        expect_input_format(&up, &tensors.up_proj, gate.input_format())?;
        Ok(Self { gate, up, down: loader.linear(&tensors.down_proj)? })
    }

    /// What the input must be prepared in.
    pub fn input_format(&self) -> ActivationFormat {
        self.gate.input_format()
    }

    /// Refuses an MLP that would need its input in another format than its neighbours.
    pub fn expect_input_format(
        &self,
        tensors: &MlpTensors,
        format: ActivationFormat,
    ) -> Result<(), EngineError> {
        expect_input_format(&self.gate, &tensors.gate_proj, format)
    }

    /// All rows of `input`: `out[m, hidden]`.
    pub fn forward(
        &self,
        cpu: &Cpu,
        workspace: &mut GatedMlpWorkspace,
        input: &Activations,
        out: &mut [f32],
    ) {
        let (gate, up) = workspace.gate_and_up(input.rows(), self.gate.width());
        self.gate.forward(cpu, input, gate);
        self.up.forward(cpu, input, up);
        self.finish(cpu, workspace, input.rows(), out);
    }

    /// Some rows of `input`: `out[rows.len(), hidden]`. A row's result is the same as in [`Self::forward`].
    pub fn forward_rows(
        &self,
        cpu: &Cpu,
        workspace: &mut GatedMlpWorkspace,
        input: &Activations,
        rows: &[u32],
        out: &mut [f32],
    ) {
        let (gate, up) = workspace.gate_and_up(rows.len(), self.gate.width());
        self.gate.forward_rows(cpu, input, rows, gate);
        self.up.forward_rows(cpu, input, rows, up);
        self.finish(cpu, workspace, rows.len(), out);
    }

    /// From the two projections to the output.
    fn finish(&self, cpu: &Cpu, workspace: &mut GatedMlpWorkspace, rows: usize, out: &mut [f32]) {
        let width = self.down.input_width();
        let GatedMlpWorkspace { gate, up, product, activations } = workspace;
        let product = &mut product[..rows * width];
        cpu.silu_mul(&gate[..rows * width], &up[..rows * width], product);
        activations.prepare(cpu, product, rows, width, self.down.input_format());
        self.down.forward(cpu, activations, out);
    }
}

/// Intermediate values of a [`GatedMlp`]; grows to the largest batch and then stays.
#[derive(Default)]
pub(crate) struct GatedMlpWorkspace {
    gate: Vec<f32>,
    up: Vec<f32>,
    product: Vec<f32>,
    activations: Activations,
}

impl GatedMlpWorkspace {
    /// Room for `rows` rows of `width` intermediate channels.
    pub fn with_capacity(rows: usize, width: usize) -> Self {
        let mut workspace = Self::default();
        workspace.gate_and_up(rows, width);
        workspace
    }

    fn gate_and_up(&mut self, rows: usize, width: usize) -> (&mut [f32], &mut [f32]) {
        let size = rows * width;
        for buffer in [&mut self.gate, &mut self.up, &mut self.product] {
            if buffer.len() < size {
                buffer.resize(size, 0.0);
            }
        }
        (&mut self.gate[..size], &mut self.up[..size])
    }
}
