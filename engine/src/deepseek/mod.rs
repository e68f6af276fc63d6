//! The DeepSeek V2/V3 layers over `compute`'s operators.
//!
//! One arithmetic per position: attention runs in its absorbed form for every row, whether it belongs to a prompt or to
//! a completion, and reads the cache as it is stored, the running chunk's rows included. Nothing here looks at how many
//! rows a step has, so a position's bits do not depend on its company.

mod absorb;
mod attention;
mod dense;
mod moe;
mod mtp;
mod weights;

pub(crate) use absorb::absorb;
pub(crate) use attention::{LATENT_NORM_EPS, rope_table};
pub(crate) use dense::{GatedMlp, GatedMlpWorkspace};
pub(crate) use moe::routing_rule;
pub(crate) use mtp::{MtpModule, MtpWorkspace};
pub(crate) use weights::{Linear, Loader, RmsNorm, expect_input_format};

use attention::{Attention, AttentionWorkspace};
use compute::{Activations, Cpu, Matrix, MlaRow, RopeTable};
use model::schema::{self, FfnTensors, LayerTensors};
use model::{ModelConfig, TokenId};
use moe::{Moe, MoeWorkspace};

use crate::batch::StepBatch;
use crate::error::EngineError;
use crate::experts::{Experts, ExpertsError};
use crate::kv_cache::KvPool;
use crate::stage::Stage;
use crate::step::StepObserver;

/// Bytes done, bytes in all.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// The main model, without its routed experts.
pub(crate) struct DeepSeek {
    pub embedding: Matrix,
    pub layers: Vec<Layer>,
    pub norm: RmsNorm,
    pub head: Linear,
}

impl DeepSeek {
    pub fn load(loader: &mut Loader<'_>) -> Result<Self, EngineError> {
        let config = loader.config();
        let global = schema::global(config);
        let embedding = loader.table(&global.embed_tokens)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(loader, index, &schema::layer(config, index)))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm(&global.norm, config.rms_norm_eps)?;
        let head = loader.linear(&global.lm_head)?;
        Ok(Self { embedding, layers, norm, head })
    }
}

/// Rows of an embedding table, `[tokens, hidden]`.
pub(crate) fn embed(table: &Matrix, tokens: &[TokenId], out: &mut [f32]) {
    for (token, row) in tokens.iter().zip(out.chunks_exact_mut(table.cols())) {
        table.row_f32(token.0 as usize, row);
    }
}

/// What a step lends to every layer.
pub(crate) struct StepContext<'s> {
    pub cpu: &'s Cpu,
    pub kv: &'s mut KvPool,
    pub rope: &'s RopeTable,
    pub experts: &'s mut dyn Experts,
    pub observer: &'s mut dyn StepObserver,
    pub batch: &'s StepBatch,
    /// Each row's view of its sequence's cache.
    pub attention_rows: &'s [MlaRow<'s>],
}

/// One decoder layer: `h += attention(norm(h))`, then `h += ffn(norm(h))`.
pub(crate) struct Layer {
    /// Counted as in the checkpoint; also its place in the KV cache.
    index: usize,
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    ffn: FeedForward,
}

enum FeedForward {
    Dense(GatedMlp),
    Moe(Moe),
}

impl Layer {
    pub fn load(loader: &mut Loader<'_>, index: usize, tensors: &LayerTensors) -> Result<Self, EngineError> {
        let eps = loader.config().rms_norm_eps;
        Ok(Self {
            index,
            input_norm: loader.norm(&tensors.input_layernorm, eps)?,
            // An MTP layer's slot 0 belongs to no position.
            attention: Attention::load(loader, &tensors.attention, usize::from(tensors.mtp.is_some()))?,
            post_attention_norm: loader.norm(&tensors.post_attention_layernorm, eps)?,
            ffn: match &tensors.ffn {
                FfnTensors::Dense(mlp) => FeedForward::Dense(GatedMlp::load(loader, mlp)?),
                FfnTensors::Moe { gate, correction_bias, shared } => {
                    FeedForward::Moe(Moe::load(loader, gate, correction_bias.as_ref(), shared.as_ref())?)
                }
            },
        })
    }

    /// Stores the cache entries of the rows whose input is `hidden` `[rows, hidden_size]`, and computes nothing else.
    pub fn store(&self, step: &mut StepContext<'_>, workspace: &mut LayerWorkspace, hidden: &[f32]) {
        let normed = &mut workspace.normed[..hidden.len()];
        self.input_norm.forward(step.cpu, hidden, normed);
        self.attention.store_rows(step, self.index, &mut workspace.attention, normed);
    }

    /// Runs the layer on `hidden` `[rows, hidden_size]` in place.
    pub fn forward(
        &self,
        step: &mut StepContext<'_>,
        workspace: &mut LayerWorkspace,
        hidden: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let LayerWorkspace { normed, output, attention, mlp_input, mlp, moe } = workspace;
        let normed = &mut normed[..hidden.len()];
        let output = &mut output[..hidden.len()];

        self.input_norm.forward(step.cpu, hidden, normed);
        step.observer.stage(Stage::Norm);
        self.attention.forward(step, self.index, attention, normed, output);
        step.cpu.add_in_place(hidden, output);
        step.observer.stage(Stage::Output);

        self.post_attention_norm.forward(step.cpu, hidden, normed);
        step.observer.stage(Stage::Norm);
        match &self.ffn {
            FeedForward::Dense(dense) => {
                let rows = step.batch.rows();
                mlp_input.prepare(step.cpu, normed, rows, normed.len() / rows, dense.input_format());
                dense.forward(step.cpu, mlp, mlp_input, output);
                step.observer.stage(Stage::Dense);
            }
            FeedForward::Moe(layer) => layer.forward(step, self.index, moe, mlp, normed, output)?,
        }
        step.cpu.add_in_place(hidden, output);
        step.observer.layer_hidden(self.index, hidden);
        Ok(())
    }
}

/// Intermediate values of a layer for up to `rows_max` rows; all layers share one.
pub(crate) struct LayerWorkspace {
    /// `[rows, hidden]`
    normed: Vec<f32>,
    /// `[rows, hidden]`: what a sub-layer adds to the residual stream.
    output: Vec<f32>,
    attention: AttentionWorkspace,
    mlp_input: Activations,
    mlp: GatedMlpWorkspace,
    moe: MoeWorkspace,
}

impl LayerWorkspace {
    pub fn new(config: &ModelConfig, rows_max: usize) -> Self {
        let width_max = config.intermediate_size.max(config.shared_intermediate_size());
        Self {
            normed: vec![0.0; rows_max * config.hidden_size],
            output: vec![0.0; rows_max * config.hidden_size],
            attention: AttentionWorkspace::new(config, rows_max),
            mlp_input: Activations::with_rows(rows_max),
            mlp: GatedMlpWorkspace::with_capacity(rows_max, width_max),
            moe: MoeWorkspace::new(config, rows_max),
        }
    }
}
