//! How many tokens to draft in a step: a function of what drafts and steps have been worth so far.
//!
//! Two things are measured as the worker goes. *Acceptance*: the share of first, second, … drafts that stood, given that the
//! ones before them did. *Time*: what a step took, by the number of its sequences and of the tokens drafted for each, so that
//! what a row costs on this machine, beside these neighbours, needs no model. A step drafts as many tokens as give the
//! most tokens per second, none if need be; now and then it drafts one more or one fewer, to notice when that has
//! changed. A sequence whose drafts stand less often than they cost sits out.
//!
//! Invariant: what is decided here changes when tokens come, never which. Deliberately absent: clocks, tokens, the engine.

use std::time::Duration;

/// The most drafts that a step can have: by the eighth, few stand whatever the model.
pub(crate) const DRAFTS_MAX: usize = 8;

/// A step in so many tries another number of drafts. Where that halves its speed it costs under a hundredth in all.
const PROBE_EVERY: u64 = 64;
/// Steps with each number of drafts before any is preferred.
const TRIALS: u32 = 2;
/// Weights of the newest value: times follow a change of load within a second, acceptance one of subject.
const TIME_WEIGHT: f64 = 1.0 / 16.0;
const ACCEPTANCE_WEIGHT: f64 = 1.0 / 64.0;
/// What is believed of a first draft before any was seen, and of each later one.
const PRIOR: f64 = 0.7;
/// One step of a sequence moves its own acceptance by this.
const OWN_WEIGHT: f64 = 1.0 / 8.0;
/// A step that took longer than this many usual ones was interrupted, and counts as so many. It must not cost its number of
/// drafts the preference: that would not be tried again for long.
const OUTLIER: f64 = 1.25;

/// Sequences in a step, up to which sizes count as alike: what a row costs hardly changes within a third.
const SIZES: [usize; 15] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, usize::MAX];

/// What is known, and the decision.
#[derive(Debug)]
pub(crate) struct Speculation {
    drafts_max: usize,
    /// Share of drafts that stood, by place, among those whose predecessors did.
    stood: [Average; DRAFTS_MAX],
    sizes: [Size; SIZES.len()],
}

/// Steps of about the same number of sequences.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    steps: u64,
    /// Seconds per sequence, by drafts.
    times: [Average; DRAFTS_MAX + 1],
}

/// How often a sequence's own first drafts stand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnAcceptance(f64);

impl Default for OwnAcceptance {
    fn default() -> Self {
        // It is given the benefit of the doubt.
        Self(1.0)
    }
}

impl Speculation {
    /// At most `drafts_max` drafts a step, itself at most [`DRAFTS_MAX`].
    pub(crate) fn new(drafts_max: usize) -> Self {
        Self {
            drafts_max: drafts_max.min(DRAFTS_MAX),
            stood: [Average { value: PRIOR, samples: 0 }; DRAFTS_MAX],
            sizes: [Size::default(); SIZES.len()],
        }
    }

    /// Drafts for each sequence of the next step.
    pub(crate) fn plan(&mut self, sequences: usize) -> usize {
        let best = self.best(sequences);
        let drafts_max = self.drafts_max;
        let size = &mut self.sizes[size(sequences)];
        size.steps += 1;
        if let Some(untried) = (0..=drafts_max).find(|&drafts| size.times[drafts].samples < TRIALS) {
            return untried;
        }
        match (size.steps % PROBE_EVERY, size.steps / PROBE_EVERY % 2) {
            (0, 0) => (best + 1).min(drafts_max),
            (0, _) => best.saturating_sub(1),
            _ => best,
        }
    }

    /// Whether a sequence takes part in drafting, in a step of `sequences` for which `drafts` are planned.
    pub(crate) fn is_worth(&self, own: &mut OwnAcceptance, sequences: usize, drafts: usize) -> bool {
        let times = &self.sizes[size(sequences)].times;
        let (without, with) = (times[0].value, times[drafts].value);
        let usual = self.stood[0].value;
        if times[0].samples < TRIALS || times[drafts].samples < TRIALS || usual <= 0.0 {
            return true;
        }
        let more = self.tokens(drafts) - 1.0;
        // Its later drafts only count when its first one stands.
        let own_more = more * (own.0 / usual).min(1.0);
        let worth = own_more * with >= self.tokens(drafts) * (with - without);
        if !worth {
            own.0 += (usual - own.0) * ACCEPTANCE_WEIGHT;
        }
        worth
    }

    /// A sequence's `drafted` tokens were checked, of which the first `stood` stood.
    pub(crate) fn observe_drafts(&mut self, own: &mut OwnAcceptance, drafted: usize, stood: usize) {
        if drafted == 0 {
            return;
        }
        own.0 += (f64::from(stood > 0) - own.0) * OWN_WEIGHT;
        for (place, average) in self.stood.iter_mut().enumerate().take(drafted.min(stood + 1)) {
            average.add(f64::from(place < stood), ACCEPTANCE_WEIGHT);
        }
    }

    /// A step of `sequences` took `took`, drafting included. `planned` drafts were meant for each, `drafted` were made in
    /// all.
    pub(crate) fn observe_step(&mut self, sequences: usize, planned: usize, drafted: usize, took: Duration) {
        // Where many sat out, the time says little about what was planned.
        if sequences == 0 || drafted * 4 < planned * sequences * 3 {
            return;
        }
        let time = &mut self.sizes[size(sequences)].times[planned.min(DRAFTS_MAX)];
        let seconds = took.as_secs_f64() / sequences as f64;
        if time.samples < TRIALS {
            // The first steps of a size may wait for memory; of few values the least says most.
            let least = if time.samples == 0 { seconds } else { time.value.min(seconds) };
            *time = Average { value: least, samples: time.samples + 1 };
        } else {
            time.add(seconds.min(OUTLIER * time.value), TIME_WEIGHT);
        }
    }

    /// The number of drafts that gives the most tokens per second, as far as is known.
    fn best(&self, sequences: usize) -> usize {
        let times = &self.sizes[size(sequences)].times;
        let rate = |drafts: usize| {
            let time = times[drafts];
            if time.samples == 0 { 0.0 } else { self.tokens(drafts) / time.value.max(f64::MIN_POSITIVE) }
        };
        (0..=self.drafts_max).fold(0, |best, drafts| if rate(drafts) > rate(best) { drafts } else { best })
    }

    /// Tokens that a sequence gets from a step with so many drafts, on average.
    fn tokens(&self, drafts: usize) -> f64 {
        let mut tokens = 1.0;
        let mut reached = 1.0;
        for stood in &self.stood[..drafts] {
            reached *= stood.value;
            tokens += reached;
        }
        tokens
    }
}

fn size(sequences: usize) -> usize {
    SIZES.partition_point(|&most| most < sequences)
}

/// An exponentially weighted mean: the plain one until there are enough values for the weight.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    value: f64,
    samples: u32,
}

impl Average {
    fn add(&mut self, value: f64, weight: f64) {
        self.samples = self.samples.saturating_add(1);
        self.value += (value - self.value) * weight.max(1.0 / (f64::from(self.samples) + 1.0));
    }
}

#[cfg(test)]
mod tests;
