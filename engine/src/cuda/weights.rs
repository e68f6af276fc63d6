//! Weights on their way to the device: from a checkpoint, or made there from a seed.

use std::time::Instant;

use compute::cuda::{
    self, Buffer, Device, ExpertMatrices, HeadMatrices, InputFormat, LinearKernel, Matrix, Uploads,
};
use compute::{HeadMatrices as HostHeads, WeightFormat};
use model::schema::{MlpTensors, TensorSpec};
use model::{ExpertId, ModelConfig, Numerics, schema};

use crate::deepseek::{Loader, absorb};
use crate::error::EngineError;
use crate::options::{SyntheticWeights, fp8_activation_format};

/// A weight matrix and what its input is rounded to.
pub(super) struct Linear {
    pub matrix: Matrix,
    pub input: InputFormat,
}

/// A norm's weight.
pub(super) struct Norm {
    pub weight: Buffer<f32>,
    pub eps: f32,
}

/// One matrix of every expert of a layer.
pub(super) struct Experts {
    pub gate: ExpertMatrices,
    pub up: ExpertMatrices,
    pub down: ExpertMatrices,
}

impl Experts {
    /// The kernel that their rows are sorted for.
    pub fn kernel(&self, device: &Device) -> LinearKernel {
        device.experts_kernel([&self.gate, &self.up, &self.down])
    }
}

/// Where weights come from, before there is a device.
pub(super) enum Origin<'a, 'b> {
    Checkpoint(&'a mut Loader<'b>),
    /// As a checkpoint of this configuration would store them, with values from a seed.
    Synthetic {
        config: &'a ModelConfig,
        weights: SyntheticWeights,
    },
}

/// Where weights come from.
pub(super) enum Source<'a, 'b> {
    Checkpoint {
        loader: &'a mut Loader<'b>,
        /// How what lies in the files as the device wants it gets there.
        uploads: Uploads,
        started: Instant,
    },
    /// As a checkpoint of this configuration would store them, with values from a seed.
    Synthetic { config: &'a ModelConfig, weights: SyntheticWeights },
}

/// Brings weights to a device.
pub(super) struct Weights<'a, 'b> {
    pub device: &'a Device,
    pub source: Source<'a, 'b>,
    pub numerics: Numerics,
}

/// So many threads read a checkpoint of `bytes` bytes at most: more than a few do not make a small one arrive sooner.
fn readers(threads: usize, bytes: u64) -> usize {
    threads.min(1 + (bytes >> 28) as usize).clamp(1, 16)
}

impl<'a, 'b> Origin<'a, 'b> {
    /// Ready to bring weights to `device`; a checkpoint is read by at most `threads` threads.
    pub fn open(self, device: &Device, threads: usize) -> Result<Source<'a, 'b>, cuda::CudaError> {
        Ok(match self {
            Self::Checkpoint(loader) => {
                let uploads = Uploads::new(device, readers(threads, loader.bytes_total()))?;
                Source::Checkpoint { loader, uploads, started: Instant::now() }
            }
            Self::Synthetic { config, weights } => Source::Synthetic { config, weights },
        })
    }
}

impl Weights<'_, '_> {
    /// Waits until all weights are on the device.
    pub fn finish(self) -> Result<(), EngineError> {
        if let Source::Checkpoint { uploads, started, .. } = self.source {
            let bytes = uploads.finish()?;
            let seconds = started.elapsed().as_secs_f64();
            let gib_per_s = bytes as f64 / seconds / f64::from(1 << 30);
            tracing::info!(bytes, seconds, gib_per_s, "weights are on the device");
        }
        Ok(())
    }

    pub fn config(&self) -> &ModelConfig {
        match &self.source {
            Source::Checkpoint { loader, .. } => loader.config(),
            Source::Synthetic { config, .. } => config,
        }
    }

    /// Whether a tensor that may be left out is there.
    pub fn stores(&self, spec: &TensorSpec) -> bool {
        match &self.source {
            Source::Checkpoint { loader, .. } => loader.contains(spec),
            Source::Synthetic { .. } => false,
        }
    }

    /// A matrix with the activations that the numerics gives it.
    pub fn linear(&mut self, spec: &TensorSpec) -> Result<Linear, EngineError> {
        let format = self.linear_format();
        let matrix = match &mut self.source {
            Source::Checkpoint { loader, uploads, .. } => {
                Matrix::new_later(self.device, loader.linear(spec)?.matrix(), uploads)?
            }
            Source::Synthetic { .. } => self.made(spec, format)?,
        };
        Ok(Linear { input: self.input_format(matrix.format()), matrix })
    }

