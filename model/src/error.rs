//! Everything that can be wrong with a model directory.
//!
//! Two moments, two consequences. While a directory is opened, an error is its owner's to repair and the process does
//! not start. While requests are served only `Tokenizer::encode` and `ChatTemplate::render` can fail, and what fails is
//! the caller's text or conversation: `Rejected`. Nothing here is worth a retry.

use std::path::PathBuf;

/// A model directory that cannot be served, and where in it the reason lies.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file could not be opened, read or mapped.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is larger than any honest file of its kind.
    #[error("{}: {bytes} bytes, at most {bytes_max} are read", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// The file is not the JSON that it should be.
    #[error("{}: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where it stopped making sense.
        #[source]
        source: serde_json::Error,
    },
    /// A JSON file's field is missing, out of range, or means something that is not supported.
    #[error("{}: {source}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// Names the field.
        #[source]
        source: ConfigError,
    },
    /// No weights in the directory.
    #[error("{}: neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The index names a shard that is not a plain file name ending in `.safetensors`.
    #[error("{}: tensor `{tensor}` is said to be in `{shard}`, which is not the plain name of a .safetensors file", file.display())]
    ShardName {
        /// The index.
        file: PathBuf,
        /// The tensor whose entry it is.
        tensor: String,
        /// The name as it stands there.
        shard: String,
    },
    /// The index names more shards than any checkpoint has.
    #[error("{}: {shards} shards, at most {shards_max} are opened", file.display())]
    TooManyShards {
        /// The index.
        file: PathBuf,
        /// Shards named.
        shards: usize,
        /// The bound.
        shards_max: usize,
    },
    /// A safetensors header cannot be used as a whole.
    #[error("{}: {source}", file.display())]
    Header {
        /// The safetensors file.
        file: PathBuf,
        /// What is wrong.
        #[source]
        source: HeaderError,
    },
    /// One tensor cannot be used.
    #[error("{}: tensor `{tensor}`: {source}", file.display())]
    Tensor {
        /// The safetensors file, or the directory when no file has the tensor.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        #[source]
        source: TensorError,
    },
    /// The tokenizer cannot be built or used.
    #[error("{}: {source}", file.display())]
    Tokenizer {
        /// tokenizer.json
        file: PathBuf,
        /// What is wrong.
        #[source]
        source: TokenizerError,
    },
    /// The chat template cannot be compiled or rendered.
    #[error("{}: {source}", file.display())]
    Template {
        /// The file that holds the template.
        file: PathBuf,
        /// What is wrong.
        #[source]
        source: TemplateError,
    },
}

/// A field of a JSON file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// The text is JSON but not an object.
    #[error("not a JSON object")]
    NotAnObject,
    /// A field without a default is not there.
    #[error("`{field}` is missing")]
    Missing {
        /// Its name.
        field: String,
    },
    /// A field has the wrong type or lies out of range.
    #[error("`{field}` is {found}, must be {expected}")]
    Invalid {
        /// Its name, dotted for a nested one.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What stands there, shortened.
        found: String,
    },
}

/// A safetensors header that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer bytes than the length prefix, or than the header that it announces.
    #[error("truncated: the header needs {needed} bytes, the file has {bytes}")]
    Truncated {
        /// Bytes up to the header's end.
        needed: u64,
        /// Bytes in the file.
        bytes: u64,
    },
    /// The announced header is larger than any honest one.
    #[error("the header claims {bytes} bytes, at most {bytes_max} are read")]
    TooLarge {
        /// Bytes announced.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// The header is not the JSON that the format asks for.
    #[error("header: {0}")]
    Json(#[from] serde_json::Error),
    /// Bytes behind the last tensor.
    #[error("{bytes} bytes follow the last tensor")]
    TrailingBytes {
        /// How many.
        bytes: u64,
    },
}

/// A tensor that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The configuration needs it and no file has it.
    #[error("missing")]
    Missing,
    /// The index promises it in this file, and it is not there.
    #[error("the index says it is in this file, and it is not")]
    NotInShard,
    /// The header describes it twice.
    #[error("described twice")]
    Duplicate,
    /// A number format that DeepSeek checkpoints do not use.
    #[error("dtype {found}, must be F8_E4M3, BF16 or F32")]
    UnsupportedDtype {
        /// The dtype as it stands in the header.
        found: String,
    },
    /// A supported dtype in a place where it means nothing.
    #[error("dtype {found}, must be {expected}")]
    WrongDtype {
        /// The dtype in the file.
        found: &'static str,
        /// What would have been accepted.
        expected: String,
    },
    /// The shape does not follow from config.json.
    #[error("shape {found:?}, must be {expected:?} by config.json")]
    WrongShape {
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that config.json asks for.
        expected: Vec<usize>,
    },
    /// More dimensions than any tensor has, or more elements than can be counted.
    #[error("shape {found:?} is not a shape of any weight")]
    ImpossibleShape {
        /// The shape in the header.
        found: Vec<u64>,
    },
    /// Shape and dtype disagree with the byte range.
    #[error("its byte range holds {found} bytes, shape and dtype need {expected}")]
    WrongLength {
        /// Bytes in the range.
        found: u64,
        /// Bytes that shape and dtype need.
        expected: u64,
    },
    /// The range begins behind its end.
    #[error("its byte range {begin}..{end} is no range")]
    InvertedRange {
        /// First byte.
        begin: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The range ends behind the file's end.
    #[error("its bytes end at {end} of the data, the file has {bytes}: truncated")]
    Truncated {
        /// One past its last byte.
        end: u64,
        /// Data bytes in the file.
        bytes: u64,
    },
    /// The range shares bytes with another tensor's.
    #[error("its bytes overlap those of `{other}`")]
    Overlap {
        /// The tensor before it.
        other: String,
    },
    /// The range leaves bytes that belong to no tensor.
    #[error("{bytes} bytes before it belong to no tensor")]
    Hole {
        /// How many.
        bytes: u64,
    },
    /// FP8 values cannot be read without their scales.
    #[error("F8_E4M3 needs {needs}")]
    Fp8Without {
        /// What is missing.
        needs: &'static str,
    },
}

/// A tokenizer that cannot be built or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The library refused the file or the text.
    #[error("{0}")]
    Library(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Decoding is not byte-level; every DeepSeek tokenizer's is.
    #[error("its decoder is not ByteLevel, which every DeepSeek tokenizer's is")]
    Decoder,
    /// A token id beyond any vocabulary.
    #[error("token `{token}` has id {id}, at most {id_max} is understood")]
    IdTooLarge {
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// The bound.
        id_max: u32,
    },
    /// tokenizer_config.json asks for a begin-of-sequence token that the vocabulary does not have.
    #[error("add_bos_token is set but the vocabulary has no `{token}`")]
    NoBos {
        /// The configured token, empty when none is.
        token: String,
    },
}

/// A chat template that cannot be compiled or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A list of named templates without one called `default`.
    #[error("`chat_template` lists templates, none of them named `default`")]
    NoDefault,
    /// The template refuses the conversation: the caller's fault, in the template's own words.
    #[error("the chat template refuses the conversation: {message}")]
    Refused {
        /// What the template passed to `raise_exception`.
        message: String,
    },
    /// The template does not compile or failed while rendering.
    #[error("chat template: {0}")]
    Engine(#[source] minijinja::Error),
}
