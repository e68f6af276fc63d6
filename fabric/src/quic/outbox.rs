//! A peer's send queue on one channel: bounded in frames and in bytes, filled by any thread, drained by the I/O thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::error::SendError;
use crate::frame::Frame;
use crate::limits::Limits;

/// The side that fills it.
pub(crate) struct Outbox {
    frames: mpsc::Sender<Frame>,
    queued_bytes: Arc<AtomicUsize>,
    bytes_max: usize,
}

/// The side that drains it.
pub(crate) struct Queue {
    frames: mpsc::Receiver<Frame>,
    queued_bytes: Arc<AtomicUsize>,
}

pub(crate) fn outbox(limits: &Limits) -> (Outbox, Queue) {
    let (sender, receiver) = mpsc::channel(limits.send_frames_max);
    let queued_bytes = Arc::new(AtomicUsize::new(0));
    let queue = Queue { frames: receiver, queued_bytes: Arc::clone(&queued_bytes) };
    (Outbox { frames: sender, queued_bytes, bytes_max: limits.send_bytes_max }, queue)
}

impl Outbox {
    /// Queues a frame and wakes the I/O thread.
    pub fn offer(&self, frame: Frame) -> Result<(), SendError> {
        let bytes = frame.bytes();
        // Relaxed: the count orders nothing, and a race of two senders may only overshoot by rejecting one of them.
        let before = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before > 0 && before + bytes > self.bytes_max {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(SendError::Full(frame));
        }
        self.frames.try_send(frame).map_err(|error| {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
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
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
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
