//! The memory that a connection's peer writes into, and what it is sent from: one mapping with an arena for each
//! direction and channel.
//!
//! A peer writes without being asked, so its end as a target must be final. The agent that registered it is gone by then:
//! no key is valid, no socket is read for it. What is left is a write by the kernel on behalf of a peer on this host that
//! was stopped in the middle of one (UCX's CMA). So the addresses are never used again: the pages are given back, and
//! the range stays reserved, without access, for as long as the process lives. That costs address space alone.

#![expect(unsafe_code, reason = "mapped memory; every block argues its bounds")]

use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use crate::checksum::{Stores, SummedCopy};
use crate::frame::Channel;
use crate::limits::Limits;
use crate::shared::Layout;

/// Mapped memory. All access is by copies: no reference to bytes that a peer may write is ever made.
pub(crate) struct Staging {
    start: NonNull<u8>,
    arena_bytes: usize,
}

/// Which arena of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arena {
    /// Written by the peer.
    Receive,
    /// What the peer is written from.
    Send,
}

// SAFETY: plain memory that lives until the drop; all access is by copies.
unsafe impl Send for Staging {}
// SAFETY: as above.
unsafe impl Sync for Staging {}

impl Staging {
    /// Zeroed memory for `limits`. Takes up room only where it is written, unless a device pins it.
    pub fn new(limits: &Limits) -> io::Result<Self> {
        let arena_bytes = Layout::of(limits).arena_bytes;
        let bytes = 2 * Channel::ALL.len() * arena_bytes;
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no memory of ours.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at null"))?;
        // Fewer pages to look up for a write by the kernel, and to register. Without huge pages it is only slower.
        // SAFETY: our own mapping; the advice changes no byte of it.
        let advised = unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for staging memory");
        }
        Ok(Self { start, arena_bytes })
    }

    /// Bytes of each arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    pub fn bytes(&self) -> usize {
        2 * Channel::ALL.len() * self.arena_bytes
    }

    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// The address of `bytes` bytes at `offset`.
    pub fn address_of(&self, offset: usize, bytes: usize) -> usize {
        self.at(offset, bytes) as usize
    }

    /// Where an arena begins.
    pub fn arena(&self, arena: Arena, channel: Channel) -> usize {
        let index = Channel::ALL.len() * usize::from(arena == Arena::Send) + channel.index();
        index * self.arena_bytes
    }

    /// Copies private bytes to `offset`.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: both sides hold `from.len()` bytes, and private memory does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// The same, with the checksum of what was copied.
    pub fn write_summed(&self, offset: usize, from: &[u8]) -> u64 {
        let to = self.at(offset, from.len());
        // SAFETY: within the mapping, which was zeroed and is never taken for a slice; senders have places of their own in it.
        let mut copy = unsafe { SummedCopy::raw(to, from.len(), Stores::Cached) };
        copy.append(from);
        copy.finish()
    }

    /// Copies as many bytes from `offset` as `copy` still wants.
    pub fn copy_summed(&self, offset: usize, copy: &mut SummedCopy<'_>) {
        let bytes = copy.left();
        let from = self.at(offset, bytes);
        // SAFETY: within the mapping, as just checked, which no private memory overlaps.
        unsafe { copy.append_raw(from, bytes) }
    }

    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both sides hold `into.len()` bytes, and private memory does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes()), "outside the mapping");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: replaces our own mapping, which nobody can use after the drop, by one without access at the same place.
        let sealed = unsafe {
            mmap_anonymous(
                self.start.as_ptr().cast(),
                self.bytes(),
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        // Where it fails the mapping stays as it is: memory is lost, nothing else.
        debug_assert!(sealed.is_ok(), "{sealed:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_do_not_overlap_and_their_addresses_are_never_used_again() {
        let limits =
            Limits { body_bytes_max: 4096, send_bytes_max: 4096, head_bytes_max: 4096, ..Limits::default() };
        let staging = Staging::new(&limits).expect("memory");
        let mut starts: Vec<usize> = [Arena::Receive, Arena::Send]
            .into_iter()
            .flat_map(|arena| Channel::ALL.map(|channel| staging.arena(arena, channel)))
            .collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == staging.arena_bytes()));
        let range = staging.address()..staging.address() + staging.bytes();
        drop(staging);
        for _ in 0..64 {
            let next = Staging::new(&limits).expect("memory");
            assert!(!range.contains(&next.address()), "a sealed range came back");
        }
        // A write by the kernel on somebody else's behalf fails there as this read by it does.
        let maps = std::fs::read_to_string("/proc/self/maps").expect("on Linux");
        let sealed = maps.lines().find_map(|line| {
            let (addresses, rest) = line.split_once(' ')?;
            let (from, to) = addresses.split_once('-')?;
            let from = usize::from_str_radix(from, 16).ok()?;
            let to = usize::from_str_radix(to, 16).ok()?;
            (from <= range.start && range.end <= to).then_some(rest)
        });
        assert!(sealed.is_some_and(|rest| rest.starts_with("---p")), "{sealed:?}");
    }
}
