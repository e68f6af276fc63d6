//! Dispatch and combine frames: what their heads must say before a byte of their bodies is used.
//!
//! A head is `proto`'s [`DispatchHead`] or [`CombineHead`]; a body is rows of raw numbers. Everything
//! here is a pure check or conversion. Invariant: after [`check_dispatch`] and [`check_combine`] every
//! index into a body is in bounds.

use compute::ActivationFormat;
use engine::{ExpertBank, ResultFormat};
use model::{ExpertId, ModelConfig, Numerics};
use proto::v1::{CombineHead, DispatchHead};

use crate::Placement;

/// How rows look on the wire; follows from the model and its numerics, equal at both ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WireFormats {
    /// Channels of a row: the model's hidden size.
    pub hidden: usize,
    /// Rows that go out.
    pub activation: ActivationFormat,
    /// Vectors that come back.
    pub result: ResultFormat,
}

impl WireFormats {
    /// What follows from a model in a numerics.
    pub fn new(config: &ModelConfig, numerics: Numerics) -> Self {
        Self {
            hidden: config.hidden_size,
            activation: engine::wire_activation_format(config, numerics),
            result: ResultFormat::of(numerics),
        }
    }

    /// What loaded experts take and give.
    pub fn of_bank(bank: &ExpertBank) -> Self {
        Self {
            hidden: bank.hidden_size(),
            activation: bank.activation_format(),
            result: bank.result_format(),
        }
    }

    /// Bytes of one token's row in a dispatch.
    pub fn activation_row_bytes(&self) -> usize {
        self.activation.wire_row_bytes(self.hidden)
    }

    /// Bytes of one (token, expert) vector in a combine.
    pub fn result_row_bytes(&self) -> usize {
        match self.result {
            ResultFormat::Bf16 => 2 * self.hidden,
            ResultFormat::F32 => 4 * self.hidden,
        }
    }

    /// Writes a vector as the wire has it; `bytes` holds [`Self::result_row_bytes`]. The values are
    /// already rounded to the wire's type, so bf16 only cuts zeros off.
    pub fn write_result(&self, vector: &[f32], bytes: &mut [u8]) {
        match self.result {
            ResultFormat::Bf16 => {
                for (value, out) in vector.iter().zip(bytes.chunks_exact_mut(2)) {
                    out.copy_from_slice(&value.to_le_bytes()[2..]);
                }
            }
            ResultFormat::F32 => {
                for (value, out) in vector.iter().zip(bytes.chunks_exact_mut(4)) {
                    out.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }

    /// Reads back what [`Self::write_result`] wrote.
    pub fn read_result(&self, bytes: &[u8], vector: &mut [f32]) {
        match self.result {
            ResultFormat::Bf16 => {
                for (value, half) in vector.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f32::from_le_bytes([0, 0, half[0], half[1]]);
                }
            }
            ResultFormat::F32 => {
                for (value, word) in vector.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                }
            }
        }
    }
}

/// What a worker measures a dispatch against.
#[derive(Debug, Clone)]
pub struct Share {
    /// The table in force.
    pub placement: Placement,
    /// This worker's rank in it.
    pub rank: usize,
    /// How rows look.
    pub wire: WireFormats,
    /// Tokens in one frame at most.
    pub tokens_max: usize,
    /// (token, expert) pairs in one frame at most.
    pub vectors_max: usize,
}

/// Why a dispatch was refused; its text travels back to the source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DispatchRefusal {
    /// Source and worker were configured with different tables.
    #[error("placement_version is {theirs:#018x}, this worker has {ours:#018x}")]
    PlacementVersion {
        /// The source's.
        theirs: u64,
        /// This worker's.
        ours: u64,
    },
    /// Not a MoE layer.
    #[error("layer {layer} has no routed experts")]
    UnknownLayer {
        /// As sent.
        layer: u32,
    },
    /// Not held by this worker.
    #[error("expert {expert} of layer {layer} is not on this worker")]
    UnknownExpert {
        /// Layer of the dispatch.
        layer: u32,
        /// As sent.
        expert: u32,
    },
    /// Rows of another model.
    #[error("hidden is {found}, expected {expected}")]
    Hidden {
        /// As sent.
        found: u32,
        /// The model's.
        expected: usize,
    },
    /// No tokens, or more than allowed.
    #[error("tokens is {found}, expected 1..={max}")]
    Tokens {
        /// As sent.
        found: u32,
        /// Allowed.
        max: usize,
    },
    /// No pairs, or more than allowed.
    #[error("experts has {found} entries, expected 1..={max}")]
    Vectors {
        /// As sent.
        found: usize,
        /// Allowed.
        max: usize,
    },
    /// The two lists do not describe the same pairs.
    #[error(
        "experts_per_token has {tokens} entries with sum {sum}, expected {expected_tokens} with sum {expected_sum}"
    )]
    Counts {
        /// Entries.
        tokens: usize,
        /// Their sum.
        sum: u64,
        /// `tokens` of the head.
        expected_tokens: u32,
        /// Length of `experts`.
        expected_sum: usize,
    },
    /// The body is not what the head describes.
    #[error("body has {found} bytes, expected {expected}")]
    Body {
        /// As sent.
        found: usize,
        /// `tokens` rows.
        expected: usize,
    },
}

