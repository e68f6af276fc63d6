//! The multi-token-prediction module: one more decoder layer that drafts the token after the next.
//!
//! It pairs the main model's hidden state of position i, after its final norm, with the token at position i + 1, and runs at
//! position i. Its own layer of the KV cache is the one after the main model's last. There the row of position i lies in
//! slot i + 1, beside the rows of the token that it was made with: so what a block holds follows from the tokens up to
//! its own end, as in every other layer, and a block can be shared by sequences that go on differently. Slot 0 belongs to
//! no position; it is written, so that a block's bytes are determined, and never read.
//!
//! Being a single layer, it needs neither attention nor experts to store a row: [`MtpModule::store`] costs a fraction of
//! [`MtpModule::forward`].

use compute::{Activations, Matrix};
use model::ModelConfig;
use model::schema::{self, MtpTensors};

use super::{Layer, LayerWorkspace, Linear, Loader, RmsNorm, StepContext, embed};
use crate::error::EngineError;
use crate::experts::ExpertsError;

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

    /// Runs the module on the batch's tokens and the hidden states in [`MtpWorkspace::hidden`]; the result is in `out`
    /// `[rows, hidden]`, before [`Self::norm`].
    pub fn forward(
        &self,
        step: &mut StepContext<'_>,
        layer_workspace: &mut LayerWorkspace,
        workspace: &mut MtpWorkspace,
        main_embedding: &Matrix,
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        self.pair(step, workspace, main_embedding, out);
        self.layer.forward(step, layer_workspace, out)
    }

    /// Stores the cache entries that [`Self::forward`] would, and nothing else; `pairs` `[rows, hidden]` is overwritten.
    pub fn store(
        &self,
        step: &mut StepContext<'_>,
        layer_workspace: &mut LayerWorkspace,
        workspace: &mut MtpWorkspace,
        main_embedding: &Matrix,
        pairs: &mut [f32],
    ) {
        self.pair(step, workspace, main_embedding, pairs);
        self.layer.store(step, layer_workspace, pairs);
    }

    /// The layer's input: token and hidden state, each normed, projected together.
    fn pair(
        &self,
        step: &StepContext<'_>,
        workspace: &mut MtpWorkspace,
        main_embedding: &Matrix,
        out: &mut [f32],
    ) {
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
    }
}

/// Intermediate values of the module's input projection for up to `rows_max` rows.
pub(crate) struct MtpWorkspace {
    /// `[rows, hidden]`: the state that each row's token follows.
    pub hidden: Vec<f32>,
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
            input: Activations::with_rows(rows_max),
        }
    }
}
