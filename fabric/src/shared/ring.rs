//! Frames through shared memory: a queue in each direction and channel, from one process into the other.
//!
//! The producer copies a frame into its own arena and publishes an entry; the consumer reads it in place, copies out of
//! it what it needs, and gives the room back by raising its own count of frames done, which the producer reads. Each
//! side writes its own memory alone. Whatever a side reads of the other's is checked before it is used: a peer that
//! writes nonsense loses its connection, and can do no more.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use bytes::Bytes;

use super::layout::Layout;
use super::memory::{Ours, Theirs};
use crate::checksum::SummedCopy;
use crate::error::SendError;
use crate::frame::{Channel, Frame, FrameHeader, ProtocolError};
use crate::limits::Limits;
use crate::places::{InOrder, Places};

/// Room for the head of a gathered frame, which is known only when its body is in place.
pub(crate) fn head_room(pieces: usize) -> usize {
    512 + 32 * pieces
}

/// The sending side of a channel.
pub(crate) struct Producer {
    ours: Arc<Ours>,
    theirs: Arc<Theirs>,
    layout: Layout,
    channel: Channel,
    /// Wakes the peer's consumer.
    bell: OwnedFd,
    places: Places,
}

impl Producer {
    pub fn new(
        ours: Arc<Ours>,
        theirs: Arc<Theirs>,
        channel: Channel,
        bell: OwnedFd,
        limits: &Limits,
    ) -> Self {
        let layout = Layout::of(limits);
        let places = Places::new(layout.arena_bytes, layout.entries, limits.send_bytes_max);
        Self { ours, theirs, layout, channel, bell, places }
    }

    /// Copies a frame over and wakes the peer if it sleeps.
    pub fn offer(&mut self, frame: Frame) -> Result<(), SendError> {
        let bytes = frame.bytes();
        let Some(place) = self.place(bytes) else { return Err(SendError::Full(frame)) };
        let mut at = self.layout.arena(self.channel) + place;
        for piece in &frame.body {
            self.ours.write(at, piece);
            at += piece.len();
        }
        self.ours.write(at, &frame.head);
        self.publish(place, FrameHeader::of(&frame));
        Ok(())
    }

    /// Gathers pieces into a body, takes their checksums, and sends it under the head that is made of them.
    pub fn offer_gathered(
        &mut self,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<usize, SendError> {
        let body_bytes = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let room = body_bytes + head_room(pieces.len());
        let Some(place) = self.place(room) else { return Err(SendError::Full(Frame::default())) };
        let mut at = self.layout.arena(self.channel) + place;
        let mut checksums = Vec::with_capacity(pieces.len());
        for piece in pieces {
            checksums.push(self.ours.write_summed(at, piece));
            at += piece.len();
        }
        let head = head(checksums);
        if head.len() > head_room(pieces.len()) {
            return Err(SendError::Oversized(Frame { head, body: Vec::new() }));
        }
        self.ours.write(at, &head);
        let header = FrameHeader { head_bytes: head.len() as u32, body_bytes: body_bytes as u32 };
        self.publish(place, header);
        Ok(header.payload_bytes())
    }

    /// A place of `bytes` bytes in the arena, if there is one now. The oldest places come back as the peer is done.
    fn place(&mut self, bytes: usize) -> Option<usize> {
        self.places.find(bytes, self.theirs.acquire(Layout::consumed(self.channel)))
    }

    fn publish(&mut self, place: usize, header: FrameHeader) {
        let entry = self.layout.entry(self.channel, self.places.written());
        self.ours.publish(entry, place as u64);
        self.ours.publish(entry + 8, u64::from(header.head_bytes) << 32 | u64::from(header.body_bytes));
        self.places.take(place, header.payload_bytes());
        self.ours.publish(Layout::produced(self.channel), self.places.written());
        // Either this sees that the peer sleeps, or the peer, looking once more before it does, sees the frame.
        fence(Ordering::SeqCst);
        if self.theirs.flag(Layout::sleeping(self.channel)) != 0 {
            super::ring_bell(&self.bell);
        }
    }
}

/// The receiving side of a channel.
pub(crate) struct Consumer {
    ours: Arc<Ours>,
    theirs: Arc<Theirs>,
    layout: Layout,
    channel: Channel,
    limits: Limits,
    next: u64,
    done: Arc<Done>,
}

impl Consumer {
    pub fn new(
        ours: Arc<Ours>,
        theirs: Arc<Theirs>,
        layout: Layout,
        channel: Channel,
        limits: &Limits,
    ) -> Self {
        let done = Done { ours: Arc::clone(&ours), channel, order: InOrder::default() };
        Self { ours, theirs, layout, channel, limits: limits.clone(), next: 0, done: Arc::new(done) }
    }

