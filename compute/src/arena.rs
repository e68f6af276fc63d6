//! Memory for weights: large pieces on huge pages, handed out front to back.
//!
//! A step walks over all of a model's weights once; on pages of 4 KiB the walk waits for address translation as much as
//! for memory. Matrices are smaller than a huge page, so they share pieces. A piece is given back to the system when the
//! last matrix in it is dropped.

use std::ops::Deref;
use std::sync::Arc;

use memmap2::MmapMut;

/// Bytes of a huge page on every CPU we know.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a piece at most, unless one matrix needs more: what a partly used last piece may cost in address space.
const PIECE: usize = 64 << 20;
/// What is handed out starts at cache lines.
const LINE: usize = 64;

/// Hands out memory for the weights of one load.
#[derive(Default)]
pub struct Arena {
    piece: Option<Arc<Piece>>,
    used: usize,
    bytes: usize,
}

/// Mapped memory that its parts own together. Every part is written before it is shared, and never again.
struct Piece {
    /// Keeps the memory; reached through `start` alone.
    _map: MmapMut,
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to the map, which is not tied to a thread; parts of it are disjoint.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(len: usize) -> std::io::Result<Self> {
        let len = len.next_multiple_of(HUGE_PAGE);
        let mut map = MmapMut::map_anon(len + HUGE_PAGE)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for weights");
        }
        let offset = map.as_ptr().align_offset(HUGE_PAGE);
        let start = map.as_mut_ptr().wrapping_add(offset);
        Ok(Self { _map: map, start, len })
    }
}

impl Arena {
    /// An arena that takes memory from the system when it is asked for some.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes handed out so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `len` bytes that `fill` writes (they are zero before) and nobody changes afterwards.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn take(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> std::io::Result<Block> {
        let padded = len.next_multiple_of(LINE);
        let piece = match &self.piece {
            Some(piece) if piece.len - self.used >= padded => Arc::clone(piece),
            _ => {
                let piece = Arc::new(Piece::new(padded.max(PIECE))?);
                self.used = 0;
                self.piece = Some(Arc::clone(&piece));
                piece
            }
        };
        // SAFETY: inside the piece by the check above.
        let start = unsafe { piece.start.add(self.used) };
        self.used += padded;
        self.bytes += padded;
        // SAFETY: mapped, zeroed and so initialised, and handed out to nobody else: `used` only grows within a piece.
        fill(unsafe { std::slice::from_raw_parts_mut(start, len) });
        Ok(Block { _piece: piece, start, len })
    }
}

/// Some bytes of an arena, at a cache line.
pub struct Block {
    _piece: Arc<Piece>,
    start: *const u8,
    len: usize,
}

// SAFETY: read-only memory that the piece keeps alive.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised in `take`, alive with the piece, never written again.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart_and_outlive_their_arena() {
        let mut arena = Arena::new();
        let sizes = [1, 64, 100, PIECE - 7, 3, PIECE + 1, 0];
        let blocks: Vec<Block> = sizes
            .into_iter()
            .zip(1u8..)
            .map(|(len, value)| arena.take(len, |bytes| bytes.fill(value)).expect("memory"))
            .collect();
        drop(arena);
        for ((block, len), value) in blocks.iter().zip(sizes).zip(1u8..) {
            assert_eq!(block.len(), len);
            assert!(block.iter().all(|&byte| byte == value));
            assert!(block.as_ptr().addr().is_multiple_of(LINE));
        }
    }
}
