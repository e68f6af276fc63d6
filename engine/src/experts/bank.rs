//! Loaded routed experts and their computation, on the CPU or on a device.

use compute::{ActivationFormat, Activations, Cpu, InputRows};
use model::{Checkpoint, Device, ExpertId, Numerics, schema};

use super::ExpertsError;
use crate::cuda::{DeviceBank, DeviceScratch};
use crate::deepseek::{GatedMlp, GatedMlpWorkspace, Loader};
use crate::error::EngineError;
use crate::fingerprint::cpu_backend;
use crate::options::{ResultFormat, wire_activation_format};

/// Some experts of some layers.
pub struct ExpertBank {
    held: Held,
    hidden_size: usize,
    activation_format: ActivationFormat,
    result_format: ResultFormat,
    bytes: u64,
}

/// Where they are.
enum Held {
    /// `[layer][expert]`.
    Host(Vec<Vec<Option<GatedMlp>>>),
    Device(Box<DeviceBank>),
}

/// Rows of a batch, grouped by the expert that computes them.
#[derive(Clone, Copy)]
pub struct ExpertJobs<'a> {
    /// The layer, counted as in the checkpoint.
    pub layer: usize,
    /// The batch's tokens, in the wire format.
    pub activations: &'a Activations,
    /// Which rows of `activations` to compute, the rows of each group together.
    pub rows: &'a [u32],
    /// The groups, in the order of `rows`, and as many rows in all.
    pub groups: &'a [ExpertGroup],
}

/// How many rows an expert computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroup {
    /// The expert.
    pub expert: ExpertId,
    /// At least one.
    pub rows: usize,
}

/// Intermediate values of [`ExpertBank::forward`]; grows to the largest job and then stays.
#[derive(Default)]
pub struct ExpertScratch {
    mlp: GatedMlpWorkspace,
    device: Option<DeviceScratch>,
}

impl ExpertBank {
    /// Loads the experts in `held`, pairs of a MoE layer and its expert ids, into the host's memory.
    ///
    /// `progress` is told `(bytes done, bytes in all)`.
    pub fn load(
        checkpoint: &Checkpoint,
        held: &[(usize, Vec<ExpertId>)],
        numerics: Numerics,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        Self::load_on(Device::Cpu, checkpoint, held, numerics, progress)
    }

    /// As [`Self::load`], onto a device.
    pub fn load_on(
        device: Device,
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
        let bank = |held, bytes| Self {
            held,
            hidden_size: config.hidden_size,
            activation_format,
            result_format: ResultFormat::of(numerics),
            bytes,
        };
        if let Device::Cuda(ordinal) = device {
            let loaded = DeviceBank::load(checkpoint, held, numerics, ordinal, progress)?;
            let bytes = loaded.bytes();
            return Ok(bank(Held::Device(Box::new(loaded)), bytes));
        }
        let plan = experts().flat_map(|(layer, expert)| schema::expert(config, layer, expert).into_specs());
        let mut loader = Loader::new(checkpoint, numerics, plan, progress)?;
        let mut layers: Vec<Vec<Option<GatedMlp>>> = Vec::new();
        layers.resize_with(config.layers_with_mtp(), Vec::new);
        let mut inner_format = None;
        for (layer, expert) in experts() {
            let tensors = schema::expert(config, layer, expert);
            let mlp = GatedMlp::load(&mut loader, &tensors)?;
            mlp.expect_input_format(&tensors, activation_format)?;
            if *inner_format.get_or_insert(mlp.inner_format()) != mlp.inner_format() {
                return Err(EngineError::MixedFormats { tensor: tensors.down_proj.name });
            }
            layers[layer].resize_with(config.n_routed_experts, || None);
            layers[layer][usize::from(expert.0)] = Some(mlp);
        }
        let bytes = loader.bytes_done();
        Ok(bank(Held::Host(layers), bytes))
    }

    /// Loads every routed expert of the main model, and of the MTP module if `mtp`.
    pub fn load_all(
        checkpoint: &Checkpoint,
        numerics: Numerics,
        mtp: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        Self::load_all_on(Device::Cpu, checkpoint, numerics, mtp, progress)
    }

