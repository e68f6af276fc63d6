//! The MTP module on a GPU: keeping its cache beside the main model's, and drafting with it, as `step::mtp` has it.
//!
//! States come from the host, where whoever owns the sequences keeps them; a draft's own stay on the device. Rounds of drafting
//! are recorded by size as plain steps are, and the host waits once a round: for the logits that it chooses from. Everything here
//! ends with such a wait, so page-locked memory may be written again when the next thing begins.

use compute::KvSlot;
use compute::cuda::{self, Activations, Buffer, CudaError, Device, NormHalf, NormRows, Pinned};
use model::{ModelConfig, TokenId};

use super::inputs::StepInputs;
use super::weights::Norm;
use super::{CudaEngine, Recorded, TABLE_BLOCKS, Tail, Workspace, recorded_rows, step};
use crate::batch::{LogitsWanted, RowsOf, SequenceInput, StepBatch};
use crate::drawing::{Draw, Drawn};
use crate::error::{EngineError, InvalidBatch, StepError};
use crate::stage::Stage;
use crate::step::{
    DraftInput, FollowedInput, FollowedOutput, MtpInput, StepObserver, StepOutput, check_before,
};

pub(super) use module::Module;

mod module;

/// A loaded module with its buffers.
pub(super) struct Mtp {
    module: Module,
    /// Of the module's own rows.
    inputs: StepInputs,
    following: StepBatch,
    /// Sequences that go on drafting: index, last token.
    drafting: Vec<(usize, TokenId)>,
    /// `[rows + 1, hidden]`: the state before each row's token. One more: a step's own states are put down a row further.
    states: Buffer<f32>,
    /// `[rows, hidden]`
    embedded: Buffer<f32>,
    /// `[rows, 2 * hidden]`: embedding, then state, both normed.
    pairs: Buffer<f32>,
    project_input: Activations,
    /// `[sequences, hidden]`: states on their way in, and those of last rows on their way out. Both grow.
    first: Buffer<f32>,
    last: Buffer<f32>,
    host_states: Pinned<f32>,
    host_last: Pinned<f32>,
}

impl Mtp {
    pub fn new(
        device: &Device,
        module: Module,
        config: &ModelConfig,
        rows_max: usize,
    ) -> Result<Self, EngineError> {
        let hidden = config.hidden_size;
        let mut states = device.alloc((rows_max + 1) * hidden)?;
        // Padding rows are computed too: from numbers.
        device.fill(&mut states.view_mut(), 0)?;
        Ok(Self {
            project_input: Activations::new(device, module.project.input, rows_max, 2 * hidden)?,
            module,
            inputs: StepInputs::new(device, rows_max, TABLE_BLOCKS)?,
            following: StepBatch::default(),
            drafting: Vec::new(),
            states,
            embedded: device.alloc(rows_max * hidden)?,
            pairs: device.alloc(rows_max * 2 * hidden)?,
            first: device.alloc(0)?,
            last: device.alloc(0)?,
            host_states: device.pinned(0)?,
            host_last: device.pinned(0)?,
        })
    }

    /// Room for `values` on their way to the device.
    fn make_room(&mut self, device: &Device, values: usize) -> Result<(), CudaError> {
        if self.host_states.len() < values {
            self.host_states = device.pinned(values.next_power_of_two())?;
        }
        Ok(())
    }
}

/// The module's layer input from tokens and states, into `pairs` `[rows, hidden]`.
fn pair(
    device: &Device,
    main_embedding: &cuda::Matrix,
    mtp: &mut Mtp,
    out: &mut Buffer<f32>,
) -> Result<(), CudaError> {
    let Mtp { module, inputs, states, embedded, pairs, project_input, .. } = mtp;
    let rows = inputs.rows();
    let size = rows * module.project.matrix.rows();
    let table = module.embedding.as_ref().unwrap_or(main_embedding);
    device.embed(table, inputs.tokens(), &mut embedded.slice_mut(0..size))?;
    let half = |x, norm| {
        let Norm { weight, eps }: &Norm = norm;
        NormHalf { x, weight: weight.view(), eps: *eps }
    };
    // The embedding comes first in the checkpoints' eh_proj, though the paper prints the hidden state first.
    let left = half(embedded.slice(0..size), &module.embedding_norm);
    let right = half(states.slice(0..size), &module.hidden_norm);
    device.norm_pair(left, right, &mut pairs.slice_mut(0..2 * size))?;
    device.prepare(pairs.slice(0..2 * size), project_input)?;
    device.linear(&module.project.matrix, project_input.inputs(rows), &mut out.slice_mut(0..size))
}

