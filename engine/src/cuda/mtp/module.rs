//! Weights of an MTP module.

use compute::cuda::{AttentionKernel, InputFormat, Matrix};
use model::schema::{self, MtpTensors};

use crate::cuda::layer::Layer;
use crate::cuda::weights::{Linear, Norm, Weights};
use crate::error::EngineError;

/// The first MTP module of a checkpoint; see `deepseek::mtp`.
pub(crate) struct Module {
    /// None: the main model's.
    pub embedding: Option<Matrix>,
    pub embedding_norm: Norm,
    pub hidden_norm: Norm,
    pub project: Linear,
    pub layer: Layer,
    pub norm: Norm,
    /// None: the main model's.
    pub head: Option<Linear>,
}

impl Module {
    pub fn load(
        weights: &mut Weights<'_, '_>,
        kernel: AttentionKernel,
        (local, format): (bool, InputFormat),
        head_format: InputFormat,
    ) -> Result<Self, EngineError> {
        let config = weights.config().clone();
        let index = config.num_hidden_layers;
        let tensors = schema::layer(&config, index);
        let MtpTensors { embed_tokens, enorm, hnorm, eh_proj, head_norm, head } =
            tensors.mtp.as_ref().ok_or(EngineError::NoMtp)?;
        let embedding = weights.stores(embed_tokens).then(|| weights.table(embed_tokens)).transpose()?;
        let own_head = weights.stores(head).then(|| weights.head(head)).transpose()?;
        if own_head.as_ref().is_some_and(|head| head.input != head_format) {
            return Err(EngineError::MixedFormats { tensor: head.name.clone() });
        }
        Ok(Self {
            embedding,
            embedding_norm: weights.norm(enorm, config.rms_norm_eps)?,
            hidden_norm: weights.norm(hnorm, config.rms_norm_eps)?,
            project: weights.linear(eh_proj)?,
            layer: Layer::load(weights, index, &tensors, kernel, (local, format))?,
            norm: weights.norm(head_norm, config.rms_norm_eps)?,
            head: own_head,
        })
    }
}
