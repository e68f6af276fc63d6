//! A model directory's configuration and weights, mapped and checked whole.
//!
//! Once open, every tensor that the configuration asks for is there, in its file's bounds, in a dtype and shape that
//! the engine understands: loading can no longer fail for a reason that lies in the checkpoint.

mod hash;
mod header;
mod map;
mod shards;
mod tensor;

use std::path::{Path, PathBuf};

pub use tensor::{Dtype, MatrixTensors, Tensor, TensorInfo};

use crate::config::ModelConfig;
use crate::error::{ModelError, TensorError};
use crate::files;
use crate::generation::GenerationDefaults;
use crate::schema::{self, TensorKind, TensorSpec};
use header::Entry;
use shards::Shards;

/// Real ones have 2 KB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// An open checkpoint. The bytes stay on disk until they are touched.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    shards: Shards,
    weights_hash: [u8; 16],
}

impl Checkpoint {
    /// Opens a directory in the Hugging Face layout: `config.json`, and `model.safetensors` or shards with
    /// `model.safetensors.index.json`.
    ///
    /// Two values of the resulting configuration come from elsewhere: the end-of-sequence ids of
    /// `generation_config.json` are added, and MTP layers that `config.json` announces while no tensor of theirs is
    /// stored (converters drop them) count as not there.
    ///
    /// # Errors
    /// [`ModelError`], naming the file and the field or tensor: a file missing or malformed, a value out of range, a
    /// tensor missing, truncated, overlapping another, or of the wrong dtype or shape.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let dir = dir.as_ref().to_owned();
        let config_path = dir.join("config.json");
        let config_json = files::read(&config_path, CONFIG_BYTES_MAX)?;
        let mut config = ModelConfig::from_json(&config_json).map_err(files::in_file(&config_path))?;
        let defaults = GenerationDefaults::open(&dir, &config)?;
        config.eos_token_ids.extend(defaults.eos_token_ids);
        config.eos_token_ids.sort_unstable();
        config.eos_token_ids.dedup();

        let shards = Shards::open(&dir)?;
        let weights_hash = hash::weights_hash(&config_json, &shards);
        let mut checkpoint = Self { dir, config, shards, weights_hash };
        checkpoint.forget_absent_mtp();
        for spec in schema::all(&checkpoint.config) {
            checkpoint.check(&spec)?;
        }
        Ok(checkpoint)
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether a tensor of this name is stored.
    pub fn contains(&self, name: &str) -> bool {
        self.shards.tensors.contains_key(name)
    }

