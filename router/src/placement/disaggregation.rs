//! Conditional disaggregation: whether a prompt is computed on prefill and handed over, or on decode itself.
//!
//! A pure function of what was measured. On prefill a prompt waits for those before it, is computed as far as prefill does not hold
//! it, and is handed over:
//!
//! > remote = (tokens before it + missing on prefill + computed again) / prefill's pace + hand-over
//!
//! *Computed again* is what decode holds and prefill does not, an answer's blocks above all: work that nobody had to do, which whoever
//! comes next waits for. On decode it is computed in chunks between the steps of what runs there, and each of those sequences gets its next token
//! later by as much. What that is worth grows with how full the batch is: an empty one has time to spare, a full
//! one none:
//!
//! > local = (tokens before it + missing on decode) / decode's pace + steps between the chunks
//! >         + missing on decode / decode's pace × running × running / batch
//!
//! So short prompts and those of which decode holds most, answers included, are computed there while it has time, and a
//! busy decode keeps to its steps. Who has not measured its pace yet is taken for the other: both run the same model on the same
//! kind of device.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which prompts decode computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefillOnDecode {
    /// Those that cost less there.
    #[default]
    Auto,
    /// None: prefill and decode stay apart.
    Never,
    /// All: prefill workers are for those that report log-probabilities of their prompts.
    Always,
}

impl std::str::FromStr for PrefillOnDecode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            _ => Err("must be auto, never or always"),
        }
    }
}

/// What a prompt would meet on a prefill worker.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Remote {
    /// Prompt tokens before it.
    pub waiting_tokens: u64,
    /// Its own that are not there.
    pub missing_tokens: u64,
    /// Prompt tokens that the worker computes in a second; 0: not known yet.
    pub tokens_per_s: u64,
    /// From the first token on prefill to a sequence that runs on decode, of late.
    pub handover: Duration,
}

/// What it would meet on a decode worker.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Local {
    /// Prompt tokens before it.
    pub waiting_tokens: u64,
    /// Its own that are not there.
    pub missing_tokens: u64,
    /// Prompt tokens that the worker computes in a second of the time that it takes for them; 0: not known yet.
    pub tokens_per_s: u64,
    /// Prompt tokens between two steps; 0: it computes none.
    pub chunk_tokens: u64,
    /// A step of what runs.
    pub step: Duration,
    /// Sequences that run.
    pub running: u64,
    /// Sequences in a step at most.
    pub batch_max: u64,
}

/// Where a prompt is computed, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// On decode.
    pub on_decode: bool,
    /// What it was thought to cost there.
    pub local: Duration,
    /// What it was thought to cost on prefill.
    pub remote: Duration,
}

impl Decision {
    /// As metrics and spans spell it.
    pub fn name(&self) -> &'static str {
        if self.on_decode { "decode" } else { "prefill" }
    }
}

/// Decides for one prompt. `only_prefill`: something is wanted of it that prefill alone reports.
pub fn decide(policy: PrefillOnDecode, local: &Local, remote: &Remote, only_prefill: bool) -> Decision {
    let known = |own: u64, other: u64| if own > 0 { own } else { other };
    let local_pace = known(local.tokens_per_s, remote.tokens_per_s);
    let remote_pace = known(remote.tokens_per_s, local.tokens_per_s);
    let again = remote.missing_tokens.saturating_sub(local.missing_tokens);
    let (local_cost, remote_cost) = (local_cost(local, local_pace), remote_cost(remote, again, remote_pace));
    let able = local.chunk_tokens > 0 && !only_prefill;
    let on_decode = match policy {
        PrefillOnDecode::Never => false,
        PrefillOnDecode::Always => able,
        PrefillOnDecode::Auto => able && local_pace > 0 && local_cost < remote_cost,
    };
    Decision { on_decode, local: local_cost, remote: remote_cost }
}

fn remote_cost(remote: &Remote, again: u64, pace: u64) -> Duration {
    time(remote.waiting_tokens + remote.missing_tokens + again, pace) + remote.handover
}

