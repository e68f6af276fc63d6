//! Multi-head latent attention in its absorbed form.
//!
//! The cache holds one row per token: the normed latent and one rotated key that all heads share. A query head is taken
//! into the latent space by `W_UK`, attends to the rows, and comes back through `W_UV`. A step first stores the rows of
//! all its tokens and then attends, so that a token reads itself and its chunk's earlier tokens exactly as any later
//! step will: rounded as the cache format rounds.

use compute::{Activations, HeadMatrices, InputRows, MlaShape, RopeRows, RopeTable};
use model::ModelConfig;
use model::schema::{AttentionTensors, QueryTensors};

use super::{Linear, Loader, RmsNorm, StepContext, absorb, expect_input_format};
use crate::error::EngineError;
use crate::stage::Stage;

/// The norms of the two latents use this whatever `rms_norm_eps` says (transformers and DeepSeek's own code).
pub(crate) const LATENT_NORM_EPS: f32 = 1e-6;

/// Attention of one layer.
pub(crate) struct Attention {
    query: Query,
    /// Hidden state to latent and shared key.
    compress: Linear,
    latent_norm: RmsNorm,
    /// `W_UK`, `[heads, latent, nope]`.
    key_up: HeadMatrices,
    /// `W_UV`, `[heads, v, latent]`.
    value_up: HeadMatrices,
    output: Linear,
    nope: usize,
    shape: MlaShape,
}

/// How queries are projected.
enum Query {
    /// V2-Lite.
    Direct(Linear),
    /// Over a normed latent of its own.
    LowRank { down: Linear, norm: RmsNorm, up: Linear },
}

impl Attention {
    /// `first`: the cache row with which every sequence begins in this layer.
    pub fn load(
        loader: &mut Loader<'_>,
        tensors: &AttentionTensors,
        first: usize,
    ) -> Result<Self, EngineError> {
        let config = loader.config();
        let query = match &tensors.query {
            QueryTensors::Direct(q_proj) => Query::Direct(loader.linear(q_proj)?),
            QueryTensors::LowRank { q_a_proj, q_a_layernorm, q_b_proj } => Query::LowRank {
                down: loader.linear(q_a_proj)?,
                norm: loader.norm(q_a_layernorm, LATENT_NORM_EPS)?,
                up: loader.linear(q_b_proj)?,
            },
        };
        let compress = loader.linear(&tensors.kv_a_proj_with_mqa)?;
        expect_input_format(&compress, &tensors.kv_a_proj_with_mqa, query.first().input_format())?;
        let latent_norm = loader.norm(&tensors.kv_a_layernorm, LATENT_NORM_EPS)?;
        let (key_up, value_up) = absorb(loader, &tensors.kv_b_proj)?;
        Ok(Self {
            query,
            compress,
            latent_norm,
            key_up,
            value_up,
            output: loader.linear(&tensors.o_proj)?,
            nope: config.qk_nope_head_dim,
            shape: MlaShape {
                heads: config.num_attention_heads,
                latent: config.kv_lora_rank,
                rope: config.qk_rope_head_dim,
                scale: config.softmax_scale(),
                first,
            },
        })
    }

    /// `out[rows, hidden]` from `normed[rows, hidden]`; stores the rows' cache entries on the way.
    pub fn forward(
        &self,
        step: &mut StepContext<'_>,
        layer: usize,
        workspace: &mut AttentionWorkspace,
        normed: &[f32],
        out: &mut [f32],
    ) {
        self.prepare(step, workspace, normed);
        let rows = step.batch.rows();
        let first = self.query.first();
        let AttentionWorkspace { activations, compressed, query_latents, queries, .. } = &mut *workspace;
        let projected = match &self.query {
            Query::Direct(_) => queries,
            Query::LowRank { .. } => query_latents,
        };
        let compressed = &mut compressed[..rows * self.compress.width()];
        step.cpu.linear_pair([
            self.compress.job(activations, InputRows::All, compressed),
            first.job(activations, InputRows::All, &mut projected[..rows * first.width()]),
        ]);
        step.observer.stage(Stage::Compress);
        self.store(step, layer, workspace);
        self.project_queries(step, workspace);
        step.observer.stage(Stage::Queries);
        self.attend(step, layer, workspace, out);
    }

