//! Min-p, top-k and top-p: which tokens may be drawn at all.
//!
//! In vLLM's order and with its edge rules: min-p compares with the best token's probability; top-k keeps everything
//! that ties with the k-th; top-p looks at what top-k left, renormalised, and keeps a token while the mass before it is
//! less than p, so that the best token always stays.

use compute::{WEIGHT_BLOCK, WeightBlock};

/// So many tokens are sorted rather than divided further.
const SORTED_MAX: usize = 64;

/// Weights are good to some 2⁻²¹.
const SLACK: f32 = 1.0 - 1e-5;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub token: u32,
    pub logit: f32,
    /// Relative to the best token's probability.
    pub weight: f32,
}

/// The three limits of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Truncation {
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
}

impl Truncation {
    /// Whether nothing would be cut off a vocabulary of this size.
    pub fn keeps_all(&self, vocab: usize) -> bool {
        (self.top_k == 0 || self.top_k as usize >= vocab) && self.top_p >= 1.0 && self.min_p <= 0.0
    }

    /// Fills `kept` with the tokens that survive, in the order of their ids. `weights` are relative to the best token's
    /// probability, and `blocks` what they come to; `spare` is working memory.
    pub fn apply(
        &self,
        logits: &[f32],
        weights: &[f32],
        blocks: &[WeightBlock],
        kept: &mut Vec<Candidate>,
        spare: &mut Vec<Candidate>,
    ) {
        kept.clear();
        let floor = self.floor(weights.len(), blocks);
        // Almost all blocks lie below the floor as a whole.
        for (block, _) in blocks.iter().enumerate().filter(|(_, block)| block.max > 0.0 && block.max >= floor)
        {
            let first = block * WEIGHT_BLOCK;
            let weights = weights[first..].iter().take(WEIGHT_BLOCK);
            kept.extend(weights.zip(first..).filter_map(|(&weight, token)| {
                let candidate = Candidate { token: token as u32, logit: logits[token], weight };
                (weight > 0.0 && weight >= floor && weight >= self.min_p).then_some(candidate)
            }));
        }
        self.keep_top_k(kept);
        if self.top_p < 1.0 {
            let total = if self.top_k == 0 && self.min_p <= 0.0 { Some(total(blocks)) } else { None };
            self.keep_top_p(kept, total, spare);
        }
    }

    /// A weight below which no token can survive. It is lowered by more than weights are rounded by, so that the
    /// decision is always made on what remains.
    fn floor(&self, vocab: usize, blocks: &[WeightBlock]) -> f32 {
        let mut floor = self.min_p * SLACK;
        let k = self.top_k as usize;
        if k > 0 && k <= blocks.len() {
            // At least k tokens weigh as much as the k-th largest block's largest. Without a buffer of the maxima: halve
            // the interval of bit patterns, which are ordered as the positive floats are.
            let (mut low, mut high) = (0, 1.0f32.to_bits() + 1);
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                let as_large = blocks.iter().filter(|block| block.max.to_bits() >= middle).count();
                if as_large >= k { low = middle } else { high = middle }
            }
            floor = floor.max(f32::from_bits(low) * SLACK);
        }
        if self.top_p < 1.0 && k == 0 && self.min_p <= 0.0 {
            // All tokens at or below an even share of the mass to be cut have at most that mass together, so none of them
            // can survive.
            let share = total(blocks) * (1.0 - f64::from(self.top_p)) / vocab as f64;
            floor = floor.max((share as f32 * SLACK).min(SLACK));
        }
        floor
    }

    fn keep_top_k(&self, kept: &mut Vec<Candidate>) {
        let k = self.top_k as usize;
        if k == 0 || kept.len() <= k {
            return;
        }
        kept.select_nth_unstable_by(k - 1, |a, b| b.logit.total_cmp(&a.logit));
        let threshold = kept[k - 1].logit;
        kept.retain(|candidate| candidate.logit >= threshold);
        // The sums that follow, and the choice among equals, go by id.
        kept.sort_unstable_by_key(|candidate| candidate.token);
    }

    /// Of tokens in the order of their ids, keeps those before which less than the limit lies, in the same order; `total`
    /// is the weight of all that `kept` was taken from, where it is known. Uses `spare`.
    fn keep_top_p(&self, kept: &mut Vec<Candidate>, total: Option<f64>, spare: &mut Vec<Candidate>) {
        let total = total.unwrap_or_else(|| kept.iter().map(|candidate| f64::from(candidate.weight)).sum());
        let limit = f64::from(self.top_p) * total;
        let best_first =
            |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        spare.clear();
        spare.extend_from_slice(kept);
        // Halves the part in which the limit is reached: only that is ever put in order.
        let mut before = 0.0;
        let mut part = &mut spare[..];
        while part.len() > SORTED_MAX {
            let middle = part.len() / 2;
            part.select_nth_unstable_by(middle, best_first);
            let (better, rest) = part.split_at_mut(middle);
            let mass: f64 = better.iter().map(|candidate| f64::from(candidate.weight)).sum();
            if before + mass >= limit {
                part = better;
            } else {
                before += mass;
                part = rest;
            }
        }
        part.sort_unstable_by(best_first);
        let mut last = None;
        for candidate in part {
            if before >= limit && last.is_some() {
                break;
            }
            before += f64::from(candidate.weight);
            last = Some(*candidate);
        }
        if let Some(last) = last {
            kept.retain(|candidate| best_first(candidate, &last).is_le());
        }
    }
}

/// The weight of the whole vocabulary.
fn total(blocks: &[WeightBlock]) -> f64 {
    blocks.iter().map(|block| f64::from(block.sum)).sum()
}
