//! What can go wrong when an engine is built and when it steps.

use model::{KvFormat, ModelError, Numerics};

use crate::experts::ExpertsError;

/// Why an engine cannot be built. All of them are found at start, before a port is bound.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The checkpoint is not what its configuration says.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A matrix is stored in a form that this numerics cannot run.
    #[error("{tensor}: {source}")]
    Matrix {
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// What the back end says.
        source: compute::MatrixError,
    },
    /// There is no memory for the weights.
    #[error("no memory for {tensor}")]
    Memory {
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// `reference` numerics keeps its cache in f32.
    #[error("kv_format {kv_format} does not go with {numerics} numerics")]
    KvFormat {
        /// The format asked for.
        kv_format: KvFormat,
        /// The numerics asked for.
        numerics: Numerics,
    },
    /// The engine has no back end for the device.
    #[error("no engine with such weights runs on {device}")]
    NoBackEnd {
        /// The device asked for.
        device: model::Device,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Cuda(#[from] compute::cuda::CudaError),
    /// Model, cache and workspace do not fit the device.
    #[error(
        "out of device memory before the start: weights {weights} + KV pool {kv} + workspace {workspace} bytes, {free} free; \
         {blocks_fit} KV blocks would fit beside the rest"
    )]
    DeviceMemory {
        /// Bytes of weights.
        weights: u64,
        /// Bytes of the KV pool.
        kv: u64,
        /// Bytes of a step's buffers, about.
        workspace: u64,
        /// Bytes free.
        free: u64,
        /// KV blocks that would fit.
        blocks_fit: u64,
    },
    /// The device's kernels cannot compute a width of the model.
    #[error("{field} is {value}: this device computes it in multiples of {multiple}")]
    Width {
        /// The field of the checkpoint's configuration.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What would do.
        multiple: usize,
    },
    /// An option is outside its range.
    #[error("{option} must be at least 1")]
    Zero {
        /// The option's name.
        option: &'static str,
    },
    /// The KV pool does not fit into memory.
    #[error("kv_blocks_max: {blocks} blocks of {block_bytes} bytes cannot be allocated")]
    KvPoolTooLarge {
        /// Blocks asked for.
        blocks: usize,
        /// Bytes of one block.
        block_bytes: usize,
    },
    /// Matrices that read the same input want it in different formats.
    #[error("{tensor}: reads the same activations as its neighbours, but is stored in another format")]
    MixedFormats {
        /// The tensor that differs.
        tensor: String,
    },
    /// A placement names an expert that the model does not have.
    #[error("layer {layer} has no routed expert {expert}")]
    NoSuchExpert {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: model::ExpertId,
    },
    /// An MTP module was asked for and the checkpoint has none.
    #[error("mtp: the checkpoint has no MTP module (num_nextn_predict_layers is 0)")]
    NoMtp,
}

/// Why a step gave no result. The KV rows that it was to write hold nothing usable; everything else is as before.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The routed experts did not answer.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// The device failed. It gives nothing any more: the worker must end.
    #[error("the device failed")]
    Device(#[from] compute::cuda::CudaError),
    /// Its observer has said that nobody wants it any more.
    #[error("nobody wants the step any more")]
    Unwanted,
    /// The batch itself cannot be run; nothing was computed.
    #[error("invalid batch: {0}")]
    Invalid(#[from] InvalidBatch),
}

impl StepError {
    /// What failed, if it was the device, the engine's own or that of experts beside it: it gives nothing any more.
    pub fn device_failure(&self) -> Option<&compute::cuda::CudaError> {
        match self {
            Self::Device(error) | Self::Experts(ExpertsError::Device(error)) => Some(error),
            _ => None,
        }
    }
}

/// What is wrong with a batch. `sequence` is an index into it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBatch {
    /// A sequence without a row, or no sequence.
    #[error("sequence {sequence} has no tokens")]
    Empty {
        /// Index of the sequence.
        sequence: usize,
    },
    /// More rows than the workspaces hold.
    #[error("{rows} rows exceed step_tokens_max {step_tokens_max}")]
    TooManyRows {
        /// Rows in the batch.
        rows: usize,
        /// The limit.
        step_tokens_max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("sequence {sequence}: token {token} is not below vocab_size {vocab_size}")]
    Token {
        /// Index of the sequence.
        sequence: usize,
        /// The token.
        token: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// Positions that the model does not have.
    #[error("sequence {sequence}: {context} tokens exceed max_position_embeddings {context_max}")]
    Context {
        /// Index of the sequence.
        sequence: usize,
        /// Tokens after this step.
        context: usize,
        /// The model's limit.
        context_max: usize,
    },
    /// A block table that does not reach the last position.
    #[error("sequence {sequence}: {blocks} KV blocks cannot hold {context} tokens")]
    BlockTableTooShort {
        /// Index of the sequence.
        sequence: usize,
        /// Length of its block table.
        blocks: usize,
        /// Tokens after this step.
        context: usize,
    },
    /// A block that the pool does not have.
    #[error("sequence {sequence}: KV block {block} is not below kv_blocks_max {blocks_max}")]
    Block {
        /// Index of the sequence.
        sequence: usize,
        /// The block.
        block: u32,
        /// The pool's size.
        blocks_max: usize,
    },
    /// Hidden rows for the MTP module that do not match its tokens.
    #[error("sequence {sequence}: {values} hidden values for {tokens} tokens of {hidden_size}")]
    Hidden {
        /// Index of the sequence.
        sequence: usize,
        /// Values given.
        values: usize,
        /// Tokens given.
        tokens: usize,
        /// Values per token.
        hidden_size: usize,
    },
    /// The MTP module runs on a token and the hidden state before it: there is none before the first.
    #[error("sequence {sequence}: the MTP module has no row for the token at position 0")]
    MtpPosition {
        /// Index of the sequence.
        sequence: usize,
    },
    /// An MTP step on an engine that was loaded without its module.
    #[error("the engine was loaded without its MTP module")]
    NoMtp,
}
