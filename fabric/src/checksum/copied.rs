//! A copy and its checksum in one pass: what is hashed are the registers that were stored, so nothing that happens to the source
//! meanwhile can come between them, and the copy need not be read again.

use std::marker::PhantomData;

use super::checksum;
#[cfg(target_arch = "x86_64")]
use super::x86;

/// How a copy is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Through the cache: it is read again soon.
    Cached,
    /// Past the cache: it goes to memory that nobody has read for long, and that would be read first only to be overwritten.
    Streaming,
}

/// A copy without a checksum, past the cache where the machine can.
///
/// # Safety
/// `from` can be read for as many bytes as `into` has, none of them of `into`.
pub(crate) unsafe fn copy_streaming(from: *const u8, into: &mut [u8]) {
    // SAFETY: as the caller promises.
    #[cfg(target_arch = "x86_64")]
    let done = unsafe { x86::stream(from, into) };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    // SAFETY: both sides have so many bytes left.
    unsafe {
        let (rest, left) = (into.as_mut_ptr().add(done), into.len() - done);
        std::ptr::copy_nonoverlapping(from.add(done), rest, left);
    }
}

/// A destination that is filled from its beginning.
pub(crate) struct SummedCopy<'a> {
    into: *mut u8,
    bytes: usize,
    at: usize,
    #[cfg(target_arch = "x86_64")]
    hash: Option<x86::Hash>,
    stores: Stores,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> SummedCopy<'a> {
    pub fn new(into: &'a mut [u8], stores: Stores) -> Self {
        // SAFETY: borrowed for as long as this lives.
        unsafe { Self::raw(into.as_mut_ptr(), into.len(), stores) }
    }

    /// A destination that is no slice.
    ///
    /// # Safety
    /// `into` is `bytes` bytes, initialised, which nobody else writes and nobody may take for a slice until this is gone.
    pub unsafe fn raw(into: *mut u8, bytes: usize, stores: Stores) -> Self {
        Self {
            into,
            bytes,
            at: 0,
            #[cfg(target_arch = "x86_64")]
            hash: x86::Hash::of(bytes),
            stores,
            borrowed: PhantomData,
        }
    }

    /// What is still to be copied, bytes.
    pub fn left(&self) -> usize {
        self.bytes - self.at
    }

    /// Copies private bytes.
    pub fn append(&mut self, from: &[u8]) {
        // SAFETY: `from` is that long, and the destination, borrowed by us alone, does not overlap it.
        unsafe { self.append_raw(from.as_ptr(), from.len()) }
    }

    /// Copies bytes that others may write meanwhile.
    ///
    /// # Panics
    /// More than the destination has room for.
    ///
    /// # Safety
    /// `from` can be read for `bytes` bytes, none of them of the destination.
    pub unsafe fn append_raw(&mut self, mut from: *const u8, mut bytes: usize) {
        assert!(bytes <= self.left(), "more than fits");
        #[cfg(target_arch = "x86_64")]
        if let Some(hash) = &mut self.hash {
            let begun = self.at % x86::STRIPE_BYTES;
            if begun > 0 {
                let now = bytes.min(x86::STRIPE_BYTES - begun);
                // SAFETY: both sides have so many bytes left, as just checked.
                unsafe { std::ptr::copy_nonoverlapping(from, self.into.add(self.at), now) };
                (self.at, bytes) = (self.at + now, bytes - now);
                // SAFETY: within the source, or one past its end.
                from = unsafe { from.add(now) };
                if self.at.is_multiple_of(x86::STRIPE_BYTES) {
                    // SAFETY: the stripe before `at` has just been completed in the destination.
                    unsafe { hash.hash_behind(self.into, self.at, self.bytes) };
                }
            }
            // SAFETY: both sides have so many bytes left.
            let now = unsafe { hash.copy(from, self.into, self.at, self.bytes, bytes, self.stores) };
            (self.at, bytes) = (self.at + now, bytes - now);
            // SAFETY: within the source, or one past its end.
            from = unsafe { from.add(now) };
        }
        // SAFETY: both sides have so many bytes left.
        unsafe { std::ptr::copy_nonoverlapping(from, self.into.add(self.at), bytes) };
        self.at += bytes;
    }

    /// The checksum of the copy.
    ///
    /// # Panics
    /// The destination is not full.
    pub fn finish(self) -> u64 {
        assert_eq!(self.at, self.bytes, "not all of it was copied");
        #[cfg(target_arch = "x86_64")]
        if let Some(hash) = self.hash {
            // SAFETY: the whole destination has been written.
            return unsafe { hash.finish(self.into, self.bytes) };
        }
        // SAFETY: borrowed by us alone until now, and initialised before.
        checksum(unsafe { std::slice::from_raw_parts(self.into, self.bytes) })
    }
}
