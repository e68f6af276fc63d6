//! Tokens drawn on the device: one copy brings what to draw, one kernel draws, one copy brings the tokens.

use compute::cuda::{Adjustment, Buffer, CudaError, DRAWN_WORDS, Device, DrawRow, Pinned};

use super::{CudaEngine, Workspace};
use crate::batch::SequenceInput;
use crate::drawing::{DeviceRows, DeviceToken, Draw, Drawn};
use crate::error::StepError;
use crate::sampler::Adjustments;
use crate::step::StepObserver;

/// Words that a plan has room for at first, beyond those of its rows; it grows.
const ADJUSTMENT_WORDS: usize = 1 << 12;

/// What is drawn of a step's wanted rows, and what came of it.
pub(super) struct DrawPlan {
    /// Rows' words, then adjustments' words: built here, sent from page-locked memory.
    words: Vec<u32>,
    pinned: Pinned<u32>,
    there: Buffer<u32>,
    /// `[rows, DRAWN_WORDS]`, there and here.
    drawn: Buffer<u32>,
    host: Pinned<u32>,
    /// The same, taken apart, and which rows' logits come to the host.
    tokens: Vec<DeviceToken>,
    logits: Pinned<f32>,
    logits_rows: usize,
    adjustments: Adjustments,
}

impl DrawPlan {
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            words: Vec::new(),
            pinned: device.pinned(0)?,
            there: device.alloc(0)?,
            drawn: device.alloc(0)?,
            host: device.pinned(0)?,
            tokens: Vec::new(),
            logits: device.pinned(0)?,
            logits_rows: 0,
            adjustments: Adjustments::default(),
        })
    }

    /// Takes in what is drawn of `rows` rows; none: the row's logits are wanted as they are. Rows without an entry are
    /// not drawn either.
    pub fn take(&mut self, rows: usize, draws: &mut dyn Iterator<Item = Option<Draw<'_>>>) {
        let Self { words, tokens, adjustments, logits_rows, .. } = self;
        words.clear();
        words.resize(rows * DrawRow::WORDS, 0);
        tokens.clear();
        *logits_rows = 0;
        let mut changed = 0;
        for row in 0..rows {
            let draw = draws.next().flatten();
            let place = &mut words[row * DrawRow::WORDS..(row + 1) * DrawRow::WORDS];
            match &draw {
                None => place.copy_from_slice(&DrawRow::NOT_DRAWN),
                Some(draw) => {
                    let mut plan = draw.plan(adjustments);
                    plan.adjustments.0 = changed;
                    changed += plan.adjustments.1;
                    place.copy_from_slice(&plan.words());
                    words.extend(adjustments.iter().flat_map(Adjustment::words));
                }
            }
            let shown = draw.is_none_or(|draw| draw.wants_logits());
            let logits = shown.then_some(*logits_rows as u32);
            *logits_rows += usize::from(shown);
            tokens.push(DeviceToken { logits, ..DeviceToken::default() });
        }
    }

    /// Asks for the tokens.
    pub fn ask(&mut self, device: &Device, logits: &mut Buffer<f32>, vocab: usize) -> Result<(), CudaError> {
        let rows = self.tokens.len();
        self.make_room(device, rows, vocab)?;
        self.pinned[..self.words.len()].copy_from_slice(&self.words);
        device.copy_in_later(&self.pinned, &mut self.there.slice_mut(0..self.words.len()))?;
        let plan = self.there.slice(0..self.words.len());
        let drawn = &mut self.drawn.slice_mut(0..rows * DRAWN_WORDS);
        device.sample(&mut logits.slice_mut(0..rows * vocab), vocab, plan, drawn)?;
        device.copy_out_later(drawn.view(), &mut self.host)?;
        for (row, token) in self.tokens.iter().enumerate() {
            if let Some(place) = token.logits {
                let from = logits.slice(row * vocab..(row + 1) * vocab);
                device.copy_out_later_at(from, &mut self.logits, place as usize * vocab)?;
            }
        }
        Ok(())
    }

    /// Waits for the tokens that were asked for.
    pub fn wait(&mut self, device: &Device, vocab: usize) -> Result<DeviceRows<'_>, CudaError> {
        device.synchronize()?;
        for (token, drawn) in self.tokens.iter_mut().zip(self.host.chunks_exact(DRAWN_WORDS)) {
            token.token = drawn[0];
            (token.logprob, token.log_total) = (f32::from_bits(drawn[1]), f32::from_bits(drawn[2]));
        }
        Ok(DeviceRows { tokens: &self.tokens, logits: &self.logits[..self.logits_rows * vocab], vocab })
    }

    fn make_room(&mut self, device: &Device, rows: usize, vocab: usize) -> Result<(), CudaError> {
        if self.pinned.len() < self.words.len() {
            let room = (self.words.len() + ADJUSTMENT_WORDS).next_power_of_two();
            (self.pinned, self.there) = (device.pinned(room)?, device.alloc(room)?);
        }
        if self.host.len() < rows * DRAWN_WORDS {
            let room = (rows * DRAWN_WORDS).next_power_of_two();
            (self.host, self.drawn) = (device.pinned(room)?, device.alloc(room)?);
        }
        if self.logits.len() < self.logits_rows * vocab {
            self.logits = device.pinned(self.logits_rows * vocab)?;
        }
        Ok(())
    }
}

impl CudaEngine {
    /// As [`crate::Engine::step_drawing`].
    pub fn step_drawing(
        &mut self,
        inputs: &[SequenceInput<'_>],
        draws: &mut dyn Iterator<Item = Option<Draw<'_>>>,
        observer: &mut dyn StepObserver,
    ) -> Result<Drawn<'_>, StepError> {
        self.run(inputs.iter().copied(), observer)?;
        self.draw(draws, observer)
    }

    /// Draws of the wanted rows, and waits for the tokens; with an MTP module to feed for their states too.
    fn draw(
        &mut self,
        draws: &mut dyn Iterator<Item = Option<Draw<'_>>>,
        observer: &mut dyn StepObserver,
    ) -> Result<Drawn<'_>, StepError> {
        let wanted = self.batch.wanted.len();
        let hidden = if self.mtp.is_some() { wanted * self.config.hidden_size } else { 0 };
        let Self { draw_plan, device, workspace, config, .. } = self;
        let Workspace { logits, normed, host, .. } = workspace;
        device.copy_out_later(normed.slice(0..hidden), &mut host.hidden)?;
        draw_plan.take(wanted, draws);
        draw_plan.ask(device, logits, config.vocab_size)?;
        self.tell_stored(observer)?;
        let rows = self.draw_plan.wait(&self.device, self.config.vocab_size)?;
        Ok(Drawn::from_device(rows, &self.workspace.host.hidden[..hidden]))
    }
}
