//! Multi-head latent attention in its absorbed form, as `deepseek::attention` has it, over the device's operators.

use compute::cuda::{
    Activations, AttentionKernel, Buffer, CacheRows, CudaError, Device, HeadMatrices, InputFormat, Inputs,
    LatentRows, MlaParts, MlaQueries, MlaRows, Outputs, QueryParts, QueryShape,
};
use compute::{KvGeometry, MlaShape};
use model::ModelConfig;
use model::schema::{AttentionTensors, QueryTensors};

use super::step::Step;
use super::weights::{Linear, Norm, Weights};
use crate::deepseek::LATENT_NORM_EPS;
use crate::error::EngineError;
use crate::stage::Stage;

/// Attention of one layer.
pub(super) struct Attention {
    query: Query,
    compress: Linear,
    latent_norm: Norm,
    /// `W_UK`, `[heads, latent, nope]`.
    key_up: HeadMatrices,
    /// `W_UV`, `[heads, v, latent]`.
    value_up: HeadMatrices,
    output: Linear,
    queries: QueryShape,
    shape: MlaShape,
}

/// How queries are projected.
enum Query {
    /// V2-Lite.
    Direct(Linear),
    /// Over a normed latent of its own.
    LowRank { down: Linear, norm: Norm, up: Linear },
}

impl Attention {
    /// `first`: the first slot of a sequence that is attended to.
    pub fn load(
        weights: &mut Weights<'_, '_>,
        tensors: &AttentionTensors,
        kernel: AttentionKernel,
        first: usize,
    ) -> Result<Self, EngineError> {
        let query = match &tensors.query {
            QueryTensors::Direct(q_proj) => Query::Direct(weights.linear(q_proj)?),
            QueryTensors::LowRank { q_a_proj, q_a_layernorm, q_b_proj } => Query::LowRank {
                down: weights.linear(q_a_proj)?,
                norm: weights.norm(q_a_layernorm, LATENT_NORM_EPS)?,
                up: weights.linear(q_b_proj)?,
            },
        };
        let compress = weights.linear(&tensors.kv_a_proj_with_mqa)?;
        let latent_norm = weights.norm(&tensors.kv_a_layernorm, LATENT_NORM_EPS)?;
        let heads = weights.absorbed(&tensors.kv_b_proj, kernel == AttentionKernel::Wgmma)?;
        if kernel == AttentionKernel::Wgmma && !weights.heads_fit_matrix_unit(&heads) {
            return Err(EngineError::MixedFormats { tensor: tensors.kv_b_proj.name.clone() });
        }
        let output = weights.linear(&tensors.o_proj)?;
        let config = weights.config();
        Ok(Self {
            query,
            compress,
            latent_norm,
            key_up: heads.0,
            value_up: heads.1,
            output,
            queries: QueryShape {
                heads: config.num_attention_heads,
                nope: config.qk_nope_head_dim,
                rope: config.qk_rope_head_dim,
            },
            shape: MlaShape {
                heads: config.num_attention_heads,
                latent: config.kv_lora_rank,
                rope: config.qk_rope_head_dim,
                scale: config.softmax_scale(),
                first,
            },
        })
    }

    /// What the hidden state must be rounded to.
    pub fn input_format(&self) -> InputFormat {
        self.compress.input
    }

    /// From the rounded hidden states in `input` to what is added to them, in `out` `[rows, hidden]`; stores the rows'
    /// cache entries on the way.
    pub fn forward(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut AttentionWorkspace,
        input: &Activations,
        out: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        self.project(step, layer, work, input, true)?;
        let (device, rows) = (step.device, step.inputs.rows());
        let QueryShape { heads, nope, rope } = self.queries;
        let queries = &mut work.queries.slice_mut(0..rows * heads * (nope + rope));
        match &self.query {
            Query::Direct(query) => device.linear(&query.matrix, input.inputs(rows), queries)?,
            Query::LowRank { up, .. } => device.linear(&up.matrix, work.query_input.inputs(rows), queries)?,
        }
        self.attend(step, layer, work)?;
        let out = &mut out.slice_mut(0..rows * self.output.matrix.rows());
        device.linear(&self.output.matrix, work.value_input.inputs(rows), out)?;
        step.stage(Stage::Output)
    }

