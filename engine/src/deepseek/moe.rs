//! A mixture-of-experts layer: route, dispatch, shared expert, combine.

use compute::{ActivationFormat, Activations, RoutingRule, Scoring, Selection};
use model::schema::{MlpTensors, TensorSpec};
use model::{ModelConfig, TopkMethod};

use super::{GatedMlp, GatedMlpWorkspace, Linear, Loader, StepContext};
use crate::error::EngineError;
use crate::experts::{ExpertBatch, ExpertsError};
use crate::options::wire_activation_format;
use crate::stage::Stage;

/// Router and shared experts of one layer; the routed experts are behind [`crate::Experts`].
pub(crate) struct Moe {
    router: Linear,
    correction_bias: Option<Vec<f32>>,
    rule: RoutingRule,
    shared: Option<GatedMlp>,
    wire_format: ActivationFormat,
}

impl Moe {
    pub fn load(
        loader: &mut Loader<'_>,
        gate: &TensorSpec,
        correction_bias: Option<&TensorSpec>,
        shared: Option<&MlpTensors>,
    ) -> Result<Self, EngineError> {
        let config = loader.config();
        let wire_format = wire_activation_format(config, loader.numerics());
        let shared = shared
            .map(|tensors| {
                let shared = GatedMlp::load(loader, tensors)?;
                shared.expect_input_format(tensors, wire_format)?;
                Ok::<_, EngineError>(shared)
            })
            .transpose()?;
        Ok(Self {
            router: loader.linear_f32(gate)?,
            correction_bias: correction_bias.map(|spec| loader.values(spec)).transpose()?,
            rule: routing_rule(config),
            shared,
            wire_format,
        })
    }

    /// `out[rows, hidden]` = the weighted sum of the routed experts, in top-k order, plus the shared expert.
    pub fn forward(
        &self,
        step: &mut StepContext<'_>,
        layer: usize,
        workspace: &mut MoeWorkspace,
        mlp: &mut GatedMlpWorkspace,
        normed: &[f32],
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let hidden_size = self.router.input_width();
        let rows = step.batch.rows();
        let MoeWorkspace { input, logits, expert_ids, weights, routed } = workspace;
        let expert_ids = &mut expert_ids[..rows * self.rule.top_k];
        let weights = &mut weights[..rows * self.rule.top_k];
        let routed = &mut routed[..rows * self.rule.top_k * hidden_size];
        let logits = &mut logits[..rows * self.router.width()];

        input.prepare(step.cpu, normed, rows, hidden_size, self.router.input_format());
        self.router.forward(step.cpu, input, logits);
        step.cpu.route(
            logits,
            self.router.width(),
            self.correction_bias.as_deref(),
            &self.rule,
            expert_ids,
            weights,
        );
        step.observer.stage(Stage::Router);
        step.observer.routed(layer, expert_ids, weights);

        input.prepare(step.cpu, normed, rows, hidden_size, self.wire_format);
        let batch = ExpertBatch { layer, activations: input, topk: self.rule.top_k, expert_ids };
        step.experts.dispatch(step.cpu, &batch)?;
        step.observer.stage(Stage::Experts);
        // While the routed experts are on their way.
        match &self.shared {
            Some(shared) => shared.forward(step.cpu, mlp, input, out),
            None => out.fill(0.0),
        }
        step.observer.stage(Stage::SharedExpert);
        step.experts.combine(step.cpu, routed)?;
        step.cpu.add_weighted(routed, weights, self.rule.top_k, out);
        step.observer.stage(Stage::Combine);
        Ok(())
    }
}

/// `compute` does not know `model`: the same facts in its words.
pub(crate) fn routing_rule(config: &ModelConfig) -> RoutingRule {
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

/// Intermediate values of a MoE layer for up to `rows_max` rows.
pub(crate) struct MoeWorkspace {
    input: Activations,
    /// `[rows, experts]`
    logits: Vec<f32>,
    /// `[rows, topk]`
    expert_ids: Vec<u16>,
    /// `[rows, topk]`
    weights: Vec<f32>,
    /// `[rows * topk, hidden]`: what the experts handed back.
    routed: Vec<f32>,
}

impl MoeWorkspace {
    pub fn new(config: &ModelConfig, rows_max: usize) -> Self {
        let assignments_max = rows_max * config.num_experts_per_tok;
        Self {
            input: Activations::with_rows(rows_max),
            logits: vec![0.0; rows_max * config.n_routed_experts],
            expert_ids: vec![0; assignments_max],
            weights: vec![0.0; assignments_max],
            routed: vec![0.0; assignments_max * config.hidden_size],
        }
    }
}
