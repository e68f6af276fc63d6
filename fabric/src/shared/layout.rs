//! Where things lie in the memory that one side of a connection writes.
//!
//! A header page of words; per channel a table of entries, one for each frame under way; per channel an arena for their bytes.
//! The words of a channel lie on cache lines of their own: one that this side writes for what it sends, one for what
//! it has taken in of the other side's frames, and one that says that its consumer sleeps.

use std::io;

use crate::frame::Channel;
use crate::limits::Limits;
use crate::places::FRAME_ALIGN;

/// Begins the memory: `TRSM` and the version of this layout.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"TRSM\x01\0\0\0");
const PAGE_BYTES: usize = 4096;
const LINE_BYTES: usize = 64;
/// An entry is the frame's offset in the arena, then its lengths: head above, body below.
const ENTRY_BYTES: usize = 16;

/// Sizes that a side chooses for what it writes, and says in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Frames under way in a channel.
    pub entries: usize,
    /// Bytes for them.
    pub arena_bytes: usize,
}

impl Layout {
    /// Room for the largest frame and for what may be under way.
    pub fn of(limits: &Limits) -> Self {
        let entries = limits.send_frames_max;
        let bytes = limits.frame_bytes_max().max(limits.send_bytes_max) + 2 * FRAME_ALIGN;
        Self { entries, arena_bytes: bytes.next_multiple_of(PAGE_BYTES) }
    }

    /// What a peer says it has, if its memory is as long as that.
    pub fn read(entries: u64, arena_bytes: u64, bytes: usize) -> io::Result<Self> {
        let layout = usize::try_from(entries)
            .ok()
            .zip(usize::try_from(arena_bytes).ok())
            .map(|(entries, arena_bytes)| Self { entries, arena_bytes });
        match layout {
            Some(layout) if layout.entries > 0 && layout.checked_bytes() == Some(bytes) => Ok(layout),
            _ => Err(io::Error::other("the shared memory's header does not match its size")),
        }
    }

    /// Bytes in all.
    pub fn bytes(self) -> usize {
        self.checked_bytes().unwrap_or(usize::MAX)
    }

    fn checked_bytes(self) -> Option<usize> {
        let tables = self.table_bytes()?.checked_mul(Channel::ALL.len())?;
        self.arena_bytes.checked_mul(Channel::ALL.len())?.checked_add(tables)?.checked_add(PAGE_BYTES)
    }

    fn table_bytes(self) -> Option<usize> {
        self.entries.checked_mul(ENTRY_BYTES)?.checked_next_multiple_of(PAGE_BYTES)
    }

    /// Where [`MAGIC`], `entries` and `arena_bytes` are.
    pub const HEADER: [usize; 3] = [0, 8, 16];

    /// How many frames this side has sent.
    pub fn produced(channel: Channel) -> usize {
        (1 + 3 * channel.index()) * 2 * LINE_BYTES
    }

    /// How many of the other side's frames this side is done with.
    pub fn consumed(channel: Channel) -> usize {
        Self::produced(channel) + 2 * LINE_BYTES
    }

    /// Not 0: this side's consumer sleeps, and wants to be woken.
    pub fn sleeping(channel: Channel) -> usize {
        Self::produced(channel) + 4 * LINE_BYTES
    }

    /// The entry of the `frame`-th frame.
    pub fn entry(self, channel: Channel, frame: u64) -> usize {
        let table = PAGE_BYTES + channel.index() * self.table_bytes().unwrap_or(0);
        table + (frame % self.entries as u64) as usize * ENTRY_BYTES
    }

    /// Where the arena starts.
    pub fn arena(self, channel: Channel) -> usize {
        PAGE_BYTES + 2 * self.table_bytes().unwrap_or(0) + channel.index() * self.arena_bytes
    }
}
