//! Blocks in host memory: which are here, and which of them goes first.
//!
//! The order is the pool's own: those without a child here go first, since nothing behind a block can be used without it,
//! and among these the one that is worth the least by GreedyDual's measure (`block_pool/tree.rs`). A block that went back into the
//! pool is worth nothing until it is evicted again: there are two of it.
//!
//! Memory is taken as it is first needed, and used again from then on: once the tier is full, keeping a block allocates
//! nothing, unless the disk still reads what had to go.

use std::collections::HashMap;
use std::sync::Arc;

use model::BlockDigest;

use super::stored::StoredBlock;
use crate::block_pool::{ATTENTION_PARITY_TOKENS, Leaves, Rank};
use crate::lower_tier::{Evicted, Source};

/// The blocks.
pub(super) struct HostTier {
    block_bytes: usize,
    slots: Vec<Option<Slot>>,
    empty: Vec<u32>,
    /// Memory that no slot uses.
    spare: Vec<Arc<StoredBlock>>,
    by_digest: HashMap<BlockDigest, u32>,
    /// Blocks here by the block before them, be that one here or not.
    children: HashMap<BlockDigest, u32>,
    /// Those without children.
    leaves: Leaves,
    /// Worth of the last block that had to go.
    inflation: u64,
    uses: u64,
    evictions: u64,
}

struct Slot {
    digest: BlockDigest,
    block: Arc<StoredBlock>,
    rank: Rank,
    source: Source,
}

impl HostTier {
    pub(super) fn new(blocks_max: usize, block_bytes: usize) -> Self {
        let blocks_max = blocks_max.min(u32::MAX as usize - 1);
        Self {
            block_bytes,
            slots: (0..blocks_max).map(|_| None).collect(),
            empty: (0..blocks_max as u32).rev().collect(),
            spare: Vec::with_capacity(blocks_max),
            // Twice as many: a table that fills the places of what was removed would have to grow.
            by_digest: HashMap::with_capacity(2 * blocks_max),
            children: HashMap::with_capacity(2 * blocks_max),
            leaves: Leaves::new(blocks_max),
            inflation: 0,
            uses: 0,
            evictions: 0,
        }
    }

    pub(super) fn blocks_max(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn len(&self) -> usize {
        self.by_digest.len()
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Whether the block is here; it counts as used now.
    pub(super) fn touch(&mut self, digest: &BlockDigest) -> bool {
        let Some(&slot) = self.by_digest.get(digest) else { return false };
        self.uses += 1;
        let (inflation, uses) = (self.inflation, self.uses);
        if let Some(here) = &mut self.slots[slot as usize] {
            here.rank = (inflation + ATTENTION_PARITY_TOKENS + here.block.depth_tokens, uses);
            self.rank_changed(slot);
        }
        true
    }

    pub(super) fn get(&self, digest: &BlockDigest) -> Option<(&StoredBlock, Source)> {
        let slot = self.slots[*self.by_digest.get(digest)? as usize].as_ref()?;
        Some((&slot.block, slot.source))
    }

    /// The pool has the block again.
    pub(super) fn restored(&mut self, digest: &BlockDigest) {
        let Some(&slot) = self.by_digest.get(digest) else { return };
        self.uses += 1;
        let uses = self.uses;
        if let Some(here) = &mut self.slots[slot as usize] {
            here.rank = (0, uses);
            here.source = Source::Host;
            self.rank_changed(slot);
        }
    }

    /// Takes in a block that is not here; `read` writes its bytes. Another goes where there is no room: there must be some.
    pub(super) fn store(&mut self, evicted: &Evicted, read: impl FnOnce(&mut [u8])) -> Arc<StoredBlock> {
        self.make_room();
        let mut block = self.spare.pop().unwrap_or_else(|| Arc::new(StoredBlock::zeroed(self.block_bytes)));
        match Arc::get_mut(&mut block) {
            Some(block) => block.fill(evicted, read),
            None => {
                // The disk is still writing what was in it.
                let mut fresh = StoredBlock::zeroed(self.block_bytes);
                fresh.fill(evicted, read);
                block = Arc::new(fresh);
            }
        }
        self.put(evicted.digest, Arc::clone(&block), Source::Host);
        block
    }

    /// Takes in a block from elsewhere, unless it is here or of another size.
    pub(super) fn insert(&mut self, digest: BlockDigest, block: Arc<StoredBlock>, source: Source) {
        if block.bytes().len() != self.block_bytes || self.touch(&digest) {
            return;
        }
        self.make_room();
        // Its memory takes the place of one of ours.
        self.spare.pop();
        self.put(digest, block, source);
    }

    pub(super) fn remove(&mut self, digest: &BlockDigest) {
        if let Some(&slot) = self.by_digest.get(digest) {
            self.take_out(slot);
        }
    }

    /// Everything that is here, the dearest first.
    pub(super) fn drain(&mut self) -> Vec<(BlockDigest, Arc<StoredBlock>)> {
        let mut slots: Vec<_> = self.slots.iter_mut().filter_map(Option::take).collect();
        *self = Self::new(0, self.block_bytes);
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.rank));
        slots.into_iter().map(|slot| (slot.digest, slot.block)).collect()
    }

