//! The SwiGLU MLP: dense layers, shared experts and routed experts alike.

use compute::{ActivationFormat, Activations, Cpu, InputRows, LinearJob};
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

    /// Inner width.
    pub fn inner_width(&self) -> usize {
        self.down.input_width()
    }

    /// What the inner values are rounded to.
    pub fn inner_format(&self) -> ActivationFormat {
        self.down.input_format()
    }

    /// The first half, as products to be run together: `gate` and `up` are `[rows, inner]`.
    pub fn gate_job<'a>(
        &'a self,
        input: &'a Activations,
        rows: InputRows<'a>,
        gate: &'a mut [f32],
    ) -> LinearJob<'a> {
        self.gate.job(input, rows, gate)
    }

    /// As [`Self::gate_job`].
    pub fn up_job<'a>(
        &'a self,
        input: &'a Activations,
        rows: InputRows<'a>,
        up: &'a mut [f32],
    ) -> LinearJob<'a> {
        self.up.job(input, rows, up)
    }

    /// The second half: `out[rows, hidden]` of rows of `inner` that [`GatedMlpWorkspace::activate`] made.
    pub fn down_job<'a>(
        &'a self,
        inner: &'a Activations,
        rows: InputRows<'a>,
        out: &'a mut [f32],
    ) -> LinearJob<'a> {
        self.down.job(inner, rows, out)
    }

    /// All rows of `input`: `out[m, hidden]`.
    pub fn forward(
        &self,
        cpu: &Cpu,
        workspace: &mut GatedMlpWorkspace,
        input: &Activations,
        out: &mut [f32],
    ) {
        let width = self.inner_width();
        let (gate, up) = workspace.gate_and_up(input.rows(), width);
        cpu.linear_pair([self.gate_job(input, InputRows::All, gate), self.up_job(input, InputRows::All, up)]);
        let inner = workspace.activate(cpu, input.rows(), width, self.inner_format());
        self.down.forward(cpu, inner, out);
    }
}

/// Intermediate values of a [`GatedMlp`]; grows to the largest batch and then stays.
#[derive(Default)]
pub(crate) struct GatedMlpWorkspace {
    gate: Vec<f32>,
    up: Vec<f32>,
    activations: Activations,
}

impl GatedMlpWorkspace {
    /// Room for `rows` rows of `width` intermediate channels.
    pub fn with_capacity(rows: usize, width: usize) -> Self {
        let mut workspace = Self { activations: Activations::with_rows(rows), ..Self::default() };
        workspace.gate_and_up(rows, width);
        workspace
    }

    /// `[rows, width]` of gates, and as many of what they let through.
    pub fn gate_and_up(&mut self, rows: usize, width: usize) -> (&mut [f32], &mut [f32]) {
        let size = rows * width;
        for buffer in [&mut self.gate, &mut self.up] {
            if buffer.len() < size {
                buffer.resize(size, 0.0);
            }
        }
        (&mut self.gate[..size], &mut self.up[..size])
    }

    /// `silu(gate) * up` of what is in the buffers, as the second half wants it.
    pub fn activate(
        &mut self,
        cpu: &Cpu,
        rows: usize,
        width: usize,
        format: ActivationFormat,
    ) -> &Activations {
        let Self { gate, up, activations } = self;
        let halves = [&gate[..rows * width], &up[..rows * width]];
        activations.prepare_swiglu(cpu, halves, rows, width, format);
        activations
    }
}
