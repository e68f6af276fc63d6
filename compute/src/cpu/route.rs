//! The router's choice. Scores in vectors, selection in plain code: 256 experts are a microsecond.

use super::disjoint::Disjoint;
use super::vector::{self, Operation, Vector};
use super::{Cpu, part, scratch};
use crate::{RoutingRule, Scoring, Selection};

/// Rows of a task.
const TASK_ROWS: usize = 16;

impl Cpu {
    /// Chooses `rule.top_k` of `experts` for each row of `logits` `[m, experts]`: `ids` and `weights` `[m, top_k]`,
    /// in descending order of the score they were selected by (bias included), ties by the lower id. `bias`
    /// `[experts]` counts for the selection of [`Selection::NoauxTc`] only, never for a weight.
    ///
    /// # Panics
    /// If a length does not fit, `top_k` exceeds the experts of the groups kept, or groups do not divide the experts.
    pub fn route(
        &self,
        logits: &[f32],
        experts: usize,
        bias: Option<&[f32]>,
        rule: &RoutingRule,
        ids: &mut [u16],
        weights: &mut [f32],
    ) {
        if logits.is_empty() {
            return;
        }
        let (groups, kept) = match rule.selection {
            Selection::Greedy => (1, 1),
            _ => (rule.groups, rule.groups_kept),
        };
        assert!(experts <= 1 << 16, "an id is 16 bits wide");
        assert!(
            experts > 0 && logits.len().is_multiple_of(experts),
            "{} logits of {experts} experts",
            logits.len()
        );
        assert!(groups > 0 && experts.is_multiple_of(groups) && kept <= groups, "groups of experts");
        assert!(
            rule.top_k > 0 && rule.top_k <= kept * (experts / groups),
            "more experts chosen than eligible"
        );
        let rows = logits.len() / experts;
        assert!(ids.len() == rows * rule.top_k && weights.len() == ids.len(), "room for the choices");
        assert!(bias.is_none_or(|bias| bias.len() == experts), "a bias per expert");
        let bias = bias.filter(|_| rule.selection == Selection::NoauxTc);
        let (top_k, ids, weights) = (rule.top_k, Disjoint::new(ids), Disjoint::new(weights));
        // A logit is worth some twenty multiply-adds, mostly of its exponential.
        self.divide(rows.div_ceil(TASK_ROWS), 20 * logits.len(), &|task| {
            let rows = part(task, TASK_ROWS, rows);
            let (logits, out) =
                (&logits[rows.start * experts..rows.end * experts], rows.start * top_k..rows.end * top_k);
            // SAFETY: tasks have different rows.
            let (ids, weights) = unsafe { (ids.part(out.clone()), weights.part(out)) };
            scratch::with_f32(2 * experts + groups, |scratch| {
                let (scores, rest) = scratch.split_at_mut(experts);
                let (choice, ranks) = rest.split_at_mut(experts);
                let out = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
                for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(out) {
                    vector::run(self.isa, Score { scoring: rule.scoring, logits, scores });
                    choice.copy_from_slice(scores);
                    if let Some(bias) = bias {
                        for (choice, bias) in choice.iter_mut().zip(bias) {
                            *choice += bias;
                        }
                    }
                    if kept < groups {
                        limit_groups(choice, ranks, kept, rule.selection);
                    }
                    select(choice, scores, rule, ids, weights);
                }
            });
        });
    }
}

/// Makes all but the `kept` best groups ineligible.
fn limit_groups(choice: &mut [f32], ranks: &mut [f32], kept: usize, selection: Selection) {
    let size = choice.len() / ranks.len();
    for (rank, group) in ranks.iter_mut().zip(choice.chunks_exact(size)) {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in group {
            if score > best {
                (best, second) = (score, best);
            } else if score > second {
                second = score;
            }
        }
        // A group of one has no second; V3 has none of those, and its best alone then is its rank.
        let pair = selection == Selection::NoauxTc && second > f32::NEG_INFINITY;
        *rank = if pair { best + second } else { best };
    }
    for _ in 0..kept {
        let group = argmax(ranks);
        // Taken: not to be found again.
        ranks[group] = f32::NAN;
    }
    for (rank, group) in ranks.iter().zip(choice.chunks_exact_mut(size)) {
        if !rank.is_nan() {
            // Minus infinity and not zero: biased scores may be negative.
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Takes the best `top_k` of `choice` (which it uses up) and weighs them by their unbiased scores.
fn select(choice: &mut [f32], scores: &[f32], rule: &RoutingRule, ids: &mut [u16], weights: &mut [f32]) {
    let mut sum = 0.0f32;
    for (id, weight) in ids.iter_mut().zip(&mut *weights) {
        let expert = argmax(choice);
        choice[expert] = f32::NAN;
        *id = expert as u16;
        *weight = scores[expert];
        sum += scores[expert];
    }
    let divisor = if rule.normalise { sum + 1e-20 } else { 1.0 };
    for weight in weights {
        *weight = *weight / divisor * rule.scale;
    }
}

/// Index of the largest value that is not NaN, the lowest on a tie; if all are NaN, of the first.
fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, &value) in values.iter().enumerate() {
        if value > values[best] || (values[best].is_nan() && !value.is_nan()) {
            best = i;
        }
    }
    best
}

struct Score<'a> {
    scoring: Scoring,
    logits: &'a [f32],
    scores: &'a mut [f32],
}

impl Operation for Score<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.logits.len();
        let (logits, scores) = (self.logits.as_ptr(), self.scores.as_mut_ptr());
        // SAFETY: the machine has the instruction set; both slices have `len` values.
        unsafe {
            let mut i = 0;
            if self.scoring == Scoring::Sigmoid {
                let one = V::splat(1.0);
                while i < len {
                    let negative = V::splat(0.0).sub(V::load_partial(logits.add(i), len - i));
                    one.div(one.add(negative.exp())).store_partial(scores.add(i), len - i);
                    i += V::LANES;
                }
                return;
            }
            let mut largest = f32::NEG_INFINITY;
            while i < len {
                largest = if *logits.add(i) > largest { *logits.add(i) } else { largest };
                i += 1;
            }
            let mut sum = 0.0;
            i = 0;
            while i < len {
                let x = V::load_partial(logits.add(i), len - i).sub(V::splat(largest));
                x.exp().store_partial(scores.add(i), len - i);
                let end = len.min(i + V::LANES);
                while i < end {
                    sum += *scores.add(i);
                    i += 1;
                }
            }
            i = 0;
            while i < len {
                *scores.add(i) /= sum;
                i += 1;
            }
        }
    }
}
