//! How many tokens to draft in a step: a function of what drafts and steps have been worth so far.
//!
//! Two things are measured as the worker goes. *Acceptance*: the share of first, second, … drafts that stood, given that the
//! ones before them did. *Cost*: what a step with drafts took, from its beginning to the next one's, as a multiple of a step without
//! at the same time, by the number of its sequences and of the tokens drafted for each, so that what a row costs on this machine,
//! beside these neighbours, needs no model. Costs come from pairs alone: now and then one step is done otherwise than its
//! neighbours, and compared with the middle of theirs. So a machine that slows down, or a step that was interrupted, speaks for
//! nobody.
//!
//! A batch drafts nothing until a few pairs say that drafts give clearly more tokens per second, and then as many as give the
//! most. While drafting does not pay it is tried ever more rarely. Batches of another size have their own pairs. A
//! sequence whose drafts stand less often than they cost sits out.
//!
//! Invariant: what is decided here changes when tokens come, never which. Deliberately absent: clocks, tokens, the engine.

use std::time::Duration;

use recent::Recent;

mod recent;

/// The most drafts that a step can have: by the eighth, few stand whatever the model.
pub(crate) const DRAFTS_MAX: usize = 8;

/// Tokens per second, as a multiple of those without drafts, from which on a batch drafts. What a step does not see, such as sending its
/// tokens and what the other processes of the machine lose, must be covered too.
const GAIN_MIN: f64 = 1.1;
/// A batch that drafts goes on while it gains this, so that it does not waver.
const GAIN_KEPT: f64 = 1.05;
/// Another number of drafts must be better by this.
const BETTER: f64 = 1.04;
/// Pairs before a number of drafts is judged, every other step while they look like a gain.
const TRIALS: usize = 9;
/// Where they look like a loss, so much of the time may go into finding out: a try that costs half a step comes after 50.
const LOSS_SHARE: f64 = 0.01;
/// Steps between such tries at most: load changes.
const TRIAL_PAUSE_MAX: u64 = 48;
/// Usual steps that a first pair is compared with: the first of a size may wait for memory.
const USUAL_MIN: usize = 3;
/// Tries of a size so close to each other; more are needed where the step has no room for what was planned.
const TRIALS_MAX: u64 = 64;
/// Steps from one try to the next: the first such pause, and the longest where drafting pays or nearly does, and where it does not.
/// Each is twice the one before it; a try that costs a whole step costs a five-hundredth in the end.
const PAUSE_MIN: u64 = 16;
const PAUSE_OPEN: u64 = 24;
const PAUSE_MAX: u64 = 512;
/// Weight of the newest draft in the acceptance: follows a change of subject within some sixty.
const ACCEPTANCE_WEIGHT: f64 = 1.0 / 64.0;
/// What is believed of a first draft before any was seen, and of each later one; as if of so many.
const PRIOR: f64 = 0.7;
const PRIOR_DRAFTS: f64 = 4.0;
/// One step of a sequence moves its own acceptance by this.
const OWN_WEIGHT: f64 = 1.0 / 8.0;
/// A sequence that sits out is forgiven by this in a step.
const OWN_RECOVERY: f64 = 1.0 / 64.0;

/// Sequences in a step, up to which sizes count as alike: what a row costs hardly changes within a third.
const SIZES: [usize; 15] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, usize::MAX];

/// What is known, and the decision.
#[derive(Debug)]
pub(crate) struct Speculation {
    drafts_max: usize,
    /// Share of drafts that stood, by place, among those whose predecessors did.
    stood: [Average; DRAFTS_MAX],
    sizes: [Size; SIZES.len()],
    /// Prompts of sequences that come here are computed on the same device.
    prefill_beside: bool,
    /// Draft as much as possible whatever it costs: tests of the bits must not depend on measured times.
    #[cfg(test)]
    pub(crate) always: bool,
}

