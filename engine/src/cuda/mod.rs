//! The engine on a GPU: the layers of `deepseek` over `compute::cuda`, weights and KV pool in the device's memory.
//!
//! One stream, and nothing in a step waits for the host, unless experts are on other workers or an observer looks inside.
//! Steps in which every row wants logits (decoding) are recorded once for each size and replayed; padding rows belong to
//! no sequence, are stored nowhere and routed to no expert.

mod attention;
mod bank;
mod drawing;
mod inputs;
mod layer;
mod mlp;
mod moe;
mod mtp;
mod plan;
mod recorded;
mod step;
mod weights;
mod workspace;

use std::sync::Arc;

use compute::Cpu;
use compute::cuda::{self, Device, InputFormat, Mark};
use model::{Checkpoint, ExecutionFingerprint, KvLayout, ModelConfig, Numerics, schema};

use crate::batch::{BatchLimits, RowsOf, SequenceInput, StepBatch};
use crate::deepseek::{Loader, rope_table};
use crate::error::{EngineError, StepError};
use crate::experts::Experts;
use crate::fingerprint::fingerprint_of;
use crate::kv_cache::KvPool;
use crate::options::{EngineOptions, SyntheticWeights, wire_activation_format};
use crate::stage::Stage;
use crate::step::{StepObserver, StepOutput};
pub(crate) use bank::{DeviceBank, DeviceScratch};
use drawing::DrawPlan;
use inputs::StepInputs;
use layer::Layer;
use mtp::Mtp;
use plan::Plan;
use recorded::{RECORDED_MAX, RECORDED_ROWS_MAX, Recorded, recorded_rows};
use step::{Remote, Step};
use weights::{Linear, Norm, Origin, Weights};
use workspace::{Tail, Workspace};

/// Blocks of all block tables of a step at first; more make the room grow.
const TABLE_BLOCKS: usize = 1 << 16;

/// An engine whose weights, cache and steps are on a GPU.
pub(crate) struct CudaEngine {
    config: ModelConfig,
    fingerprint: ExecutionFingerprint,
    limits: BatchLimits,
    device: Arc<Device>,
    /// For experts on other workers.
    cpu: Cpu,
    remote: Option<Box<dyn Experts>>,
    numerics: Numerics,
    model: Model,
    mtp: Option<Mtp>,
    kv: KvPool,
    rope: cuda::RopeTable,
    batch: StepBatch,
    inputs: StepInputs,
    workspace: Workspace,
    recorded: Vec<Recorded>,
    /// Whether steps are recorded: until that fails.
    records: bool,
    draw_plan: DrawPlan,
    /// When each layer's cache rows of the step that was asked for will be stored, for an observer that wants to know.
    stored: Vec<(usize, Mark)>,
}

/// The main model.
struct Model {
    embedding: cuda::Matrix,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
}

/// Where the routed experts are.
pub(crate) enum RoutedExperts {
    /// On the same device.
    Local,
    /// Elsewhere.
    Remote(Box<dyn Experts>),
}

