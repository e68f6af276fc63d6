//! Which tensors a configuration asks for: names, shapes and what may be stored there.
//!
//! The one source of tensor names. [`crate::Checkpoint::open`] checks a directory against it, the engine loads by it,
//! and `trireme inspect` lists it, so the three cannot disagree. Shapes are `[out, in]`, row-major, as on disk.

use crate::config::{ModelConfig, TopkMethod};
use crate::ids::ExpertId;

/// What may be stored under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// A projection: BF16 or F32, or F8_E4M3 with a `…_scale_inv` tensor beside it.
    Matrix,
    /// BF16 or F32 and never quantised: norms, router, embedding, head, `eh_proj`.
    Plain,
}

/// One tensor that a configuration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What may be stored there.
    pub kind: TensorKind,
    /// Whether it may be left out: MTP's copies of embedding and head.
    pub optional: bool,
}

impl TensorSpec {
    fn new(kind: TensorKind, prefix: &str, name: &str, shape: &[usize]) -> Self {
        Self { name: format!("{prefix}{name}.weight"), shape: shape.to_vec(), kind, optional: false }
    }

    fn matrix(prefix: &str, name: &str, out: usize, input: usize) -> Self {
        Self::new(TensorKind::Matrix, prefix, name, &[out, input])
    }

    fn plain(prefix: &str, name: &str, shape: &[usize]) -> Self {
        Self::new(TensorKind::Plain, prefix, name, shape)
    }

    /// Name of the FP8 scales of this matrix.
    pub fn scale_name(&self) -> String {
        format!("{}_scale_inv", self.name)
    }

    /// Shape of the FP8 scales of this matrix: one per block of 128×128, partial blocks included.
    pub fn scale_shape(&self) -> Vec<usize> {
        self.shape.iter().map(|n| n.div_ceil(crate::Fp8Quantization::BLOCK)).collect()
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors outside the decoder layers.
#[derive(Clone, Debug)]
pub struct GlobalTensors {
    /// `[vocab, hidden]`
    pub embed_tokens: TensorSpec,
    /// `[hidden]`
    pub norm: TensorSpec,
    /// `[vocab, hidden]`
    pub lm_head: TensorSpec,
}

/// Tensors of one decoder layer, but for its routed experts.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// `[hidden]`
    pub input_layernorm: TensorSpec,
    /// Latent attention.
    pub attention: AttentionTensors,
    /// `[hidden]`
    pub post_attention_layernorm: TensorSpec,
    /// What follows attention.
    pub ffn: FfnTensors,
    /// What an MTP layer has on top.
    pub mtp: Option<MtpTensors>,
}

/// Tensors of latent attention.
#[derive(Clone, Debug)]
pub struct AttentionTensors {
    /// Hidden state to query heads.
    pub query: QueryTensors,
    /// `[kv_lora + rope, hidden]`: latent first, then the shared rotary key.
    pub kv_a_proj_with_mqa: TensorSpec,
    /// `[kv_lora]`
    pub kv_a_layernorm: TensorSpec,
    /// `[heads × (nope + v), kv_lora]`: per head key rows, then value rows.
    pub kv_b_proj: TensorSpec,
    /// `[hidden, heads × v]`
    pub o_proj: TensorSpec,
}

/// The query projection.
#[derive(Clone, Debug)]
pub enum QueryTensors {
    /// `[heads × (nope + rope), hidden]`
    Direct(TensorSpec),
    /// In two steps over a latent.
    LowRank {
        /// `[q_lora, hidden]`
        q_a_proj: TensorSpec,
        /// `[q_lora]`
        q_a_layernorm: TensorSpec,
        /// `[heads × (nope + rope), q_lora]`
        q_b_proj: TensorSpec,
    },
}

/// Dense or routed.
#[derive(Clone, Debug)]
pub enum FfnTensors {
    /// One MLP.
    Dense(MlpTensors),
    /// Router and shared experts; the routed ones are [`expert`]'s.
    Moe {
        /// Router weight, `[experts, hidden]`. Not to be confused with an MLP's `gate_proj`.
        gate: TensorSpec,
        /// `[experts]`, for `noaux_tc` alone.
        correction_bias: Option<TensorSpec>,
        /// All shared experts as one MLP; `None` without shared experts.
        shared: Option<MlpTensors>,
    },
}

/// A SwiGLU MLP: `down(silu(gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct MlpTensors {
    /// `[inner, hidden]`
    pub gate_proj: TensorSpec,
    /// `[inner, hidden]`
    pub up_proj: TensorSpec,
    /// `[hidden, inner]`
    pub down_proj: TensorSpec,
}

