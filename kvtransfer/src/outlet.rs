//! Where the state machines put frames that shall leave.

use bytes::Bytes;
use fabric::{Frame, SendError};

use crate::wire;

/// The way out to peers named by `P`. Never blocks.
pub trait Outlet<P> {
    /// Queues a frame for `peer`. `Ok` means queued, not delivered.
    ///
    /// # Errors
    /// The frame is dropped, and why.
    fn try_send(&mut self, peer: P, frame: Frame) -> Result<(), Unsent>;

    /// Gathers `pieces` into a body and queues it under the head that is made of their checksums. A
    /// transport that can gather straight to where the frame will be read does so.
    ///
    /// # Errors
    /// As [`Self::try_send`].
    fn try_push(
        &mut self,
        peer: P,
        pieces: &[&[u8]],
        head: &mut dyn FnMut(Vec<u64>) -> Bytes,
    ) -> Result<(), Unsent> {
        let (body, checksums) = wire::gather(pieces);
        self.try_send(peer, Frame { head: head(checksums), body: vec![body] })
    }
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

impl From<SendError> for Unsent {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Full(_) => Self::Full,
            SendError::Oversized(_) => Self::TooLarge,
            SendError::Gone => Self::Gone,
        }
    }
}