fn local_cost(local: &Local, pace: u64) -> Duration {
    let tokens = local.waiting_tokens + local.missing_tokens;
    let steps = if local.running > 0 { tokens.div_ceil(local.chunk_tokens.max(1)) } else { 0 };
    let between = local.step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX));
    let held_up = local.running as f64 * (local.running as f64 / local.batch_max.max(1) as f64).min(1.0);
    let interference = time(local.missing_tokens, pace).as_secs_f64() * held_up;
    time(tokens, pace)
        .saturating_add(between)
        .saturating_add(Duration::try_from_secs_f64(interference).unwrap_or(Duration::MAX))
}

fn time(tokens: u64, pace: u64) -> Duration {
    if pace == 0 { Duration::ZERO } else { Duration::from_secs_f64(tokens as f64 / pace as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REMOTE: Remote = Remote {
        waiting_tokens: 0,
        missing_tokens: 1000,
        tokens_per_s: 10_000,
        handover: Duration::from_millis(5),
    };
    const LOCAL: Local = Local {
        waiting_tokens: 0,
        missing_tokens: 1000,
        tokens_per_s: 10_000,
        chunk_tokens: 100,
        step: Duration::from_millis(2),
        running: 0,
        batch_max: 64,
    };

    fn on_decode(local: Local, remote: Remote) -> bool {
        decide(PrefillOnDecode::Auto, &local, &remote, false).on_decode
    }

    #[test]
    fn the_costs_are_what_they_are_said_to_be() {
        let running = Local { running: 16, waiting_tokens: 500, ..LOCAL };
        let decision = decide(PrefillOnDecode::Auto, &running, &REMOTE, false);
        assert_eq!(decision.remote, Duration::from_millis(105));
        // 150 ms of tokens, 15 steps of 2 ms, and 100 ms for each of 16 at a quarter.
        assert_eq!(decision.local, Duration::from_millis(150 + 30 + 400));
        assert_eq!(decision.name(), "prefill");
    }

    #[test]
    fn what_an_idle_decode_holds_most_of_is_computed_there() {
        assert!(on_decode(LOCAL, REMOTE), "nobody is held up, and nothing handed over");
        let half_full = Local { running: 32, ..LOCAL };
        assert!(!on_decode(half_full, REMOTE), "a long prompt holds a busy batch up");
        let cached = Local { missing_tokens: 30, ..half_full };
        assert!(on_decode(cached, REMOTE), "the rest of a long one does not");
        assert!(on_decode(half_full, Remote { waiting_tokens: 100_000, ..REMOTE }), "prefill is busier");
        // A turn of 200 new tokens, its 100 of answer on decode alone, behind another of 150: 35 ms here or there.
        let turn = Local { missing_tokens: 200, waiting_tokens: 150, ..LOCAL };
        let remote = Remote { missing_tokens: 300, handover: Duration::ZERO, ..REMOTE };
        assert!(on_decode(turn, remote), "to compute the answer again would hold others up");
        assert!(!on_decode(turn, Remote { missing_tokens: 200, ..remote }), "nothing is computed again");
        assert!(!on_decode(Local { waiting_tokens: 2000, ..LOCAL }, REMOTE), "others are before it");
    }

    #[test]
    fn who_has_not_measured_is_taken_for_the_other() {
        let unknown = Local { tokens_per_s: 0, ..LOCAL };
        assert!(on_decode(unknown, REMOTE));
        assert!(!on_decode(unknown, Remote { tokens_per_s: 0, ..REMOTE }), "the first shows the pace");
        assert!(!on_decode(Local { chunk_tokens: 0, ..LOCAL }, REMOTE), "it computes no prompts");
    }

    #[test]
    fn a_policy_stands_over_costs() {
        let busy = Local { running: 64, ..LOCAL };
        let decide = |policy, local, only_prefill| decide(policy, &local, &REMOTE, only_prefill).on_decode;
        assert!(decide(PrefillOnDecode::Always, busy, false));
        assert!(
            !decide(PrefillOnDecode::Always, busy, true),
            "log-probabilities of the prompt are prefill's"
        );
        assert!(!decide(PrefillOnDecode::Always, Local { chunk_tokens: 0, ..busy }, false));
        assert!(!decide(PrefillOnDecode::Never, LOCAL, false));
    }
}
