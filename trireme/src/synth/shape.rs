//! The dimensions of a synthetic model: a released model's, each of them replaceable.

use anyhow::{anyhow, bail};
use model::{ConfigError, ModelConfig};
use serde_json::{Value, json};

/// Begin of sequence; the demo model's, whose tokenizer goes with the weights.
pub const BOS: u32 = 0;
/// End of sequence.
pub const EOS: u32 = 1;

/// The model whose dimensions are the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Like {
    /// 61 layers, 256 experts top-8 in 8 groups, sigmoid router with correction bias.
    DeepseekV3,
    /// 27 layers, 64 experts top-6, softmax router, plain query projection.
    DeepseekV2Lite,
}

/// What projections are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightKind {
    /// E4M3 with a scale per block of 128×128, as V3 was released.
    Fp8,
    /// As V2-Lite was released.
    Bf16,
}

/// Dimensions; each that is left out is that of `--like`.
#[derive(Debug, Clone, clap::Args)]
pub struct Shape {
    /// The model to take dimensions from.
    #[arg(long, value_enum)]
    pub like: Like,
    /// Decoder layers.
    #[arg(long)]
    pub layers: u32,
    /// Of them dense, at the start. Default: the model's, but at most all layers but one.
    #[arg(long)]
    pub dense_layers: Option<u32>,
    /// MTP layers on top; they share embedding and head with the main model.
    #[arg(long, default_value_t = 0)]
    pub mtp: u32,
    /// Width of the residual stream.
    #[arg(long)]
    pub hidden: Option<u32>,
    /// Inner width of a dense layer.
    #[arg(long)]
    pub intermediate: Option<u32>,
    /// Inner width of an expert.
    #[arg(long)]
    pub moe_intermediate: Option<u32>,
    /// Query heads.
    #[arg(long)]
    pub heads: Option<u32>,
    /// Rank of the query projection; 0: one plain matrix.
    #[arg(long)]
    pub q_lora_rank: Option<u32>,
    /// Width of the cached latent.
    #[arg(long)]
    pub kv_lora_rank: Option<u32>,
    /// Channels of a head without position.
    #[arg(long)]
    pub nope_dim: Option<u32>,
    /// Channels of a head with rotary position.
    #[arg(long)]
    pub rope_dim: Option<u32>,
    /// Channels of a value head.
    #[arg(long)]
    pub v_dim: Option<u32>,
    /// Routed experts of a layer.
    #[arg(long)]
    pub experts: Option<u32>,
    /// Shared experts of a layer.
    #[arg(long)]
    pub shared_experts: Option<u32>,
    /// Routed experts of a token.
    #[arg(long)]
    pub topk: Option<u32>,
    /// Groups of experts.
    #[arg(long)]
    pub groups: Option<u32>,
    /// Groups that a token may use.
    #[arg(long)]
    pub topk_groups: Option<u32>,
    /// Token ids.
    #[arg(long)]
    pub vocab: Option<u32>,
    /// Positions.
    #[arg(long)]
    pub context: Option<u32>,
    /// What projections are stored in; embedding, head, norms and routers are BF16 in either.
    #[arg(long, value_enum, default_value_t = WeightKind::Fp8)]
    pub weights: WeightKind,
}

/// Latents wider than this do not fit the operator that writes a cache row.
const KV_LORA_RANK_MAX: u32 = 4096;

/// Which flag sets which field of config.json: an error about a field is told in the words of whoever typed the flag.
const FLAGS: [(&str, &str); 18] = [
    ("num_hidden_layers", "--layers"),
    ("first_k_dense_replace", "--dense-layers"),
    ("num_nextn_predict_layers", "--mtp"),
    ("hidden_size", "--hidden"),
    ("moe_intermediate_size", "--moe-intermediate"),
    ("intermediate_size", "--intermediate"),
    ("num_attention_heads", "--heads"),
    ("q_lora_rank", "--q-lora-rank"),
    ("kv_lora_rank", "--kv-lora-rank"),
    ("qk_nope_head_dim", "--nope-dim"),
    ("qk_rope_head_dim", "--rope-dim"),
    ("v_head_dim", "--v-dim"),
    ("n_routed_experts", "--experts"),
    ("n_shared_experts", "--shared-experts"),
    ("num_experts_per_tok", "--topk"),
    ("n_group", "--groups"),
    ("vocab_size", "--vocab"),
    ("max_position_embeddings", "--context"),
];

