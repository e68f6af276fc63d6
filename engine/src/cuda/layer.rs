//! One decoder layer: `h += attention(norm(h))`, then `h += ffn(norm(h))`.

use compute::KvGeometry;
use compute::cuda::{Activations, AttentionKernel, Buffer, CudaError, Device, InputFormat, NormRows};
use model::schema::{FfnTensors, LayerTensors};
use model::{ExpertId, ModelConfig};

use super::attention::{Attention, AttentionWorkspace};
use super::mlp::{Mlp, MlpWorkspace};
use super::moe::{Moe, MoeWorkspace};
use super::step::Step;
use super::weights::{Norm, Weights};
use crate::error::{EngineError, StepError};
use crate::stage::Stage;

pub(super) struct Layer {
    /// Counted as in the checkpoint; also its place in the KV cache.
    index: usize,
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Norm,
    ffn: FeedForward,
}

enum FeedForward {
    Dense(Box<Mlp>),
    Moe(Box<Moe>),
}

impl Layer {
    /// `format`: what every product of the layers reads; `local`: whether the routed experts come along.
    pub fn load(
        weights: &mut Weights<'_, '_>,
        index: usize,
        tensors: &LayerTensors,
        kernel: AttentionKernel,
        (local, format): (bool, InputFormat),
    ) -> Result<Self, EngineError> {
        let eps = weights.config().rms_norm_eps;
        let mixed =
            |spec: &model::schema::TensorSpec| EngineError::MixedFormats { tensor: spec.name.clone() };
        let input_norm = weights.norm(&tensors.input_layernorm, eps)?;
        // An MTP layer's slot 0 belongs to no position.
        let first = usize::from(tensors.mtp.is_some());
        let attention = Attention::load(weights, &tensors.attention, kernel, first)?;
        if attention.input_format() != format {
            return Err(mixed(&tensors.attention.kv_a_proj_with_mqa));
        }
        let post_attention_norm = weights.norm(&tensors.post_attention_layernorm, eps)?;
        let ffn = match &tensors.ffn {
            FfnTensors::Dense(mlp) => {
                let dense = Mlp::load(weights, mlp)?;
                if dense.input_format() != format {
                    return Err(mixed(&mlp.gate_proj));
                }
                FeedForward::Dense(Box::new(dense))
            }
            FfnTensors::Moe { gate, correction_bias, shared } => {
                let mut moe = Moe::load(weights, gate, correction_bias.as_ref(), shared.as_ref())?;
                if local {
                    let all: Vec<_> = (0..weights.config().n_routed_experts as u16).map(ExpertId).collect();
                    moe.hold(weights.experts(index, &all)?);
                }
                FeedForward::Moe(Box::new(moe))
            }
        };
        Ok(Self { index, input_norm, attention, post_attention_norm, ffn })
    }

    /// What its router reads, if it has one.
    pub fn router_format(&self) -> Option<InputFormat> {
        match &self.ffn {
            FeedForward::Dense(_) => None,
            FeedForward::Moe(moe) => Some(moe.router_format()),
        }
    }

    /// Stores the cache entries of the rows whose input is `hidden` `[rows, hidden_size]`, and computes nothing else.
    pub fn store(
        &self,
        step: &mut Step<'_>,
        work: &mut LayerWorkspace,
        hidden: &mut Buffer<f32>,
    ) -> Result<(), StepError> {
        let width = self.input_norm.weight.len();
        let x = &mut hidden.slice_mut(0..step.inputs.rows() * width);
        let x = NormRows { x, stride: width, add: None, index: None };
        let LayerWorkspace { input, attention, .. } = work;
        step.device.norm(x, self.input_norm.weight.view(), self.input_norm.eps, None, &mut [input])?;
        Ok(self.attention.store(step, self.index, attention, input)?)
    }

    /// Runs the layer on `hidden` `[rows, hidden_size]` in place. `pending`: whether the layer before left a summand in
    /// the workspace's output; so does this one if the answer is true.
    pub fn forward(
        &self,
        step: &mut Step<'_>,
        work: &mut LayerWorkspace,
        hidden: &mut Buffer<f32>,
        pending: bool,
    ) -> Result<bool, StepError> {
        let (device, rows) = (step.device, step.inputs.rows());
        let width = self.input_norm.weight.len();
        let size = rows * width;
        let LayerWorkspace { output, input, router_input, attention, mlp, moe } = work;

        let add = pending.then(|| output.slice(0..size));
        let x = NormRows { x: &mut hidden.slice_mut(0..size), stride: width, add, index: None };
        device.norm(x, self.input_norm.weight.view(), self.input_norm.eps, None, &mut [input])?;
        step.stage(Stage::Norm)?;
        self.attention.forward(step, self.index, attention, input, output)?;

        let add = Some(output.slice(0..size));
        let x = NormRows { x: &mut hidden.slice_mut(0..size), stride: width, add, index: None };
        let (weight, eps) = (self.post_attention_norm.weight.view(), self.post_attention_norm.eps);
        let pending = match &self.ffn {
            FeedForward::Dense(dense) => {
                device.norm(x, weight, eps, None, &mut [input])?;
                step.stage(Stage::Norm)?;
                dense.forward(device, mlp, input, rows, output)?;
                step.stage(Stage::Dense)?;
                true
            }
            FeedForward::Moe(layer) => {
                match router_input {
                    Some(router_input) => device.norm(x, weight, eps, None, &mut [input, router_input])?,
                    None => device.norm(x, weight, eps, None, &mut [input])?,
                }
                step.stage(Stage::Norm)?;
                layer.forward(step, self.index, moe, router_input.as_ref(), input, output, hidden)?;
                false
            }
        };
        if pending && step.watched.values {
            device.add_in_place(&mut hidden.slice_mut(0..size), output.slice(0..size))?;
            step.layer_hidden(self.index, hidden.slice(0..size))?;
            return Ok(false);
        }
        step.layer_hidden(self.index, hidden.slice(0..size))?;
        Ok(pending)
    }
}

/// Intermediate values of a layer for up to `rows_max` rows; all layers share one.
pub(super) struct LayerWorkspace {
    /// `[rows, hidden]`: what a sub-layer adds to the residual stream.
    pub output: Buffer<f32>,
    input: Activations,
    /// None where the router reads what the experts read.
    router_input: Option<Activations>,
    attention: AttentionWorkspace,
    mlp: MlpWorkspace,
    moe: MoeWorkspace,
}

impl LayerWorkspace {
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        geometry: &KvGeometry,
        (format, router_format): (InputFormat, Option<InputFormat>),
        rows_max: usize,
        local: bool,
    ) -> Result<Self, CudaError> {
        let router = router_format.filter(|router| *router != format);
        Ok(Self {
            output: device.alloc(rows_max * config.hidden_size)?,
            input: Activations::new(device, format, rows_max, config.hidden_size)?,
            router_input: router
                .map(|router| Activations::new(device, router, rows_max, config.hidden_size))
                .transpose()?,
            attention: AttentionWorkspace::new(device, config, geometry, format, rows_max)?,
            mlp: MlpWorkspace::new(device, format, rows_max, config.intermediate_size)?,
            moe: MoeWorkspace::new(device, config, format, rows_max, local)?,
        })
    }
}
