//! Loaded routed experts on a GPU and their computation, for a worker that has nothing but experts.
//!
//! Tokens arrive and results leave by way of page-locked memory. The products are the ones that experts beside the engine
//! run, on rows sorted by the host, so the bits are theirs.

use std::sync::Arc;

use compute::Activations as HostRows;
use compute::cuda::{
    Activations, Buffer, CudaError, Device, GroupStaging, Groups, InputFormat, ResultBuffer, ResultStaging,
    RowStaging,
};
use model::{Checkpoint, ExpertId, ModelConfig, Numerics, schema};

use super::plan::RESERVE;
use super::weights::{Experts, Origin, Weights};
use crate::deepseek::Loader;
use crate::error::EngineError;
use crate::experts::{ExpertGroup, ExpertJobs, ExpertsError};
use crate::options::wire_activation_format;

/// Rows of the largest job that memory is planned for: twice the `step_vectors_max` that an expert worker has by default, since
/// room is made in powers of two.
const PLANNED_ROWS: u64 = 1 << 15;

/// Bytes of [`DeviceScratch`] for it, each row of another token.
fn largest_job(config: &ModelConfig) -> u64 {
    let (hidden, inside) = (config.hidden_size as u64, config.moe_intermediate_size as u64);
    // Inputs and what is inside in f32 at most, both halves before SwiGLU, results.
    PLANNED_ROWS * (hidden * 4 + inside * 4 + 2 * inside * 4 + hidden * 4)
}

/// Some experts of some layers, on a device.
pub(crate) struct DeviceBank {
    device: Arc<Device>,
    layers: Vec<Option<LayerExperts>>,
    format: InputFormat,
    hidden: usize,
    inside: usize,
    bytes: u64,
}

/// The experts of one layer.
struct LayerExperts {
    experts: Experts,
    /// By the expert's id: which of the matrices are its own.
    places: Vec<Option<u16>>,
}

impl DeviceBank {
    /// As [`crate::ExpertBank::load`], onto GPU `ordinal`.
    pub fn load(
        checkpoint: &Checkpoint,
        held: &[(usize, Vec<ExpertId>)],
        numerics: Numerics,
        ordinal: u32,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = checkpoint.config();
        let device = Arc::new(Device::open(ordinal as usize)?);
        let specs = held.iter().flat_map(|(layer, experts)| {
            experts.iter().flat_map(|&expert| schema::expert(config, *layer, expert).into_specs())
        });
        let mut loader = Loader::new(checkpoint, numerics, specs, progress)?.unarranged();
        let bytes = loader.bytes_total();
        let (free, workspace) = (device.memory()?.0 as u64, largest_job(config));
        if bytes + workspace + RESERVE > free {
            return Err(EngineError::DeviceMemory { weights: bytes, kv: 0, workspace, free, blocks_fit: 0 });
        }
        let format = InputFormat::from(wire_activation_format(config, numerics));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let source = Origin::Checkpoint(&mut loader).open(&device, threads)?;
        let mut weights = Weights { device: &device, source, numerics };
        let mut layers: Vec<Option<LayerExperts>> = Vec::new();
        layers.resize_with(config.layers_with_mtp(), || None);
        for (layer, ids) in held.iter().filter(|(_, ids)| !ids.is_empty()) {
            let mut places = vec![None; config.n_routed_experts];
            for (place, id) in (0..).zip(ids) {
                places[usize::from(id.0)] = Some(place);
            }
            let experts = weights.experts(*layer, ids)?;
            if weights.input_format(experts.gate.format()) != format {
                let tensor = schema::expert(config, *layer, ids[0]).gate_proj.name;
                return Err(EngineError::MixedFormats { tensor });
            }
            layers[*layer] = Some(LayerExperts { experts, places });
        }
        weights.finish()?;
        Ok(Self {
            device,
            layers,
            format,
            hidden: config.hidden_size,
            inside: config.moe_intermediate_size,
            bytes,
        })
    }

    /// Whether an expert is held.
    pub fn contains(&self, layer: usize, expert: ExpertId) -> bool {
        self.place(layer, expert).is_some()
    }

    /// Bytes of weights held, as stored in the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What computes, for the execution fingerprint.
    pub fn backend(&self) -> String {
        super::backend(&self.device)
    }

