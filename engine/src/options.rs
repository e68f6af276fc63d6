//! How an engine is set up, and the arithmetic that follows from it.

use compute::{ActivationFormat, ScaleFormat as ActivationScale};
use model::{Device, KvFormat, KvLayout, ModelConfig, Numerics, ScaleFormat};

use crate::error::EngineError;

/// How to set up an [`crate::Engine`].
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where it computes.
    pub device: Device,
    /// The arithmetic.
    pub numerics: Numerics,
    /// How the cache stores rows; `None`: f32 for `reference`, FP8 otherwise.
    pub kv_format: Option<KvFormat>,
    /// KV blocks in the pool.
    pub kv_blocks_max: usize,
    /// Threads that compute, the caller's included. On a GPU: those that read weights.
    pub threads: usize,
    /// Rows of the largest step; the workspaces are sized by it.
    pub step_tokens_max: usize,
    /// Whether to load the MTP module and give the cache its layer.
    pub mtp: bool,
}

/// Weights that a device makes for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyntheticWeights {
    /// What they are made from.
    pub seed: u64,
    /// Standard deviation of the routers' correction biases, where the model has them. Scores lie between 0 and 1: with 0 tokens are
    /// routed evenly, from some 10 on all tokens of a layer go to the same experts.
    pub router_bias: f32,
}

impl SyntheticWeights {
    /// Such that tokens are routed evenly.
    pub fn from_seed(seed: u64) -> Self {
        Self { seed, router_bias: 0.0 }
    }
}

impl EngineOptions {
    /// How an engine with these options lays out its cache.
    ///
    /// # Errors
    /// As [`crate::Engine::load`]: an option is zero, contradicts another or asks for what the model has not.
    pub fn kv_layout(&self, config: &ModelConfig) -> Result<KvLayout, EngineError> {
        Ok(KvLayout::for_model(config, self.validate(config)?, usize::from(self.mtp)))
    }

    fn validate(&self, config: &ModelConfig) -> Result<KvFormat, EngineError> {
        let limits = [
            ("kv_blocks_max", self.kv_blocks_max),
            ("threads", self.threads),
            ("step_tokens_max", self.step_tokens_max),
        ];
        if let Some((option, _)) = limits.into_iter().find(|&(_, value)| value == 0) {
            return Err(EngineError::Zero { option });
        }
        if self.mtp && config.num_nextn_predict_layers == 0 {
            return Err(EngineError::NoMtp);
        }
        match (self.numerics, self.kv_format) {
            (Numerics::Reference, None | Some(KvFormat::F32)) => Ok(KvFormat::F32),
            (numerics @ Numerics::Reference, Some(kv_format)) => {
                Err(EngineError::KvFormat { kv_format, numerics })
            }
            (Numerics::Fp8, format) => Ok(format.unwrap_or(KvFormat::Fp8)),
        }
    }
}

/// How the tokens that go to routed experts are encoded, on the wire and in [`crate::LocalExperts`] alike.
pub fn wire_activation_format(config: &ModelConfig, numerics: Numerics) -> ActivationFormat {
    match (numerics, &config.quantization) {
        (Numerics::Reference, _) => ActivationFormat::F32,
        (Numerics::Fp8, None) => ActivationFormat::Bf16,
        (Numerics::Fp8, Some(_)) => fp8_activation_format(config),
    }
}

/// What FP8 matrices want their input in: scales are powers of two where the checkpoint was trained with such (V3.1).
pub(crate) fn fp8_activation_format(config: &ModelConfig) -> ActivationFormat {
    let scale_format =
        config.quantization.as_ref().map_or(ScaleFormat::F32, |quantization| quantization.scale_format);
    ActivationFormat::Fp8(match scale_format {
        ScaleFormat::F32 => ActivationScale::F32,
        ScaleFormat::Ue8m0 => ActivationScale::Ue8m0,
    })
}

/// What the vectors that experts hand back are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultFormat {
    /// In `fp8` numerics, for BF16 checkpoints as well.
    Bf16,
    /// In `reference` numerics.
    F32,
}

impl ResultFormat {
    /// The format that goes with a numerics.
    pub fn of(numerics: Numerics) -> Self {
        match numerics {
            Numerics::Reference => Self::F32,
            Numerics::Fp8 => Self::Bf16,
        }
    }

    /// Rounds values in place, to the nearest and to even on ties.
    pub fn round(self, values: &mut [f32]) {
        if self == Self::Bf16 {
            for value in values {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
    }
}
