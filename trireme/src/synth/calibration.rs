//! What makes routers prefer some experts: a correction bias where the model has one, rows of the router otherwise.
//!
//! There is no formula from a bias to a load: top-k, groups and scoring stand between. So it is found as training finds
//! it, by routing random tokens and raising what is chosen too rarely, with the operator that will route the real ones.
//! Loads of a running model follow roughly; its tokens are not independent.

use compute::{Cpu, Isa, RoutingRule, Scoring, Selection};
use model::{ModelConfig, TopkMethod};

use super::plan::ROUTER_DEVIATION;
use super::values::{SplitMix, mixed};

/// The channel of the residual stream that is the same for every token, where routers have no bias of their own: what a
/// router row has there is added to the expert's logit.
pub const CONSTANT_CHANNEL: usize = 0;
/// Its value, of a stream whose other channels have deviation one: large beside what the layers add to it.
const CONSTANT: f32 = 4.0;

/// Tokens routed a round.
const TOKENS: usize = 2048;
/// Rounds; the step falls to a tenth over them.
const ROUNDS: usize = 80;
/// No expert is asked to be chosen by more than this share of all tokens.
const LOAD_MAX: f64 = 0.9;

/// The preferences of all layers.
pub struct Skew {
    seed: u64,
    groups: usize,
    /// What is added to each expert's score or logit, in one arrangement; each layer has its own order of groups and of
    /// the experts within a group. Empty: no expert is preferred.
    offsets: Vec<f32>,
    /// Whether the model has a correction bias.
    biased: bool,
    experts: usize,
}

impl Skew {
    /// Preferences such that loads fall with the `exponent`-th power of an expert's rank.
    pub fn solve(config: &ModelConfig, exponent: f64, seed: u64) -> Self {
        let (experts, groups) = (config.n_routed_experts, config.n_group);
        let biased = config.topk_method == TopkMethod::NoauxTc;
        let offsets = if exponent > 0.0 { solve(config, exponent, seed) } else { Vec::new() };
        Self { seed, groups, offsets, biased, experts }
    }

    /// No preferences at all.
    #[cfg(test)]
    pub fn none() -> Self {
        Self { seed: 0, groups: 1, offsets: Vec::new(), biased: false, experts: 0 }
    }

    /// The correction bias of a layer's experts.
    pub fn bias(&self, layer: usize) -> Vec<f32> {
        self.arranged(layer).unwrap_or_else(|| vec![0.0; self.experts])
    }

    /// What stands in the constant channel of a layer's router rows; `None` where nothing has to.
    pub fn router_column(&self, layer: usize) -> Option<Vec<f32>> {
        let column = if self.biased { None } else { self.arranged(layer) };
        column.map(|offsets| offsets.into_iter().map(|offset| offset / CONSTANT).collect())
    }

    /// What stands in the constant channel of every token's embedding; `None` where it is a channel like all others.
    pub fn constant_channel(&self) -> Option<f32> {
        (!self.biased && !self.offsets.is_empty()).then_some(CONSTANT)
    }

    /// A layer's own order: who is hot differs, who shares a group with how hot an expert does not.
    fn arranged(&self, layer: usize) -> Option<Vec<f32>> {
        if self.offsets.is_empty() {
            return None;
        }
        let mut random = SplitMix(mixed(self.seed, layer as u64));
        let mut groups: Vec<&[f32]> = self.offsets.chunks_exact(self.experts / self.groups).collect();
        shuffle(&mut groups, &mut random);
        let shuffled = groups.into_iter().flat_map(|group| {
            let mut group = group.to_vec();
            shuffle(&mut group, &mut random);
            group
        });
        Some(shuffled.collect())
    }
}

fn shuffle<T>(items: &mut [T], random: &mut SplitMix) {
    for end in (1..items.len()).rev() {
        items.swap(end, random.word() as usize % (end + 1));
    }
}

