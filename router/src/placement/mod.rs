//! Hop 3: chooses the (prefill, decode) pair of a sequence.
//!
//! A pure function of a snapshot: no clock, no lock, no randomness, so that the simulator runs the same
//! code. Invariants: both workers have equal fingerprints, neither is draining or excluded, the sequence
//! fits the pools of both. Among those the cheapest win, in tokens of work: on prefill what is queued and what of
//! the prompt is not there already, on decode the batch it would join and the KV that would have to be brought;
//! ties go to the smaller worker id, so that equal snapshots give equal answers.
//!
//! Whether the pair's prompt is computed on prefill at all, or on decode, is [`disaggregation`]'s to say.
//!
//! What a worker holds is a guess ([`PrefixIndex`]); whether there is room at this moment is decode's to say, which
//! queues what has to wait.

pub mod disaggregation;
mod prefix_index;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use model::ExecutionFingerprint;

use self::disaggregation::{Decision, Local, PrefillOnDecode, Remote};
pub(crate) use self::prefix_index::{PrefixIndex, Prefixes};
use crate::admission::door::PrefillPace;
use crate::worker::WorkerKey;

/// Tokens of KV that must be brought to decode which weigh as much as one more sequence in its batch. In V3's layout they are
/// 20 MB: some milliseconds of a 100 Gbit/s link, which is what one more row may cost each step of a full batch.
const TOKENS_PER_SEQUENCE: u64 = 512;

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
    /// Sequences that wait for KV blocks there.
    pub queued: u64,
    /// Prompt tokens that it computes in a second; 0: not known yet.
    pub prompt_tokens_per_s: u64,
    /// Decode: a step of late, and what one may have.
    pub step: StepLoad,
    /// Tokens at the start of this sequence's prompt whose KV it is thought to hold.
    pub matched_tokens: u64,
}

impl WorkerLoad {
    fn blocks_for(&self, tokens: u64) -> u64 {
        tokens.div_ceil(self.kv_block_tokens)
    }
}

/// A decode worker's steps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepLoad {
    /// Sequences that take part.
    pub running: u64,
    /// Its time, of late.
    pub time: Duration,
    /// Sequences at most.
    pub batch_max: u64,
    /// Prompt tokens behind it at most; 0: the worker computes no prompts.
    pub prompt_tokens_max: u64,
}

/// What a sequence needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need<'a> {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of prompt and completion: what decode must be able to hold at worst.
    pub lifetime_tokens: u64,
    /// Something is wanted of the prompt that prefill alone reports.
    pub only_prefill: bool,
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
        .min_by_key(|(prefill, decode)| (prefill_order(prefill, need), decode_order(decode, need)));
    if let Some((prefill, decode)) = best {
        return Ok(Pair { prefill: prefill.key.clone(), decode: decode.key.clone() });
    }
    match groups.values().any(|group| group.prefills > 0 && group.decodes > 0) {
        true => Err(PlacementError::TooLong { lifetime_tokens: need.lifetime_tokens }),
        false => Err(Box::new(disagreement(some_prefill, some_decode)).into()),
    }
}

/// The longest sequence (prompt and completion) that some live decode worker could ever hold.
pub(crate) fn lifetime_tokens_max(workers: &[WorkerLoad]) -> Option<u64> {
    let decodes = workers.iter().filter(|worker| worker.tier == Tier::Decode && !worker.draining);
    decodes.map(|worker| worker.kv_blocks_max * worker.kv_block_tokens).max()
}

/// Where the prompt of a placed sequence is computed.
pub(crate) fn decide(
    policy: PrefillOnDecode,
    (prefill, decode): (&WorkerLoad, &WorkerLoad),
    need: &Need<'_>,
    handover: Duration,
) -> Decision {
    // The last token is computed wherever the rest is found.
    let missing = |worker: &WorkerLoad| need.prompt_tokens.saturating_sub(worker.matched_tokens).max(1);
    let remote = Remote {
        waiting_tokens: prefill.waiting_tokens,
        missing_tokens: missing(prefill),
        tokens_per_s: prefill.prompt_tokens_per_s,
        handover,
    };
    let local = Local {
        waiting_tokens: decode.waiting_tokens,
        missing_tokens: missing(decode),
        tokens_per_s: decode.prompt_tokens_per_s,
        chunk_tokens: decode.step.prompt_tokens_max,
        step: decode.step.time,
        running: decode.step.running,
        batch_max: decode.step.batch_max,
    };
    disaggregation::decide(policy, &local, &remote, need.only_prefill)
}

/// How fast those who compute prompts do it, all together: prefill workers, or decode's where all are left to them. One that has not computed any yet is taken for one of the
/// others.
pub(crate) fn prefill_pace(workers: &[WorkerLoad], policy: PrefillOnDecode) -> PrefillPace {
    let tier = if policy == PrefillOnDecode::Always { Tier::Decode } else { Tier::Prefill };
    let open = || workers.iter().filter(|worker| worker.tier == tier && !worker.draining);
    let known = || open().map(|worker| worker.prompt_tokens_per_s).filter(|&rate| rate > 0);
    let (workers, of) = (open().count(), known().count());
    let sum = known().sum::<u64>() as f64;
    PrefillPace { tokens_per_s: if of > 0 { sum * workers as f64 / of as f64 } else { 0.0 }, workers }
}

/// The best of one fingerprint's workers.
#[derive(Default)]
struct Group<'a> {
    prefills: usize,
    decodes: usize,
    prefill: Option<&'a WorkerLoad>,
    decode: Option<&'a WorkerLoad>,
}

impl<'a> Group<'a> {
    fn offer(&mut self, worker: &'a WorkerLoad, need: &Need<'_>) {
        match worker.tier {
            Tier::Prefill => {
                self.prefills += 1;
                let fits = worker.blocks_for(need.prompt_tokens) <= worker.kv_blocks_max;
                let order = prefill_order(worker, need);
                if fits && self.prefill.is_none_or(|best| order < prefill_order(best, need)) {
                    self.prefill = Some(worker);
                }
            }
            Tier::Decode => {
                self.decodes += 1;
                let fits = worker.blocks_for(need.lifetime_tokens) <= worker.kv_blocks_max;
                let order = decode_order(worker, need);
                if fits && self.decode.is_none_or(|best| order < decode_order(best, need)) {
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

/// Prefill is compute-bound: what counts is the tokens in front of this prompt, and those of its own that must be computed.
fn prefill_order<'a>(worker: &'a WorkerLoad, need: &Need<'_>) -> (u64, u64, &'a WorkerKey) {
    let missing = need.prompt_tokens.saturating_sub(worker.matched_tokens);
    (worker.waiting_tokens + missing, worker.sequences, &worker.key)
}

/// Whoever has room at once comes first. Decode steps grow with the batch, and what is not there must be brought; among
/// equals the emptier pool lasts longer.
fn decode_order<'a>(worker: &'a WorkerLoad, need: &Need<'_>) -> (bool, u64, Reverse<u64>, &'a WorkerKey) {
    let missing = need.prompt_tokens.saturating_sub(worker.matched_tokens);
    let waits = worker.queued > 0 || worker.kv_blocks_free < worker.blocks_for(missing);
    let cost = worker.sequences * TOKENS_PER_SEQUENCE + missing;
    (waits, cost, Reverse(worker.kv_blocks_free), &worker.key)
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
