//! How long a completion will be, judged by those that have ended here: what admission plans with, and nothing that a
//! guarantee rests on.
//!
//! A Kaplan–Meier estimate over logarithmic buckets. A completion that ended by itself is an observation; one that was
//! cut off (by `max_tokens`, a cancel, a deadline) says only that it would have been longer, and leaves the count of
//! those at risk without an end. So requests with a small `max_tokens` do not make long ones look short, and the
//! estimate is conditional: of completions that got as far as this one, four of five end by the answer.
//!
//! Old observations fade: at [`WINDOW`] of them all are halved. Until [`OBSERVATIONS_MIN`] have been made, and beyond the
//! longest of them, the answer is `max_tokens`.

/// Buckets of one doubling of the length: an estimate is at most a quarter too long.
const PER_OCTAVE: usize = 4;
/// Lengths from 1 to 2²⁰ tokens.
const BUCKETS: usize = 20 * PER_OCTAVE;
/// Below so many observations the estimate is a guess.
const OBSERVATIONS_MIN: f32 = 32.0;
/// A change of workload shows within some five hundred completions.
const WINDOW: f32 = 1024.0;
/// Share of completions that may outlive their estimate. An average would plan half of them too short.
const OUTLIVE: f32 = 0.2;

/// What has been seen of completions' lengths.
#[derive(Debug)]
pub(super) struct LengthEstimate {
    /// Completions that ended by themselves, by bucket of their length.
    ended: [f32; BUCKETS],
    /// Completions that were cut off.
    cut: [f32; BUCKETS],
    observations: f32,
    /// Bucket by whose end a completion that has reached the index's bucket has ended; `BUCKETS` where nobody knows.
    ends_by: [usize; BUCKETS],
}

impl LengthEstimate {
    pub(super) fn new() -> Self {
        Self { ended: [0.0; BUCKETS], cut: [0.0; BUCKETS], observations: 0.0, ends_by: [BUCKETS; BUCKETS] }
    }

    /// A completion of `tokens` is over: `by_itself`, or cut off.
    pub(super) fn observe(&mut self, tokens: u32, by_itself: bool) {
        let seen = if by_itself { &mut self.ended } else { &mut self.cut };
        seen[bucket(tokens)] += 1.0;
        self.observations += 1.0;
        if self.observations >= WINDOW {
            self.ended.iter_mut().chain(&mut self.cut).for_each(|count| *count /= 2.0);
            self.observations /= 2.0;
        }
        self.resolve();
    }

    /// Tokens in all that a completion will have that has `generated` by now: more than `generated`, at most
    /// `tokens_max`.
    pub(super) fn tokens(&self, generated: u32, tokens_max: u32) -> u32 {
        if self.observations < OBSERVATIONS_MIN {
            return tokens_max;
        }
        match self.ends_by[bucket(generated)] {
            BUCKETS => tokens_max,
            bucket => last_of(bucket).max(generated.saturating_add(1)).min(tokens_max),
        }
    }

    /// Fills `ends_by`: a walk from the longest bucket down, the end of each found by going on from its own.
    fn resolve(&mut self) {
        let mut survival = [1.0; BUCKETS];
        let mut at_risk = 0.0;
        for at in (0..BUCKETS).rev() {
            at_risk += self.ended[at] + self.cut[at];
            if at_risk > 0.0 {
                survival[at] = 1.0 - self.ended[at] / at_risk;
            }
        }
        for from in 0..BUCKETS {
            let mut left = 1.0;
            let ends = (from..BUCKETS).find(|&at| {
                left *= survival[at];
                left <= OUTLIVE
            });
            self.ends_by[from] = ends.unwrap_or(BUCKETS);
        }
    }
}

/// The bucket of a length; 0 is taken for 1.
fn bucket(tokens: u32) -> usize {
    let tokens = tokens.max(1);
    let octave = tokens.ilog2();
    let within = ((u64::from(tokens) * PER_OCTAVE as u64) >> octave) as usize - PER_OCTAVE;
    (octave as usize * PER_OCTAVE + within).min(BUCKETS - 1)
}

/// The largest length of a bucket.
fn last_of(bucket: usize) -> u32 {
    let (octave, within) = ((bucket / PER_OCTAVE) as u32, (bucket % PER_OCTAVE) as u64);
    // The first length of the next bucket, less one.
    let next = ((within + 1 + PER_OCTAVE as u64) << octave).div_ceil(PER_OCTAVE as u64);
    u32::try_from(next - 1).unwrap_or(u32::MAX).max(1 << octave)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lengths: impl IntoIterator<Item = (u32, bool)>) -> LengthEstimate {
        let mut estimate = LengthEstimate::new();
        for (tokens, by_itself) in lengths {
            estimate.observe(tokens, by_itself);
        }
        estimate
    }

    #[test]
    fn buckets_cover_every_length_once() {
        let mut before = 0;
        for tokens in 1..5000 {
            let at = bucket(tokens);
            assert!(at >= before, "{tokens} goes back");
            before = at;
            assert!(last_of(at) >= tokens, "{tokens} is in a bucket that ends at {}", last_of(at));
            assert!(tokens < 4 || last_of(at) <= tokens + tokens / 4, "{tokens}: {}", last_of(at));
        }
        assert_eq!(bucket(u32::MAX), BUCKETS - 1);
    }

    #[test]
    fn until_enough_is_seen_the_worst_case_is_the_estimate() {
        assert_eq!(seen([]).tokens(0, 4096), 4096);
        assert_eq!(seen((0..31).map(|_| (10, true))).tokens(0, 4096), 4096);
        assert!(seen((0..32).map(|_| (10, true))).tokens(0, 4096) < 16);
    }

    #[test]
    fn it_depends_on_how_far_a_completion_has_come() {
        // Nine of ten answers are short, the tenth is long.
        let estimate = seen((0..500).map(|at| (if at % 10 == 0 { 2000 } else { 100 }, true)));
        assert!((100..130).contains(&estimate.tokens(0, 4096)), "{}", estimate.tokens(0, 4096));
        assert!((2000..2500).contains(&estimate.tokens(200, 4096)), "{}", estimate.tokens(200, 4096));
        assert_eq!(estimate.tokens(3000, 4096), 4096, "nobody got as far");
        assert_eq!(estimate.tokens(0, 50), 50, "max_tokens bounds it");
    }

    #[test]
    fn what_was_cut_off_does_not_make_others_look_short() {
        let mixed = (0..400).map(|at| if at % 2 == 0 { (16, false) } else { (1000, true) });
        let tokens = seen(mixed).tokens(0, 4096);
        assert!((1000..1250).contains(&tokens), "{tokens}");
        assert_eq!(
            seen((0..400).map(|_| (16, false))).tokens(0, 4096),
            4096,
            "all were cut: nothing is known"
        );
    }

    #[test]
    fn it_follows_the_workload() {
        let mut estimate = seen((0..5000).map(|_| (1000, true)));
        (0..1500).for_each(|_| estimate.observe(50, true));
        assert!(estimate.tokens(0, 4096) < 65, "{}", estimate.tokens(0, 4096));
    }
}
