//! Memory that two processes see: written by its owner, mapped read-only by the peer.
//!
//! All access goes through two kinds of operation: single words as atomics, and copies into or out of private memory.
//! No reference to shared bytes is ever made, so what the other process does to them can change values, never break a
//! rule of the language. The memfd is sealed before it is passed: it cannot shrink under a reader, and nobody else can map it
//! for writing.

#![expect(unsafe_code, reason = "mapped memory; every block argues its bounds")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::checksum::{Stores, SummedCopy, copy_streaming};

/// A mapping of `bytes` bytes from page-aligned `start`.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory that lives until the drop; all access is by atomics or by copies, see the module.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, bytes: usize, protection: ProtFlags) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no memory of ours.
        let start =
            unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0) }?.cast::<u8>();
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at null"))?;
        Ok(Self { start, bytes })
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// They are not within the mapping: callers have checked what a peer says.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let within = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(within, "{offset}+{bytes} is outside {} shared bytes", self.bytes);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// A word, read relaxed: the one kind of atomic access that read-only memory allows.
    fn load(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: within the mapping, aligned (the mapping starts on a page), and only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }.load(Ordering::Relaxed)
    }

    fn load_flag(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }.load(Ordering::Relaxed)
    }

    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both sides hold `into.len()` bytes, and private memory does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    fn copy_streaming(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: within the mapping, as just checked, which no private memory overlaps.
        unsafe { copy_streaming(from, into) }
    }

    /// Copies as many bytes from `offset` as `copy` still wants.
    fn copy_summed(&self, offset: usize, copy: &mut SummedCopy<'_>) {
        let bytes = copy.left();
        let from = self.at(offset, bytes);
        // SAFETY: within the mapping, as just checked, which no private memory overlaps.
        unsafe { copy.append_raw(from, bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody can use it after the drop.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// Memory of ours that a peer may read.
pub(crate) struct Ours {
    memory: Mapping,
    file: OwnedFd,
}

impl Ours {
    /// Zeroed memory. Takes up room only where it is written.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("trireme-fabric", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, bytes as u64)?;
        let memory = Mapping::new(file.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        // After our own mapping: from here on nobody can make another one that writes.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(Self { memory, file })
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes a word. What was written before is seen by whoever sees the word.
    pub fn publish(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8));
        // SAFETY: within the mapping, aligned, writable, and only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.memory.at(offset, 8).cast()) }.store(value, Ordering::Release);
    }

    pub fn set_flag(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4));
        // SAFETY: as in `publish`.
        unsafe { AtomicU32::from_ptr(self.memory.at(offset, 4).cast()) }.store(value, Ordering::Relaxed);
    }

    /// Copies private bytes to `offset`, for a peer that does not look there yet.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.memory.at(offset, from.len());
        // SAFETY: both sides hold `from.len()` bytes, and private memory does not overlap the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// The same, with the checksum of what was copied.
    pub fn write_summed(&self, offset: usize, from: &[u8]) -> u64 {
        let to = self.memory.at(offset, from.len());
        // SAFETY: within the mapping, which was zeroed, which the peer can only read, and which nobody ever takes for a slice.
        let mut copy = unsafe { SummedCopy::raw(to, from.len(), Stores::Cached) };
        copy.append(from);
        copy.finish()
    }
}

/// Memory of a peer, which it may write at any time.
pub(crate) struct Theirs {
    memory: Mapping,
}

impl Theirs {
    /// Maps a peer's memory once it cannot shrink any more: a shrunk file would kill its readers.
    pub fn map(file: &OwnedFd, bytes_max: usize) -> io::Result<Self> {
        let bytes = usize::try_from(fstat(file)?.st_size).unwrap_or(usize::MAX);
        if bytes == 0 || bytes > bytes_max {
            return Err(io::Error::other(format!("{bytes} shared bytes, at most {bytes_max} expected")));
        }
        if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK | SealFlags::SEAL) {
            return Err(io::Error::other("the shared memory is not sealed"));
        }
        Ok(Self { memory: Mapping::new(file.as_fd(), bytes, ProtFlags::READ)? })
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// A word that orders nothing.
    pub fn load(&self, offset: usize) -> u64 {
        self.memory.load(offset)
    }

    /// A word, and with it everything that was written before it was published.
    pub fn acquire(&self, offset: usize) -> u64 {
        let value = self.memory.load(offset);
        fence(Ordering::Acquire);
        value
    }

    pub fn flag(&self, offset: usize) -> u32 {
        self.memory.load_flag(offset)
    }

    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.memory.copy_out(offset, into);
    }
    /// Copies past the cache, to where nobody reads it soon.
    pub fn copy_streaming(&self, offset: usize, into: &mut [u8]) {
        self.memory.copy_streaming(offset, into);
    }

    pub fn copy_summed(&self, offset: usize, copy: &mut SummedCopy<'_>) {
        self.memory.copy_summed(offset, copy);
    }
}
