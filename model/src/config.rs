//! `config.json` of the DeepSeek-V3 and V2 classes, checked whole.
//!
//! A value that would change the arithmetic in a way that is not implemented is refused by its name; nothing is
//! guessed. Defaults, where the field may be absent, are those of `transformers` for the same class.

mod fields;
mod quantization;
mod rope;

use std::ops::RangeInclusive;

use serde_json::{Value, json};

pub(crate) use fields::Fields;
use fields::invalid;
pub use quantization::{Fp8Quantization, ScaleFormat};
pub use rope::{RopeConfig, Yarn};

use crate::error::ConfigError;
use crate::ids::TokenId;

/// 16 Mi positions: a hundred times the longest released context, and still an exact f32.
const POSITIONS_MAX: usize = 1 << 24;

/// The model class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `deepseek_v2`: V2, V2-Lite, V2.5, Coder-V2.
    V2,
    /// `deepseek_v3`: V3, R1, V3.1 and checkpoints of the class with other numbers.
    V3,
}

/// What turns router logits into scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Each expert on its own.
    Sigmoid,
    /// Over all experts of the layer.
    Softmax,
}

/// How a token's experts are chosen from the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopkMethod {
    /// V3: score plus correction bias; groups by the sum of their two best.
    NoauxTc,
    /// V2-Lite: the best scores.
    Greedy,
    /// V2: groups by their best score.
    GroupLimitedGreedy,
}

/// The model's shape. All sizes are in elements, all counts plain; every one is within the bounds of `from_json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model class.
    pub architecture: Architecture,
    /// Rows of the embedding and of the head. At least the tokenizer's vocabulary, often a little more.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Decoder layers, without MTP's.
    pub num_hidden_layers: usize,
    /// Query heads. MLA has no separate key-value heads.
    pub num_attention_heads: usize,
    /// Rank of the query projection; `None`: one plain matrix (V2-Lite).
    pub q_lora_rank: Option<usize>,
    /// Width of the cached latent.
    pub kv_lora_rank: usize,
    /// Channels of a query or key head without position.
    pub qk_nope_head_dim: usize,
    /// Channels of a query or key head with rotary position. Even.
    pub qk_rope_head_dim: usize,
    /// Channels of a value head.
    pub v_head_dim: usize,
    /// Logical experts of a MoE layer.
    pub n_routed_experts: usize,
    /// Experts that every token passes, stored as one MLP of their joint width. May be 0.
    pub n_shared_experts: usize,
    /// Routed experts per token.
    pub num_experts_per_tok: usize,
    /// Groups of consecutive experts. 1 where groups are not used.
    pub n_group: usize,
    /// Groups that a token may use.
    pub topk_group: usize,
    /// Router logits to scores.
    pub scoring: Scoring,
    /// Scores to experts.
    pub topk_method: TopkMethod,
    /// Whether the chosen weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// What the routed experts' weights are multiplied by in the end.
    pub routed_scaling_factor: f32,
    /// Layers at the start that are dense.
    pub first_k_dense_replace: usize,
    /// Of the remaining layers, those whose index it divides are MoE.
    pub moe_layer_freq: usize,
    /// Epsilon of the residual stream's norms. The norms of the two latents use 1e-6 whatever this says.
    pub rms_norm_eps: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Context, prompt and completion together.
    pub max_position_embeddings: usize,
    /// MTP layers, ids `num_hidden_layers..`. [`crate::Checkpoint`] sets it to 0 where the weights were left out.
    pub num_nextn_predict_layers: usize,
    /// Begin of sequence.
    pub bos_token_id: Option<TokenId>,
    /// Ends of sequence, ascending. [`crate::Checkpoint`] adds generation_config.json's.
    pub eos_token_ids: Vec<TokenId>,
    /// How FP8 weights are scaled; `None`: the checkpoint is BF16.
    pub quantization: Option<Fp8Quantization>,
}

impl ModelConfig {
    /// Reads and checks a whole `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] names the first field that is missing, of the wrong type, out of range, in conflict with
    /// another one, or asks for something that is not implemented.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let root: Value = serde_json::from_str(text)?;
        let fields = Fields::new(&root)?;
        let architecture = architecture(&fields)?;
        refuse_unsupported(&fields)?;

