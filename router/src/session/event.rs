//! What a session tells its front door.

use model::TokenId;
use proto::v1;

/// One step of a request's answer. [`Event::Done`] is the last.
#[derive(Debug)]
pub(crate) enum Event {
    /// A choice got further.
    Delta(Delta),
    /// Every choice has finished.
    Done(v1::Usage),
}

/// What one message of tokens added to a choice.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// prompt × n + choice.
    pub index: u32,
    /// Text inside the thinking marks that became certain.
    pub reasoning: String,
    /// Other text that became certain.
    pub content: String,
    /// The tokens themselves; their text may come later.
    pub tokens: Vec<v1::GeneratedToken>,
    /// On a choice's first delta, where they were asked for: the prompt's tokens behind its first.
    pub prompt: Vec<v1::GeneratedToken>,
    /// Set on a choice's last delta.
    pub finish: Option<Finish>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finish {
    pub reason: FinishReason,
    /// What the client had named and the choice ended at.
    pub stop: Option<StopCause>,
}

/// Why a choice ended. A cancelled choice has no reader, a failed one an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishReason {
    /// End of sequence, a stop token id or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// The stop rule that matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StopCause {
    Text(String),
    Token(TokenId),
}
