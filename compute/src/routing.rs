//! What makes a router: scoring, selection, weights. The rules are values, so that one operator serves V2 and V3.

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Each on its own (V3).
    Sigmoid,
    /// Over all experts (V2).
    Softmax,
}

/// How experts are selected from scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The best of all (V2-Lite).
    Greedy,
    /// The best within the `topk_group` groups that hold the best single experts (V2).
    GroupLimitedGreedy,
    /// Correction bias added for selection only; groups ranked by the sum of their two best (V3).
    NoauxTc,
}

/// A router's rule.
#[derive(Clone, Copy, Debug)]
pub struct RoutingRule {
    /// How logits become scores.
    pub scoring: Scoring,
    /// How experts are selected.
    pub selection: Selection,
    /// Experts per token, 1 or more.
    pub top_k: usize,
    /// Groups of consecutive experts; divides the number of experts.
    pub groups: usize,
    /// Groups that stay eligible.
    pub groups_kept: usize,
    /// Whether the selected scores are divided by their sum.
    pub normalise: bool,
    /// Factor on the final weights (`routed_scaling_factor`).
    pub scale: f32,
}
