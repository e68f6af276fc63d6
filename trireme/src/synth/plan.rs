//! Every tensor of a synthetic checkpoint in the order of the schema, and what it is filled with.
//!
//! Variances are chosen so that activations stay near one at any depth: projections have 1/fan-in, and those that add to
//! the residual stream are smaller by the square root of their number, so that the embedding of a token stays visible to
//! every router and tokens go on being routed apart.

use model::schema::{self, FfnTensors, LayerTensors, MlpTensors, QueryTensors, TensorKind, TensorSpec};
use model::{Dtype, ExpertId, ModelConfig};

use super::WeightKind;

/// Standard deviation of a router's logits over the experts.
pub const ROUTER_DEVIATION: f64 = 1.5;
/// Standard deviation of the logits over the vocabulary: some tokens are likely, none is certain.
const HEAD_DEVIATION: f64 = 3.0;

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    /// Normal values of this standard deviation.
    Normal(f64),
    /// The embedding: normal values of deviation one; one channel may be a constant one.
    Embedding,
    /// A norm's weights: one, give or take a tenth.
    Norm,
    /// The router of a layer.
    Router(usize),
    /// The correction bias of a layer's router.
    Bias(usize),
    /// Scales of the FP8 matrix of this deviation.
    Scales(f64),
}

/// One tensor to write.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// How it is stored.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it holds.
    pub fill: Fill,
}

impl Planned {
    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * element_bytes(self.dtype)
    }
}

/// Bytes of one element.
pub fn element_bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F8E4m3 => 1,
        Dtype::Bf16 => 2,
        Dtype::F32 => 4,
    }
}

/// Everything that the schema asks for. MTP's copies of embedding and head are left out: they would be copies.
pub fn tensors(config: &ModelConfig, weights: WeightKind) -> Vec<Planned> {
    let mut plan = Plan { config, weights, tensors: Vec::new() };
    let schema::GlobalTensors { embed_tokens, norm, lm_head } = schema::global(config);
    plan.plain(embed_tokens, Fill::Embedding);
    for layer in 0..config.layers_with_mtp() {
        plan.layer(layer);
    }
    plan.plain(norm, Fill::Norm);
    plan.plain(lm_head, Fill::Normal(HEAD_DEVIATION / (config.hidden_size as f64).sqrt()));
    plan.tensors
}

struct Plan<'a> {
    config: &'a ModelConfig,
    weights: WeightKind,
    tensors: Vec<Planned>,
}

impl Plan<'_> {
    fn layer(&mut self, layer: usize) {
        let LayerTensors { input_layernorm, attention, post_attention_layernorm, ffn, mtp } =
            schema::layer(self.config, layer);
        self.plain(input_layernorm, Fill::Norm);
        match attention.query {
            QueryTensors::Direct(q_proj) => self.matrix(q_proj, 1.0),
            QueryTensors::LowRank { q_a_proj, q_a_layernorm, q_b_proj } => {
                self.matrix(q_a_proj, 1.0);
                self.plain(q_a_layernorm, Fill::Norm);
                self.matrix(q_b_proj, 1.0);
            }
        }
        self.matrix(attention.kv_a_proj_with_mqa, 1.0);
        self.plain(attention.kv_a_layernorm, Fill::Norm);
        self.matrix(attention.kv_b_proj, 1.0);
        self.matrix(attention.o_proj, self.residual_gain());
        self.plain(post_attention_layernorm, Fill::Norm);
        match ffn {
            FfnTensors::Dense(mlp) => self.mlp(mlp),
            FfnTensors::Moe { gate, correction_bias, shared } => {
                self.plain(gate, Fill::Router(layer));
                if let Some(bias) = correction_bias {
                    // In f32, as released: its steps are smaller than what bf16 resolves.
                    self.push(bias, Dtype::F32, Fill::Bias(layer));
                }
                if let Some(shared) = shared {
                    self.mlp(shared);
                }
                for expert in 0..self.config.n_routed_experts {
                    self.mlp(schema::expert(self.config, layer, ExpertId(expert as u16)));
                }
            }
        }
        if let Some(mtp) = mtp {
            for norm in [mtp.enorm, mtp.hnorm, mtp.head_norm] {
                self.plain(norm, Fill::Norm);
            }
            let fan_in = 2 * self.config.hidden_size;
            self.plain(mtp.eh_proj, Fill::Normal((fan_in as f64).powf(-0.5)));
        }
    }

    fn mlp(&mut self, mlp: MlpTensors) {
        self.matrix(mlp.gate_proj, 1.0);
        self.matrix(mlp.up_proj, 1.0);
        self.matrix(mlp.down_proj, self.residual_gain());
    }

    /// Two branches a layer add to the residual stream.
    fn residual_gain(&self) -> f64 {
        (2.0 * self.config.num_hidden_layers as f64).powf(-0.5)
    }

    fn matrix(&mut self, spec: TensorSpec, gain: f64) {
        debug_assert_eq!(spec.kind, TensorKind::Matrix);
        let deviation = gain / (spec.shape[1] as f64).sqrt();
        if self.weights == WeightKind::Bf16 {
            return self.push(spec, Dtype::Bf16, Fill::Normal(deviation));
        }
        let scales = Planned {
            name: spec.scale_name(),
            dtype: Dtype::F32,
            shape: spec.scale_shape(),
            fill: Fill::Scales(deviation),
        };
        self.push(spec, Dtype::F8E4m3, Fill::Normal(deviation));
        self.tensors.push(scales);
    }

    fn plain(&mut self, spec: TensorSpec, fill: Fill) {
        self.push(spec, Dtype::Bf16, fill);
    }

    fn push(&mut self, spec: TensorSpec, dtype: Dtype, fill: Fill) {
        self.tensors.push(Planned { name: spec.name, dtype, shape: spec.shape, fill });
    }
}
