//! Hop 3: chooses the (prefill, decode) pair of a sequence.
//!
//! A pure function of a snapshot: no clock, no lock, no randomness, so that the simulator runs the same
//! code. Invariants: both workers have equal fingerprints, neither is draining or excluded, the sequence
//! fits decode's free KV blocks and prefill's pool. Among those the least loaded win; ties go to the
//! smaller worker id, so that equal snapshots give equal answers.
//!
//! Deliberately not here: prefix hits and transfer cost. They enter as further terms of the two keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::ExecutionFingerprint;

use crate::worker::WorkerKey;

/// What a worker is to the router's sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Prompts to KV and a first token.
    Prefill,
    /// KV to the remaining tokens.
    Decode,
    /// Routed experts; never placed by the router.
    Expert,
}

impl Tier {
    /// Every tier, in the order of a request's way.
    pub const ALL: [Self; 3] = [Self::Prefill, Self::Decode, Self::Expert];

    /// As metrics, health and logs spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Expert => "expert",
        }
    }
}

/// One worker of the snapshot.
#[derive(Debug, Clone)]
pub(crate) struct WorkerLoad {
    /// Name and incarnation.
    pub key: WorkerKey,
    /// Which tier.
    pub tier: Tier,
    /// What must be equal within a pair. Expert workers may have none.
    pub fingerprint: Option<Arc<ExecutionFingerprint>>,
    /// Takes no new sequences.
    pub draining: bool,
    /// Sequences running and waiting there.
    pub sequences: u64,
    /// Prompt tokens queued and not yet computed.
    pub waiting_tokens: u64,
    /// KV blocks nobody holds.
    pub kv_blocks_free: u64,
    /// KV blocks of the pool.
    pub kv_blocks_max: u64,
    /// Tokens in a block, at least 1.
    pub kv_block_tokens: u64,
}

impl WorkerLoad {
    fn blocks_for(&self, tokens: u64) -> u64 {
        tokens.div_ceil(self.kv_block_tokens)
    }
}

/// What a sequence needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need<'a> {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of prompt and completion: decode reserves for a sequence's whole life.
    pub lifetime_tokens: u64,
    /// Workers that have just failed this sequence.
    pub excluded: &'a [WorkerKey],
}

/// Where a sequence goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Runs the prompt.
    pub prefill: WorkerKey,
    /// Runs the rest.
    pub decode: WorkerKey,
}

/// Why there is no pair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No live prefill worker takes sequences.
    #[error("no prefill worker is live")]
    NoPrefill,
    /// No live decode worker takes sequences.
    #[error("no decode worker is live")]
    NoDecode,
    /// Both tiers are there, but no two workers of them agree on what they compute.
    #[error(transparent)]
    Fingerprints(#[from] Box<Disagreement>),
    /// A pair exists, but its decode worker has no room now. Waiting helps.
    #[error("no decode worker has {blocks} KV blocks free")]
    NoRoom {
        /// Blocks the sequence needs.
        blocks: u64,
    },
    /// The sequence fits no pool, however long one waits.
    #[error("the sequence's {lifetime_tokens} tokens fit the KV pool of no pair of workers")]
    TooLong {
        /// Tokens of prompt and completion.
        lifetime_tokens: u64,
    },
}

/// Two workers that would be a pair if they computed the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no prefill and decode worker agree on {field}: {prefill} has {prefill_value}, {decode} has {decode_value}"
)]
pub struct Disagreement {
    /// The first field in which they differ.
    pub field: String,
    /// A prefill worker.
    pub prefill: WorkerKey,
    /// Its value.
    pub prefill_value: String,
    /// A decode worker.
    pub decode: WorkerKey,
    /// Its value.
    pub decode_value: String,
}