    /// As [`Self::load_all`], onto a device.
    pub fn load_all_on(
        device: Device,
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
        Self::load_on(device, checkpoint, &held, numerics, progress)
    }

    /// Each row's result: `out` is `[rows, hidden_size]`, rounded to the result format. The products of all experts are
    /// run together, so that a few rows for each of many experts are as fast as memory allows.
    ///
    /// A row's result depends on that row and its expert alone.
    pub fn forward(
        &self,
        cpu: &Cpu,
        scratch: &mut ExpertScratch,
        jobs: ExpertJobs<'_>,
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let ExpertJobs { layer, activations, rows, groups } = jobs;
        if let Held::Device(bank) = &self.held {
            return bank.forward(&mut scratch.device, jobs, out);
        }
        let Some((width, format)) = self.inner(layer, groups)? else { return Ok(()) };
        let experts = || {
            let mlps = groups.iter().filter_map(move |group| self.get(layer, group.expert));
            let ends = groups.iter().scan(0, |end, group| {
                *end += group.rows;
                Some(*end - group.rows..*end)
            });
            mlps.zip(ends)
        };
        let (gate, up) = scratch.mlp.gate_and_up(rows.len(), width);
        let (mut gate, mut up) = (Parts::new(gate, width), Parts::new(up, width));
        let gates = experts().map(|(mlp, range)| {
            let out = gate.next(range.len());
            mlp.gate_job(activations, InputRows::Index(&rows[range]), out)
        });
        let ups = experts().map(|(mlp, range)| {
            let out = up.next(range.len());
            mlp.up_job(activations, InputRows::Index(&rows[range]), out)
        });
        cpu.linear_all(gates.chain(ups));
        let inner = scratch.mlp.activate(cpu, rows.len(), width, format);
        let mut parts = Parts::new(out, self.hidden_size);
        cpu.linear_all(experts().map(|(mlp, range)| {
            let rows = InputRows::Range { first: range.start, count: range.len() };
            mlp.down_job(inner, rows, parts.next(range.len()))
        }));
        if self.result_format == ResultFormat::Bf16 {
            cpu.round_to_bf16(out);
        }
        Ok(())
    }

    /// Inner width and format of the experts of some groups; nothing if there is no group.
    fn inner(
        &self,
        layer: usize,
        groups: &[ExpertGroup],
    ) -> Result<Option<(usize, ActivationFormat)>, ExpertsError> {
        let mut inner = None;
        for &ExpertGroup { expert, .. } in groups {
            let mlp = self.get(layer, expert).ok_or(ExpertsError::NotHeld { layer, expert })?;
            // The loader checks that all of them are alike.
            inner = Some((mlp.inner_width(), mlp.inner_format()));
        }
        Ok(inner)
    }

    /// Whether an expert is held.
    pub fn contains(&self, layer: usize, expert: ExpertId) -> bool {
        match &self.held {
            Held::Host(_) => self.get(layer, expert).is_some(),
            Held::Device(bank) => bank.contains(layer, expert),
        }
    }

    /// What computes them where `cpu` is the host's part, as the execution fingerprint names it.
    pub fn backend(&self, cpu: &Cpu) -> String {
        match &self.held {
            Held::Host(_) => cpu_backend(cpu),
            Held::Device(bank) => bank.backend(),
        }
    }

    /// A buffer for tokens on their way into [`Self::forward`].
    pub fn activations(&self) -> Activations {
        match &self.held {
            Held::Host(_) => Activations::new(),
            Held::Device(_) => Activations::in_transit(),
        }
    }

    /// Of experts on the host.
    fn get(&self, layer: usize, expert: ExpertId) -> Option<&GatedMlp> {
        let Held::Host(layers) = &self.held else { return None };
        layers.get(layer)?.get(usize::from(expert.0))?.as_ref()
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

/// A buffer given out row by row.
struct Parts<'a> {
    rest: &'a mut [f32],
    width: usize,
}

impl<'a> Parts<'a> {
    fn new(rest: &'a mut [f32], width: usize) -> Self {
        Self { rest, width }
    }

    /// The next `rows` rows.
    fn next(&mut self, rows: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.rest).split_at_mut(rows * self.width);
        self.rest = rest;
        part
    }
}
