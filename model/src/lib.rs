//! What follows from a checkpoint and token ids alone: the configuration, the weights on disk, the tokenizer,
//! the chat template, the KV layout, block hashes and the execution fingerprint.
//!
//! Everything read here comes from a directory that somebody downloaded, so nothing in it is trusted: every value is
//! bounded, every tensor is checked against the configuration, and an error names the file and the field or tensor.
//!
//! Deliberately not here: arithmetic (`compute`), what a layer does with its weights (`engine`), and the wire (`proto`).

mod block_hash;
mod chat;
mod checkpoint;
mod config;
mod device;
mod error;
mod files;
mod fingerprint;
mod generation;
mod ids;
mod kv_layout;
mod numerics;
mod sampling;
pub mod schema;
mod tokenizer;

pub use block_hash::{BlockDigest, BlockHash, block_hashes};
pub use chat::{ChatMessage, ChatTemplate};
pub use checkpoint::{Checkpoint, Dtype, MatrixTensors, Tensor, TensorInfo};
pub use config::{
    Architecture, Fp8Quantization, ModelConfig, RopeConfig, ScaleFormat, Scoring, TopkMethod, Yarn,
};
pub use device::Device;
pub use error::{ConfigError, HeaderError, ModelError, TemplateError, TensorError, TokenizerError};
pub use fingerprint::{ExecutionFingerprint, FingerprintMismatch};
pub use generation::GenerationDefaults;
pub use ids::{BlockId, ExpertId, TokenId};
pub use kv_layout::KvLayout;
pub use numerics::{KvFormat, Numerics, UnknownName};
pub use sampling::{ParamError, SamplingParams, Stopping};
pub use tokenizer::{Detokenizer, Tokenizer};