    /// The head, which checkpoints keep in bf16.
    pub fn head(&mut self, spec: &TensorSpec) -> Result<Linear, EngineError> {
        match self.source {
            Source::Checkpoint { .. } => self.linear(spec),
            Source::Synthetic { .. } => {
                Ok(Linear { matrix: self.made(spec, WeightFormat::Bf16)?, input: InputFormat::Bf16 })
            }
        }
    }

    /// The router, whose choices must not hang on rounding: bf16 weights by f32 inputs in three parts where the device
    /// can, else f32 by f32.
    pub fn router(&mut self, spec: &TensorSpec) -> Result<Linear, EngineError> {
        let matrix = match &mut self.source {
            Source::Checkpoint { loader, .. } => {
                let stored = loader.table(spec)?;
                if self.numerics == Numerics::Fp8 && stored.format() == WeightFormat::Bf16 {
                    let matrix = Matrix::new(self.device, &stored)?;
                    if self.device.takes_parts(&matrix) {
                        return Ok(Linear { matrix, input: InputFormat::Parts });
                    }
                }
                let (rows, cols) = (stored.rows(), stored.cols());
                let wide = compute::Matrix::f32(rows, cols, stored.to_f32());
                let wide =
                    wide.map_err(|source| EngineError::Matrix { tensor: spec.name.clone(), source })?;
                Matrix::new(self.device, &wide)?
            }
            Source::Synthetic { .. } => {
                let matrix = self.made(spec, WeightFormat::Bf16)?;
                let input =
                    if self.device.takes_parts(&matrix) { InputFormat::Parts } else { InputFormat::F32 };
                return Ok(Linear { matrix, input });
            }
        };
        Ok(Linear { matrix, input: InputFormat::F32 })
    }

    /// A table whose rows are looked up.
    pub fn table(&mut self, spec: &TensorSpec) -> Result<Matrix, EngineError> {
        match &mut self.source {
            Source::Checkpoint { loader, uploads, .. } => {
                Ok(Matrix::new_later(self.device, &loader.table(spec)?, uploads)?)
            }
            Source::Synthetic { .. } => self.made(spec, WeightFormat::Bf16),
        }
    }

    /// A vector in f32.
    pub fn values(&mut self, spec: &TensorSpec) -> Result<Buffer<f32>, EngineError> {
        match &mut self.source {
            Source::Checkpoint { loader, .. } => Ok(self.device.upload(&loader.values(spec)?)?),
            Source::Synthetic { weights, .. } => {
                let mut values = self.device.alloc(spec.elements())?;
                // A norm's weight is one; a correction bias says which experts are preferred by all tokens alike.
                let is_bias = spec.name.ends_with("e_score_correction_bias");
                let deviation = if is_bias { weights.router_bias } else { 0.0 };
                let seed = seed_of(weights.seed, &spec.name);
                self.device.fill_normal(&mut values.view_mut(), seed, 1.0, deviation)?;
                Ok(values)
            }
        }
    }

    /// A norm's weight.
    pub fn norm(&mut self, spec: &TensorSpec, eps: f32) -> Result<Norm, EngineError> {
        Ok(Norm { weight: self.values(spec)?, eps })
    }

    /// The two absorbed halves of `kv_b`; see [`absorb`]. In bf16 if the matrix unit is to multiply by them and can.
    pub fn absorbed(
        &mut self,
        spec: &TensorSpec,
        bf16: bool,
    ) -> Result<(HeadMatrices, HeadMatrices), EngineError> {
        let device = self.device;
        match &mut self.source {
            Source::Checkpoint { loader, .. } => {
                let (key, value) = absorb(loader, spec)?;
                let copy = |heads: &HostHeads| {
                    if bf16 {
                        HeadMatrices::new_bf16(device, heads)
                    } else {
                        HeadMatrices::new(device, heads)
                    }
                };
                Ok((copy(&key)?, copy(&value)?))
            }
            Source::Synthetic { config, weights: SyntheticWeights { seed, .. } } => {
                let (heads, latent) = (config.num_attention_heads, config.kv_lora_rank);
                let mut key = HeadMatrices::alloc_bf16(device, heads, latent, config.qk_nope_head_dim)?;
                let mut value = HeadMatrices::alloc_bf16(device, heads, config.v_head_dim, latent)?;
                device.fill_heads(&mut key, seed_of(*seed, &spec.name))?;
                device.fill_heads(&mut value, !seed_of(*seed, &spec.name))?;
                Ok((key, value))
            }
        }
    }

