//! Loaded routed experts and their computation.

use compute::{ActivationFormat, Activations, Cpu};
use model::{Checkpoint, ExpertId, Numerics, schema};

use super::ExpertsError;
use crate::deepseek::{GatedMlp, GatedMlpWorkspace, Loader};
use crate::error::EngineError;
use crate::options::{ResultFormat, wire_activation_format};

/// Some experts of some layers.
pub struct ExpertBank {
    /// `[layer][expert]`.
    layers: Vec<Vec<Option<GatedMlp>>>,
    hidden_size: usize,
    activation_format: ActivationFormat,
    result_format: ResultFormat,
    bytes: u64,
}

/// Some rows of a batch for one expert.
#[derive(Clone, Copy)]
pub struct ExpertJob<'a> {
    /// The layer, counted as in the checkpoint.
    pub layer: usize,
    /// The expert.
    pub expert: ExpertId,
    /// The batch's tokens, in the wire format.
    pub activations: &'a Activations,
    /// Which rows of `activations` to compute.
    pub rows: &'a [u32],
}

/// Intermediate values of [`ExpertBank::forward`]; grows to the largest job and then stays.
#[derive(Default)]
pub struct ExpertScratch {
    mlp: GatedMlpWorkspace,
}

impl ExpertBank {
    /// Loads the experts in `held`: pairs of a MoE layer and its expert ids.
    ///
    /// `progress` is told `(bytes done, bytes in all)`.
    pub fn load(
        checkpoint: &Checkpoint,
        held: &[(usize, Vec<ExpertId>)],
        numerics: Numerics,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = checkpoint.config();
        let activation_format = wire_activation_format(config, numerics);
        let experts =
            || held.iter().flat_map(|(layer, experts)| experts.iter().map(|expert| (*layer, *expert)));
        for (layer, expert) in experts() {
            let exists = layer < config.layers_with_mtp()
                && config.is_moe_layer(layer)
                && usize::from(expert.0) < config.n_routed_experts;
            if !exists {
                return Err(EngineError::NoSuchExpert { layer, expert });
            }
        }
        let plan = experts().flat_map(|(layer, expert)| schema::expert(config, layer, expert).into_specs());
        let mut loader = Loader::new(checkpoint, numerics, plan, progress)?;
        let mut layers: Vec<Vec<Option<GatedMlp>>> = Vec::new();
        layers.resize_with(config.layers_with_mtp(), Vec::new);
        for (layer, expert) in experts() {
            let tensors = schema::expert(config, layer, expert);
            let mlp = GatedMlp::load(&mut loader, &tensors)?;
            mlp.expect_input_format(&tensors, activation_format)?;
            layers[layer].resize_with(config.n_routed_experts, || None);
            layers[layer][usize::from(expert.0)] = Some(mlp);
        }
        Ok(Self {
            layers,
            hidden_size: config.hidden_size,
            activation_format,
            result_format: ResultFormat::of(numerics),
            bytes: loader.bytes_done(),
        })
    }

    /// Loads every routed expert of the main model, and of the MTP module if `mtp`.
    pub fn load_all(
        checkpoint: &Checkpoint,
        numerics: Numerics,
        mtp: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = checkpoint.config();
        let layers = config.num_hidden_layers + usize::from(mtp);
        let all: Vec<ExpertId> = (0..config.n_routed_experts).map(|expert| ExpertId(expert as u16)).collect();
        let held: Vec<_> =
            config.moe_layers().filter(|&layer| layer < layers).map(|layer| (layer, all.clone())).collect();
        Self::load(checkpoint, &held, numerics, progress)
    }

    /// One expert's result for each row of a job: `out` is `[rows, hidden_size]`, rounded to the result format.
    ///
    /// A row's result depends on that row alone, not on the others in the job.
    pub fn forward(
        &self,
        cpu: &Cpu,
        scratch: &mut ExpertScratch,
        job: ExpertJob<'_>,
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let ExpertJob { layer, expert, activations, rows } = job;
        let mlp = self.get(layer, expert).ok_or(ExpertsError::NotHeld { layer, expert })?;
        mlp.forward_rows(cpu, &mut scratch.mlp, activations, rows, out);
        self.result_format.round(out);
        Ok(())
    }

    /// Whether an expert is held.
    pub fn contains(&self, layer: usize, expert: ExpertId) -> bool {
        self.get(layer, expert).is_some()
    }

    fn get(&self, layer: usize, expert: ExpertId) -> Option<&GatedMlp> {
        self.layers.get(layer)?.get(usize::from(expert.0))?.as_ref()
    }

    /// Bytes of weights held, as stored in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Values per token.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// How tokens must arrive.
    pub fn activation_format(&self) -> ActivationFormat {
        self.activation_format
    }

    /// What results are rounded to.
    pub fn result_format(&self) -> ResultFormat {
        self.result_format
    }
}
