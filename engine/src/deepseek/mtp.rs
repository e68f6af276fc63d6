//! The multi-token-prediction module: one more decoder layer that drafts the token after the next.
//!
//! Row i sees the main model's hidden state of position i after its final norm, and the token at position i + 1. It runs
//! at position i and keeps its own layer in the KV cache, the one after the main model's last.

use compute::{Activations, Matrix};
use model::ModelConfig;
use model::schema::{self, MtpTensors};

use super::{Layer, LayerWorkspace, Linear, Loader, RmsNorm, StepContext, embed};
use crate::batch::SequenceInput;
use crate::error::{EngineError, InvalidBatch};
use crate::experts::ExpertsError;
use crate::step::MtpInput;

/// The first MTP module of a checkpoint.
pub(crate) struct MtpModule {
    /// `None`: the main model's, which a checkpoint need not store twice.
    pub embedding: Option<Matrix>,
    embedding_norm: RmsNorm,
    hidden_norm: RmsNorm,
    project: Linear,
    layer: Layer,
    pub norm: RmsNorm,
    /// `None`: the main model's.
    pub head: Option<Linear>,
}

impl MtpModule {
    pub fn load(loader: &mut Loader<'_>) -> Result<Self, EngineError> {
        let config = loader.config();
        let index = config.num_hidden_layers;
        let tensors = schema::layer(config, index);
        let MtpTensors { embed_tokens, enorm, hnorm, eh_proj, head_norm, head } =
            tensors.mtp.as_ref().ok_or(EngineError::NoMtp)?;
        let stored = |loader: &Loader<'_>, spec| loader.contains(spec).then_some(spec);
        Ok(Self {
            embedding: stored(loader, embed_tokens).map(|spec| loader.table(spec)).transpose()?,
            embedding_norm: loader.norm(enorm, config.rms_norm_eps)?,
            hidden_norm: loader.norm(hnorm, config.rms_norm_eps)?,
            project: loader.linear(eh_proj)?,
            layer: Layer::load(loader, index, &tensors)?,
            norm: loader.norm(head_norm, config.rms_norm_eps)?,
            head: stored(loader, head).map(|spec| loader.linear(spec)).transpose()?,
        })
    }

    /// Runs the module on the batch's tokens and the hidden states that [`MtpWorkspace::gather_hidden`] took; the result
    /// is in `out` `[rows, hidden]`, before [`Self::norm`].
    pub fn forward(
        &self,
        step: &mut StepContext<'_>,
        layer_workspace: &mut LayerWorkspace,
        workspace: &mut MtpWorkspace,
        main_embedding: &Matrix,
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let MtpWorkspace { hidden, embedded, normed, pairs, input } = workspace;
        let hidden = &hidden[..out.len()];
        let width = self.project.width();
        let embedded = &mut embedded[..out.len()];
        let normed = &mut normed[..out.len()];
        let pairs = &mut pairs[..2 * out.len()];
        embed(self.embedding.as_ref().unwrap_or(main_embedding), &step.batch.tokens, embedded);
        // The embedding comes first in the checkpoints' eh_proj, though the paper prints the hidden state first.
        self.embedding_norm.forward(step.cpu, embedded, normed);
        for (pair, row) in pairs.chunks_exact_mut(2 * width).zip(normed.chunks_exact(width)) {
            pair[..width].copy_from_slice(row);
        }
        self.hidden_norm.forward(step.cpu, hidden, normed);
        for (pair, row) in pairs.chunks_exact_mut(2 * width).zip(normed.chunks_exact(width)) {
            pair[width..].copy_from_slice(row);
        }
        input.prepare(step.cpu, pairs, step.batch.rows(), 2 * width, self.project.input_format());
        self.project.forward(step.cpu, input, out);
        self.layer.forward(step, layer_workspace, out)
    }
}

/// Intermediate values of the module's input projection for up to `rows_max` rows.
pub(crate) struct MtpWorkspace {
    /// `[rows, hidden]`: the main model's.
    hidden: Vec<f32>,
    /// `[rows, hidden]`
    embedded: Vec<f32>,
    /// `[rows, hidden]`
    normed: Vec<f32>,
    /// `[rows, 2 * hidden]`: embedding, then hidden state.
    pairs: Vec<f32>,
    input: Activations,
}

impl MtpWorkspace {
    pub fn new(config: &ModelConfig, rows_max: usize) -> Self {
        let rows = |width: usize| vec![0.0; rows_max * width];
        Self {
            hidden: rows(config.hidden_size),
            embedded: rows(config.hidden_size),
            normed: rows(config.hidden_size),
            pairs: rows(2 * config.hidden_size),
            input: Activations::new(),
        }
    }

    /// Takes the hidden states of a batch that has been formed.
    pub fn gather_hidden(&mut self, batch: &[MtpInput<'_>], hidden_size: usize) -> Result<(), InvalidBatch> {
        let mut start = 0;
        for (sequence, MtpInput { sequence: SequenceInput { tokens, .. }, hidden }) in
            batch.iter().enumerate()
        {
            let tokens = tokens.len();
            if hidden.len() != tokens * hidden_size {
                return Err(InvalidBatch::Hidden { sequence, values: hidden.len(), tokens, hidden_size });
            }
            self.hidden[start..start + hidden.len()].copy_from_slice(hidden);
            start += hidden.len();
        }
        Ok(())
    }
}