        let required = |field: &str, range: RangeInclusive<usize>| {
            fields.integer(field, range)?.ok_or_else(|| fields.missing(field))
        };
        let count =
            |field: &str, range: RangeInclusive<usize>, default: usize| -> Result<usize, ConfigError> {
                Ok(fields.integer(field, range)?.unwrap_or(default))
            };
        let v3 = architecture == Architecture::V3;

        // Bounds: some ten times what the largest released model of any family has. They keep every product of two
        // or three of them far from 2^63 and a hostile file from asking for terabytes.
        let vocab_size = required("vocab_size", 1..=4_194_304)?;
        let num_hidden_layers = required("num_hidden_layers", 1..=1024)?;
        let default_scoring = if v3 { Scoring::Sigmoid } else { Scoring::Softmax };
        let default_topk = if v3 { TopkMethod::NoauxTc } else { TopkMethod::Greedy };
        let config = Self {
            architecture,
            vocab_size,
            hidden_size: required("hidden_size", 1..=131_072)?,
            intermediate_size: required("intermediate_size", 1..=1_048_576)?,
            moe_intermediate_size: required("moe_intermediate_size", 1..=1_048_576)?,
            num_hidden_layers,
            num_attention_heads: required("num_attention_heads", 1..=4096)?,
            // 0 is DeepSeek's own spelling of "none".
            q_lora_rank: fields.integer("q_lora_rank", 0..=65_536)?.filter(|rank| *rank > 0),
            kv_lora_rank: required("kv_lora_rank", 1..=65_536)?,
            qk_nope_head_dim: required("qk_nope_head_dim", 1..=4096)?,
            qk_rope_head_dim: required("qk_rope_head_dim", 2..=4096)?,
            v_head_dim: required("v_head_dim", 1..=4096)?,
            n_routed_experts: required("n_routed_experts", 1..=65_535)?,
            n_shared_experts: count("n_shared_experts", 0..=64, 0)?,
            num_experts_per_tok: required("num_experts_per_tok", 1..=256)?,
            n_group: count("n_group", 1..=65_535, 1)?,
            topk_group: count("topk_group", 1..=65_535, 1)?,
            scoring: fields
                .choice("scoring_func", &[("sigmoid", Scoring::Sigmoid), ("softmax", Scoring::Softmax)])?
                .unwrap_or(default_scoring),
            topk_method: fields
                .choice(
                    "topk_method",
                    &[
                        ("noaux_tc", TopkMethod::NoauxTc),
                        ("greedy", TopkMethod::Greedy),
                        ("group_limited_greedy", TopkMethod::GroupLimitedGreedy),
                    ],
                )?
                .unwrap_or(default_topk),
            norm_topk_prob: fields.boolean("norm_topk_prob")?.unwrap_or(v3),
            routed_scaling_factor: fields.number("routed_scaling_factor", 1e-6..=1e6)?.unwrap_or(1.0) as f32,
            first_k_dense_replace: required("first_k_dense_replace", 0..=num_hidden_layers)?,
            moe_layer_freq: count("moe_layer_freq", 1..=1024, 1)?,
            rms_norm_eps: fields.number("rms_norm_eps", 1e-12..=1e-2)?.unwrap_or(1e-6) as f32,
            rope: RopeConfig::from_fields(&fields)?,
            max_position_embeddings: required("max_position_embeddings", 1..=POSITIONS_MAX)?,
            num_nextn_predict_layers: count("num_nextn_predict_layers", 0..=16, 0)?,
            bos_token_id: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos_token_ids: ascending(fields.token_ids("eos_token_id", vocab_size)?),
            quantization: Fp8Quantization::from_fields(&fields)?,
        };
        config.check_relations()?;
        Ok(config)
    }

    /// Whether decoder layer `layer` has experts. MTP layers (`num_hidden_layers..`) always do.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        layer >= self.num_hidden_layers
            || (layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq))
    }

    /// What attention scores are multiplied by before the softmax, in the absorbed form as well:
    /// `q_head_dim^-0.5`, times YaRN's mscale squared.
    pub fn softmax_scale(&self) -> f32 {
        ((self.q_head_dim() as f64).powf(-0.5) * self.rope.softmax_gain()) as f32
    }

    /// Angle per position of each rotated pair, `[qk_rope_head_dim / 2]`, in radians.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        self.rope.frequencies(self.qk_rope_head_dim)
    }

    /// What cos and sin of the rotary embedding are multiplied by: 1 in every released model.
    pub fn rope_gain(&self) -> f64 {
        self.rope.gain()
    }

    /// Channels of a query or key head.
    pub fn q_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Decoder layers with MTP's.
    pub fn layers_with_mtp(&self) -> usize {
        self.num_hidden_layers + self.num_nextn_predict_layers
    }

    /// Inner width of the shared experts' one MLP; 0 without shared experts.
    pub fn shared_intermediate_size(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }

    /// The layers that have experts, MTP's included, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers_with_mtp()).filter(|layer| self.is_moe_layer(*layer))
    }

    fn check_relations(&self) -> Result<(), ConfigError> {
        let check = |holds: bool, field: &str, expected: &str, found: usize| match holds {
            true => Ok(()),
            false => Err(invalid(field, expected, &found.to_string())),
        };
        let rope = self.qk_rope_head_dim;
        check(rope.is_multiple_of(2), "qk_rope_head_dim", "even: channels are rotated in pairs", rope)?;
        let (experts, groups) = (self.n_routed_experts, self.n_group);
        check(experts.is_multiple_of(groups), "n_group", "a divisor of `n_routed_experts`", groups)?;
        check(self.topk_group <= groups, "topk_group", "at most `n_group`", self.topk_group)?;
        let per_group = experts / groups;
        let reachable = match self.topk_method {
            TopkMethod::Greedy => experts,
            TopkMethod::GroupLimitedGreedy => self.topk_group * per_group,
            TopkMethod::NoauxTc => {
                let expected = "such that a group has two experts: its score is the sum of its two best";
                check(per_group >= 2, "n_group", expected, groups)?;
                self.topk_group * per_group
            }
        };
        let topk = self.num_experts_per_tok;
        check(topk <= reachable, "num_experts_per_tok", "at most the experts of `topk_group` groups", topk)?;
        Ok(())
    }
}