impl Shape {
    /// `config.json`, not yet checked.
    pub fn config_json(&self) -> anyhow::Result<Value> {
        if self.layers == 0 {
            bail!("--layers must be 1 or more");
        }
        let mut config = match self.like {
            Like::DeepseekV3 => deepseek_v3(),
            Like::DeepseekV2Lite => deepseek_v2_lite(),
        };
        let dense = config["first_k_dense_replace"].as_u64().unwrap_or(0) as u32;
        config["num_hidden_layers"] = json!(self.layers);
        config["first_k_dense_replace"] = json!(self.dense_layers.unwrap_or(dense.min(self.layers - 1)));
        config["num_nextn_predict_layers"] = json!(self.mtp);
        for (field, value) in [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("moe_intermediate_size", self.moe_intermediate),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.heads),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.nope_dim),
            ("qk_rope_head_dim", self.rope_dim),
            ("v_head_dim", self.v_dim),
            ("n_routed_experts", self.experts),
            ("n_shared_experts", self.shared_experts),
            ("num_experts_per_tok", self.topk),
            ("n_group", self.groups),
            ("topk_group", self.topk_groups),
            ("vocab_size", self.vocab),
            ("max_position_embeddings", self.context),
        ] {
            if let Some(value) = value {
                config[field] = json!(value);
            }
        }
        if let Some(rank) = self.q_lora_rank {
            config["q_lora_rank"] = if rank == 0 { Value::Null } else { json!(rank) };
        }
        if self.weights == WeightKind::Fp8 {
            config["quantization_config"] = json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            });
        }
        Ok(config)
    }

    /// The configuration, checked as that of any checkpoint.
    pub fn check(&self, config: &Value) -> anyhow::Result<ModelConfig> {
        let checked = ModelConfig::from_json(&config.to_string()).map_err(|error| self.in_flags(error))?;
        let smallest = EOS as usize + 1;
        if checked.vocab_size <= smallest {
            bail!("--vocab is {}, must be more than {smallest}", checked.vocab_size);
        }
        if checked.kv_lora_rank > KV_LORA_RANK_MAX as usize {
            bail!("--kv-lora-rank is {}, must be at most {KV_LORA_RANK_MAX}", checked.kv_lora_rank);
        }
        Ok(checked)
    }

    fn in_flags(&self, error: ConfigError) -> anyhow::Error {
        let words = |text: &str| {
            let named = [("topk_group", "--topk-groups")].into_iter().chain(FLAGS);
            named.fold(text.to_owned(), |text, (field, flag)| text.replace(&format!("`{field}`"), flag))
        };
        match error {
            // A token id is refused because the vocabulary is too small for it.
            ConfigError::Invalid { field, expected, .. } if field.ends_with("_token_id") => {
                anyhow!("--vocab is too small: {field} must be {expected}")
            }
            error => anyhow!(words(&error.to_string())),
        }
    }
}

fn deepseek_v3() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": yarn(1.0), "max_position_embeddings": 163_840,
        "hidden_act": "silu", "attention_bias": false, "attention_dropout": 0.0, "tie_word_embeddings": false,
        "ep_size": 1, "pretraining_tp": 1, "initializer_range": 0.02, "use_cache": true, "torch_dtype": "bfloat16",
        "bos_token_id": BOS, "eos_token_id": EOS,
    })
}

fn deepseek_v2_lite() -> Value {
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false, "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": yarn(0.707), "max_position_embeddings": 163_840,
        "hidden_act": "silu", "attention_bias": false, "attention_dropout": 0.0, "tie_word_embeddings": false,
        "ep_size": 1, "pretraining_tp": 1, "initializer_range": 0.02, "use_cache": true, "torch_dtype": "bfloat16",
        "bos_token_id": BOS, "eos_token_id": EOS,
    })
}

fn yarn(mscale: f64) -> Value {
    json!({
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale,
    })
}
