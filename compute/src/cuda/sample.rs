//! Tokens drawn from rows of logits.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};

/// How one row's token is drawn.
///
/// In this order: every [`Adjustment`] of the row, in the logits' own memory; the log-probability; temperature, min-p, top-k, top-p;
/// the largest sum of logit over temperature and the noise that [`crate::Isa::gumbel_noise`] has for the same key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawRow {
    /// Which adjustments are the row's: the first, and how many. No two name the same token.
    pub adjustments: (u32, u32),
    /// Divides positive logits of tokens that occurred, multiplies the others.
    pub repetition: f32,
    /// Taken off for each occurrence in the completion.
    pub frequency: f32,
    /// Taken off where there is one.
    pub presence: f32,
    /// None takes the best token. Positive.
    pub temperature: Option<f32>,
    /// 0 keeps all; what ties with the last stays.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Of the request.
    pub seed: u64,
    /// Which of the request's completions.
    pub choice: u32,
    /// Of the token that is drawn.
    pub position: u64,
}

/// What is done to one token's logit before anything else: the bias, then the penalties, or nothing but suppression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adjustment {
    /// Which token; one past the vocabulary counts for nothing.
    pub token: u32,
    /// Added.
    pub bias: f32,
    /// Whether the prompt has it.
    pub in_prompt: bool,
    /// How often the completion has it.
    pub generated: u32,
    /// Whether it gets probability zero.
    pub suppressed: bool,
}

/// Numbers that a drawn row gives: token, bits of its log-probability, bits of the logarithm of the row's whole weight.
pub const DRAWN_WORDS: usize = 3;

impl DrawRow {
    /// Words of one row.
    pub const WORDS: usize = 16;
    /// A row that is left alone.
    pub const NOT_DRAWN: [u32; Self::WORDS] = [0; Self::WORDS];

    /// As the kernel reads it; `struct Row` there.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        let ([seed_low, seed_high], [low, high]) = (halves(self.seed), halves(self.position));
        [
            self.adjustments.0,
            self.adjustments.1,
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            self.temperature.unwrap_or(1.0).to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            seed_low,
            seed_high,
            self.choice,
            low,
            high,
            1,
            u32::from(self.temperature.is_none()),
        ]
    }
}

impl Adjustment {
    /// Words of one.
    pub const WORDS: usize = 4;

    /// As the kernel reads it; `struct Adjustment` there.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let prompt = if self.in_prompt { 1 << 31 } else { 0 };
        let seen = self.generated.min((1 << 31) - 1) | prompt;
        [self.token, self.bias.to_bits(), seen, u32::from(self.suppressed)]
    }
}

impl Device {
    /// Draws a token for each row of `logits` `[rows, vocab]`, which its adjustments change. `plan` holds the rows' words and, behind
    /// them, all adjustments' words; `drawn` `[rows, 3]` gets [`DRAWN_WORDS`] for each row, nothing for one that is
    /// [`DrawRow::NOT_DRAWN`].
    ///
    /// NaN is never drawn; of a row without a number, token 0.
    ///
    /// # Panics
    /// If a length does not fit. A row that names adjustments past the plan's end ends the context.
    pub fn sample(
        &self,
        logits: &mut ViewMut<'_, f32>,
        vocab: usize,
        plan: View<'_, u32>,
        drawn: &mut ViewMut<'_, u32>,
    ) -> Result<(), CudaError> {
        assert!(vocab > 0 && logits.len().is_multiple_of(vocab), "{} logits of {vocab}", logits.len());
        let rows = logits.len() / vocab;
        assert_eq!(drawn.len(), rows * DRAWN_WORDS, "room for {rows} drawn rows");
        assert!(plan.len() >= rows * DrawRow::WORDS, "a plan for each of {rows} rows");
        assert!(rows <= 65_535, "{rows} rows in one launch");
        if rows == 0 {
            return Ok(());
        }
        let adjustments = plan.slice(rows * DrawRow::WORDS..plan.len());
        let grid = Grid { blocks: (self.sample_parts(), size(rows), 1), threads: 512, shared: 0 };
        let count = size(adjustments.len() / Adjustment::WORDS);
        // SAFETY: a cluster of blocks a row; lengths checked above, tokens and adjustments by the kernel.
        unsafe {
            launch!(self, sample, grid;
                logits.address(), size(vocab), plan.address(), adjustments.address(), count, drawn.address())
        }
    }

    /// Blocks of a row: a cluster where there are such. No bit hangs on it.
    fn sample_parts(&self) -> u32 {
        if self.has_wgmma { 8 } else { 1 }
    }
}
