//! Whether every sequence can still reach the end of its life: Dijkstra's banker, for one kind of resource.
//!
//! A sequence takes blocks as it grows and may need, at worst, those of its prompt and `max_tokens`; what it still may ask
//! for is *owed*. A state is **safe** when there is an order in which every sequence can be given what it is owed, from
//! the blocks that are free and those that the ones before it gave back at their end.
//!
//! - *Which order.* With one kind of resource the order of ascending debt succeeds whenever any does: free blocks only grow
//!   as sequences end, and when the smallest debt cannot be paid, none can. So the test is a sort and a walk.
//! - *Shared blocks* are counted once: a block comes back when the last of its holders in that order ends.
//! - *Somebody always moves.* In a safe state the smallest debt can be paid in full from what is free, and the state behind
//!   each of its blocks is safe again. So the sequence with the smallest debt is never refused a block, and when it
//!   ends, however early, what it gives back makes the next one's debt payable.
//! - *Safety is lost by nothing but a grant.* An end before the worst case gives blocks back sooner; two sequences that turn
//!   out to hold the same tokens free one block now for one that comes back later. Grants are what is tested.
//!
//! A sequence whose hand-off is on the way or whose reader is behind may stand first in the order: it is waited for, and
//! lease and reader limit bound how long. Deliberately absent: who should be granted what is safe.

use std::collections::BTreeMap;

use engine::BlockPool;

use super::sequence::{Sequence, SequenceId};

/// The test, with memory of its own, so that it allocates nothing.
#[derive(Debug)]
pub(super) struct Banker {
    /// Debt and name of every sequence that holds blocks.
    order: Vec<(usize, SequenceId)>,
    /// Holders met so far, by block; all zero between two tests.
    met: Vec<u32>,
}

impl Banker {
    /// For a pool of `kv_blocks` and at most `sequences_max` that hold some of it.
    pub(super) fn new(kv_blocks: usize, sequences_max: usize) -> Self {
        Self { order: Vec::with_capacity(sequences_max), met: vec![0; kv_blocks] }
    }

    /// Whether the state is safe after `granted` more blocks to a sequence. O(n log n) in the sequences that hold
    /// blocks, and linear in the blocks that several of them list.
    pub(super) fn safe(
        &mut self,
        pool: &BlockPool,
        sequences: &BTreeMap<SequenceId, Sequence>,
        granted: Option<(SequenceId, usize)>,
    ) -> bool {
        let grant_to = |id| granted.filter(|&(to, _)| to == id).map_or(0, |(_, blocks)| blocks);
        let Some(mut free) = pool.free_blocks().checked_sub(granted.map_or(0, |(_, blocks)| blocks)) else {
            return false;
        };
        self.order.clear();
        let holders = sequences.iter().filter(|(_, sequence)| sequence.table.is_some());
        self.order
            .extend(holders.map(|(&id, sequence)| (sequence.owed_blocks().saturating_sub(grant_to(id)), id)));
        self.order.sort_unstable();
        let mut walked = 0;
        let mut safe = true;
        for &(owed, id) in &self.order {
            if owed > free {
                safe = false;
                break;
            }
            walked += 1;
            let Some(table) = sequences[&id].table.as_ref() else { continue };
            let common = pool.in_common(table);
            free += table.blocks().len() - common + grant_to(id);
            for &block in &table.blocks()[..common] {
                let met = &mut self.met[block.0 as usize];
                *met += 1;
                free += usize::from(*met == pool.holders(block));
            }
        }
        for (_, id) in &self.order[..walked] {
            let Some(table) = sequences[id].table.as_ref() else { continue };
            for &block in &table.blocks()[..pool.in_common(table)] {
                self.met[block.0 as usize] = 0;
            }
        }
        safe
    }
}
