//! From a step's rows to tokens, on whichever device: what to draw, and what was drawn.

use model::TokenId;

use crate::sampler::{Sampled, SequenceSampler};

/// How a wanted row's token is drawn.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// Its sequence's sampler.
    pub sampler: &'a SequenceSampler,
    /// The position of the token that is drawn.
    pub position: usize,
    /// Tokens that may not come here.
    pub suppress: &'a [TokenId],
    /// Tokens between those that the sampler has observed and this row, taken to stand: drafts.
    pub ahead: &'a [TokenId],
}

/// Whoever lets a module guess: how the next token of each sequence is drawn, and what becomes of it. Sequences are named by their
/// place among the drafts' inputs.
pub trait Drafter {
    /// How it is drawn, as far as the guesses so far are taken to stand.
    fn draw(&self, index: usize) -> Option<Draw<'_>>;

    /// The same from the module's `logits` `[vocab]`, which may be overwritten, where the host draws. None: no more guesses.
    fn guess(&mut self, index: usize, logits: &mut [f32]) -> Option<TokenId>;

    /// Takes a guess; whether there may be another.
    fn take(&mut self, index: usize, token: TokenId) -> bool;
}

/// A step's wanted rows, drawn by its device or to be drawn from their logits.
pub struct Drawn<'a> {
    rows: Rows<'a>,
    hidden: &'a [f32],
}

/// What the wanted rows came to the host as.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// `[wanted, vocab]`
    Logits {
        logits: &'a [f32],
        vocab: usize,
    },
    Device(DeviceRows<'a>),
}

/// Rows that a device drew.
#[derive(Clone, Copy)]
pub(crate) struct DeviceRows<'a> {
    /// `[wanted]`
    pub tokens: &'a [DeviceToken],
    /// `[some rows, vocab]`: of rows that were not drawn, and of those whose best tokens are asked for, after bias and
    /// penalties.
    pub logits: &'a [f32],
    pub vocab: usize,
}

/// What a device says of a row.
#[derive(Clone, Copy, Default)]
pub(crate) struct DeviceToken {
    pub token: u32,
    pub logprob: f32,
    /// Of the weight of the whole row.
    pub log_total: f32,
    /// Which row of the logits is its own, if one is.
    pub logits: Option<u32>,
}

impl<'a> Drawn<'a> {
    /// Rows whose logits `[wanted, vocab]` are on the host; `hidden` as [`Self::hidden`].
    pub fn from_logits(logits: &'a [f32], vocab: usize, hidden: &'a [f32]) -> Self {
        Self { rows: Rows::Logits { logits, vocab }, hidden }
    }

    pub(crate) fn from_device(rows: DeviceRows<'a>, hidden: &'a [f32]) -> Self {
        Self { rows: Rows::Device(rows), hidden }
    }

    /// `[wanted, hidden]`, after the final norm; empty on a device whose engine has no MTP module to feed.
    pub fn hidden(&self) -> &'a [f32] {
        self.hidden
    }

    /// Logits of a row for which there was no [`Draw`].
    pub fn logits(&self, row: usize) -> &'a [f32] {
        match self.rows {
            Rows::Logits { logits, vocab } => &logits[row * vocab..(row + 1) * vocab],
            Rows::Device(rows) => rows.logits_of(row).unwrap_or_default(),
        }
    }

    /// The token of wanted row `row`. `sampler`, `position` and `suppress` are what the row's [`Draw`] said, whose `ahead` the
    /// sampler has observed meanwhile; `scratch` is working memory.
    pub fn token(
        &self,
        row: usize,
        sampler: &mut SequenceSampler,
        (position, suppress): (usize, &[TokenId]),
        scratch: &mut Vec<f32>,
    ) -> Sampled {
        match self.rows {
            Rows::Logits { .. } => {
                scratch.clear();
                scratch.extend_from_slice(self.logits(row));
                sampler.sample(scratch, position, suppress)
            }
            Rows::Device(rows) => {
                let DeviceToken { token, logprob, log_total, .. } = rows.tokens[row];
                let top = sampler.best_of(rows.logits_of(row).unwrap_or_default(), log_total);
                Sampled { token: TokenId(token), logprob, top }
            }
        }
    }
}

impl<'a> DeviceRows<'a> {
    fn logits_of(&self, row: usize) -> Option<&'a [f32]> {
        let at = self.tokens[row].logits? as usize * self.vocab;
        Some(&self.logits[at..at + self.vocab])
    }
}
