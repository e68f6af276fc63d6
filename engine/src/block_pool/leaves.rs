//! Which of many slots goes first: an ordered set of slots that allocates nothing once it is made.
//!
//! A binary heap that knows where each slot stands in it, so that any of them can be taken out.

/// What a slot is worth, then when it was last used: the lowest goes first.
pub(crate) type Rank = (u64, u64);

/// Slots `0..slots_max`, each at most once.
#[derive(Debug)]
pub(crate) struct Leaves {
    heap: Vec<(Rank, u32)>,
    /// By slot: its place in `heap`, [`ABSENT`] where it is not.
    places: Vec<u32>,
}

const ABSENT: u32 = u32::MAX;

impl Leaves {
    pub(crate) fn new(slots_max: usize) -> Self {
        Self { heap: Vec::with_capacity(slots_max), places: vec![ABSENT; slots_max] }
    }

    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }

    /// Of a slot that is here.
    pub(crate) fn rank(&self, slot: u32) -> Option<Rank> {
        let place = self.places[slot as usize];
        (place != ABSENT).then(|| self.heap[place as usize].0)
    }

    /// Adds a slot, or gives it another rank.
    pub(crate) fn insert(&mut self, slot: u32, rank: Rank) {
        self.remove(slot);
        self.heap.push((rank, slot));
        self.places[slot as usize] = (self.heap.len() - 1) as u32;
        self.rise(self.heap.len() - 1);
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        let place = std::mem::replace(&mut self.places[slot as usize], ABSENT);
        if place == ABSENT {
            return;
        }
        let place = place as usize;
        self.heap.swap_remove(place);
        if place < self.heap.len() {
            self.places[self.heap[place].1 as usize] = place as u32;
            self.sink(place);
            self.rise(place);
        }
    }

    /// Takes out the slot of the lowest rank.
    pub(crate) fn pop_first(&mut self) -> Option<(Rank, u32)> {
        let &first = self.heap.first()?;
        self.remove(first.1);
        Some(first)
    }

    fn rise(&mut self, mut at: usize) {
        while at > 0 && self.heap[at] < self.heap[(at - 1) / 2] {
            self.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }

    fn sink(&mut self, mut at: usize) {
        while let Some(child) =
            (2 * at + 1..(2 * at + 3).min(self.heap.len())).min_by_key(|&at| self.heap[at])
            && self.heap[child] < self.heap[at]
        {
            self.swap(at, child);
            at = child;
        }
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.places[self.heap[one].1 as usize] = one as u32;
        self.places[self.heap[other].1 as usize] = other as u32;
    }
}

#[cfg(test)]
mod tests;