    /// The part of [`Self::forward`] that stores the rows' cache entries, which need no attention.
    pub fn store_rows(
        &self,
        step: &mut StepContext<'_>,
        layer: usize,
        workspace: &mut AttentionWorkspace,
        normed: &[f32],
    ) {
        self.prepare(step, workspace, normed);
        let compressed = &mut workspace.compressed[..step.batch.rows() * self.compress.width()];
        self.compress.forward(step.cpu, &workspace.activations, compressed);
        step.observer.stage(Stage::Compress);
        self.store(step, layer, workspace);
    }

    /// The hidden state as the projections want it.
    fn prepare(&self, step: &StepContext<'_>, workspace: &mut AttentionWorkspace, normed: &[f32]) {
        let (rows, width) = (step.batch.rows(), self.compress.input_width());
        workspace.activations.prepare(step.cpu, normed, rows, width, self.compress.input_format());
    }

    /// Latent and rotated key of every row into the cache, from what is in `workspace.compressed`.
    fn store(&self, step: &mut StepContext<'_>, layer: usize, workspace: &mut AttentionWorkspace) {
        let MlaShape { latent, rope, .. } = self.shape;
        let rows = step.batch.rows();
        let compressed = &workspace.compressed[..rows * (latent + rope)];
        let latents = &mut workspace.latents[..rows * latent];
        let normed_latents = &mut workspace.normed_latents[..rows * latent];
        let keys = &mut workspace.keys[..rows * rope];
        split_rows(compressed, latent, latents, rope, keys);
        // The norm covers the latent alone, not the key.
        self.latent_norm.forward(step.cpu, latents, normed_latents);
        let whole = RopeRows { per_position: 1, stride: rope, offset: 0 };
        step.cpu.rope_interleaved(keys, whole, &step.batch.positions, step.rope);
        let mut cache = step.kv.view_mut();
        let entries = normed_latents.chunks_exact(latent).zip(keys.chunks_exact(rope));
        for (&slot, (latent, key)) in step.batch.slots.iter().zip(entries) {
            step.cpu.kv_write(&mut cache, layer, slot, latent, key);
        }
        step.observer.stage(Stage::CacheRows);
        step.observer.layer_done(layer, step.kv);
    }

    /// Rotated queries from what [`Self::forward`] projected, split into the part taken into the latent space and the rotary part.
    fn project_queries(&self, step: &StepContext<'_>, workspace: &mut AttentionWorkspace) {
        let MlaShape { heads, rope, .. } = self.shape;
        let rows = step.batch.rows();
        let AttentionWorkspace {
            activations,
            query_latents,
            normed_query_latents,
            queries,
            nope,
            rope: rotary,
            ..
        } = workspace;
        let queries = &mut queries[..rows * heads * (self.nope + rope)];
        match &self.query {
            // Already there: they are projected along with the latents.
            Query::Direct(_) => {}
            Query::LowRank { down, norm, up } => {
                let latents = &query_latents[..rows * down.width()];
                let normed = &mut normed_query_latents[..rows * down.width()];
                norm.forward(step.cpu, latents, normed);
                activations.prepare(step.cpu, normed, rows, down.width(), up.input_format());
                up.forward(step.cpu, activations, queries);
            }
        }
        let nope = &mut nope[..rows * heads * self.nope];
        let rotary = &mut rotary[..rows * heads * rope];
        split_rows(queries, self.nope, nope, rope, rotary);
        let per_head = RopeRows { per_position: heads, stride: rope, offset: 0 };
        step.cpu.rope_interleaved(rotary, per_head, &step.batch.positions, step.rope);
    }

