//! Whose turn it is in an arena that its reader empties in order: places for frames, and the order in which they come back.
//!
//! Shared by the transports whose frames lie in memory that both ends know: [`crate::shared`] and [`crate::rdma`].

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::sync::lock;

/// Frames start on cache lines.
pub(crate) const FRAME_ALIGN: usize = 64;

/// What is walked through before its beginning is used again, where the reader keeps up: well within a last-level cache. An
/// arena is as large as the largest frame, which is rare.
const WARM_BYTES: usize = 8 << 20;

/// The writer's side: which parts of an arena hold frames that the reader is not done with.
pub(crate) struct Places {
    arena_bytes: usize,
    frames_max: usize,
    bytes_max: usize,
    /// Place and length of the frames under way, oldest first.
    under_way: VecDeque<(usize, usize)>,
    under_way_bytes: usize,
    write_at: usize,
    written: u64,
}

impl Places {
    pub fn new(arena_bytes: usize, frames_max: usize, bytes_max: usize) -> Self {
        Self {
            arena_bytes,
            frames_max,
            bytes_max,
            under_way: VecDeque::new(),
            under_way_bytes: 0,
            write_at: 0,
            written: 0,
        }
    }

    /// Frames written so far: the number of the next one.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Frames and bytes that the reader is not known to be done with.
    #[cfg(test)]
    pub fn under_way(&self) -> (usize, usize) {
        (self.under_way.len(), self.under_way_bytes)
    }

    /// A place of `bytes` bytes, if there is one now. The reader says that it is done with the first `done` frames.
    pub fn find(&mut self, bytes: usize, done: u64) -> Option<usize> {
        let bytes = bytes.max(1).next_multiple_of(FRAME_ALIGN);
        let first = self.written - self.under_way.len() as u64;
        // A reader that claims to be done with what was never sent is given no more room for it.
        for _ in first..done.min(self.written) {
            if let Some((_, bytes)) = self.under_way.pop_front() {
                self.under_way_bytes -= bytes;
            }
        }
        let Some(&(oldest, _)) = self.under_way.front() else {
            // Empty: start over, where the cache is warm.
            self.write_at = 0;
            return (bytes <= self.arena_bytes).then_some(0);
        };
        if self.under_way.len() >= self.frames_max || self.under_way_bytes + bytes > self.bytes_max {
            return None;
        }
        if self.write_at > oldest {
            // Rather where the cache is warm than to the arena's end.
            if self.write_at >= WARM_BYTES && bytes <= oldest {
                return Some(0);
            }
            if self.arena_bytes - self.write_at >= bytes {
                return Some(self.write_at);
            }
            return (bytes <= oldest).then_some(0);
        }
        (oldest - self.write_at >= bytes).then_some(self.write_at)
    }

    /// Takes a place that [`Self::find`] has found, or its beginning.
    pub fn take(&mut self, place: usize, bytes: usize) {
        let bytes = bytes.max(1).next_multiple_of(FRAME_ALIGN);
        self.under_way.push_back((place, bytes));
        self.under_way_bytes += bytes;
        self.write_at = place + bytes;
        self.written += 1;
    }
}

/// The reader's side: frames that are done with in any order, counted in order.
#[derive(Default)]
pub(crate) struct InOrder(Mutex<State>);

#[derive(Default)]
struct State {
    /// All before this one are done.
    first: u64,
    /// Whether it and those behind it are.
    behind: VecDeque<bool>,
}

impl InOrder {
    /// `frame` is done with. `tell` is given how many are, all before them included, one call at a time.
    pub fn done(&self, frame: u64, tell: impl FnOnce(u64)) {
        let mut state = lock(&self.0);
        let index = (frame - state.first) as usize;
        if state.behind.len() <= index {
            state.behind.resize(index + 1, false);
        }
        state.behind[index] = true;
        while state.behind.front() == Some(&true) {
            state.behind.pop_front();
            state.first += 1;
        }
        tell(state.first);
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn places_never_overlap_and_all_room_comes_back() {
        for seed in 0..50 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut places, order) = (Places::new(4096, 8, 3072), InOrder::default());
            let (mut live, mut done) = (VecDeque::<(u64, usize, usize)>::new(), 0);
            for _ in 0..2_000 {
                if rng.random_bool(0.6) {
                    let bytes = rng.random_range(0..1500);
                    if let Some(place) = places.find(bytes, done) {
                        let end = place + bytes;
                        assert!(end <= 4096, "seed {seed}");
                        for &(_, from, to) in &live {
                            assert!(
                                end <= from || to <= place,
                                "seed {seed}: {place}..{end} in {from}..{to}"
                            );
                        }
                        live.push_back((places.written(), place, end));
                        places.take(place, bytes);
                    }
                } else if !live.is_empty() {
                    let (frame, ..) = live.remove(rng.random_range(0..live.len())).expect("in range");
                    order.done(frame, |count| done = count);
                }
            }
            for (frame, ..) in live {
                order.done(frame, |count| done = count);
            }
            assert_eq!(done, places.written(), "seed {seed}");
            assert_eq!(places.find(3000, done), Some(0), "seed {seed}");
        }
    }
}
