//! Greedy choice and log-probabilities.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, View, ViewMut};

impl Device {
    /// For each row of `logits` `[m, vocab]` a token and its log-probability under the row's softmax: the `given` token,
    /// or the one of the largest logit (the lowest on a tie; NaN never wins). A given token past the vocabulary ends the
    /// context.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn logprob(
        &self,
        logits: View<'_, f32>,
        vocab: usize,
        given: Option<View<'_, u32>>,
        tokens: &mut ViewMut<'_, u32>,
        logprobs: &mut ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        let rows = tokens.len();
        assert_eq!(logits.len(), rows * vocab, "logits [{rows}, {vocab}]");
        assert!(logprobs.len() == rows && given.is_none_or(|given| given.len() == rows), "one of each a row");
        if rows == 0 {
            return Ok(());
        }
        assert!(vocab > 0, "a vocabulary");
        let given = given.map_or(0, |given| given.address());
        // SAFETY: a thread block a row; a null `given` is none.
        unsafe {
            launch!(self, logprob, Grid::line(rows, 1024);
                logits.address(), size(vocab), given, tokens.address(), logprobs.address())
        }
    }
}
