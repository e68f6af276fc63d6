//! An MTP module's layer input: token and state, each normed, projected together.

use compute::cuda::{Activations, Buffer, CudaError, Device, Matrix, NormHalf};

use super::Module;
use crate::cuda::inputs::StepInputs;
use crate::cuda::weights::Norm;

/// What the module's projection reads.
pub(super) struct Pairing {
    /// `[rows + 1, hidden]`: the state before each row's token. One more: a step's own states are put down a row further.
    pub states: Buffer<f32>,
    /// `[rows, hidden]`
    embedded: Buffer<f32>,
    /// `[rows, 2 * hidden]`: embedding, then state, both normed.
    pairs: Buffer<f32>,
    input: Activations,
}

impl Pairing {
    pub fn new(device: &Device, module: &Module, hidden: usize, rows_max: usize) -> Result<Self, CudaError> {
        let mut states = device.alloc((rows_max + 1) * hidden)?;
        // Padding rows are computed too: from numbers.
        device.fill(&mut states.view_mut(), 0)?;
        Ok(Self {
            states,
            embedded: device.alloc(rows_max * hidden)?,
            pairs: device.alloc(rows_max * 2 * hidden)?,
            input: Activations::new(device, module.project.input, rows_max, 2 * hidden)?,
        })
    }

    /// The module's layer input from the tokens of `inputs` and the states, into `out` `[rows, hidden]`.
    pub fn run(
        &mut self,
        device: &Device,
        (module, main_embedding): (&Module, &Matrix),
        inputs: &StepInputs,
        out: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        let Self { states, embedded, pairs, input } = self;
        let rows = inputs.rows();
        let size = rows * module.project.matrix.rows();
        let table = module.embedding.as_ref().unwrap_or(main_embedding);
        device.embed(table, inputs.tokens(), &mut embedded.slice_mut(0..size))?;
        let half = |x, norm| {
            let Norm { weight, eps }: &Norm = norm;
            NormHalf { x, weight: weight.view(), eps: *eps }
        };
        // The embedding comes first in the checkpoints' eh_proj, though the paper prints the hidden state first.
        let left = half(embedded.slice(0..size), &module.embedding_norm);
        let right = half(states.slice(0..size), &module.hidden_norm);
        device.norm_pair(left, right, &mut pairs.slice_mut(0..2 * size))?;
        device.prepare(pairs.slice(0..2 * size), input)?;
        device.linear(&module.project.matrix, input.inputs(rows), &mut out.slice_mut(0..size))
    }
}