/// What an MTP layer has besides a decoder layer.
#[derive(Clone, Debug)]
pub struct MtpTensors {
    /// `[vocab, hidden]`; absent: the main model's.
    pub embed_tokens: TensorSpec,
    /// `[hidden]`, norm of the next token's embedding.
    pub enorm: TensorSpec,
    /// `[hidden]`, norm of the main model's hidden state.
    pub hnorm: TensorSpec,
    /// `[hidden, 2 × hidden]`: embedding half first.
    pub eh_proj: TensorSpec,
    /// `[hidden]`
    pub head_norm: TensorSpec,
    /// `[vocab, hidden]`; absent: the main model's.
    pub head: TensorSpec,
}

/// Tensors outside the decoder layers.
pub fn global(config: &ModelConfig) -> GlobalTensors {
    let table = [config.vocab_size, config.hidden_size];
    GlobalTensors {
        embed_tokens: TensorSpec::plain("model.", "embed_tokens", &table),
        norm: TensorSpec::plain("model.", "norm", &[config.hidden_size]),
        lm_head: TensorSpec::plain("", "lm_head", &table),
    }
}

/// Tensors of decoder layer `layer`, an MTP layer where `layer >= num_hidden_layers`.
pub fn layer(config: &ModelConfig, layer: usize) -> LayerTensors {
    let prefix = layer_prefix(layer);
    let norm = |name: &str| TensorSpec::plain(&prefix, name, &[config.hidden_size]);
    LayerTensors {
        input_layernorm: norm("input_layernorm"),
        attention: attention(config, &prefix),
        post_attention_layernorm: norm("post_attention_layernorm"),
        ffn: ffn(config, layer),
        mtp: (layer >= config.num_hidden_layers).then(|| mtp(config, &prefix)),
    }
}

/// Tensors of one routed expert of MoE layer `layer`.
pub fn expert(config: &ModelConfig, layer: usize, expert: ExpertId) -> MlpTensors {
    let prefix = format!("{}mlp.experts.{expert}.", layer_prefix(layer));
    mlp(config, &prefix, config.moe_intermediate_size)
}

/// Every tensor that the configuration asks for, layer by layer, experts and MTP layers included. The scales of FP8
/// matrices are not listed: whether a matrix has them shows in its dtype ([`TensorSpec::scale_name`]).
///
/// Lazy: a hostile configuration asks for hundreds of millions, and the first missing one ends the check.
pub fn all(config: &ModelConfig) -> impl Iterator<Item = TensorSpec> + '_ {
    let GlobalTensors { embed_tokens, norm, lm_head } = global(config);
    let layers = (0..config.layers_with_mtp()).flat_map(move |index| {
        let experts = if config.is_moe_layer(index) { config.n_routed_experts } else { 0 };
        // ExpertId holds every index: n_routed_experts is at most 65,535.
        let experts = (0..experts).flat_map(move |e| expert(config, index, ExpertId(e as u16)).into_specs());
        layer(config, index).into_specs().into_iter().chain(experts)
    });
    [embed_tokens].into_iter().chain(layers).chain([norm, lm_head])
}

/// Prefix of the names of all tensors of a layer.
pub(crate) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

impl LayerTensors {
    /// The layer's tensors as a list.
    pub fn into_specs(self) -> Vec<TensorSpec> {
        let mut specs = vec![self.input_layernorm];
        let AttentionTensors { query, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj } =
            self.attention;
        match query {
            QueryTensors::Direct(q_proj) => specs.push(q_proj),
            QueryTensors::LowRank { q_a_proj, q_a_layernorm, q_b_proj } => {
                specs.extend([q_a_proj, q_a_layernorm, q_b_proj]);
            }
        }
        specs.extend([kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj, self.post_attention_layernorm]);
        match self.ffn {
            FfnTensors::Dense(mlp) => specs.extend(mlp.into_specs()),
            FfnTensors::Moe { gate, correction_bias, shared } => {
                specs.push(gate);
                specs.extend(correction_bias);
                specs.extend(shared.into_iter().flat_map(MlpTensors::into_specs));
            }
        }
        if let Some(MtpTensors { embed_tokens, enorm, hnorm, eh_proj, head_norm, head }) = self.mtp {
            specs.extend([embed_tokens, enorm, hnorm, eh_proj, head_norm, head]);
        }
        specs
    }
}