    /// From split queries to the output projection.
    fn attend(
        &self,
        step: &mut StepContext<'_>,
        layer: usize,
        workspace: &mut AttentionWorkspace,
        out: &mut [f32],
    ) {
        let MlaShape { heads, latent, rope, .. } = self.shape;
        let rows = step.batch.rows();
        let nope = &workspace.nope[..rows * heads * self.nope];
        let rotary = &workspace.rope[..rows * heads * rope];
        let absorbed = &mut workspace.absorbed[..rows * heads * latent];
        let attended = &mut workspace.attended[..rows * heads * latent];
        let values = &mut workspace.values[..rows * self.output.input_width()];
        step.cpu.head_matmul(&self.key_up, nope, rows, absorbed);
        step.observer.stage(Stage::Absorb);
        let cache = step.kv.view();
        step.cpu.mla_attention(&cache, layer, self.shape, step.attention_rows, absorbed, rotary, attended);
        step.observer.stage(Stage::Attention);
        step.cpu.head_matmul(&self.value_up, attended, rows, values);
        step.observer.stage(Stage::Values);
        let activations = &mut workspace.activations;
        activations.prepare(step.cpu, values, rows, self.output.input_width(), self.output.input_format());
        self.output.forward(step.cpu, activations, out);
    }
}

impl Query {
    /// The matrix that reads the hidden state.
    fn first(&self) -> &Linear {
        match self {
            Self::Direct(query) => query,
            Self::LowRank { down, .. } => down,
        }
    }
}

/// Splits rows `[a | b]` of widths `a_width` and `b_width` into two contiguous arrays.
fn split_rows(rows: &[f32], a_width: usize, a: &mut [f32], b_width: usize, b: &mut [f32]) {
    let targets = a.chunks_exact_mut(a_width).zip(b.chunks_exact_mut(b_width));
    for (row, (a, b)) in rows.chunks_exact(a_width + b_width).zip(targets) {
        a.copy_from_slice(&row[..a_width]);
        b.copy_from_slice(&row[a_width..]);
    }
}

/// Rotation angles of every position that the model has.
pub(crate) fn rope_table(config: &ModelConfig) -> RopeTable {
    RopeTable::new(&config.rope_frequencies(), config.rope_gain(), config.max_position_embeddings)
}

/// Intermediate values of attention for up to `rows_max` rows; widths per row in the comments.
pub(crate) struct AttentionWorkspace {
    activations: Activations,
    /// q_lora, as projected.
    query_latents: Vec<f32>,
    /// q_lora
    normed_query_latents: Vec<f32>,
    /// heads × (nope + rope)
    queries: Vec<f32>,
    /// heads × nope
    nope: Vec<f32>,
    /// heads × rope
    rope: Vec<f32>,
    /// latent + rope
    compressed: Vec<f32>,
    /// latent, as projected.
    latents: Vec<f32>,
    /// latent
    normed_latents: Vec<f32>,
    /// rope
    keys: Vec<f32>,
    /// heads × latent: queries in the latent space.
    absorbed: Vec<f32>,
    /// heads × latent: what the heads read.
    attended: Vec<f32>,
    /// heads × v
    values: Vec<f32>,
}

impl AttentionWorkspace {
    pub fn new(config: &ModelConfig, rows_max: usize) -> Self {
        let rows = |width: usize| vec![0.0; rows_max * width];
        let heads = config.num_attention_heads;
        let (latent, rope) = (config.kv_lora_rank, config.qk_rope_head_dim);
        let query_latent = config.q_lora_rank.unwrap_or(0);
        Self {
            activations: Activations::with_rows(rows_max),
            query_latents: rows(query_latent),
            normed_query_latents: rows(query_latent),
            queries: rows(heads * config.q_head_dim()),
            nope: rows(heads * config.qk_nope_head_dim),
            rope: rows(heads * rope),
            compressed: rows(latent + rope),
            latents: rows(latent),
            normed_latents: rows(latent),
            keys: rows(rope),
            absorbed: rows(heads * latent),
            attended: rows(heads * latent),
            values: rows(heads * config.v_head_dim),
        }
    }
}
