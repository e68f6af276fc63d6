//! The router's choice.

use crate::{RoutingRule, Scoring, Selection};

/// Chooses `top_k` experts for each row of `logits` `[m, experts]`: ids in descending order of the score they were
/// selected by (ties: the lower id first), and their weights.
pub fn route(
    logits: &[f32],
    experts: usize,
    bias: Option<&[f32]>,
    rule: &RoutingRule,
    ids: &mut [u16],
    weights: &mut [f32],
) {
    for (row, logits) in logits.chunks_exact(experts).enumerate() {
        let scores: Vec<f64> = match rule.scoring {
            Scoring::Sigmoid => logits.iter().map(|&l| 1.0 / (1.0 + (-f64::from(l)).exp())).collect(),
            Scoring::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let exp: Vec<f64> = logits.iter().map(|&l| (f64::from(l) - f64::from(max)).exp()).collect();
                let sum: f64 = exp.iter().sum();
                exp.iter().map(|e| e / sum).collect()
            }
        };
        let mut choice: Vec<f64> = match (rule.selection, bias) {
            (Selection::NoauxTc, Some(bias)) => {
                scores.iter().zip(bias).map(|(s, &b)| s + f64::from(b)).collect()
            }
            _ => scores.clone(),
        };
        if rule.selection != Selection::Greedy {
            let size = experts / rule.groups;
            let best = if rule.selection == Selection::NoauxTc { 2 } else { 1 };
            let rank: Vec<f64> =
                choice.chunks(size).map(|g| top(g, best).iter().map(|&i| g[i]).sum()).collect();
            let kept = top(&rank, rule.groups_kept);
            for (expert, choice) in choice.iter_mut().enumerate() {
                if !kept.contains(&(expert / size)) {
                    *choice = f64::NEG_INFINITY;
                }
            }
        }
        let chosen = top(&choice, rule.top_k);
        let sum: f64 =
            if rule.normalise { chosen.iter().map(|&i| scores[i]).sum::<f64>() + 1e-20 } else { 1.0 };
        for (j, &expert) in chosen.iter().enumerate() {
            ids[row * rule.top_k + j] = expert as u16;
            weights[row * rule.top_k + j] = (scores[expert] / sum * f64::from(rule.scale)) as f32;
        }
    }
}

/// Indices of the `k` largest, descending, ties by index.
fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}
