//! What two workers must have in common for their bits to be the same.

use compute::Cpu;
use model::{Checkpoint, ExecutionFingerprint, KvLayout, Numerics};

/// Counts every change that alters a bit of any result; part of the execution fingerprint, so that workers of two
/// versions never mix their caches.
pub const ARITHMETIC_REVISION: u32 = 4;

/// What must be equal for KV, prefixes and bits to cross between two workers; an expert worker, which has no engine,
/// proves with it that its sources compute as it does. `backend` is what computes: [`crate::ExpertBank::backend`].
pub fn execution_fingerprint(
    checkpoint: &Checkpoint,
    layout: &KvLayout,
    numerics: Numerics,
    backend: String,
) -> ExecutionFingerprint {
    fingerprint_of(checkpoint.weights_hash(), layout, numerics, backend)
}

/// How a fingerprint names the CPU.
pub(crate) fn cpu_backend(cpu: &Cpu) -> String {
    format!("cpu-{}", cpu.isa().name())
}

/// The same for any back end.
pub(crate) fn fingerprint_of(
    weights: [u8; 16],
    layout: &KvLayout,
    numerics: Numerics,
    backend: String,
) -> ExecutionFingerprint {
    ExecutionFingerprint {
        weights,
        numerics,
        kv_layout_digest: layout.digest(),
        backend,
        arithmetic_revision: ARITHMETIC_REVISION,
    }
}
