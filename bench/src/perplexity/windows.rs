//! How a long text is cut into windows that overlap.

use std::ops::Range;

/// A stretch of the text that the model sees at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Its tokens in the text.
    pub text: Range<usize>,
    /// The first of them that no window before has scored.
    pub scored: usize,
}

/// Windows of at most `window` tokens over `tokens` tokens: the first scores all of its own, each later one at most
/// `stride` (1 or more, at most `window`). Every token is scored by exactly one.
pub fn windows(tokens: usize, window: usize, stride: usize) -> Vec<Window> {
    let (window, stride) = (window.max(1), stride.clamp(1, window.max(1)));
    let mut windows = Vec::new();
    let mut scored = 0;
    while scored < tokens {
        let new = if scored == 0 { window } else { stride };
        let end = (scored + new).min(tokens);
        windows.push(Window { text: end.saturating_sub(window)..end, scored });
        scored = end;
    }
    windows
}