    /// Whether a frame is there.
    pub fn is_ready(&self) -> bool {
        self.theirs.load(Layout::produced(self.channel)) != self.next
    }

    /// The lengths of the frame that [`Self::take`] would take.
    pub fn peek(&self) -> Result<Option<FrameHeader>, ProtocolError> {
        let produced = self.theirs.acquire(Layout::produced(self.channel));
        if produced == self.next {
            return Ok(None);
        }
        let entry = self.layout.entry(self.channel, self.next);
        let lengths = self.theirs.load(entry + 8);
        let header = FrameHeader { head_bytes: (lengths >> 32) as u32, body_bytes: lengths as u32 };
        header.check(&self.limits)?;
        Ok(Some(header))
    }

    /// The next frame: its head, and its body where the peer has put it.
    pub fn take(&mut self) -> Result<Option<(Bytes, SharedBody)>, ProtocolError> {
        let Some(header) = self.peek()? else { return Ok(None) };
        let place = self.theirs.load(self.layout.entry(self.channel, self.next));
        let end = usize::try_from(place).ok().and_then(|place| place.checked_add(header.payload_bytes()));
        if end.is_none_or(|end| end > self.layout.arena_bytes) {
            return Err(ProtocolError::SharedPlace { place, bytes: header.payload_bytes() });
        }
        let at = self.layout.arena(self.channel) + place as usize;
        let (head_bytes, bytes) = (header.head_bytes as usize, header.body_bytes as usize);
        let mut head = vec![0; head_bytes];
        self.theirs.copy_out(at + bytes, &mut head);
        let body = SharedBody {
            theirs: Arc::clone(&self.theirs),
            at,
            bytes,
            frame: self.next,
            done: self.done.clone(),
        };
        self.next += 1;
        Ok(Some((head.into(), body)))
    }

    /// Says whether the consumer sleeps. After `true`, a frame that [`Self::is_ready`] does not see rings the bell.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.ours.set_flag(Layout::sleeping(self.channel), u32::from(sleeping));
        if sleeping {
            fence(Ordering::SeqCst);
        }
    }
}

/// Frames that are done with, in any order, told to the producer in order.
struct Done {
    ours: Arc<Ours>,
    channel: Channel,
    order: InOrder,
}

/// A body in the peer's memory. Its room goes back to the peer with the drop.
pub(crate) struct SharedBody {
    theirs: Arc<Theirs>,
    at: usize,
    bytes: usize,
    frame: u64,
    done: Arc<Done>,
}

impl SharedBody {
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Copies `into.len()` bytes from `start` on. The caller has checked the bounds.
    pub fn copy(&self, start: usize, into: &mut [u8]) {
        assert!(start + into.len() <= self.bytes, "outside the body");
        self.theirs.copy_streaming(self.at + start, into);
    }

    /// Copies as many bytes from `start` as `copy` still wants. The caller has checked the bounds.
    pub fn copy_summed(&self, start: usize, copy: &mut SummedCopy<'_>) {
        assert!(start + copy.left() <= self.bytes, "outside the body");
        self.theirs.copy_summed(self.at + start, copy);
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.bytes];
        self.theirs.copy_out(self.at, &mut copy);
        copy
    }
}

impl Drop for SharedBody {
    fn drop(&mut self) {
        let Done { ours, channel, order } = &*self.done;
        order.done(self.frame, |count| ours.publish(Layout::consumed(*channel), count));
    }
}

#[cfg(test)]
mod tests;
