//! A sequence's KV blocks from one worker to another: ticket, layout, fence, progress, failure.
//!
//! [`Receiver`] lives on decode's device thread, [`Sender`] on prefill's. Each is a thin shell over a state machine,
//! [`receiver::ReceiverCore`] and [`sender::SenderCore`], that knows neither clock nor thread nor network: time is an
//! argument, frames go out through an [`Outlet`]. Tests drive the very code that serves.
//!
//! The invariant that everything here is for: **a pushed block never lands in memory that belongs to somebody
//! else**. The receiver makes the one copy itself, on the thread that owns the pool, after it has checked
//! incarnation, ticket, bounds, size and checksum. A ticket that is revoked before a frame is looked at is
//! dead for that frame, whenever it was sent; nobody else can write, so no write can be late.
//!
//! Deliberately not here: which blocks a sequence gets (`decode`), when a layer is done (`engine`), who pushes to whom
//! (`router`), and how bytes travel (`fabric`). The states and messages in words: `docs/kv-transfer.md`.

mod budget;
mod error;
mod extent;
mod outlet;
mod pieces;
mod rails;
pub mod receiver;
pub mod sender;
pub mod wire;

pub use budget::{BASELINE_MAX, RESUME_MAX};
pub use error::TransferError;
pub use outlet::{Outlet, Unsent};
pub use proto::ticket::{KvTicket, TicketId};
pub use rails::Rails;
pub use receiver::{
    BlockSink, Fenced, Receiver, ReceiverEvent, ReceiverOptions, ReceiverStats, Reservation, TransferReport,
};
pub use sender::{Sender, SenderEvent, TransferId};