impl CudaEngine {
    pub fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    /// As [`crate::Engine::step_with_mtp`].
    pub fn step_with_mtp(
        &mut self,
        inputs: &[FollowedInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<FollowedOutput<'_>, StepError> {
        self.run_followed(inputs, observer)?;
        let StepOutput { logits, hidden } = self.fetch(self.batch.wanted.len())?;
        let (logits, hidden) = (logits.len(), hidden.len());
        let last = inputs.len() * self.config.hidden_size;
        let host = &self.workspace.host;
        let mtp = self.mtp.as_ref().ok_or(InvalidBatch::NoMtp)?;
        Ok(FollowedOutput {
            logits: &host.logits[..logits],
            hidden: &host.hidden[..hidden],
            last: &mtp.host_last[..last],
        })
    }

    /// As [`crate::Engine::step_with_mtp_drawing`].
    pub fn step_with_mtp_drawing(
        &mut self,
        inputs: &[FollowedInput<'_>],
        draws: &mut dyn Iterator<Item = Option<Draw<'_>>>,
        observer: &mut dyn StepObserver,
    ) -> Result<(Drawn<'_>, &[f32]), StepError> {
        self.run_followed(inputs, observer)?;
        self.draw_plan.take(self.batch.wanted.len(), draws);
        let Self { draw_plan, device, workspace, config, mtp, .. } = self;
        let rows = draw_plan.run(device, &mut workspace.logits, config.vocab_size)?;
        let mtp = mtp.as_ref().ok_or(InvalidBatch::NoMtp)?;
        Ok((Drawn::from_device(rows, &[]), &mtp.host_last[..inputs.len() * config.hidden_size]))
    }

    /// Runs the main model, then stores the module's rows of its tokens.
    fn run_followed(
        &mut self,
        inputs: &[FollowedInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        self.require_mtp()?;
        check_before(inputs, self.config.hidden_size)?;
        let _span = tracing::debug_span!("step", hop = 7, sequences = inputs.len()).entered();
        self.run(inputs.iter().map(|input| input.sequence), observer)?;
        self.follow(inputs, observer)
    }

    /// Stores the module's rows of the tokens that have just been run. A row whose state before it is not known is padding.
    fn follow(
        &mut self,
        inputs: &[FollowedInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let Self { device, model, workspace, batch, mtp, config, .. } = &mut *self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let (hidden_size, rows) = (config.hidden_size, batch.rows());
        let size = rows * hidden_size;
        // Every row's own state is the one before the row behind it.
        let all = NormRows {
            x: &mut workspace.hidden.slice_mut(0..size),
            stride: hidden_size,
            add: None,
            index: None,
        };
        let states = &mut mtp.states.slice_mut(hidden_size..hidden_size + size);
        device.norm(all, model.norm.weight.view(), model.norm.eps, Some(states), &mut [])?;

        let values = inputs.len() * hidden_size;
        mtp.make_room(device, values)?;
        if mtp.last.len() < values {
            let room = values.next_power_of_two();
            (mtp.first, mtp.last) = (device.alloc(room)?, device.alloc(room)?);
            mtp.host_last = device.pinned(room)?;
        }
        for (input, state) in inputs.iter().zip(mtp.host_states.chunks_exact_mut(hidden_size)) {
            // Zero before position 0, where there is none.
            state.fill(0.0);
            if input.sequence.position > 0 {
                state[..input.before.len()].copy_from_slice(input.before);
            }
        }
        device.copy_in_later(&mtp.host_states, &mut mtp.first.slice_mut(0..values))?;
        mtp.following.start_following();
        (0..rows).for_each(|row| mtp.following.push_following(batch, row));
        // All last states are taken before any first one is put in their place.
        let mut end = 0;
        for (index, count) in batch.sequence_rows().enumerate() {
            end += count;
            let from = mtp.states.slice(end * hidden_size..(end + 1) * hidden_size);
            let to = &mut mtp.last.slice_mut(index * hidden_size..(index + 1) * hidden_size);
            device.copy_within(from, to)?;
        }
        let mut row = 0;
        for (index, (input, count)) in inputs.iter().zip(batch.sequence_rows()).enumerate() {
            let from = mtp.first.slice(index * hidden_size..(index + 1) * hidden_size);
            let to = &mut mtp.states.slice_mut(row * hidden_size..(row + 1) * hidden_size);
            device.copy_within(from, to)?;
            if input.before.is_empty() && input.sequence.position > 0 {
                mtp.following.slots[row] = KvSlot { block: u32::MAX, row: u32::MAX };
            }
            row += count;
        }
        device.copy_out_later(mtp.last.slice(0..values), &mut mtp.host_last)?;
        mtp.inputs.take(&mtp.following, rows);
        self.store(observer)
    }

    /// Stores the module's rows that its inputs hold, made of the states that are there.
    fn store(&mut self, observer: &mut dyn StepObserver) -> Result<(), StepError> {
        let Self { device, model, kv, rope, workspace, mtp, .. } = &mut *self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        mtp.inputs.send(device)?;
        pair(device, &model.embedding, mtp, &mut workspace.hidden)?;
        let watched = observer.watched();
        let (geometry, pool) = kv.device_parts();
        let mut step = step::Step {
            device,
            inputs: &mtp.inputs,
            pool,
            geometry: &geometry,
            rope,
            context_max: 0,
            remote: None,
            observer: &mut *observer,
            watched,
            stored: Vec::new(),
        };
        mtp.module.layer.store(&mut step, &mut workspace.layer, &mut workspace.hidden)?;
        let stored = step.stored;
        for mark in stored {
            mark.wait()?;
            observer.layer_done(model.layers.len(), kv);
        }
        Ok(())
    }

    /// As [`crate::Engine::mtp_step`].
    pub fn mtp_step(
        &mut self,
        inputs: &[MtpInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        self.form_mtp(inputs)?;
        self.run_mtp(observer)?;
        self.fetch(self.batch.wanted.len())
    }

    /// As [`crate::Engine::mtp_store`].
    pub fn mtp_store(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), StepError> {
        self.form_mtp(inputs)?;
        let mtp = self.mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        // Tables are not read where nothing attends.
        mtp.inputs.take_without_tables(&self.batch, self.batch.rows());
        self.store(&mut ())?;
        // Whoever reads the blocks next does so beside the stream.
        Ok(self.device.synchronize()?)
    }

    /// Forms a batch of the module's rows and sends their states.
    fn form_mtp(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), StepError> {
        let hidden_size = self.config.hidden_size;
        self.require_mtp()?;
        self.batch.form(RowsOf::Mtp, inputs.iter().map(|input| input.sequence), &self.limits)?;
        for (sequence, input) in inputs.iter().enumerate() {
            let (values, tokens) = (input.hidden.len(), input.sequence.tokens.len());
            if values != tokens * hidden_size {
                return Err(InvalidBatch::Hidden { sequence, values, tokens, hidden_size }.into());
            }
        }
        self.send_states(inputs.iter().map(|input| input.hidden))
    }

    /// Puts the states of a batch's rows where the module reads them.
    fn send_states<'a>(&mut self, states: impl Iterator<Item = &'a [f32]>) -> Result<(), StepError> {
        let size = self.batch.rows() * self.config.hidden_size;
        let mtp = self.mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        mtp.make_room(&self.device, size)?;
        let mut taken = 0;
        for state in states {
            mtp.host_states[taken..taken + state.len()].copy_from_slice(state);
            taken += state.len();
        }
        Ok(self.device.copy_in_later(&mtp.host_states, &mut mtp.states.slice_mut(0..size))?)
    }

    /// As [`crate::Engine::draft`].
    pub fn draft(
        &mut self,
        inputs: &[DraftInput<'_>],
        choose: &mut dyn FnMut(usize, &mut [f32]) -> Option<TokenId>,
    ) -> Result<(), StepError> {
        let hidden_size = self.config.hidden_size;
        self.require_mtp()?;
        for (sequence, input) in inputs.iter().enumerate() {
            let values = input.hidden.len();
            if values != hidden_size {
                return Err(InvalidBatch::Hidden { sequence, values, tokens: 1, hidden_size }.into());
            }
        }
        let mut drafting = self.mtp.as_mut().map(|mtp| std::mem::take(&mut mtp.drafting)).unwrap_or_default();
        drafting.clear();
        drafting.extend(inputs.iter().map(|input| input.token).enumerate());
        let result = self.draft_rounds(inputs, &mut drafting, choose);
        if let Some(mtp) = &mut self.mtp {
            mtp.drafting = drafting;
        }
        result
    }

    fn draft_rounds(
        &mut self,
        inputs: &[DraftInput<'_>],
        drafting: &mut Vec<(usize, TokenId)>,
        choose: &mut dyn FnMut(usize, &mut [f32]) -> Option<TokenId>,
    ) -> Result<(), StepError> {
        let (hidden_size, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        for round in 0.. {
            if drafting.is_empty() {
                break;
            }
            let rows = drafting.iter().map(|(index, token)| SequenceInput {
                tokens: std::slice::from_ref(token),
                position: inputs[*index].position + round,
                block_table: inputs[*index].block_table,
                logits: LogitsWanted::Last,
            });
            self.batch.form(RowsOf::Mtp, rows, &self.limits)?;
            if round == 0 {
                self.send_states(inputs.iter().map(|input| input.hidden))?;
            }
            self.run_mtp(&mut ())?;
            self.fetch_logits(drafting.len())?;
            let Self { device, workspace: Workspace { normed, host, .. }, mtp: Some(mtp), .. } = &mut *self
            else {
                break;
            };
            // States of those that go on move up; neighbours move together.
            let (mut row, mut kept, mut copied, mut failed) = (0, 0, 0, Ok(()));
            let mut run = 0..0;
            let mut flush = |run: &std::ops::Range<usize>, copied: &mut usize| {
                let to = *copied..*copied + run.len();
                *copied = to.end;
                let from = normed.slice(run.start * hidden_size..run.end * hidden_size);
                let to = &mut mtp.states.slice_mut(to.start * hidden_size..to.end * hidden_size);
                device.copy_within(from, to)
            };
            drafting.retain_mut(|(index, token)| {
                let logits = &mut host.logits[row * vocab_size..][..vocab_size];
                row += 1;
                let Some(chosen) = choose(*index, logits) else { return false };
                *token = chosen;
                let goes_on = round + 1 < inputs[*index].drafts_max;
                if goes_on {
                    kept += 1;
                    if run.end != row - 1 && failed.is_ok() {
                        failed = flush(&run, &mut copied);
                        run = row - 1..row - 1;
                    }
                    run.end = row;
                }
                goes_on
            });
            failed?;
            flush(&run, &mut copied)?;
            debug_assert_eq!(copied, kept, "every kept state has moved");
        }
        Ok(())
    }

    /// Runs the batch that was formed on the states that were sent; leaves logits and states of the wanted rows on the
    /// device.
    fn run_mtp(&mut self, observer: &mut dyn StepObserver) -> Result<(), StepError> {
        let watched = observer.watched();
        let count = self.batch.rows();
        let wanted = self.batch.wanted.len();
        let silent = !(watched.layers_done || watched.values || watched.stages);
        let record = wanted == count && silent && self.may_record(count);
        let rows = if record { recorded_rows(count).min(self.limits.step_tokens_max) } else { count };
        let mtp = self.mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        if !mtp.inputs.fits(&self.batch, rows) {
            // Recorded rounds name the old room.
            self.recorded.clear();
            let blocks = 2 * self.batch.tables().len();
            mtp.inputs = StepInputs::new(&self.device, self.limits.step_tokens_max, blocks)?;
        }
        let room = wanted.max(rows * usize::from(record));
        self.workspace.make_room(&self.device, room, &mut self.recorded)?;
        mtp.inputs.take(&self.batch, rows);
        mtp.inputs.send(&self.device)?;
        let context_max = mtp.inputs.context_max();
        if !record {
            return self.launch_mtp(context_max, wanted, observer);
        }
        let context_max = context_max.next_power_of_two().max(1024);
        let found = |recorded: &Recorded| recorded.is(RowsOf::Mtp, rows, context_max);
        if let Some(recorded) = self.recorded.iter().find(|recorded| found(recorded)) {
            return Ok(self.device.replay(&recorded.graph)?);
        }
        // Once as it is: what a kernel does at its first launch cannot be recorded.
        self.launch_mtp(context_max, rows, &mut ())?;
        let device = std::sync::Arc::clone(&self.device);
        let mut outcome = Ok(());
        let graph = device.record(|| {
            outcome = self.launch_mtp(context_max, rows, &mut ());
            Ok(())
        })?;
        outcome?;
        self.recorded.push(Recorded { of: RowsOf::Mtp, rows, context_max, graph });
        Ok(())
    }

    /// Asks for a whole round: from tokens and states to logits of the first `wanted` wanted rows.
    fn launch_mtp(
        &mut self,
        context_max: usize,
        wanted: usize,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let Self { device, cpu, remote, model, kv, rope, workspace, config, numerics, mtp, .. } = self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        pair(device, &model.embedding, mtp, &mut workspace.hidden)?;
        let Mtp { module, inputs, .. } = mtp;
        let watched = observer.watched();
        let (geometry, pool) = kv.device_parts();
        let mut step = step::Step {
            device,
            inputs,
            pool,
            geometry: &geometry,
            rope,
            context_max,
            remote: step::Remote::of(remote, cpu, config, *numerics),
            observer: &mut *observer,
            watched,
            stored: Vec::new(),
        };
        step.stage(Stage::Embedding)?;
        let Workspace { hidden, layer: layer_work, .. } = workspace;
        let size = inputs.rows() * config.hidden_size;
        if module.layer.forward(&mut step, layer_work, hidden, false)? {
            device.add_in_place(&mut hidden.slice_mut(0..size), layer_work.output.slice(0..size))?;
        }
        let tail = Tail { norm: &module.norm, head: module.head.as_ref().unwrap_or(&model.head) };
        if wanted > 0 {
            workspace.finish(device, tail, inputs, wanted)?;
        }
        step.stage(Stage::Head)?;
        let stored = step.stored;
        for mark in stored {
            mark.wait()?;
            observer.layer_done(model.layers.len(), kv);
        }
        Ok(())
    }

    fn require_mtp(&self) -> Result<(), InvalidBatch> {
        if self.mtp.is_some() { Ok(()) } else { Err(InvalidBatch::NoMtp) }
    }
}
