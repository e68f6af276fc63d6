//! What device threads touch of a connection over RDMA: they place frames in staging memory and copy bodies out of it. The
//! writes themselves, and everything of NIXL's, belong to the connection's [`super::pump`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use crossbeam_channel::{Sender, TrySendError};

use super::staging::{Arena, Staging};
use crate::checksum::SummedCopy;
use crate::error::SendError;
use crate::frame::{Channel, Frame, FrameHeader};
use crate::limits::Limits;
use crate::places::{InOrder, Places};
use crate::shared::head_room;

/// What the pump is asked for.
pub(crate) enum Command {
    /// Write a frame that lies at `place` of the sending arena, to the same place of the peer's.
    Post { channel: Channel, number: u64, place: usize, header: FrameHeader },
    /// Look around: there is room to tell the peer of.
    Look,
    /// What the handshake and the connection's end have to say.
    Control(super::pump::Control),
}

/// A connection's memory and counters.
pub(crate) struct Link {
    pub staging: Arc<Staging>,
    pub commands: Sender<Command>,
    /// How many of our frames the peer is done with, by channel.
    pub credit: [AtomicU64; 2],
    /// How many of the peer's frames we are done with, by channel.
    pub done: [AtomicU64; 2],
}

/// The sending side of a channel.
pub(crate) struct Producer {
    link: Arc<Link>,
    channel: Channel,
    places: Places,
    frame_bytes_max: usize,
}

impl Producer {
    /// For a peer that grants `arena_bytes` and `frames_max`.
    pub fn new(
        link: Arc<Link>,
        channel: Channel,
        limits: &Limits,
        arena_bytes: u64,
        frames_max: u64,
    ) -> Self {
        let arena_bytes = link.staging.arena_bytes().min(usize::try_from(arena_bytes).unwrap_or(usize::MAX));
        let frames_max = limits.send_frames_max.min(usize::try_from(frames_max).unwrap_or(usize::MAX));
        let places = Places::new(arena_bytes, frames_max, limits.send_bytes_max);
        Self { link, channel, places, frame_bytes_max: arena_bytes }
    }

    /// Copies a frame to where it is written from.
    pub fn offer(&mut self, frame: Frame) -> Result<(), SendError> {
        if frame.bytes() > self.frame_bytes_max {
            return Err(SendError::Oversized(frame));
        }
        let Some(place) = self.place(frame.bytes()) else { return Err(SendError::Full(frame)) };
        let mut at = self.arena() + place;
        for piece in &frame.body {
            self.link.staging.write(at, piece);
            at += piece.len();
        }
        self.link.staging.write(at, &frame.head);
        self.post(place, FrameHeader::of(&frame)).map_err(|full| full.error(frame))
    }

    /// Gathers pieces into a body, takes their checksums, and sends it under the head that is made of them.
    pub fn offer_gathered(
        &mut self,
        pieces: &[&[u8]],
        head: impl FnOnce(Vec<u64>) -> Bytes,
    ) -> Result<usize, SendError> {
        let body_bytes = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let room = body_bytes + head_room(pieces.len());
        if room > self.frame_bytes_max {
            return Err(SendError::Oversized(Frame::default()));
        }
        let Some(place) = self.place(room) else { return Err(SendError::Full(Frame::default())) };
        let mut at = self.arena() + place;
        let mut checksums = Vec::with_capacity(pieces.len());
        for piece in pieces {
            checksums.push(self.link.staging.write_summed(at, piece));
            at += piece.len();
        }
        let head = head(checksums);
        if head.len() > head_room(pieces.len()) {
            return Err(SendError::Oversized(Frame { head, body: Vec::new() }));
        }
        self.link.staging.write(at, &head);
        let header = FrameHeader { head_bytes: head.len() as u32, body_bytes: body_bytes as u32 };
        self.post(place, header).map_err(|full| full.error(Frame::default()))?;
        Ok(header.payload_bytes())
    }

    fn arena(&self) -> usize {
        self.link.staging.arena(Arena::Send, self.channel)
    }

    fn place(&mut self, bytes: usize) -> Option<usize> {
        self.places.find(bytes, self.link.credit[self.channel.index()].load(Ordering::Acquire))
    }

    fn post(&mut self, place: usize, header: FrameHeader) -> Result<(), NotPosted> {
        let command = Command::Post { channel: self.channel, number: self.places.written(), place, header };
        self.link.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => NotPosted::Full,
            TrySendError::Disconnected(_) => NotPosted::Gone,
        })?;
        self.places.take(place, header.payload_bytes());
        Ok(())
    }
}

enum NotPosted {
    Full,
    Gone,
}

impl NotPosted {
    fn error(self, frame: Frame) -> SendError {
        match self {
            Self::Full => SendError::Full(frame),
            Self::Gone => SendError::Gone,
        }
    }
}

/// A body that the peer has written to our staging memory. Its room goes back to the peer with the drop.
pub(crate) struct StagedBody {
    pub link: Arc<Link>,
    pub order: Arc<InOrder>,
    pub channel: Channel,
    pub at: usize,
    pub bytes: usize,
    pub number: u64,
}

impl StagedBody {
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Copies `into.len()` bytes from `start` on. The caller has checked the bounds.
    pub fn copy(&self, start: usize, into: &mut [u8]) {
        assert!(start + into.len() <= self.bytes, "outside the body");
        self.link.staging.copy_out(self.at + start, into);
    }

    /// Copies as many bytes from `start` as `copy` still wants. The caller has checked the bounds.
    pub fn copy_summed(&self, start: usize, copy: &mut SummedCopy<'_>) {
        assert!(start + copy.left() <= self.bytes, "outside the body");
        self.link.staging.copy_summed(self.at + start, copy);
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.bytes];
        self.copy(0, &mut copy);
        copy
    }
}

impl Drop for StagedBody {
    fn drop(&mut self) {
        let done = &self.link.done[self.channel.index()];
        self.order.done(self.number, |count| done.store(count, Ordering::Release));
        // A pump with a full queue is awake and looks anyway; one that has ended has nobody to tell.
        let _ = self.link.commands.try_send(Command::Look);
    }
}
