//! What two workers must share for the same tokens to come out of both.

use std::fmt::Write;

use xxhash_rust::xxh3::xxh3_64;

use crate::numerics::Numerics;

/// The execution fingerprint. KV, prefix reuse and bit-exact failover cross only between equal ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExecutionFingerprint {
    /// [`crate::Checkpoint::weights_hash`].
    pub weights: [u8; 16],
    /// How the forward pass rounds.
    pub numerics: Numerics,
    /// [`crate::KvLayout::digest`].
    pub kv_layout_digest: u64,
    /// Back end and instruction set, such as `cpu/avx512`: their roundings differ.
    pub backend: String,
    /// Raised with every change to the arithmetic of the engine.
    pub arithmetic_revision: u32,
}

/// The first field in which two fingerprints differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("execution fingerprints differ in `{field}`: ours is {ours}, theirs {theirs}")]
pub struct FingerprintMismatch {
    /// The field's name.
    pub field: &'static str,
    /// Its value here.
    pub ours: String,
    /// Its value there.
    pub theirs: String,
}

impl ExecutionFingerprint {
    /// The first field in which `theirs` differs, `None` when the two are equal.
    pub fn mismatch(&self, theirs: &Self) -> Option<FingerprintMismatch> {
        let pairs = self.fields().into_iter().zip(theirs.fields());
        pairs
            .filter(|((_, ours), (_, theirs))| ours != theirs)
            .map(|((field, ours), (_, theirs))| FingerprintMismatch { field, ours, theirs })
            .next()
    }

    /// xxh3-64 over all fields: a short name for logs and lookups.
    pub fn digest(&self) -> u64 {
        let mut text = String::new();
        for (field, value) in self.fields() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{field}={value}");
        }
        xxh3_64(text.as_bytes())
    }

    fn fields(&self) -> [(&'static str, String); 5] {
        // Destructured so that a new field cannot be forgotten here.
        let Self { weights, numerics, kv_layout_digest, backend, arithmetic_revision } = self;
        [
            ("weights", format!("{:032x}", u128::from_be_bytes(*weights))),
            ("numerics", numerics.to_string()),
            ("kv_layout_digest", format!("{kv_layout_digest:016x}")),
            ("backend", backend.clone()),
            ("arithmetic_revision", arithmetic_revision.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests;