    /// A stored tensor by its name.
    ///
    /// # Errors
    /// [`TensorError::Missing`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let (file, entry) = self.entry(name)?;
        Ok(Tensor {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            data: self.shards.files[file].bytes.slice(entry.range.clone()),
        })
    }

    /// A stored tensor by its name, if it is as expected.
    ///
    /// # Errors
    /// [`TensorError::Missing`], [`TensorError::WrongDtype`], [`TensorError::WrongShape`].
    pub fn expect(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<Tensor, ModelError> {
        self.check_stored(name, dtypes, shape)?;
        self.tensor(name)
    }

    /// A tensor that is never quantised, BF16 or F32.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn plain(&self, spec: &TensorSpec) -> Result<Tensor, ModelError> {
        self.expect(&spec.name, &[Dtype::Bf16, Dtype::F32], &spec.shape)
    }

    /// As [`Self::plain`], `None` where the checkpoint leaves the tensor out.
    ///
    /// # Errors
    /// As [`Self::expect`], [`TensorError::Missing`] excepted.
    pub fn plain_if_stored(&self, spec: &TensorSpec) -> Result<Option<Tensor>, ModelError> {
        self.contains(&spec.name).then(|| self.plain(spec)).transpose()
    }

    /// A projection, with its scales if it is FP8. They may lie in different shards.
    ///
    /// # Errors
    /// As [`Self::expect`], for the weight and for its scales; [`TensorError::Fp8Without`].
    pub fn matrix(&self, spec: &TensorSpec) -> Result<MatrixTensors, ModelError> {
        self.check(spec)?;
        let weight = self.tensor(&spec.name)?;
        let scales = match weight.dtype {
            Dtype::F8E4m3 => Some(self.tensor(&spec.scale_name())?),
            Dtype::Bf16 | Dtype::F32 => None,
        };
        Ok(MatrixTensors { weight, scales })
    }

    /// Every stored tensor in the order of names, those that nobody asks for included.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.shards.tensors.values().map(|(file, entry)| TensorInfo {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            file: &self.shards.files[*file].path,
            bytes: entry.range.len(),
        })
    }

    /// xxh3-128 of config.json, of every tensor's name, dtype and shape, and of samples of their bytes: equal for
    /// copies of a checkpoint however they are sharded, different for different weights, in milliseconds at any size.
    /// It tells checkpoints apart and authenticates nothing.
    pub fn weights_hash(&self) -> [u8; 16] {
        self.weights_hash
    }

    /// Checks that what `spec` asks for is stored as it may be.
    fn check(&self, spec: &TensorSpec) -> Result<(), ModelError> {
        if spec.optional && !self.contains(&spec.name) {
            return Ok(());
        }
        let dtypes: &[Dtype] = match spec.kind {
            TensorKind::Matrix => &[Dtype::F8E4m3, Dtype::Bf16, Dtype::F32],
            TensorKind::Plain => &[Dtype::Bf16, Dtype::F32],
        };
        let dtype = self.check_stored(&spec.name, dtypes, &spec.shape)?;
        if dtype != Dtype::F8E4m3 {
            return Ok(());
        }
        let scale = spec.scale_name();
        let needs = match (self.config.quantization, self.contains(&scale)) {
            (None, _) => "`quantization_config` in config.json",
            (Some(_), false) => "its `weight_scale_inv` tensor",
            (Some(_), true) => {
                return self.check_stored(&scale, &[Dtype::F32], &spec.scale_shape()).map(|_| ());
            }
        };
        Err(self.fault(&spec.name, TensorError::Fp8Without { needs }))
    }

    fn check_stored(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<Dtype, ModelError> {
        let (_, entry) = self.entry(name)?;
        if !dtypes.contains(&entry.dtype) {
            let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
            let (found, expected) = (entry.dtype.name(), names.join(" or "));
            return Err(self.fault(name, TensorError::WrongDtype { found, expected }));
        }
        if entry.shape != shape {
            let (found, expected) = (entry.shape.clone(), shape.to_vec());
            return Err(self.fault(name, TensorError::WrongShape { found, expected }));
        }
        Ok(entry.dtype)
    }

    fn entry(&self, name: &str) -> Result<(usize, &Entry), ModelError> {
        match self.shards.tensors.get(name) {
            Some((file, entry)) => Ok((*file, entry)),
            None => Err(self.fault(name, TensorError::Missing)),
        }
    }

    /// The error for a tensor, with the file that has it, or the directory when none does.
    fn fault(&self, name: &str, source: TensorError) -> ModelError {
        let file = match (self.shards.tensors.get(name), self.shards.files.as_slice()) {
            (Some((file, _)), files) => files[*file].path.clone(),
            (None, [only]) => only.path.clone(),
            (None, _) => self.dir.clone(),
        };
        ModelError::Tensor { file, tensor: name.to_owned(), source }
    }

    fn forget_absent_mtp(&mut self) {
        let first = self.config.num_hidden_layers;
        let stored = |layer| {
            let prefix = schema::layer_prefix(layer);
            let next = self.shards.tensors.range(prefix.clone()..).next();
            next.is_some_and(|(name, _)| name.starts_with(&prefix))
        };
        let announced = self.config.num_nextn_predict_layers;
        if announced > 0 && !(first..first + announced).any(stored) {
            tracing::warn!(announced, dir = %self.dir.display(), "no MTP weights are stored: going on without");
            self.config.num_nextn_predict_layers = 0;
        }
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (files, tensors) = (self.shards.files.len(), self.shards.tensors.len());
        write!(f, "Checkpoint {{ dir: {:?}, files: {files}, tensors: {tensors} }}", self.dir)
    }
}