/// The class, by `model_type` and `architectures`. Derived models (Kimi-K2 and others) keep the architecture's name
/// under a model type of their own.
fn architecture(fields: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let by_type = match fields.text("model_type")? {
        Some("deepseek_v3") => Some(Architecture::V3),
        Some("deepseek_v2") => Some(Architecture::V2),
        _ => None,
    };
    let names: &[Value] = match fields.value("architectures") {
        None => &[],
        Some(Value::Array(names)) => names,
        Some(other) => return Err(fields.invalid("architectures", "a list of names", other)),
    };
    let by_name = names.iter().find_map(|name| match name.as_str() {
        Some("DeepseekV3ForCausalLM") => Some(Architecture::V3),
        Some("DeepseekV2ForCausalLM") => Some(Architecture::V2),
        _ => None,
    });
    match (by_type, by_name) {
        (Some(a), Some(b)) if a != b => {
            Err(fields.invalid("architectures", "in agreement with `model_type`", &json!(names)))
        }
        (Some(a), _) | (None, Some(a)) => Ok(a),
        (None, None) => match fields.value("model_type") {
            None => Err(fields.missing("model_type")),
            Some(other) => Err(fields.invalid("model_type", "`deepseek_v3` or `deepseek_v2`", other)),
        },
    }
}

/// Switches of which the released models use one side, and the other is not implemented.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    fields.only("hidden_act", json!("silu"))?;
    fields.only("attention_bias", json!(false))?;
    fields.only("tie_word_embeddings", json!(false))?;
    // transformers' name for pairs (x0, x1), (x2, x3), …; false would be another checkpoint layout.
    fields.only("rope_interleave", json!(true))?;
    if let (Some(heads), Some(kv_heads)) =
        (fields.value("num_attention_heads"), fields.value("num_key_value_heads"))
        && heads != kv_heads
    {
        return Err(fields.invalid("num_key_value_heads", "equal to `num_attention_heads`", kv_heads));
    }
    Ok(())
}

fn ascending(mut ids: Vec<TokenId>) -> Vec<TokenId> {
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests;
