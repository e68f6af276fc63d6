//! What the callers of either end can be told at once. How a transfer ends is an event, not an error.

use proto::control::Consequence;
use proto::ticket::TicketId;

use crate::sender::TransferId;

/// Why a call had no effect.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No room towards the peer, or no connection yet. Offer the same again after the next poll.
    #[error("the peer takes no more at the moment")]
    Full,
    /// The transfer is over: committed, refused, lost or aborted. If the caller has not heard so, the next poll
    /// says it.
    #[error("transfer {0} has ended")]
    Ended(TransferId),
    /// The push is not what the ticket permits: a bug of the caller.
    #[error("{field} {value} is outside the ticket, which permits {permitted}")]
    OutsideTicket {
        /// Which argument.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would have been accepted.
        permitted: String,
    },
    /// The run is longer than the fabric's frames: a bug of the caller, who must push fewer blocks at once.
    #[error("{bytes} bytes are more than a frame holds")]
    FrameTooLarge {
        /// Bytes of the run.
        bytes: usize,
    },
    /// A transfer for this ticket is under way here already.
    #[error("ticket {0} is already being served")]
    TicketInUse(TicketId),
    /// As many transfers, or tickets, as allowed are alive.
    #[error("{max} hand-offs are alive, the bound")]
    TooMany {
        /// The bound.
        max: usize,
    },
    /// The reservation makes no sense: an empty prompt, one that no ticket can express, or a prefix longer than it.
    #[error("no ticket for {prompt_tokens} prompt tokens from block {first_block}")]
    Reservation {
        /// As asked for.
        prompt_tokens: usize,
        /// As asked for.
        first_block: usize,
    },
}

impl TransferError {
    /// What the request's owner does next.
    pub fn consequence(&self) -> Consequence {
        match self {
            Self::Full | Self::TooMany { .. } => Consequence::Unavailable,
            Self::Ended(_) => Consequence::Lost,
            Self::OutsideTicket { .. }
            | Self::FrameTooLarge { .. }
            | Self::TicketInUse(_)
            | Self::Reservation { .. } => Consequence::Rejected,
        }
    }
}