impl MlpTensors {
    /// The MLP's tensors as a list: gate, up, down.
    pub fn into_specs(self) -> [TensorSpec; 3] {
        [self.gate_proj, self.up_proj, self.down_proj]
    }
}

fn attention(config: &ModelConfig, layer_prefix: &str) -> AttentionTensors {
    let prefix = format!("{layer_prefix}self_attn.");
    let (hidden, latent) = (config.hidden_size, config.kv_lora_rank);
    let heads = config.num_attention_heads;
    let query_rows = heads * config.q_head_dim();
    let query = match config.q_lora_rank {
        None => QueryTensors::Direct(TensorSpec::matrix(&prefix, "q_proj", query_rows, hidden)),
        Some(rank) => QueryTensors::LowRank {
            q_a_proj: TensorSpec::matrix(&prefix, "q_a_proj", rank, hidden),
            q_a_layernorm: TensorSpec::plain(&prefix, "q_a_layernorm", &[rank]),
            q_b_proj: TensorSpec::matrix(&prefix, "q_b_proj", query_rows, rank),
        },
    };
    let kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim);
    let row = latent + config.qk_rope_head_dim;
    AttentionTensors {
        query,
        kv_a_proj_with_mqa: TensorSpec::matrix(&prefix, "kv_a_proj_with_mqa", row, hidden),
        kv_a_layernorm: TensorSpec::plain(&prefix, "kv_a_layernorm", &[latent]),
        kv_b_proj: TensorSpec::matrix(&prefix, "kv_b_proj", kv_rows, latent),
        o_proj: TensorSpec::matrix(&prefix, "o_proj", hidden, heads * config.v_head_dim),
    }
}

fn ffn(config: &ModelConfig, layer: usize) -> FfnTensors {
    let prefix = format!("{}mlp.", layer_prefix(layer));
    if !config.is_moe_layer(layer) {
        return FfnTensors::Dense(mlp(config, &prefix, config.intermediate_size));
    }
    let experts = config.n_routed_experts;
    let correction_bias = (config.topk_method == TopkMethod::NoauxTc).then(|| TensorSpec {
        name: format!("{prefix}gate.e_score_correction_bias"),
        shape: vec![experts],
        kind: TensorKind::Plain,
        optional: false,
    });
    let shared = (config.n_shared_experts > 0)
        .then(|| mlp(config, &format!("{prefix}shared_experts."), config.shared_intermediate_size()));
    FfnTensors::Moe {
        gate: TensorSpec::plain(&prefix, "gate", &[experts, config.hidden_size]),
        correction_bias,
        shared,
    }
}

fn mlp(config: &ModelConfig, prefix: &str, inner: usize) -> MlpTensors {
    MlpTensors {
        gate_proj: TensorSpec::matrix(prefix, "gate_proj", inner, config.hidden_size),
        up_proj: TensorSpec::matrix(prefix, "up_proj", inner, config.hidden_size),
        down_proj: TensorSpec::matrix(prefix, "down_proj", config.hidden_size, inner),
    }
}

fn mtp(config: &ModelConfig, prefix: &str) -> MtpTensors {
    let hidden = config.hidden_size;
    let shared =
        |name| TensorSpec { optional: true, ..TensorSpec::plain(prefix, name, &[config.vocab_size, hidden]) };
    MtpTensors {
        embed_tokens: shared("embed_tokens"),
        enorm: TensorSpec::plain(prefix, "enorm", &[hidden]),
        hnorm: TensorSpec::plain(prefix, "hnorm", &[hidden]),
        eh_proj: TensorSpec::plain(prefix, "eh_proj", &[hidden, 2 * hidden]),
        head_norm: TensorSpec::plain(prefix, "shared_head.norm", &[hidden]),
        head: shared("shared_head.head"),
    }
}

#[cfg(test)]
mod tests;