    /// Routed experts of a layer, in the order of `ids`.
    pub fn experts(&mut self, layer: usize, ids: &[ExpertId]) -> Result<Experts, EngineError> {
        let device = self.device;
        let config = self.config();
        let count = ids.len();
        let (inside, hidden) = (config.moe_intermediate_size, config.hidden_size);
        let alloc = |format| -> Result<Experts, cuda::CudaError> {
            Ok(Experts {
                gate: ExpertMatrices::alloc(device, count, (inside, hidden), format)?,
                up: ExpertMatrices::alloc(device, count, (inside, hidden), format)?,
                down: ExpertMatrices::alloc(device, count, (hidden, inside), format)?,
            })
        };
        let made_format = self.linear_format();
        match &mut self.source {
            Source::Checkpoint { loader, uploads, .. } => {
                let mut experts = None;
                for (place, &expert) in ids.iter().enumerate() {
                    let tensors = schema::expert(loader.config(), layer, expert);
                    let MlpTensors { gate_proj, up_proj, down_proj } = &tensors;
                    for (spec, which) in [(gate_proj, 0), (up_proj, 1), (down_proj, 2)] {
                        let linear = loader.linear(spec)?;
                        let matrix = linear.matrix();
                        let experts = match &mut experts {
                            Some(experts) => experts,
                            None => experts.insert(alloc(matrix.format())?),
                        };
                        let stack = match which {
                            0 => &mut experts.gate,
                            1 => &mut experts.up,
                            _ => &mut experts.down,
                        };
                        if !stack.takes(matrix) {
                            return Err(EngineError::MixedFormats { tensor: spec.name.clone() });
                        }
                        stack.set_later(device, place, matrix, uploads)?;
                    }
                }
                experts.ok_or(EngineError::NoSuchExpert { layer, expert: ExpertId(0) })
            }
            Source::Synthetic { weights: SyntheticWeights { seed, .. }, .. } => {
                let mut experts = alloc(made_format)?;
                let seed = seed_of(*seed, &format!("experts of layer {layer}"));
                device.fill_experts(&mut experts.gate, seed)?;
                device.fill_experts(&mut experts.up, seed.wrapping_mul(3))?;
                device.fill_experts(&mut experts.down, seed.wrapping_mul(5))?;
                Ok(experts)
            }
        }
    }

    /// Whether a layer's kernels for both of its heads' matrices are the matrix unit's.
    pub fn heads_fit_matrix_unit(&self, heads: &(HeadMatrices, HeadMatrices)) -> bool {
        [&heads.0, &heads.1].into_iter().all(|heads| self.device.head_kernel(heads) == LinearKernel::Wgmma)
    }

    fn linear_format(&self) -> WeightFormat {
        match (self.numerics, &self.config().quantization) {
            (Numerics::Reference, _) => WeightFormat::F32,
            (Numerics::Fp8, None) => WeightFormat::Bf16,
            (Numerics::Fp8, Some(_)) => WeightFormat::Fp8,
        }
    }

    /// What rows are rounded to that a matrix in this format multiplies.
    pub fn input_format(&self, weights: WeightFormat) -> InputFormat {
        match weights {
            WeightFormat::F32 => InputFormat::F32,
            WeightFormat::Bf16 => InputFormat::Bf16,
            WeightFormat::Fp8 => fp8_activation_format(self.config()).into(),
        }
    }

    fn made(&self, spec: &TensorSpec, format: WeightFormat) -> Result<Matrix, EngineError> {
        let Source::Synthetic { weights: SyntheticWeights { seed, .. }, .. } = self.source else {
            unreachable!("only a seed makes weights");
        };
        let cols = spec.shape.last().copied().unwrap_or(1);
        let mut matrix = Matrix::alloc(self.device, spec.elements() / cols, cols, format)?;
        self.device.fill_matrix(&mut matrix, seed_of(seed, &spec.name))?;
        Ok(matrix)
    }
}

/// Another seed for each tensor: FNV-1a over its name.
fn seed_of(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}
