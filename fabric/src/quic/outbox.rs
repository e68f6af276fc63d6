//! A peer's send queue on one channel: bounded in frames and in bytes, filled by any thread. The I/O thread drains it, or,
//! for a peer on this host, the peer itself.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::body;
use crate::error::SendError;
use crate::frame::Frame;
use crate::limits::Limits;
use crate::rdma;
use crate::shared::Producer;
use crate::spares::Spares;
use crate::stats::Counters;
use crate::sync::lock;

/// Where a peer's frames go.
pub(crate) enum Outbox {
    /// To the I/O thread.
    Queue(Queued),
    /// Into memory that the peer reads. Locked for one copy, and by one thread at a time as a rule: a channel has one owner.
    Shared(Mutex<Producer>),
    /// Into memory that is written to the peer's.
    Rdma(Mutex<rdma::Producer>),
}

/// The side that fills a queue.
pub(crate) struct Queued {
    frames: mpsc::Sender<Frame>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    /// Bodies that were gathered and have been acknowledged.
    spares: Spares,
}

/// The side that drains it.
pub(crate) struct Queue {
    frames: mpsc::Receiver<Frame>,
    bytes: Arc<AtomicUsize>,
}

pub(crate) fn outbox(limits: &Limits) -> (Queued, Queue) {
    let (sender, receiver) = mpsc::channel(limits.send_frames_max);
    let bytes = Arc::new(AtomicUsize::new(0));
    let queue = Queue { frames: receiver, bytes: Arc::clone(&bytes) };
    let queued = Queued { frames: sender, bytes, bytes_max: limits.send_bytes_max, spares: Spares::new() };
    (queued, queue)
}

impl Outbox {
    /// Queues a frame that fits the limits.
    pub fn offer(&self, frame: Frame, counters: &Counters) -> Result<(), SendError> {
        match self {
            Self::Queue(queued) => queued.offer(frame),
            Self::Shared(producer) => {
                let bytes = frame.bytes();
                lock(producer).offer(frame)?;
                counters.sent(bytes);
                Ok(())
            }
            Self::Rdma(producer) => {
                let bytes = frame.bytes();
                lock(producer).offer(frame)?;
                counters.sent(bytes);
                Ok(())
            }
        }
    }

    /// Gathers a frame's body, for a queue only if there is room for it.
    pub fn offer_gathered(
        &self,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
        counters: &Counters,
    ) -> Result<(), SendError> {
        match self {
            Self::Queue(queued) => {
                let body_bytes = pieces.iter().map(|piece| piece.len()).sum();
                if !queued.has_room(body_bytes) {
                    return Err(SendError::Full(Frame::default()));
                }
                let (body, checksums) = body::gather(pieces, &queued.spares);
                queued.offer(Frame { head: head(checksums), body: vec![body] })
            }
            Self::Shared(producer) => {
                let bytes = lock(producer).offer_gathered(pieces, head)?;
                counters.sent(bytes);
                Ok(())
            }
            Self::Rdma(producer) => {
                let bytes = lock(producer).offer_gathered(pieces, head)?;
                counters.sent(bytes);
                Ok(())
            }
        }
    }
}

impl Queued {
    fn has_room(&self, bytes: usize) -> bool {
        let queued = self.bytes.load(Ordering::Relaxed);
        queued == 0 || queued + bytes <= self.bytes_max
    }

    /// Queues a frame and wakes the I/O thread.
    fn offer(&self, frame: Frame) -> Result<(), SendError> {
        let bytes = frame.bytes();
        // Relaxed: the count orders nothing, and a race of two senders may only overshoot by rejecting one of them.
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before > 0 && before + bytes > self.bytes_max {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(SendError::Full(frame));
        }
        self.frames.try_send(frame).map_err(|error| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            match error {
                TrySendError::Full(frame) => SendError::Full(frame),
                TrySendError::Closed(_) => SendError::Gone,
            }
        })
    }
}

impl Queue {
    /// Waits for frames, then takes all that are there, at most `max`. `false`: nobody can queue any more.
    pub async fn take(&mut self, into: &mut Vec<Frame>, max: usize) -> bool {
        self.frames.recv_many(into, max).await > 0
    }

    /// Gives the room of frames back that the transport has taken over.
    pub fn written(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn frame(bytes: usize) -> Frame {
        Frame { head: Bytes::new(), body: vec![Bytes::from(vec![0; bytes])] }
    }

    #[test]
    fn full_by_bytes_and_by_frames_until_written() {
        let limits = Limits { send_frames_max: 3, send_bytes_max: 100, ..Limits::default() };
        let (outbox, mut queue) = outbox(&limits);
        assert!(outbox.offer(frame(500)).is_ok(), "an empty queue takes any frame");
        assert!(matches!(outbox.offer(frame(1)), Err(SendError::Full(f)) if f.bytes() == 1));

        let mut taken = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        assert!(runtime.block_on(queue.take(&mut taken, 8)));
        assert!(matches!(outbox.offer(frame(1)), Err(SendError::Full(_))), "taken is not yet written");
        queue.written(500);
        for _ in 0..3 {
            outbox.offer(frame(10)).expect("room again");
        }
        assert!(matches!(outbox.offer(frame(10)), Err(SendError::Full(_))), "three frames are the bound");
        drop(queue);
        assert!(matches!(outbox.offer(frame(1)), Err(SendError::Gone)));
    }
}