    /// The part of [`Self::forward`] that stores the rows' cache entries, which need no attention.
    pub fn store(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut AttentionWorkspace,
        input: &Activations,
    ) -> Result<(), CudaError> {
        self.project(step, layer, work, input, false)
    }

    /// Stores the rows' cache entries; with `queries` also their query latents in `work.query_input`, if they have any.
    fn project(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut AttentionWorkspace,
        input: &Activations,
        queries: bool,
    ) -> Result<(), CudaError> {
        let (device, rows) = (step.device, step.inputs.rows());
        let read = input.inputs(rows);
        let width = self.compressed_width();
        let compressed = &mut work.compressed.slice_mut(0..rows * width);
        match &self.query {
            Query::LowRank { down, .. } => {
                device.linear_pair(&down.matrix, &self.compress.matrix, read, compressed)?;
            }
            Query::Direct(_) => device.linear(&self.compress.matrix, read, compressed)?,
        }
        step.stage(Stage::Compress)?;

        let cache = CacheRows {
            pool: &mut step.pool.view_mut(),
            geometry: step.geometry,
            layer,
            slots: step.inputs.slots(),
        };
        let latents = LatentRows {
            x: work.compressed.slice(0..rows * width),
            stride: width,
            first: width - self.compress.matrix.rows(),
            norm: (self.latent_norm.weight.view(), self.latent_norm.eps),
            positions: step.inputs.positions(),
            table: step.rope,
        };
        match &self.query {
            Query::LowRank { norm, .. } if queries => {
                let norm = (norm.weight.view(), norm.eps);
                device.latent_write_and_norm(cache, latents, norm, &mut work.query_input)?;
            }
            _ => device.latent_write(cache, latents)?,
        }
        step.layer_stored()?;
        step.stage(Stage::CacheRows)
    }

    /// Values of a row of [`AttentionWorkspace::compressed`]: the query's latent, then the row's own and its key.
    fn compressed_width(&self) -> usize {
        let query = match &self.query {
            Query::Direct(_) => 0,
            Query::LowRank { down, .. } => down.matrix.rows(),
        };
        query + self.compress.matrix.rows()
    }

    /// From projected queries to rounded values.
    fn attend(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut AttentionWorkspace,
    ) -> Result<(), CudaError> {
        let (device, rows) = (step.device, step.inputs.rows());
        let QueryShape { heads, nope, rope } = self.queries;
        let latents = rows * heads * self.shape.latent;
        let (nopes, ropes) = (rows * heads * nope, rows * heads * rope);
        let mla = MlaRows {
            tables: step.inputs.tables(),
            starts: step.inputs.starts(),
            contexts: step.inputs.contexts(),
            context_max: step.context_max,
            unpacked: step.inputs.unpacked(step.geometry.block_tokens),
        };
        let queries = work.queries.slice(0..rows * heads * (nope + rope));
        let positions = step.inputs.positions();
        let values = &mut work.values.slice_mut(0..rows * self.output.matrix.cols());
        match &mut work.core {
            Core::F32 { nope, rope, absorbed, attended } => {
                let parts = QueryParts::F32(&mut nope.slice_mut(0..nopes), &mut rope.slice_mut(0..ropes));
                device.split_queries(queries, self.queries, positions, step.rope, parts)?;
                step.stage(Stage::Queries)?;
                let to = Outputs::F32(&mut absorbed.slice_mut(0..latents));
                device.head_matmul(&self.key_up, Inputs::F32(nope.slice(0..nopes)), rows, to)?;
                step.stage(Stage::Absorb)?;
                let (latent, rope) = (absorbed.slice(0..latents), rope.slice(0..ropes));
                let out = &mut attended.slice_mut(0..latents);
                let queries = MlaQueries::F32 { latent, rope, out };
                device.mla_attention(step.pool.view(), step.geometry, layer, self.shape, mla, queries)?;
                step.stage(Stage::Attention)?;
                let read = Inputs::F32(attended.slice(0..latents));
                device.head_matmul(&self.value_up, read, rows, Outputs::F32(values))?;
                device.prepare(values.view(), &mut work.value_input)?;
            }
            Core::Bf16 { nope, rope, absorbed, attended, parts } => {
                step.stage(Stage::Queries)?;
                let parts_of_queries = (&mut nope.slice_mut(0..nopes), &mut rope.slice_mut(0..ropes));
                let latent = &mut absorbed.slice_mut(0..latents);
                let rotation = (positions, step.rope);
                device.absorb_queries(
                    &self.key_up,
                    queries,
                    self.queries,
                    rotation,
                    parts_of_queries,
                    latent,
                )?;
                step.stage(Stage::Absorb)?;
                let (latent, rope) = (absorbed.slice(0..latents), rope.slice(0..ropes));
                let out = &mut attended.slice_mut(0..latents);
                let queries = MlaQueries::Bf16 { latent, rope, out, parts };
                device.mla_attention(step.pool.view(), step.geometry, layer, self.shape, mla, queries)?;
                step.stage(Stage::Attention)?;
                let read = attended.slice(0..latents);
                device.head_matmul_rounded(&self.value_up, read, rows, values, &mut work.value_input)?;
            }
        }
        step.stage(Stage::Values)
    }
}

