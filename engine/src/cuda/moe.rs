//! A mixture-of-experts layer: route, sort, grouped products, combine, without asking the host.
//!
//! Where the routed experts are on other workers the host does ask: tokens leave and results come back by way of
//! page-locked memory, and the step waits for them.

use compute::RoutingRule;
use compute::cuda::{
    Activations, Buffer, CudaError, Device, Groups, InputFormat, Inputs, Pinned, ResultBuffer, ResultStaging,
    Routing, RowStaging,
};
use model::ModelConfig;
use model::schema::{MlpTensors, TensorSpec};

use super::mlp::{Mlp, MlpWorkspace};
use super::step::{Remote, Step};
use super::weights::{Experts, Linear, Weights};
use crate::deepseek::routing_rule;
use crate::error::{EngineError, StepError};
use crate::experts::{ExpertBatch, ExpertsError};
use crate::stage::Stage;

/// Router, shared and routed experts of one layer.
pub(super) struct Moe {
    router: Linear,
    correction_bias: Option<Buffer<f32>>,
    rule: RoutingRule,
    shared: Option<Mlp>,
    /// None: on other workers.
    experts: Option<Experts>,
}

impl Moe {
    pub fn load(
        weights: &mut Weights<'_, '_>,
        gate: &TensorSpec,
        correction_bias: Option<&TensorSpec>,
        shared: Option<&MlpTensors>,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            router: weights.router(gate)?,
            correction_bias: correction_bias.map(|spec| weights.values(spec)).transpose()?,
            rule: routing_rule(weights.config()),
            shared: shared.map(|tensors| Mlp::load(weights, tensors)).transpose()?,
            experts: None,
        })
    }

    /// Takes the layer's routed experts in.
    pub fn hold(&mut self, experts: Experts) {
        self.experts = Some(experts);
    }

    /// What the router reads.
    pub fn router_format(&self) -> InputFormat {
        self.router.input
    }

    /// From normed hidden states, rounded for the router (`router_input`; none: `input`) and for the experts, to
    /// `hidden += shared expert + weighted sum of the routed experts in top-k order`.
    #[allow(clippy::too_many_arguments)] // Two inputs, two workspaces, one output.
    pub fn forward(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut MoeWorkspace,
        router_input: Option<&Activations>,
        input: &Activations,
        shared_out: &mut Buffer<f32>,
        hidden: &mut Buffer<f32>,
    ) -> Result<(), StepError> {
        let (device, rows, top_k) = (step.device, step.inputs.rows(), self.rule.top_k);
        // Its products run while the router's small kernels leave the device idle. Whoever measures wants one after the other.
        let beside = match &self.shared {
            Some(shared) if !step.watched.stages && self.experts.is_some() => {
                Some(device.beside(|| shared.forward(device, &mut work.shared, input, rows, shared_out))?)
            }
            _ => None,
        };
        let (experts, width) = (self.router.matrix.rows(), self.router.matrix.cols());
        let assignments = rows * top_k;
        let read = router_input.unwrap_or(input).inputs(rows);
        let slices = match (self.router.input, read) {
            (InputFormat::Parts, Inputs::Bf16(parts)) => {
                let slices = device.parts_slices(width);
                let logits = &mut work.logits.slice_mut(0..slices * rows * experts);
                device.linear_parts(&self.router.matrix, parts, logits)?;
                slices
            }
            (_, read) => {
                device.linear(&self.router.matrix, read, &mut work.logits.slice_mut(0..rows * experts))?;
                1
            }
        };
        let logits = work.logits.slice(0..slices * rows * experts);
        let bias = self.correction_bias.as_ref().map(Buffer::view);
        let (ids, weights) =
            (&mut work.ids.slice_mut(0..assignments), &mut work.weights.slice_mut(0..assignments));
        let row_count = Some(step.inputs.row_count());
        let routing = Routing { logits, slices, experts, row_count, bias, rule: &self.rule };
        match &self.experts {
            Some(held) => {
                let kernel = held.kernel(device);
                device.route_and_group(routing, ids, weights, kernel, &mut work.groups)?;
            }
            None => device.route(routing, ids, weights)?,
        }
        step.routed(layer, ids.view(), weights.view(), top_k)?;
        step.stage(Stage::Router)?;

        match &self.experts {
            Some(experts) => self.run_local(step, work, experts, input)?,
            None => self.dispatch(step, layer, work, input)?,
        }
        step.stage(Stage::Experts)?;
        let shared = match &self.shared {
            Some(shared) => {
                match beside {
                    Some(beside) => device.join(beside)?,
                    None => shared.forward(device, &mut work.shared, input, rows, shared_out)?,
                }
                Some(shared_out.slice(0..rows * width))
            }
            None => None,
        };
        step.stage(Stage::SharedExpert)?;
        if self.experts.is_none() {
            self.collect(step, work, width)?;
        }
        let hidden = &mut hidden.slice_mut(0..rows * width);
        let (ids, weights) = (work.ids.slice(0..assignments), work.weights.slice(0..assignments));
        device.combine(hidden, shared, work.results.results(assignments * width), ids, weights, top_k)?;
        step.stage(Stage::Combine)?;
        Ok(())
    }

    fn run_local(
        &self,
        step: &Step<'_>,
        work: &mut MoeWorkspace,
        experts: &Experts,
        input: &Activations,
    ) -> Result<(), CudaError> {
        let (device, rows, top_k) = (step.device, step.inputs.rows(), self.rule.top_k);
        let (assignments, inside) = (rows * top_k, experts.down.cols());
        let (up, groups) = (Some(&experts.up), &work.groups);
        let gate_up = &mut work.gate_up.slice_mut(0..assignments * 2 * inside);
        device.experts_in(&experts.gate, up, input.inputs(rows), groups, top_k, gate_up)?;
        let gate_up = work.gate_up.slice(0..assignments * 2 * inside);
        device.swiglu(gate_up, Some(groups.row_count()), &mut work.inside)?;
        let read = work.inside.inputs(assignments);
        work.results.write(assignments * experts.down.rows(), |out| {
            device.experts_out(&experts.down, read, groups, out)
        })
    }

    /// Sends rows to experts elsewhere, by way of the host. The step is not recorded, and its rows are not padded, where
    /// this runs.
    fn dispatch(
        &self,
        step: &mut Step<'_>,
        layer: usize,
        work: &mut MoeWorkspace,
        input: &Activations,
    ) -> Result<(), StepError> {
        let (device, rows, top_k) = (step.device, step.inputs.rows(), self.rule.top_k);
        let (assignments, width) = (rows * top_k, input.channels());
        let Remote { experts, cpu, wire } =
            step.remote.as_mut().ok_or(ExpertsError::NotHeld { layer, expert: model::ExpertId(0) })?;
        let Some(staging) = &mut work.staging else {
            return Err(ExpertsError::NotHeld { layer, expert: model::ExpertId(0) }.into());
        };
        device.copy_out_later(work.ids.slice(0..assignments), &mut staging.ids)?;
        staging.rows.fetch(device, input, rows)?;
        device.synchronize()?;
        staging.rows.to_wire(rows, width, &mut staging.wire);
        staging
            .activations
            .read_wire(*wire, rows, width, &staging.wire)
            .map_err(|error| ExpertsError::Rejected { layer, detail: error.to_string() })?;
        let expert_ids = &staging.ids[..assignments];
        let batch = ExpertBatch { layer, activations: &staging.activations, topk: top_k, expert_ids };
        Ok(experts.dispatch(cpu, &batch)?)
    }

    /// Waits for what experts elsewhere give back.
    fn collect(&self, step: &mut Step<'_>, work: &mut MoeWorkspace, width: usize) -> Result<(), StepError> {
        let len = step.inputs.rows() * self.rule.top_k * width;
        let (Some(Remote { experts, cpu, .. }), Some(staging)) = (&mut step.remote, &mut work.staging) else {
            return Ok(());
        };
        experts.combine(cpu, &mut staging.results[..len])?;
        work.results.fill(step.device, &staging.results[..len], &mut staging.sent)?;
        Ok(())
    }
}

