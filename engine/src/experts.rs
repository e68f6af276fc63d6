//! The seam between the engine and the routed experts.
//!
//! The engine routes; whoever implements [`Experts`] computes. [`LocalExperts`] does it in this process,
//! `expert::RemoteExperts` on other workers, and both give the same bits: tokens leave in
//! [`crate::wire_activation_format`], and one vector per (token, expert) comes back, rounded to [`crate::ResultFormat`].
//! The engine multiplies by the router's weights and sums in f32, in top-k order. An implementation therefore never
//! sees a router weight and never adds two experts together.

mod bank;
mod local;

pub use bank::{ExpertBank, ExpertGroup, ExpertJobs, ExpertScratch};
pub use local::LocalExperts;

use model::ExpertId;

/// The tokens of one MoE layer of one step.
#[derive(Clone, Copy)]
pub struct ExpertBatch<'a> {
    /// The layer, counted as in the checkpoint; an MTP module's is `num_hidden_layers`.
    pub layer: usize,
    /// One row per token, in the wire format.
    pub activations: &'a compute::Activations,
    /// Experts per token.
    pub topk: usize,
    /// `[tokens, topk]`, in the router's order (best first).
    pub expert_ids: &'a [u16],
}

/// Where routed experts are computed.
///
/// `dispatch` and `combine` alternate. Between the two the engine computes the shared expert, so an implementation that
/// sends tokens elsewhere returns from `dispatch` as soon as they are on their way.
pub trait Experts: Send {
    /// Starts computing `batch`. After an error the step ends and `combine` is not called.
    fn dispatch(&mut self, cpu: &compute::Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError>;

    /// Waits for the batch that was dispatched last: `out` is `[tokens * topk, hidden]` in the order of its `expert_ids`.
    fn combine(&mut self, cpu: &compute::Cpu, out: &mut [f32]) -> Result<(), ExpertsError>;
}

/// Why routed experts gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ExpertsError {
    /// A worker cannot be reached or did not answer in time; the step may be retried elsewhere.
    #[error("expert worker {worker} is unavailable: {detail}")]
    Unavailable {
        /// The worker.
        worker: String,
        /// What happened.
        detail: String,
    },
    /// A worker refused the batch; trying again would not help.
    #[error("layer {layer}: expert batch rejected: {detail}")]
    Rejected {
        /// The layer of the batch.
        layer: usize,
        /// What is wrong with it.
        detail: String,
    },
    /// The device that computes them has failed. It gives nothing any more: its worker must end.
    #[error("the experts' device failed")]
    Device(#[from] compute::cuda::CudaError),
    /// An expert that is not loaded here.
    #[error("layer {layer}: expert {expert} is not held here")]
    NotHeld {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: ExpertId,
    },
}