/// Intermediate values of attention for up to `rows_max` rows; all layers share one.
pub(super) struct AttentionWorkspace {
    /// q_lora, then latent and rope.
    compressed: Buffer<f32>,
    query_input: Activations,
    /// heads × (nope + rope)
    queries: Buffer<f32>,
    core: Core,
    /// heads × v
    values: Buffer<f32>,
    value_input: Activations,
}

/// Around the attention kernel, in its format; widths per row in the comments.
enum Core {
    F32 {
        /// heads × nope
        nope: Buffer<f32>,
        /// heads × rope
        rope: Buffer<f32>,
        /// heads × latent: queries in the latent space.
        absorbed: Buffer<f32>,
        /// heads × latent: what the heads read.
        attended: Buffer<f32>,
    },
    Bf16 {
        nope: Buffer<u16>,
        rope: Buffer<u16>,
        absorbed: Buffer<u16>,
        attended: Buffer<u16>,
        parts: MlaParts,
    },
}

/// (query, part) pairs that attention keeps at once at most: 1 GiB. A prompt's rows with long contexts take turns.
const PARTS_MAX: usize = 1 << 20;

impl AttentionWorkspace {
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        geometry: &KvGeometry,
        format: InputFormat,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        let heads = config.num_attention_heads;
        let query_latent = config.q_lora_rank.unwrap_or(0);
        let latents = rows_max * heads * config.kv_lora_rank;
        let (nopes, ropes) =
            (rows_max * heads * config.qk_nope_head_dim, rows_max * heads * config.qk_rope_head_dim);
        let core = match device.attention_kernel(geometry) {
            AttentionKernel::Plain => Core::F32 {
                nope: device.alloc(nopes)?,
                rope: device.alloc(ropes)?,
                absorbed: device.alloc(latents)?,
                attended: device.alloc(latents)?,
            },
            AttentionKernel::Wgmma => {
                let row = heads * MlaParts::of(config.max_position_embeddings.next_power_of_two());
                let pairs = (rows_max * row).min(PARTS_MAX).max(row);
                Core::Bf16 {
                    nope: device.alloc(nopes)?,
                    rope: device.alloc(ropes)?,
                    absorbed: device.alloc(latents)?,
                    attended: device.alloc(latents)?,
                    parts: MlaParts::new(device, pairs, 1)?,
                }
            }
        };
        Ok(Self {
            compressed: device
                .alloc(rows_max * (query_latent + config.kv_lora_rank + config.qk_rope_head_dim))?,
            query_input: Activations::new(device, format, rows_max, query_latent.max(1))?,
            queries: device.alloc(rows_max * heads * config.q_head_dim())?,
            core,
            values: device.alloc(rows_max * heads * config.v_head_dim)?,
            value_input: Activations::new(device, format, rows_max, heads * config.v_head_dim)?,
        })
    }
}