/// Intermediate values of a MoE layer for up to `rows_max` rows.
pub(super) struct MoeWorkspace {
    /// `[slices, rows, experts]`
    logits: Buffer<f32>,
    /// `[rows, topk]`
    ids: Buffer<u16>,
    /// `[rows, topk]`
    weights: Buffer<f32>,
    groups: Groups,
    /// `[rows * topk, 2 * intermediate]`, expert by expert.
    gate_up: Buffer<f32>,
    inside: Activations,
    /// `[rows * topk, hidden]`, token by token.
    results: ResultBuffer,
    shared: MlpWorkspace,
    /// None where the routed experts are here.
    staging: Option<Staging>,
}

/// What goes to experts elsewhere and comes back.
struct Staging {
    ids: Pinned<u16>,
    rows: RowStaging,
    wire: Vec<u8>,
    activations: compute::Activations,
    results: Vec<f32>,
    sent: ResultStaging,
}

impl MoeWorkspace {
    /// `local`: whether the routed experts are computed here.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        format: InputFormat,
        rows_max: usize,
        local: bool,
    ) -> Result<Self, CudaError> {
        let assignments = rows_max * config.num_experts_per_tok;
        let inside = config.moe_intermediate_size;
        let here = if local { assignments } else { 0 };
        let slices = device.parts_slices(config.hidden_size);
        let values = assignments * config.hidden_size;
        let results = ResultBuffer::new(device, format != InputFormat::F32, values)?;
        let staging = if local {
            None
        } else {
            Some(Staging {
                ids: device.pinned(assignments)?,
                rows: RowStaging::new(device, format, rows_max, config.hidden_size)?,
                wire: Vec::new(),
                activations: compute::Activations::in_transit(),
                results: vec![0.0; values],
                sent: results.staging(device, values)?,
            })
        };
        Ok(Self {
            logits: device.alloc(slices * rows_max * config.n_routed_experts)?,
            ids: device.alloc(assignments)?,
            weights: device.alloc(assignments)?,
            groups: Groups::new(device, here, config.n_routed_experts)?,
            gate_up: device.alloc(here * 2 * inside)?,
            inside: Activations::new(device, format, here, inside.max(1))?,
            results,
            shared: MlpWorkspace::new(device, format, rows_max, config.shared_intermediate_size())?,
            staging,
        })
    }
}
