//! Buffers of frames that are done with, for the frames to come.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::sync::lock;

/// Smaller buffers come cheaply from the allocator; larger ones it takes from the system each time, and a fresh
/// page costs more than writing into it.
const SPARE_BYTES: std::ops::RangeInclusive<usize> = 64 << 10..=16 << 20;
/// At 16 MiB at most, 128 MiB.
const SPARES_MAX: usize = 8;

/// Where buffers wait for their next frame, the last one on top: the one whose bytes may still be in cache. Clones share them.
#[derive(Clone)]
pub(crate) struct Spares(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spares {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Vec::with_capacity(SPARES_MAX))))
    }

    /// A buffer of at least `bytes` bytes, used before where there is one: what lies in it means nothing.
    pub fn take(&self, bytes: usize) -> Vec<u8> {
        let spare = if SPARE_BYTES.contains(&bytes) { lock(&self.0).pop() } else { None };
        let mut buffer = spare.unwrap_or_default();
        if buffer.len() < bytes {
            buffer.resize(bytes, 0);
        }
        buffer
    }

    /// A buffer's first `bytes` bytes; it comes back here with the last slice of them.
    pub fn lend(&self, buffer: Vec<u8>, bytes: usize) -> Bytes {
        Bytes::from_owner(Lent { buffer, bytes, spares: self.clone() })
    }

    fn put(&self, buffer: Vec<u8>) {
        if SPARE_BYTES.contains(&buffer.len()) {
            let mut spares = lock(&self.0);
            if spares.len() < SPARES_MAX {
                spares.push(buffer);
            }
        }
    }
}

struct Lent {
    buffer: Vec<u8>,
    bytes: usize,
    spares: Spares,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.bytes]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.spares.put(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_its_last_slice() {
        let spares = Spares::new();
        let buffer = spares.take(1 << 20);
        let place = buffer.as_ptr();
        let whole = spares.lend(buffer, 1 << 20);
        let slice = whole.slice(1000..);
        drop(whole);
        let other = spares.take(1 << 20);
        assert_ne!(other.as_ptr(), place, "a slice is still in use");
        drop(slice);
        let again = spares.take(1 << 20);
        assert_eq!((again.as_ptr(), again.len()), (place, 1 << 20));
    }
}
