//! Min-p, top-k and top-p: which tokens may be drawn at all.
//!
//! In vLLM's order and with its edge rules: min-p compares with the best token's probability; top-k keeps everything
//! that ties with the k-th; top-p looks at what top-k left, renormalised, and keeps a token while the mass before it is
//! less than p, so that the best token always stays.

use super::weight;

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

    /// Fills `kept` with the tokens that survive, in an order that depends on the logits alone.
    pub fn apply(&self, logits: &[f32], peak: f32, temperature: f32, kept: &mut Vec<Candidate>) {
        kept.clear();
        kept.extend(logits.iter().enumerate().filter_map(|(token, &logit)| {
            let weight = weight(logit, peak, temperature);
            (weight > 0.0 && weight >= self.min_p).then_some(Candidate { token: token as u32, logit, weight })
        }));
        self.keep_top_k(kept);
        if self.top_p < 1.0 {
            self.keep_top_p(kept);
        }
    }

    fn keep_top_k(&self, kept: &mut Vec<Candidate>) {
        let k = self.top_k as usize;
        if k == 0 || kept.len() <= k {
            return;
        }
        // On a copy of the order only: the tokens themselves stay sorted by id for the sums that follow.
        let mut by_logit: Vec<f32> = kept.iter().map(|candidate| candidate.logit).collect();
        let (_, threshold, _) = by_logit.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let threshold = *threshold;
        kept.retain(|candidate| candidate.logit >= threshold);
    }

    fn keep_top_p(&self, kept: &mut Vec<Candidate>) {
        let total: f64 = kept.iter().map(|candidate| f64::from(candidate.weight)).sum();
        let limit = f64::from(self.top_p) * total;
        // All tokens at or below an even share of the mass to be cut have at most that mass together, so none of them
        // can survive. Dropping them first spares sorting a whole vocabulary.
        let negligible = (total - limit) / kept.len() as f64;
        let best = kept.iter().map(|candidate| candidate.weight).fold(0.0, f32::max);
        kept.retain(|candidate| f64::from(candidate.weight) > negligible || candidate.weight >= best);
        kept.sort_unstable_by(|a, b| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token)));
        let mut before = 0.0;
        let survivors = kept
            .iter()
            .take_while(|candidate| {
                let stays = before < limit;
                before += f64::from(candidate.weight);
                stays
            })
            .count();
        kept.truncate(survivors.max(1));
    }
}
