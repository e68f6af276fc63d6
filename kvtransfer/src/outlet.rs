//! Where the state machines put frames that shall leave.

use fabric::{Channel, Fabric, Frame, PeerId, SendError};

/// The way out to peers named by `P`. Never blocks.
pub trait Outlet<P> {
    /// Queues a frame for `peer`. `Ok` means queued, not delivered.
    ///
    /// # Errors
    /// The frame is dropped, and why.
    fn try_send(&mut self, peer: P, frame: Frame) -> Result<(), Unsent>;
}

/// Why a frame did not leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The peer's queue is full: later, perhaps.
    Full,
    /// Longer than frames may be.
    TooLarge,
    /// The peer is lost.
    Gone,
}

/// The fabric's KV channel.
impl Outlet<PeerId> for Fabric {
    fn try_send(&mut self, peer: PeerId, frame: Frame) -> Result<(), Unsent> {
        Fabric::try_send(self, peer, Channel::Kv, frame).map_err(|error| match error {
            SendError::Full(_) => Unsent::Full,
            SendError::Oversized(_) => Unsent::TooLarge,
            SendError::Gone => Unsent::Gone,
        })
    }
}
