//! [`v1::Fingerprint`] ⇄ [`model::ExecutionFingerprint`]: what must be equal for KV and bits to cross.

use model::ExecutionFingerprint;

use crate::field::{FieldError, name};
use crate::v1;

/// Longest back end name, bytes: `cpu/avx512` has ten.
const BACKEND_BYTES_MAX: usize = 64;

/// The wire's form of `fingerprint`.
pub fn to_wire(fingerprint: &ExecutionFingerprint) -> v1::Fingerprint {
    v1::Fingerprint {
        weights: fingerprint.weights.to_vec(),
        numerics: fingerprint.numerics.to_string(),
        kv_layout_digest: fingerprint.kv_layout_digest,
        backend: fingerprint.backend.clone(),
        arithmetic_revision: fingerprint.arithmetic_revision,
    }
}

/// Checks shape and bounds; says nothing about equality with ours.
///
/// # Errors
/// Names the field: `weights` that are no 16 bytes, an unknown `numerics`, a missing or overlong `backend`.
pub fn from_wire(wire: &v1::Fingerprint) -> Result<ExecutionFingerprint, FieldError> {
    let weights = wire.weights.as_slice().try_into().map_err(|_| {
        FieldError::out_of_range("weights", format_args!("{} bytes", wire.weights.len()), "16 bytes")
    })?;
    let numerics = wire
        .numerics
        .parse()
        .map_err(|_| FieldError::out_of_range("numerics", &wire.numerics, "reference or fp8"))?;
    name("backend", &wire.backend, BACKEND_BYTES_MAX)?;
    Ok(ExecutionFingerprint {
        weights,
        numerics,
        kv_layout_digest: wire.kv_layout_digest,
        backend: wire.backend.clone(),
        arithmetic_revision: wire.arithmetic_revision,
    })
}

/// Reads the peer's fingerprint and demands that it equals `ours`.
///
/// # Errors
/// Names the field that is malformed or differs, with both values.
pub fn require_equal(
    ours: &ExecutionFingerprint,
    theirs: Option<&v1::Fingerprint>,
) -> Result<(), FieldError> {
    let wire = theirs.ok_or_else(|| FieldError::missing("fingerprint"))?;
    let theirs = from_wire(wire).map_err(|error| error.within("fingerprint"))?;
    match ours.mismatch(&theirs) {
        None => Ok(()),
        Some(difference) => Err(FieldError::out_of_range(
            format!("fingerprint.{}", difference.field),
            &difference.theirs,
            format_args!("{} as on this worker", difference.ours),
        )),
    }
}