    fn make_room(&mut self) {
        if self.empty.is_empty()
            && let Some(((worth, _), slot)) = self.leaves.pop_first()
        {
            self.inflation = self.inflation.max(worth);
            self.evictions += 1;
            self.take_out(slot);
        }
    }

    fn put(&mut self, digest: BlockDigest, block: Arc<StoredBlock>, source: Source) {
        let Some(slot) = self.empty.pop() else { return };
        self.uses += 1;
        let rank = (self.inflation + ATTENTION_PARITY_TOKENS + block.depth_tokens, self.uses);
        let parent = block.parent;
        *self.children.entry(parent).or_insert(0) += 1;
        if let Some(&parent) = self.by_digest.get(&parent) {
            self.leaves.remove(parent);
        }
        self.slots[slot as usize] = Some(Slot { digest, block, rank, source });
        self.by_digest.insert(digest, slot);
        self.rank_changed(slot);
    }

    fn take_out(&mut self, slot: u32) {
        self.leaves.remove(slot);
        let Some(gone) = self.slots[slot as usize].take() else { return };
        self.by_digest.remove(&gone.digest);
        self.empty.push(slot);
        let parent = gone.block.parent;
        self.spare.push(gone.block);
        if let Some(children) = self.children.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&parent);
                if let Some(&parent) = self.by_digest.get(&parent) {
                    self.rank_changed(parent);
                }
            }
        }
    }

    /// Puts a block where it now stands among those that may go.
    fn rank_changed(&mut self, slot: u32) {
        let Some(here) = &self.slots[slot as usize] else { return };
        if !self.children.contains_key(&here.digest) {
            self.leaves.insert(slot, here.rank);
        }
    }

    /// Flips a bit of a block that is here.
    #[cfg(test)]
    pub(super) fn damage(&mut self, digest: &BlockDigest) {
        let slot = self.by_digest[digest] as usize;
        let block = &mut self.slots[slot].as_mut().expect("it is here").block;
        Arc::make_mut(block).flip();
    }

    /// # Panics
    /// Where the books do not balance.
    #[cfg(test)]
    pub(super) fn check_invariants(&self) {
        let here: Vec<_> = self.slots.iter().flatten().collect();
        assert_eq!(here.len(), self.by_digest.len());
        assert_eq!(here.len() + self.empty.len(), self.slots.len());
        assert!(here.len() + self.spare.len() <= self.slots.len(), "memory is bounded");
        let mut children = HashMap::new();
        for slot in &here {
            *children.entry(slot.block.parent).or_insert(0u32) += 1;
        }
        assert_eq!(children, self.children);
        for (at, slot) in self.slots.iter().enumerate() {
            let Some(slot) = slot else {
                assert_eq!(self.leaves.rank(at as u32), None);
                continue;
            };
            assert_eq!(self.by_digest.get(&slot.digest), Some(&(at as u32)));
            let leaf = !children.contains_key(&slot.digest);
            assert_eq!(self.leaves.rank(at as u32), leaf.then_some(slot.rank), "slot {at}");
        }
    }
}

#[cfg(test)]
mod tests;