/// Offsets by slot; ranks are dealt to the groups like cards.
fn solve(config: &ModelConfig, exponent: f64, seed: u64) -> Vec<f32> {
    let (experts, groups) = (config.n_routed_experts, config.n_group);
    let slot = |rank: usize| rank % groups * (experts / groups) + rank / groups;
    let mut targets = vec![0.0; experts];
    for (rank, target) in
        targets_by_rank(experts, config.num_experts_per_tok, exponent).into_iter().enumerate()
    {
        targets[slot(rank)] = target;
    }

    let cpu = Cpu::with_isa(1, Isa::Portable);
    let rule = rule(config);
    let mut random = SplitMix(mixed(seed, u64::MAX));
    let plain: Vec<f32> = (0..TOKENS * experts).map(|_| ROUTER_DEVIATION as f32 * random.normal()).collect();
    let mut logits = plain.clone();
    let mut offsets = vec![0.0f32; experts];
    let mut ids = vec![0; TOKENS * rule.top_k];
    let mut weights = vec![0.0; TOKENS * rule.top_k];
    // A step is measured in deviations of what the offset is added to: a sigmoid's outcome, or a logit.
    let biased = rule.selection == Selection::NoauxTc;
    let unit = if biased { 0.28 } else { ROUTER_DEVIATION };
    for round in 0..ROUNDS {
        if !biased {
            for (logits, plain) in logits.chunks_exact_mut(experts).zip(plain.chunks_exact(experts)) {
                for ((logit, plain), offset) in logits.iter_mut().zip(plain).zip(&offsets) {
                    *logit = plain + offset;
                }
            }
        }
        cpu.route(&logits, experts, biased.then_some(&offsets), &rule, &mut ids, &mut weights);
        let mut loads = vec![0usize; experts];
        for &id in &ids {
            loads[usize::from(id)] += 1;
        }
        let step = 0.3 * unit * 0.1f64.powf(round as f64 / ROUNDS as f64);
        let least = 0.5 / TOKENS as f64;
        for ((offset, &load), target) in offsets.iter_mut().zip(&loads).zip(&targets) {
            let load = load as f64 / TOKENS as f64;
            *offset += (step * ((target + least) / (load + least)).ln()) as f32;
        }
    }
    // Only differences count; around zero they lose least in bf16.
    let mean = offsets.iter().sum::<f32>() / experts as f32;
    offsets.iter().map(|offset| offset - mean).collect()
}

/// The share of tokens that should choose the expert of each rank; they add up to `topk`.
pub fn targets_by_rank(experts: usize, topk: usize, exponent: f64) -> Vec<f64> {
    let raw: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-exponent)).collect();
    let most = LOAD_MAX.max(topk as f64 / experts as f64);
    // What the hottest cannot take goes to the others in proportion; each round settles one expert at least.
    let mut full = 0;
    loop {
        let scale = (topk as f64 - full as f64 * most) / raw[full..].iter().sum::<f64>();
        if full + 1 < experts && raw[full] * scale > most + 1e-9 {
            full += 1;
            continue;
        }
        return raw.iter().enumerate().map(|(r, raw)| if r < full { most } else { raw * scale }).collect();
    }
}

/// `compute` does not know `model`: the same facts in its words.
fn rule(config: &ModelConfig) -> RoutingRule {
    RoutingRule {
        scoring: match config.scoring {
            model::Scoring::Sigmoid => Scoring::Sigmoid,
            model::Scoring::Softmax => Scoring::Softmax,
        },
        selection: match config.topk_method {
            TopkMethod::NoauxTc => Selection::NoauxTc,
            TopkMethod::Greedy => Selection::Greedy,
            TopkMethod::GroupLimitedGreedy => Selection::GroupLimitedGreedy,
        },
        top_k: config.num_experts_per_tok,
        groups: config.n_group,
        groups_kept: config.topk_group,
        normalise: config.norm_topk_prob,
        scale: config.routed_scaling_factor,
    }
}

#[cfg(test)]
mod tests;