/// Checks a dispatch of `body` bytes against the worker's share.
pub fn check_dispatch(head: &DispatchHead, body: usize, share: &Share) -> Result<(), DispatchRefusal> {
    let ours = share.placement.version();
    let theirs = head.placement_version;
    if theirs != ours {
        return Err(DispatchRefusal::PlacementVersion { theirs, ours });
    }
    let layer = head.layer;
    if share.placement.owners(layer as usize).is_none() {
        return Err(DispatchRefusal::UnknownLayer { layer });
    }
    let expected = share.wire.hidden;
    if head.hidden as usize != expected {
        return Err(DispatchRefusal::Hidden { found: head.hidden, expected });
    }
    let tokens = head.tokens as usize;
    if tokens == 0 || tokens > share.tokens_max {
        return Err(DispatchRefusal::Tokens { found: head.tokens, max: share.tokens_max });
    }
    let vectors = head.experts.len();
    if vectors == 0 || vectors > share.vectors_max {
        return Err(DispatchRefusal::Vectors { found: vectors, max: share.vectors_max });
    }
    let sum = head.experts_per_token.iter().map(|&count| u64::from(count)).sum();
    if head.experts_per_token.len() != tokens || sum != vectors as u64 {
        return Err(DispatchRefusal::Counts {
            tokens: head.experts_per_token.len(),
            sum,
            expected_tokens: head.tokens,
            expected_sum: vectors,
        });
    }
    let held = |expert: u32| {
        let id = u16::try_from(expert).map(ExpertId);
        id.is_ok_and(|id| share.placement.holds(share.rank, layer as usize, id))
    };
    if let Some(&expert) = head.experts.iter().find(|&&expert| !held(expert)) {
        return Err(DispatchRefusal::UnknownExpert { layer, expert });
    }
    let expected = tokens * share.wire.activation_row_bytes();
    if body != expected {
        return Err(DispatchRefusal::Body { found: body, expected });
    }
    Ok(())
}

/// Why a reply to a live dispatch is no answer to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CombineFault {
    /// The worker refused the dispatch.
    #[error("refused: {reason}")]
    Refused {
        /// The worker's words, shortened.
        reason: String,
    },
    /// Fewer or more vectors, or bytes, than asked for.
    #[error("reply has {vectors} vectors in {bytes} bytes, expected {expected_vectors} in {expected_bytes}")]
    Size {
        /// As the head says.
        vectors: u32,
        /// In the body.
        bytes: usize,
        /// Asked for.
        expected_vectors: usize,
        /// Asked for.
        expected_bytes: usize,
    },
}

/// Checks a reply with `body` bytes to a dispatch that asked for `vectors`.
pub fn check_combine(
    head: &CombineHead,
    body: usize,
    vectors: usize,
    wire: &WireFormats,
) -> Result<(), CombineFault> {
    if !head.refused.is_empty() {
        // A line of a log, whatever a peer sends.
        let reason = head.refused.chars().take(256).collect();
        return Err(CombineFault::Refused { reason });
    }
    let expected_bytes = vectors * wire.result_row_bytes();
    if head.vectors as usize != vectors || body != expected_bytes {
        return Err(CombineFault::Size {
            vectors: head.vectors,
            bytes: body,
            expected_vectors: vectors,
            expected_bytes,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
