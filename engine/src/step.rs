//! A step, and the engine that runs it on the CPU.

use compute::{Activations, Cpu, MlaRow, RopeTable};
use model::{Checkpoint, ExecutionFingerprint, ModelConfig, schema};

use crate::batch::{BatchLimits, RowsOf, SequenceInput, StepBatch, recycle};
use crate::deepseek::{
    DeepSeek, LayerWorkspace, Linear, Loader, MtpModule, RmsNorm, StepContext, embed, rope_table,
};
use crate::error::{EngineError, StepError};
use crate::experts::Experts;
use crate::fingerprint::{cpu_backend, execution_fingerprint};
use crate::kv_cache::KvPool;
use crate::options::EngineOptions;
use crate::stage::Stage;
use mtp::Mtp;
pub(crate) use mtp::check_before;
pub use mtp::{DraftInput, FollowedInput, FollowedOutput, MtpInput};

mod mtp;

/// Watches a step from inside. `()` watches nothing.
pub trait StepObserver {
    /// What it looks at: a device brings nothing else to the host.
    fn watched(&self) -> Watched {
        Watched { layers_done: true, values: true, stages: false }
    }

    /// The KV rows that this step adds to `layer` are in the pool, and will not change: they may be pushed while the
    /// rest of the step runs.
    fn layer_done(&mut self, _layer: usize, _kv: &KvPool) {}

    /// The router of `layer` chose `ids` with `weights`, both `[rows, topk]`, best first.
    fn routed(&mut self, _layer: usize, _ids: &[u16], _weights: &[f32]) {}

    /// The residual stream after `layer`, `[rows, hidden]`.
    fn layer_hidden(&mut self, _layer: usize, _hidden: &[f32]) {}

    /// A part of the step has ended. For whoever wants to know where the time goes.
    fn stage(&mut self, _ended: Stage) {}

    /// Whether anybody still wants what the step gives. The CPU asks before each layer and ends a step that nobody wants with
    /// [`StepError::Unwanted`]; what a device was asked for, it does.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// What a [`StepObserver`] looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// [`StepObserver::layer_done`].
    pub layers_done: bool,
    /// [`StepObserver::routed`] and [`StepObserver::layer_hidden`].
    pub values: bool,
    /// [`StepObserver::stage`] at the moment when the stage is done, for which a device must be waited for.
    pub stages: bool,
}

impl StepObserver for () {
    fn watched(&self) -> Watched {
        Watched { layers_done: false, values: false, stages: false }
    }
}

/// What a step gives, for the wanted rows in the batch's order.
#[derive(Clone, Copy, Debug)]
pub struct StepOutput<'a> {
    /// `[wanted, vocab]`
    pub logits: &'a [f32],
    /// `[wanted, hidden]`, after the final norm: what an MTP module takes.
    pub hidden: &'a [f32],
}

/// The engine on the CPU.
pub(crate) struct CpuEngine {
    config: ModelConfig,
    fingerprint: ExecutionFingerprint,
    limits: BatchLimits,
    cpu: Cpu,
    model: DeepSeek,
    mtp: Option<Mtp>,
    experts: Box<dyn Experts>,
    kv: KvPool,
    rope: RopeTable,
    batch: StepBatch,
    attention_rows: Vec<MlaRow<'static>>,
    workspace: Workspace,
}

impl CpuEngine {
    /// Loads everything but the routed experts, which `experts` reaches.
    ///
    /// `progress` is told `(bytes done, bytes in all)`.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        experts: Box<dyn Experts>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = checkpoint.config().clone();
        let layout = options.kv_layout(&config)?;
        let cpu = Cpu::new(options.threads);
        let fingerprint = execution_fingerprint(checkpoint, &layout, options.numerics, cpu_backend(&cpu));