    fn place(&self, layer: usize, expert: ExpertId) -> Option<usize> {
        let places = &self.layers.get(layer)?.as_ref()?.places;
        places.get(usize::from(expert.0)).copied().flatten().map(usize::from)
    }

    /// As [`crate::ExpertBank::forward`].
    pub fn forward(
        &self,
        scratch: &mut Option<DeviceScratch>,
        jobs: ExpertJobs<'_>,
        out: &mut [f32],
    ) -> Result<(), ExpertsError> {
        let ExpertJobs { layer, activations, rows, groups } = jobs;
        if rows.is_empty() {
            return Ok(());
        }
        let missing = |expert| ExpertsError::NotHeld { layer, expert };
        if let Some(group) = groups.iter().find(|group| !self.contains(layer, group.expert)) {
            return Err(missing(group.expert));
        }
        let held = self.layers[layer].as_ref().ok_or_else(|| missing(ExpertId(0)))?;
        let room = match scratch {
            Some(scratch) if scratch.has_room(activations.rows(), rows.len()) => scratch,
            _ => {
                *scratch = None;
                scratch.insert(DeviceScratch::new(self, activations.rows(), rows.len())?)
            }
        };
        self.compute(held, room, activations, (rows, groups), out)?;
        Ok(())
    }

    fn compute(
        &self,
        LayerExperts { experts, places }: &LayerExperts,
        work: &mut DeviceScratch,
        activations: &HostRows,
        (rows, groups): (&[u32], &[ExpertGroup]),
        out: &mut [f32],
    ) -> Result<(), CudaError> {
        let (device, count) = (&*self.device, rows.len());
        work.staging.send(device, activations, &mut work.input)?;
        let place = |expert: ExpertId| places[usize::from(expert.0)].map_or(0, usize::from);
        let counts = groups.iter().map(|group| (place(group.expert), group.rows));
        let kernel = experts.kernel(device);
        device.take_groups(rows, counts, kernel, &mut work.group_staging, &mut work.groups)?;
        let gate_up = &mut work.gate_up.slice_mut(0..count * 2 * self.inside);
        let read = work.input.inputs(activations.rows());
        device.experts_in(&experts.gate, Some(&experts.up), read, &work.groups, 1, gate_up)?;
        let gate_up = work.gate_up.slice(0..count * 2 * self.inside);
        device.swiglu(gate_up, Some(work.groups.row_count()), &mut work.inside)?;
        let (inside, groups) = (work.inside.inputs(count), &work.groups);
        let len = count * self.hidden;
        work.results.write(len, |out| device.experts_sorted(&experts.down, inside, groups, out))?;
        work.results.read(device, &mut out[..len], &mut work.result_staging)
    }
}

/// Buffers of a [`DeviceBank`], sized for the largest job so far.
pub(crate) struct DeviceScratch {
    tokens: usize,
    rows: usize,
    staging: RowStaging,
    input: Activations,
    group_staging: GroupStaging,
    groups: Groups,
    /// `[rows, 2 * intermediate]`
    gate_up: Buffer<f32>,
    inside: Activations,
    /// `[rows, hidden]`
    results: ResultBuffer,
    result_staging: ResultStaging,
}

impl DeviceScratch {
    fn new(bank: &DeviceBank, tokens: usize, rows: usize) -> Result<Self, CudaError> {
        let DeviceBank { device, format, hidden, inside, layers, .. } = bank;
        let (tokens, rows) = (tokens.next_power_of_two(), rows.next_power_of_two());
        let experts = layers.iter().flatten().map(|layer| layer.experts.gate.experts()).max().unwrap_or(0);
        let results = ResultBuffer::new(device, *format != InputFormat::F32, rows * hidden)?;
        Ok(Self {
            tokens,
            rows,
            staging: RowStaging::new(device, *format, tokens, *hidden)?,
            input: Activations::new(device, *format, tokens, *hidden)?,
            group_staging: GroupStaging::new(device, rows)?,
            groups: Groups::new(device, rows, experts)?,
            gate_up: device.alloc(rows * 2 * inside)?,
            inside: Activations::new(device, *format, rows, *inside)?,
            result_staging: results.staging(device, rows * hidden)?,
            results,
        })
    }

    fn has_room(&self, tokens: usize, rows: usize) -> bool {
        tokens <= self.tokens && rows <= self.rows
    }
}
