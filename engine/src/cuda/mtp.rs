//! The MTP module on a GPU: keeping its cache beside the main model's, and drafting with it, as `step::mtp` has it.
//!
//! States come from the host, where whoever owns the sequences keeps them; a draft's own stay on the device. Rounds of drafting
//! are recorded by size as plain steps are, and the host waits once a round: for the tokens, or the logits to choose them from.
//! Storing rows waits for nothing; it has page-locked memory of its own, which the next storing waits for.

use compute::KvSlot;
use compute::cuda::{Buffer, CudaError, Device, Mark, NormRows, Pinned};
use model::{ModelConfig, TokenId};

use super::inputs::StepInputs;
use super::{CudaEngine, TABLE_BLOCKS, Tail, Workspace, recorded_rows, step};
use crate::batch::{LogitsWanted, RowsOf, SequenceInput, StepBatch};
use crate::drawing::{Drafter, Draw, Drawn};
use crate::error::{EngineError, InvalidBatch, StepError};
use crate::stage::Stage;
use crate::step::{
    DraftInput, FollowedInput, FollowedOutput, MtpInput, StepObserver, StepOutput, check_before,
};

pub(super) use module::Module;
use pairing::Pairing;

mod module;
mod pairing;

/// Waits for a round and puts the next token of each sequence that drafts in the place of its last one, or none.
type Choose<'a> = dyn FnMut(&mut CudaEngine, &mut [(usize, Option<TokenId>)]) -> Result<(), StepError> + 'a;

/// A loaded module with its buffers.
pub(super) struct Mtp {
    module: Module,
    /// Of the module's own rows that are run, and of those that are stored.
    inputs: StepInputs,
    storing: StepInputs,
    /// When the last rows were stored.
    stored: Option<Mark>,
    following: StepBatch,
    /// Sequences that go on drafting: index, last token.
    drafting: Vec<(usize, Option<TokenId>)>,
    pairing: Pairing,
    /// `[sequences, hidden]`: states on their way in, and those of last rows on their way out. Both grow.
    first: Buffer<f32>,
    last: Buffer<f32>,
    host_states: Pinned<f32>,
    host_stored: Pinned<f32>,
    host_last: Pinned<f32>,
}

impl Mtp {
    pub fn new(
        device: &Device,
        module: Module,
        config: &ModelConfig,
        rows_max: usize,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            pairing: Pairing::new(device, &module, config.hidden_size, rows_max)?,
            module,
            inputs: StepInputs::new(device, rows_max, TABLE_BLOCKS)?,
            storing: StepInputs::new(device, rows_max, 0)?,
            stored: None,
            following: StepBatch::default(),
            drafting: Vec::new(),
            first: device.alloc(0)?,
            last: device.alloc(0)?,
            host_states: device.pinned(0)?,
            host_stored: device.pinned(0)?,
            host_last: device.pinned(0)?,
        })
    }

    /// Waits for the last storing, and makes room for `values` that the next one sends.
    fn begin_storing(&mut self, device: &Device, values: usize) -> Result<(), CudaError> {
        if let Some(stored) = self.stored.take() {
            stored.wait()?;
        }
        make_room(&mut self.host_stored, device, values)
    }
}