impl CudaEngine {
    /// Loads a checkpoint onto GPU `ordinal`.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        ordinal: u32,
        experts: RoutedExperts,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = checkpoint.config();
        let layout = options.kv_layout(config)?;
        let local = matches!(experts, RoutedExperts::Local);
        let mut specs: Vec<_> = Vec::new();
        let schema::GlobalTensors { embed_tokens, norm, lm_head } = schema::global(config);
        specs.extend([embed_tokens, norm, lm_head]);
        for layer in 0..layout.layers {
            specs.extend(schema::layer(config, layer).into_specs());
            if local && config.is_moe_layer(layer) {
                let experts = (0..config.n_routed_experts).map(|expert| model::ExpertId(expert as u16));
                specs.extend(experts.flat_map(|expert| schema::expert(config, layer, expert).into_specs()));
            }
        }
        let mut loader = Loader::new(checkpoint, options.numerics, specs.into_iter(), progress)?.unarranged();
        let weight_bytes = loader.bytes_total();
        let origin = Origin::Checkpoint(&mut loader);
        let hash = checkpoint.weights_hash();
        Self::build(config, options, layout, ordinal, experts, origin, (weight_bytes, hash))
    }

    /// An engine with weights made on the device, experts included.
    pub fn synthetic(
        config: &ModelConfig,
        options: &EngineOptions,
        ordinal: u32,
        weights: SyntheticWeights,
    ) -> Result<Self, EngineError> {
        let layout = options.kv_layout(config)?;
        let bytes = schema::all(config).map(|spec| spec.elements() as u64).sum();
        let origin = Origin::Synthetic { config, weights };
        Self::build(
            config,
            options,
            layout,
            ordinal,
            RoutedExperts::Local,
            origin,
            (bytes, Default::default()),
        )
    }

    fn build(
        config: &ModelConfig,
        options: &EngineOptions,
        layout: KvLayout,
        ordinal: u32,
        experts: RoutedExperts,
        origin: Origin<'_, '_>,
        (weight_bytes, hash): (u64, WeightsHash),
    ) -> Result<Self, EngineError> {
        check_widths(config)?;
        let device = Arc::new(Device::open(ordinal as usize)?);
        let rows_max = options.step_tokens_max;
        let plan = Plan::new(&device, config, options, &layout, weight_bytes)?;
        plan.check()?;
        let local = matches!(experts, RoutedExperts::Local);
        let format: InputFormat = wire_activation_format(config, options.numerics).into();
        let kv = KvPool::on_device(layout, options.kv_blocks_max, &device)?;
        let mut weights = Weights {
            device: &device,
            source: origin.open(&device, options.threads)?,
            numerics: options.numerics,
        };
        let model = Model::load(&mut weights, kv.geometry(), local, format)?;
        let kernel = device.attention_kernel(&kv.geometry());
        let load = || mtp::Module::load(&mut weights, kernel, (local, format), model.head.input);
        let module = options.mtp.then(load).transpose()?;
        weights.finish()?;
        let router_format = model.layers.iter().chain(module.as_ref().map(|module| &module.layer));
        let formats = (format, router_format.clone().find_map(Layer::router_format), model.head.input);
        let workspace = Workspace::new(&device, config, &kv, formats, (rows_max, local))?;
        let table = rope_table(config);
        let backend = backend(&device);
        Ok(Self {
            fingerprint: fingerprint_of(hash, kv.layout(), options.numerics, backend),
            limits: BatchLimits::new(config, rows_max, options.kv_blocks_max, kv.layout().block_tokens),
            rope: cuda::RopeTable::new(&device, &table, config.max_position_embeddings)?,
            inputs: StepInputs::new(&device, rows_max, TABLE_BLOCKS)?,
            batch: StepBatch::default(),
            cpu: Cpu::new(options.threads),
            remote: match experts {
                RoutedExperts::Local => None,
                RoutedExperts::Remote(experts) => Some(experts),
            },
            numerics: options.numerics,
            config: config.clone(),
            recorded: Vec::new(),
            records: true,
            stored: Vec::new(),
            draw_plan: DrawPlan::new(&device)?,
            mtp: module.map(|module| Mtp::new(&device, module, config, rows_max)).transpose()?,
            model,
            kv,
            workspace,
            device,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn fingerprint(&self) -> &ExecutionFingerprint {
        &self.fingerprint
    }

    pub fn kv_layout(&self) -> &KvLayout {
        self.kv.layout()
    }

    pub fn kv(&self) -> &KvPool {
        self.settle();
        &self.kv
    }

    pub fn kv_mut(&mut self) -> &mut KvPool {
        self.settle();
        &mut self.kv
    }

    pub fn step_tokens_max(&self) -> usize {
        self.limits.step_tokens_max
    }

    /// As [`crate::Engine::step`].
    pub fn step(
        &mut self,
        inputs: &[SequenceInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        let _span = tracing::debug_span!("step", hop = 7, sequences = inputs.len()).entered();
        self.run(inputs.iter().copied(), observer)?;
        self.fetch(self.batch.wanted.len(), observer)
    }

    /// Brings logits and hidden states of the `wanted` wanted rows to the host, when everything is done that was asked for.
    fn fetch(&mut self, wanted: usize, observer: &mut dyn StepObserver) -> Result<StepOutput<'_>, StepError> {
        let (logits, hidden) = (wanted * self.config.vocab_size, wanted * self.config.hidden_size);
        let Workspace { normed, host, .. } = &mut self.workspace;
        self.device.copy_out_later(normed.slice(0..hidden), &mut host.hidden)?;
        self.ask_for_logits(wanted)?;
        self.tell_stored(observer)?;
        self.device.synchronize()?;
        let host = &self.workspace.host;
        Ok(StepOutput { logits: &host.logits[..logits], hidden: &host.hidden[..hidden] })
    }

    /// Brings the logits alone.
    fn fetch_logits(&mut self, wanted: usize) -> Result<(), StepError> {
        self.ask_for_logits(wanted)?;
        Ok(self.device.synchronize()?)
    }

    /// Tells of each layer's cache rows when they are stored. Comes when everything of the step has been asked for: the device
    /// goes on while the host pushes.
    fn tell_stored(&mut self, observer: &mut dyn StepObserver) -> Result<(), StepError> {
        for (layer, mark) in self.stored.drain(..) {
            mark.wait()?;
            observer.layer_done(layer, &self.kv);
        }
        Ok(())
    }

    fn ask_for_logits(&mut self, wanted: usize) -> Result<(), StepError> {
        let size = wanted * self.config.vocab_size;
        let Workspace { logits, host, .. } = &mut self.workspace;
        if host.logits.len() < size {
            host.logits = self.device.pinned(size)?;
        }
        Ok(self.device.copy_out_later(logits.slice(0..size), &mut host.logits)?)
    }

    /// Leaves logits and hidden states of the wanted rows on the device, and in `stored` when each layer's rows will be there.
    fn run<'a>(
        &mut self,
        inputs: impl Iterator<Item = SequenceInput<'a>>,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        self.stored.clear();
        self.batch.form(RowsOf::Model, inputs, &self.limits)?;
        let watched = observer.watched();
        let count = self.batch.rows();
        let each_wanted = self.batch.wanted.len() == count;
        let silent = !(watched.layers_done || watched.values || watched.stages);
        let record = each_wanted && silent && self.may_record(count);
        let rows = if record { recorded_rows(count).min(self.limits.step_tokens_max) } else { count };
        if !self.inputs.fits(&self.batch, rows) {
            // Recorded steps name the old room.
            self.recorded.clear();
            let blocks = 2 * self.batch.tables().len();
            self.inputs = StepInputs::new(&self.device, self.limits.step_tokens_max, blocks)?;
        }
        self.workspace.make_room(
            &self.device,
            self.batch.wanted.len().max(rows * usize::from(record)),
            &mut self.recorded,
        )?;
        self.inputs.take(&self.batch, rows);
        self.inputs.send(&self.device)?;
        self.kv.settle();
        if !record {
            let context_max = self.inputs.context_max();
            let wanted = self.inputs.wanted();
            return self.launch(context_max, wanted, observer);
        }
        self.inputs.for_recording();
        let context_max = self.inputs.context_max();
        self.run_recorded(RowsOf::Model, rows, context_max, |engine, context_max| {
            engine.launch(context_max, rows, &mut ())
        })
    }

    /// Replays what `launch` asks for at so many rows and a context of at least `context_max`; the first time it is run as it is, and
    /// recorded.
    fn run_recorded(
        &mut self,
        of: RowsOf,
        rows: usize,
        context_max: usize,
        launch: impl Fn(&mut Self, usize) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let context_max = context_max.next_power_of_two().max(1024);
        if let Some(at) = self.recorded.iter().position(|recorded| recorded.is(of, rows, context_max)) {
            // Those used last stand last.
            let recorded = self.recorded.remove(at);
            let replayed = self.device.replay(&recorded.graph);
            self.recorded.push(recorded);
            return Ok(replayed?);
        }
        // Once as it is: what a kernel does at its first launch cannot be recorded.
        launch(self, context_max)?;
        let device = Arc::clone(&self.device);
        match device.record(|| launch(self, context_max)) {
            Ok(graph) => {
                if self.recorded.len() == RECORDED_MAX {
                    self.recorded.remove(0);
                }
                self.recorded.push(Recorded { of, rows, context_max, graph });
            }
            Err(StepError::Device(error)) if !matches!(error, cuda::CudaError::Fault { .. }) => {
                // The step itself is under way.
                tracing::warn!(%error, rows, context_max, "a step could not be recorded; from now on none is");
                self.records = false;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether a step of `count` rows is worth recording, and can be: the host has no part in it.
    fn may_record(&self, count: usize) -> bool {
        self.records && self.remote.is_none() && count <= RECORDED_ROWS_MAX
    }

    /// Asks for the whole step: from tokens to logits of the first `wanted` wanted rows.
    fn launch(
        &mut self,
        context_max: usize,
        wanted: usize,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let Self {
            device, cpu, remote, model, kv, rope, inputs, workspace, config, numerics, stored, ..
        } = self;
        let rows = inputs.rows();
        let watched = observer.watched();
        let remote = Remote::of(remote, cpu, config, *numerics);
        let (geometry, pool) = kv.device_parts();
        let mut step = Step {
            device,
            inputs,
            pool,
            geometry: &geometry,
            rope,
            context_max,
            remote,
            observer,
            watched,
            stored: Vec::new(),
        };
        let Workspace { hidden, layer: layer_work, .. } = workspace;
        let size = rows * config.hidden_size;
        device.embed(&model.embedding, inputs.tokens(), &mut hidden.slice_mut(0..size))?;
        step.stage(Stage::Embedding)?;
        let mut pending = false;
        for layer in &model.layers {
            pending = layer.forward(&mut step, layer_work, hidden, pending)?;
        }
        if pending {
            device.add_in_place(&mut hidden.slice_mut(0..size), layer_work.output.slice(0..size))?;
        }
        if wanted > 0 {
            let tail = Tail { norm: &model.norm, head: &model.head };
            workspace.finish(device, tail, inputs, wanted)?;
        }
        step.stage(Stage::Head)?;
        stored.extend(step.stored.into_iter().enumerate());
        Ok(())
    }
}

/// Refuses widths that the row kernels, which take several channels at once, have no tail for.
fn check_widths(config: &ModelConfig) -> Result<(), EngineError> {
    let widths = [
        ("hidden_size", config.hidden_size, 4),
        ("qk_nope_head_dim", config.qk_nope_head_dim, 2),
        ("qk_rope_head_dim", config.qk_rope_head_dim, 2),
    ];
    match widths.into_iter().find(|(_, value, multiple)| !value.is_multiple_of(*multiple)) {
        Some((field, value, multiple)) => Err(EngineError::Width { field, value, multiple }),
        None => Ok(()),
    }
}

/// What computes, for the execution fingerprint.
fn backend(device: &Device) -> String {
    format!("cuda-{}", device.architecture())
}

/// What tells checkpoints apart.
type WeightsHash = [u8; 16];

impl Model {
    fn load(
        weights: &mut Weights<'_, '_>,
        geometry: compute::KvGeometry,
        local: bool,
        format: InputFormat,
    ) -> Result<Self, EngineError> {
        let config = weights.config().clone();
        let global = schema::global(&config);
        let kernel = weights.device.attention_kernel(&geometry);
        let embedding = weights.table(&global.embed_tokens)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(weights, index, &schema::layer(&config, index), kernel, (local, format)))
            .collect::<Result<_, _>>()?;
        let norm = weights.norm(&global.norm, config.rms_norm_eps)?;
        Ok(Self { embedding, layers, norm, head: weights.head(&global.lm_head)? })
    }
}
