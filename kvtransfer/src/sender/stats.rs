//! What a sender has counted.

/// What a sender has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderStats {
    /// Transfers begun.
    pub begun: u64,
    /// Transfers that decode committed.
    pub committed: u64,
    /// Transfers that decode refused.
    pub refused: u64,
    /// Transfers that were lost.
    pub lost: u64,
    /// Transfers that the caller gave up.
    pub aborted: u64,
    /// Bytes of blocks sent.
    pub bytes: u64,
    /// Pushes handed back for want of room.
    pub full: u64,
    /// Paths lost in the middle of a transfer.
    pub broken: u64,
    /// Transfers that went on, on another path or after an answer was missing.
    pub resumed: u64,
    /// Pieces that had been sent and had to be sent again.
    pub repeated: u64,
    /// Answers that nobody waits for, and frames that are none.
    pub unexpected: u64,
}