        let schema::GlobalTensors { embed_tokens, norm, lm_head } = schema::global(&config);
        let plan = [embed_tokens, norm, lm_head].into_iter();
        let plan =
            plan.chain((0..layout.layers).flat_map(|layer| schema::layer(&config, layer).into_specs()));
        let mut loader = Loader::new(checkpoint, options.numerics, plan, progress)?;
        let model = DeepSeek::load(&mut loader)?;
        let mtp = options.mtp.then(|| MtpModule::load(&mut loader)).transpose()?;
        let rows_max = options.step_tokens_max;
        tracing::info!(
            bytes = loader.bytes_done(),
            numerics = %options.numerics,
            backend = fingerprint.backend,
            kv_layout = layout.describe(),
            kv_blocks = options.kv_blocks_max,
            "model loaded"
        );
        Ok(Self {
            limits: BatchLimits::new(&config, rows_max, options.kv_blocks_max, layout.block_tokens),
            kv: KvPool::new(layout, options.kv_blocks_max)?,
            rope: rope_table(&config),
            mtp: mtp.map(|module| Mtp::new(module, &config, rows_max)),
            workspace: Workspace::new(&config, rows_max),
            batch: StepBatch::with_room(rows_max, options.kv_blocks_max),
            attention_rows: Vec::with_capacity(rows_max),
            fingerprint,
            cpu,
            model,
            experts,
            config,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What must be equal for two workers to give the same bits.
    pub fn fingerprint(&self) -> &ExecutionFingerprint {
        &self.fingerprint
    }

    /// The KV cache.
    pub fn kv(&self) -> &KvPool {
        &self.kv
    }

    /// The KV cache, for rows that were computed elsewhere.
    pub fn kv_mut(&mut self) -> &mut KvPool {
        &mut self.kv
    }

    /// The largest number of rows in a step.
    pub fn step_tokens_max(&self) -> usize {
        self.limits.step_tokens_max
    }

    /// Runs rows of some sequences through the main model.
    ///
    /// # Errors
    /// [`StepError::Invalid`] before anything is computed; [`StepError::Experts`] where the routed experts fail and
    /// [`StepError::Unwanted`] as the observer says, after which the rows of this step count as not in the cache. The engine
    /// can go on in any case.
    pub fn step(
        &mut self,
        inputs: &[SequenceInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        self.run_layers(inputs.iter().copied(), observer)?;
        let Self { cpu, batch, model, workspace, .. } = self;
        Ok(workspace.finish(cpu, &batch.wanted, &model.norm, &model.head, observer))
    }

    /// Leaves the residual stream behind the last layer in the workspace.
    fn run_layers<'a>(
        &mut self,
        inputs: impl ExactSizeIterator<Item = SequenceInput<'a>>,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let _span = tracing::debug_span!("step", hop = 7, sequences = inputs.len()).entered();
        let Self { cpu, kv, rope, experts, batch, attention_rows, model, workspace, config, .. } = self;
        batch.form(RowsOf::Model, inputs, &self.limits)?;
        let views = batch.attention_rows(recycle(std::mem::take(attention_rows)));
        let experts = experts.as_mut();
        let mut step = StepContext { cpu, kv, rope, experts, observer, batch, attention_rows: &views };
        let hidden = &mut workspace.hidden[..batch.rows() * config.hidden_size];
        embed(&model.embedding, &batch.tokens, hidden);
        step.observer.stage(Stage::Embedding);
        let mut layers = model.layers.iter();
        let result = layers.try_for_each(|layer| {
            if !step.observer.is_wanted() {
                return Err(StepError::Unwanted);
            }
            Ok(layer.forward(&mut step, &mut workspace.layer, hidden)?)
        });
        *attention_rows = recycle(views);
        result
    }
}

/// Buffers of a step, sized for the largest one.
struct Workspace {
    /// `[rows, hidden]`: the residual stream.
    hidden: Vec<f32>,
    layer: LayerWorkspace,
    /// `[wanted, hidden]`, before and after the final norm.
    wanted: Vec<f32>,
    normed: Vec<f32>,
    head_input: Activations,
    /// `[wanted, vocab]`. Grows to the most rows ever wanted at once: a chunk of a prompt wants one, and room for
    /// `step_tokens_max` of them would be 265 MB with V3's vocabulary and 512 rows.
    logits: Vec<f32>,
}

impl Workspace {
    fn new(config: &ModelConfig, rows_max: usize) -> Self {
        let rows = || vec![0.0; rows_max * config.hidden_size];
        Self {
            hidden: rows(),
            layer: LayerWorkspace::new(config, rows_max),
            wanted: rows(),
            normed: rows(),
            head_input: Activations::new(),
            logits: Vec::new(),
        }
    }

    /// Final norm and head for the wanted rows of `hidden`.
    fn finish(
        &mut self,
        cpu: &Cpu,
        rows: &[u32],
        norm: &RmsNorm,
        head: &Linear,
        observer: &mut dyn StepObserver,
    ) -> StepOutput<'_> {
        let width = head.input_width();
        gather(&self.hidden, rows, width, &mut self.wanted);
        let size = rows.len() * width;
        norm.forward(cpu, &self.wanted[..size], &mut self.normed[..size]);
        let Self { head_input, logits, normed, .. } = self;
        let normed = &normed[..size];
        let logits = run_head(cpu, head, normed, head_input, logits);
        observer.stage(Stage::Head);
        StepOutput { logits, hidden: normed }
    }
}

/// `out` `[rows, width]` = the named rows of `from`.
fn gather(from: &[f32], rows: &[u32], width: usize, out: &mut [f32]) {
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&from[row as usize * width..][..width]);
    }
}

/// `[rows, vocab]` from `normed` `[rows, hidden]`, in the memory of `logits`.
fn run_head<'a>(
    cpu: &Cpu,
    head: &Linear,
    normed: &[f32],
    input: &mut Activations,
    logits: &'a mut Vec<f32>,
) -> &'a [f32] {
    let rows = normed.len() / head.input_width();
    input.prepare(cpu, normed, rows, head.input_width(), head.input_format());
    let size = rows * head.width();
    if logits.len() < size {
        logits.resize(size, 0.0);
    }
    head.forward(cpu, input, &mut logits[..size]);
    &logits[..size]
}