fn make_room(states: &mut Pinned<f32>, device: &Device, values: usize) -> Result<(), CudaError> {
    if states.len() < values {
        *states = device.pinned(values.next_power_of_two())?;
    }
    Ok(())
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
        let StepOutput { logits, hidden } = self.fetch(self.batch.wanted.len(), observer)?;
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
        let Self { draw_plan, device, workspace, config, .. } = self;
        draw_plan.ask(device, &mut workspace.logits, config.vocab_size)?;
        self.tell_stored(observer)?;
        let Self { draw_plan, device, config, mtp, .. } = self;
        let rows = draw_plan.wait(device, config.vocab_size)?;
        let mtp = mtp.as_ref().ok_or(InvalidBatch::NoMtp)?;
        Ok((Drawn::from_device(rows, &[]), &mtp.host_last[..inputs.len() * config.hidden_size]))
    }

    /// Asks for the main model's step, then for the module's rows of its tokens.
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

    /// Stores the module's rows of the tokens that are being run. A row whose state before it is not known is padding.
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
        let states = &mut mtp.pairing.states.slice_mut(hidden_size..hidden_size + size);
        device.norm(all, model.norm.weight.view(), model.norm.eps, Some(states), &mut [])?;

        let values = inputs.len() * hidden_size;
        mtp.begin_storing(device, values)?;
        if mtp.last.len() < values {
            let room = values.next_power_of_two();
            let host_last = device.pinned(room)?;
            (mtp.first, mtp.last) = (device.alloc(room)?, device.alloc(room)?);
            mtp.host_last = host_last;
        }
        for (input, state) in inputs.iter().zip(mtp.host_stored.chunks_exact_mut(hidden_size)) {
            // Zero before position 0, where there is none.
            state.fill(0.0);
            if input.sequence.position > 0 {
                state[..input.before.len()].copy_from_slice(input.before);
            }
        }
        device.copy_in_later(&mtp.host_stored, &mut mtp.first.slice_mut(0..values))?;
        mtp.following.start_following();
        (0..rows).for_each(|row| mtp.following.push_following(batch, row));
        // All last states are taken before any first one is put in their place.
        let mut end = 0;
        for (index, count) in batch.sequence_rows().enumerate() {
            end += count;
            let from = mtp.pairing.states.slice(end * hidden_size..(end + 1) * hidden_size);
            let to = &mut mtp.last.slice_mut(index * hidden_size..(index + 1) * hidden_size);
            device.copy_within(from, to)?;
        }
        let mut row = 0;
        for (index, (input, count)) in inputs.iter().zip(batch.sequence_rows()).enumerate() {
            let from = mtp.first.slice(index * hidden_size..(index + 1) * hidden_size);
            let to = &mut mtp.pairing.states.slice_mut(row * hidden_size..(row + 1) * hidden_size);
            device.copy_within(from, to)?;
            if input.before.is_empty() && input.sequence.position > 0 {
                mtp.following.slots[row] = KvSlot { block: u32::MAX, row: u32::MAX };
            }
            row += count;
        }
        device.copy_out_later(mtp.last.slice(0..values), &mut mtp.host_last)?;
        mtp.storing.take_without_tables(&mtp.following, rows);
        self.store(observer)
    }

    /// Stores the module's rows that its inputs hold, made of the states that are there.
    fn store(&mut self, observer: &mut dyn StepObserver) -> Result<(), StepError> {
        let Self { device, model, kv, rope, workspace, mtp, stored, .. } = &mut *self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let Mtp { module, pairing, storing, .. } = mtp;
        storing.send(device)?;
        pairing.run(device, (&*module, &model.embedding), storing, &mut workspace.hidden)?;
        let watched = observer.watched();
        let (geometry, pool) = kv.device_parts();
        let mut step = step::Step {
            device,
            inputs: storing,
            pool,
            geometry: &geometry,
            rope,
            context_max: 0,
            remote: None,
            observer,
            watched,
            stored: Vec::new(),
        };
        module.layer.store(&mut step, &mut workspace.layer, &mut workspace.hidden)?;
        stored.extend(step.stored.into_iter().map(|mark| (model.layers.len(), mark)));
        mtp.stored = Some(device.mark()?);
        Ok(())
    }

    /// As [`crate::Engine::mtp_step`].
    pub fn mtp_step(
        &mut self,
        inputs: &[MtpInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        self.form_mtp(inputs)?;
        self.send_states(inputs.iter().map(|input| input.hidden))?;
        self.run_mtp(observer)?;
        self.fetch(self.batch.wanted.len(), observer)
    }

    /// As [`crate::Engine::mtp_store`].
    pub fn mtp_store(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), StepError> {
        self.form_mtp(inputs)?;
        let Self { device, batch, mtp, config, .. } = &mut *self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let size = batch.rows() * config.hidden_size;
        mtp.begin_storing(device, size)?;
        gather(inputs.iter().map(|input| input.hidden), &mut mtp.host_stored);
        device.copy_in_later(&mtp.host_stored, &mut mtp.pairing.states.slice_mut(0..size))?;
        // Tables are not read where nothing attends.
        mtp.storing.take_without_tables(batch, batch.rows());
        self.store(&mut ())
    }

    /// Forms a batch of the module's rows.
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
        Ok(())
    }

    /// Puts the states of a batch's rows where the module reads them.
    fn send_states<'a>(&mut self, states: impl Iterator<Item = &'a [f32]>) -> Result<(), StepError> {
        let size = self.batch.rows() * self.config.hidden_size;
        let mtp = self.mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        make_room(&mut mtp.host_states, &self.device, size)?;
        gather(states, &mut mtp.host_states);
        Ok(self.device.copy_in_later(&mtp.host_states, &mut mtp.pairing.states.slice_mut(0..size))?)
    }

    /// Nobody reads or writes the cache beside the stream while rows of the module's are on their way to it. An error shows at
    /// the next call.
    pub fn settle(&self) {
        if let Some(stored) = self.mtp.as_ref().and_then(|mtp| mtp.stored.as_ref()) {
            let _shown_later = stored.wait();
        }
    }

    /// As [`crate::Engine::draft`].
    pub fn draft(
        &mut self,
        inputs: &[DraftInput<'_>],
        choose: &mut dyn FnMut(usize, &mut [f32]) -> Option<TokenId>,
    ) -> Result<(), StepError> {
        let vocab_size = self.config.vocab_size;
        self.draft_rounds(inputs, &mut |engine, drafting| {
            engine.fetch_logits(drafting.len())?;
            let logits = engine.workspace.host.logits.chunks_exact_mut(vocab_size);
            for ((index, token), logits) in drafting.iter_mut().zip(logits) {
                *token = choose(*index, logits);
            }
            Ok(())
        })
    }

    /// As [`crate::Engine::draft_drawing`].
    pub fn draft_drawing(
        &mut self,
        inputs: &[DraftInput<'_>],
        drafter: &mut dyn Drafter,
    ) -> Result<(), StepError> {
        self.draft_rounds(inputs, &mut |engine, drafting| {
            let Self { draw_plan, device, workspace, config, .. } = engine;
            draw_plan.take(drafting.len(), &mut drafting.iter().map(|(index, _)| drafter.draw(*index)));
            draw_plan.ask(device, &mut workspace.logits, config.vocab_size)?;
            let drawn = draw_plan.wait(device, config.vocab_size)?;
            for ((index, token), drawn) in drafting.iter_mut().zip(drawn.tokens) {
                let guess = TokenId(drawn.token);
                *token = drafter.take(*index, guess).then_some(guess);
            }
            Ok(())
        })
    }

    /// Rounds until nobody drafts.
    fn draft_rounds(&mut self, inputs: &[DraftInput<'_>], choose: &mut Choose<'_>) -> Result<(), StepError> {
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
        drafting.extend(inputs.iter().map(|input| Some(input.token)).enumerate());
        let mut result = Ok(());
        for round in 0.. {
            if drafting.is_empty() || result.is_err() {
                break;
            }
            result = self.draft_round(inputs, &mut drafting, round, choose);
        }
        if let Some(mtp) = &mut self.mtp {
            mtp.drafting = drafting;
        }
        result
    }

    /// One round: leaves those in `drafting` that go on, and their states where the next round reads them.
    fn draft_round(
        &mut self,
        inputs: &[DraftInput<'_>],
        drafting: &mut Vec<(usize, Option<TokenId>)>,
        round: usize,
        choose: &mut Choose<'_>,
    ) -> Result<(), StepError> {
        let hidden_size = self.config.hidden_size;
        let rows = drafting.iter().map(|(index, token)| SequenceInput {
            tokens: token.as_slice(),
            position: inputs[*index].position + round,
            block_table: inputs[*index].block_table,
            logits: LogitsWanted::Last,
        });
        self.batch.form(RowsOf::Mtp, rows, &self.limits)?;
        if round == 0 {
            self.send_states(inputs.iter().map(|input| input.hidden))?;
        }
        self.run_mtp(&mut ())?;
        choose(self, drafting)?;
        let Self { device, workspace: Workspace { normed, .. }, mtp, .. } = &mut *self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        for (index, token) in drafting.iter_mut() {
            *token = token.filter(|_| round + 1 < inputs[*index].drafts_max);
        }
        // States of those that go on move up; neighbours move together.
        let (mut row, mut kept) = (0, 0);
        for run in drafting.chunk_by(|a, b| a.1.is_some() == b.1.is_some()) {
            if run[0].1.is_some() {
                let from = normed.slice(row * hidden_size..(row + run.len()) * hidden_size);
                let to = kept * hidden_size..(kept + run.len()) * hidden_size;
                device.copy_within(from, &mut mtp.pairing.states.slice_mut(to))?;
                kept += run.len();
            }
            row += run.len();
        }
        drafting.retain(|(_, token)| token.is_some());
        Ok(())
    }

    /// Runs the batch that was formed on the states that were sent; leaves logits and states of the wanted rows on the
    /// device.
    fn run_mtp(&mut self, observer: &mut dyn StepObserver) -> Result<(), StepError> {
        self.stored.clear();
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
        self.kv.settle();
        let context_max = mtp.inputs.context_max();
        if !record {
            return self.launch_mtp(context_max, wanted, observer);
        }
        mtp.inputs.for_recording();
        self.run_recorded(RowsOf::Mtp, rows, context_max, |engine, context_max| {
            engine.launch_mtp(context_max, rows, &mut ())
        })
    }

    /// Asks for a whole round: from tokens and states to logits of the first `wanted` wanted rows.
    fn launch_mtp(
        &mut self,
        context_max: usize,
        wanted: usize,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let Self { device, cpu, remote, model, kv, rope, workspace, config, numerics, mtp, stored, .. } =
            self;
        let mtp = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let Mtp { module, inputs, pairing, .. } = mtp;
        pairing.run(device, (&*module, &model.embedding), inputs, &mut workspace.hidden)?;
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
            observer,
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
        stored.extend(step.stored.into_iter().map(|mark| (model.layers.len(), mark)));
        Ok(())
    }

    fn require_mtp(&self) -> Result<(), InvalidBatch> {
        if self.mtp.is_some() { Ok(()) } else { Err(InvalidBatch::NoMtp) }
    }
}

/// Rows one after the other.
fn gather<'a>(rows: impl Iterator<Item = &'a [f32]>, to: &mut [f32]) {
    let mut taken = 0;
    for row in rows {
        to[taken..taken + row.len()].copy_from_slice(row);
        taken += row.len();
    }
}