/// Chooses the pair for one sequence.
///
/// # Errors
/// Says which tier or which agreement is missing, or that the sequence must wait for room.
pub(crate) fn place(workers: &[WorkerLoad], need: &Need<'_>) -> Result<Pair, PlacementError> {
    let open = |tier| {
        workers.iter().filter(move |worker| {
            worker.tier == tier && !worker.draining && !need.excluded.contains(&worker.key)
        })
    };
    let some_prefill = open(Tier::Prefill).min_by_key(|w| &w.key).ok_or(PlacementError::NoPrefill)?;
    let some_decode = open(Tier::Decode).min_by_key(|w| &w.key).ok_or(PlacementError::NoDecode)?;

    let mut groups: BTreeMap<u64, Group<'_>> = BTreeMap::new();
    for worker in open(Tier::Prefill).chain(open(Tier::Decode)) {
        if let Some(fingerprint) = &worker.fingerprint {
            groups.entry(fingerprint.digest()).or_default().offer(worker, need);
        }
    }
    let best = groups
        .values()
        .filter_map(Group::pair)
        .min_by_key(|(prefill, decode)| (prefill_order(prefill), decode_order(decode)));
    if let Some((prefill, decode)) = best {
        return Ok(Pair { prefill: prefill.key.clone(), decode: decode.key.clone() });
    }
    // Nothing fits now: say whether waiting helps.
    let mut complete = groups.values().filter(|group| group.prefills > 0 && group.decodes > 0).peekable();
    if complete.peek().is_none() {
        return Err(Box::new(disagreement(some_prefill, some_decode)).into());
    }
    match complete.filter(|group| group.prefill.is_some()).filter_map(|group| group.blocks_fitting).min() {
        Some(blocks) => Err(PlacementError::NoRoom { blocks }),
        None => Err(PlacementError::TooLong { lifetime_tokens: need.lifetime_tokens }),
    }
}

/// The longest sequence (prompt and completion) that some live decode worker could ever hold.
pub(crate) fn lifetime_tokens_max(workers: &[WorkerLoad]) -> Option<u64> {
    let decodes = workers.iter().filter(|worker| worker.tier == Tier::Decode && !worker.draining);
    decodes.map(|worker| worker.kv_blocks_max * worker.kv_block_tokens).max()
}

/// The best of one fingerprint's workers.
#[derive(Default)]
struct Group<'a> {
    prefills: usize,
    decodes: usize,
    prefill: Option<&'a WorkerLoad>,
    decode: Option<&'a WorkerLoad>,
    /// Blocks needed on the decode workers whose whole pool would hold the sequence.
    blocks_fitting: Option<u64>,
}

impl<'a> Group<'a> {
    fn offer(&mut self, worker: &'a WorkerLoad, need: &Need<'_>) {
        match worker.tier {
            Tier::Prefill => {
                self.prefills += 1;
                let fits = worker.blocks_for(need.prompt_tokens) <= worker.kv_blocks_max;
                let better = self.prefill.is_none_or(|best| prefill_order(worker) < prefill_order(best));
                if fits && better {
                    self.prefill = Some(worker);
                }
            }
            Tier::Decode => {
                self.decodes += 1;
                let blocks = worker.blocks_for(need.lifetime_tokens);
                if blocks <= worker.kv_blocks_max {
                    self.blocks_fitting = Some(self.blocks_fitting.map_or(blocks, |least| least.min(blocks)));
                }
                let better = self.decode.is_none_or(|best| decode_order(worker) < decode_order(best));
                if blocks <= worker.kv_blocks_free && better {
                    self.decode = Some(worker);
                }
            }
            Tier::Expert => {}
        }
    }

    fn pair(&self) -> Option<(&'a WorkerLoad, &'a WorkerLoad)> {
        self.prefill.zip(self.decode)
    }
}

/// Prefill is compute-bound: what counts is the tokens in front of this prompt.
fn prefill_order(worker: &WorkerLoad) -> (u64, u64, &WorkerKey) {
    (worker.waiting_tokens, worker.sequences, &worker.key)
}

/// Decode steps grow with the batch; among equal batches the emptier pool lasts longer.
fn decode_order(worker: &WorkerLoad) -> (u64, std::cmp::Reverse<u64>, &WorkerKey) {
    (worker.sequences, std::cmp::Reverse(worker.kv_blocks_free), &worker.key)
}

fn disagreement(prefill: &WorkerLoad, decode: &WorkerLoad) -> Disagreement {
    let differing = match (&prefill.fingerprint, &decode.fingerprint) {
        (Some(ours), Some(theirs)) => ours.mismatch(theirs),
        _ => None,
    };
    let (field, prefill_value, decode_value) = match differing {
        Some(mismatch) => {
            (mismatch.field.to_string(), mismatch.ours.to_string(), mismatch.theirs.to_string())
        }
        None => ("fingerprint".to_owned(), "none".to_owned(), "none".to_owned()),
    };
    Disagreement {
        field,
        prefill: prefill.key.clone(),
        prefill_value,
        decode: decode.key.clone(),
        decode_value,
    }
}

#[cfg(test)]
mod tests;