/// Steps of about the same number of sequences.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// What steps draft, but for those that try something else.
    chosen: usize,
    /// Seconds per sequence of such steps.
    usual: Recent,
    /// A step with so many drafts as a multiple of one without, from pairs. That of none is 1.
    costs: [Recent; DRAFTS_MAX + 1],
    /// Steps since the last try, from one to the next, and tries so far.
    since: u64,
    pause: u64,
    tries: u64,
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
        let size = Size {
            chosen: 0,
            usual: Recent::default(),
            costs: [Recent::default(); DRAFTS_MAX + 1],
            since: 0,
            pause: PAUSE_MIN,
            tries: 0,
        };
        Self {
            drafts_max: drafts_max.min(DRAFTS_MAX),
            stood: [Average { value: PRIOR, drafts: PRIOR_DRAFTS }; DRAFTS_MAX],
            sizes: [size; SIZES.len()],
            prefill_beside: false,
            #[cfg(test)]
            always: false,
        }
    }

    /// Says whether prefill computes on the same device.
    pub(crate) fn beside_prefill(self, prefill_beside: bool) -> Self {
        Self { prefill_beside, ..self }
    }

    /// Whether drafts must wait while `awaited` sequences' prompts are being computed. What drafts shorten is the running sequences'
    /// part, with time of the device that those prompts get otherwise: no round here shows how much later they come.
    pub(crate) fn holds_back(&self, awaited: usize) -> bool {
        self.prefill_beside && awaited > 0
    }

    /// Drafts for each sequence of the next step.
    pub(crate) fn plan(&mut self, sequences: usize) -> usize {
        if self.drafts_max == 0 {
            return 0;
        }
        #[cfg(test)]
        if self.always {
            return self.drafts_max;
        }
        let index = size(sequences);
        let best = self.best(index);
        let untried = self.untried(index);
        let pace = untried.map_or(2, |drafts| self.pace(index, drafts));
        let drafts_max = self.drafts_max;
        let size = &mut self.sizes[index];
        if best != size.chosen {
            (size.chosen, size.usual) = (best, Recent::default());
            (size.since, size.pause) = (0, PAUSE_MIN);
        }
        size.since += 1;
        if size.usual.len() < USUAL_MIN {
            return best;
        }
        if let Some(untried) = untried {
            if size.since >= if size.tries < TRIALS_MAX { pace } else { PAUSE_MAX } {
                size.since = 0;
                size.tries += 1;
                return untried;
            }
            return best;
        }
        if size.since < size.pause {
            return best;
        }
        size.since = 0;
        size.tries += 1;
        // Without drafts, the most promising number; with, none and the neighbours.
        let other = match (best, size.tries % 3) {
            (0, _) => self.promising(index),
            (_, 0) => (best + 1).min(drafts_max),
            (_, 1) => best - 1,
            (_, _) => 0,
        };
        let open = best > 0 || self.gain(index, other) > GAIN_KEPT;
        let size = &mut self.sizes[index];
        size.pause = (size.pause * 2).min(if open { PAUSE_OPEN } else { PAUSE_MAX });
        other
    }

    /// Whether a sequence takes part in drafting, in a step of `sequences` for which `drafts` are planned.
    pub(crate) fn is_worth(&self, own: &mut OwnAcceptance, sequences: usize, drafts: usize) -> bool {
        let size = &self.sizes[size(sequences)];
        let usual = self.stood[0].value;
        let Some(cost) = size.cost(drafts).filter(|_| drafts == size.chosen && usual > 0.0) else {
            // A try wants everybody.
            return true;
        };
        let more = self.tokens(drafts) - 1.0;
        // Its later drafts only count when its first one stands.
        let own_more = more * (own.0 / usual).min(1.0);
        let worth = own_more * cost >= self.tokens(drafts) * (cost - 1.0);
        if !worth {
            own.0 += (usual - own.0) * OWN_RECOVERY;
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
            average.add(f64::from(place < stood));
        }
    }

    /// A round of `sequences` took `took`: drafting, their step, and all else until the next could start. `planned` drafts were meant
    /// for each, `drafted` were made in all.
    pub(crate) fn observe_round(&mut self, sequences: usize, planned: usize, drafted: usize, took: Duration) {
        // Where many sat out, the time says little about what was planned.
        if sequences == 0 || planned > self.drafts_max || drafted * 4 < planned * sequences * 3 {
            return;
        }
        let size = &mut self.sizes[size(sequences)];
        let seconds = took.as_secs_f64() / sequences as f64;
        let (Some(usual), Some(cost)) = (size.usual.middle(), size.cost(size.chosen)) else {
            return if planned == size.chosen {
                size.usual.push(seconds)
            };
        };
        if planned == size.chosen {
            size.usual.push(seconds);
        } else if planned == 0 {
            size.costs[size.chosen].push(usual / seconds.max(f64::MIN_POSITIVE));
        } else {
            size.costs[planned].push(cost * seconds / usual.max(f64::MIN_POSITIVE));
        }
    }

    /// The number of drafts to go on with.
    fn best(&self, index: usize) -> usize {
        let chosen = self.sizes[index].chosen;
        let kept = if chosen > 0 && self.gain(index, chosen) < GAIN_KEPT { 0 } else { chosen };
        (1..=self.drafts_max).fold(kept, |best, drafts| {
            let enough = if best == 0 { GAIN_MIN } else { BETTER * self.gain(index, best) };
            let known = self.sizes[index].costs[drafts].len() >= TRIALS;
            if known && self.gain(index, drafts) > enough { drafts } else { best }
        })
    }

    /// The least number of drafts that has not been judged, where one fewer makes it worth asking.
    fn untried(&self, index: usize) -> Option<usize> {
        let drafts = (1..=self.drafts_max).find(|&drafts| self.sizes[index].costs[drafts].len() < TRIALS)?;
        let before = self.gain(index, drafts - 1);
        // Where one draft is a loss, two are rarely a gain.
        (drafts == 1 || before > 1.0).then_some(drafts)
    }

    /// Steps from one try of a number of drafts that is not judged yet to the next, by the best that it has looked like: here, or
    /// where it has not been tried, at the size nearest to this where it has.
    fn pace(&self, index: usize, drafts: usize) -> u64 {
        // One pair may have been interrupted.
        let tried = |index: &usize| {
            let costs = &self.sizes[*index].costs[drafts];
            costs.least().filter(|_| costs.len() > 1)
        };
        let nearest = (0..self.sizes.len()).filter(|other| tried(other).is_some());
        let nearest = nearest.min_by_key(|other| other.abs_diff(index));
        let cost = nearest.as_ref().and_then(tried).unwrap_or(0.0);
        let lost = (cost / self.tokens(drafts) - 1.0).max(0.0);
        2 + ((lost / LOSS_SHARE) as u64).min(TRIAL_PAUSE_MAX)
    }

    /// Of the numbers of drafts that have been judged, the one that comes nearest to paying.
    fn promising(&self, index: usize) -> usize {
        (2..=self.drafts_max).fold(1, |best, drafts| {
            if self.gain(index, drafts) > self.gain(index, best) { drafts } else { best }
        })
    }

    /// Tokens per second with so many drafts, as a multiple of those without. 0 where that is not known.
    fn gain(&self, index: usize, drafts: usize) -> f64 {
        self.sizes[index].cost(drafts).map_or(0.0, |cost| self.tokens(drafts) / cost.max(f64::MIN_POSITIVE))
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

impl Size {
    fn cost(&self, drafts: usize) -> Option<f64> {
        if drafts == 0 { Some(1.0) } else { self.costs[drafts].middle() }
    }
}

fn size(sequences: usize) -> usize {
    SIZES.partition_point(|&most| most < sequences)
}

/// An exponentially weighted share: the plain one until there are enough drafts for the weight.
#[derive(Clone, Copy, Debug)]
struct Average {
    value: f64,
    drafts: f64,
}

impl Average {
    fn add(&mut self, value: f64) {
        self.drafts += 1.0;
        self.value += (value - self.value) * ACCEPTANCE_WEIGHT.max(1.0 / self.drafts);
    }
}

#[cfg(test)]
mod tests;
