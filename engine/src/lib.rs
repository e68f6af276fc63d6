//! One forward step of a DeepSeek model: layers, paged KV cache, batch, sampler.
//!
//! [`Engine::step`] takes rows of any number of sequences and gives logits for the rows that want them. Whether a
//! sequence decodes, verifies a draft or runs a chunk of its prompt is not known here, and a row's bits depend on its
//! own sequence alone (ARCHITECTURE.md). Routed experts are reached through [`Experts`].
//!
//! Deliberately not here: which sequences run when (the roles' schedulers), where KV goes (`kvtransfer`), networks,
//! clocks and tokio, but for the thread that keeps KV blocks on a disk
//! (`kv_tier`). One thread owns an engine.

mod batch;
mod block_pool;
mod cuda;
mod deepseek;
mod drawing;
mod engine;
mod error;
mod experts;
mod fingerprint;
mod kv_cache;
mod kv_tier;
mod lower_tier;
mod options;
mod sampler;
mod stage;
mod step;

pub use batch::{LogitsWanted, SequenceInput};
pub use block_pool::{BlockPool, BlockTable, Reservation, Restored};
pub use drawing::{Drafter, Draw, Drawn};
pub use engine::Engine;
pub use error::{EngineError, InvalidBatch, StepError};
pub use experts::{
    ExpertBank, ExpertBatch, ExpertGroup, ExpertJobs, ExpertScratch, Experts, ExpertsError, LocalExperts,
};
pub use fingerprint::{ARITHMETIC_REVISION, execution_fingerprint};
pub use kv_cache::KvPool;
pub use kv_tier::{Behind, BlockRows, DiskError, DiskOptions, Found, KvTier, KvTierOptions, TierStats};
pub use lower_tier::{Evicted, LowerTier, Source};
pub use options::{EngineOptions, ResultFormat, SyntheticWeights, wire_activation_format};
pub use sampler::{Sampled, SequenceSampler};
pub use stage::Stage;
pub use step::{DraftInput, FollowedInput, FollowedOutput, MtpInput, StepObserver, StepOutput, Watched};
