//! What each worker is thought to hold of the prompts that it was given: which blocks of KV a sequence would find there.
//!
//! Nobody tells: the router notes what it sent where, as the workers' own prefix caches do, block by block under a chained
//! hash, and forgets as they do, the longest unused first, once a worker would hold more than its pool and what lies behind it. A guess that is
//! wrong costs a transfer or a computation, never an answer: workers look at what they really have.
//!
//! Entries are of a worker's incarnation; a process that starts anew holds nothing. Deliberately absent: load, clocks.

use std::collections::{BTreeMap, HashMap};

use model::{BlockHash, TokenId, block_hashes};

use crate::worker::WorkerKey;

/// Blocks of one worker that are remembered at most, whatever its pool: some 50 MB each.
const BLOCKS_MAX: usize = 1 << 19;

/// Blocks by worker.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    workers: HashMap<WorkerKey, Held>,
}

/// Blocks of one worker.
#[derive(Debug)]
struct Held {
    blocks_max: usize,
    /// When each was last used.
    blocks: HashMap<BlockHash, u64>,
    by_use: BTreeMap<u64, BlockHash>,
    uses: u64,
}

/// The full blocks at a prompt's start, by the number of tokens in a block: workers may differ in it.
#[derive(Debug)]
pub(crate) struct Prefixes<'a> {
    salt: u64,
    tokens: &'a [TokenId],
    hashes: BTreeMap<usize, Vec<BlockHash>>,
}

impl<'a> Prefixes<'a> {
    /// Of `tokens`, among sequences of one cache salt.
    pub fn new(salt: u64, tokens: &'a [TokenId]) -> Self {
        Self { salt, tokens, hashes: BTreeMap::new() }
    }

    /// Hashes them for workers with so many tokens in a block, so that it need not be done under a lock.
    pub fn prepare(&mut self, block_tokens: usize) {
        self.hashes(block_tokens);
    }

    fn hashes(&mut self, block_tokens: usize) -> &[BlockHash] {
        let (salt, tokens) = (self.salt, self.tokens);
        self.hashes.entry(block_tokens).or_insert_with(|| block_hashes(salt, tokens, block_tokens))
    }
}

impl PrefixIndex {
    /// Tokens at the prompt's start whose KV `worker` is thought to hold.
    pub fn matched_tokens(&self, worker: &WorkerKey, prompt: &mut Prefixes<'_>, block_tokens: usize) -> u64 {
        let Some(held) = self.workers.get(worker) else { return 0 };
        let hashes = prompt.hashes(block_tokens);
        let matched = hashes.iter().take_while(|hash| held.blocks.contains_key(hash)).count();
        (matched * block_tokens) as u64
    }

    /// `worker`, which has room for `blocks_max` blocks in its pool and behind it, holds these tokens from now on.
    pub fn note(
        &mut self,
        worker: &WorkerKey,
        tokens: &mut Prefixes<'_>,
        block_tokens: usize,
        blocks_max: usize,
    ) {
        let blocks_max = blocks_max.min(BLOCKS_MAX);
        let held = self.workers.entry(worker.clone()).or_insert_with(|| Held {
            blocks_max,
            blocks: HashMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
        });
        // The last one first: of one prompt's blocks, those at its end are forgotten before those that others share.
        for &hash in tokens.hashes(block_tokens).iter().take(blocks_max).rev() {
            held.touch(hash);
        }
    }

    /// Forgets every worker that `live` does not say yes to.
    pub fn retain(&mut self, mut live: impl FnMut(&WorkerKey) -> bool) {
        self.workers.retain(|worker, _| live(worker));
    }
}

impl Held {
    fn touch(&mut self, hash: BlockHash) {
        self.uses += 1;
        if let Some(before) = self.blocks.insert(hash, self.uses) {
            self.by_use.remove(&before);
        }
        self.by_use.insert(self.uses, hash);
        if self.blocks.len() > self.blocks_max
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.blocks.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn key(id: &str, incarnation: u64) -> WorkerKey {
        WorkerKey { id: Arc::from(id), incarnation }
    }

    fn tokens(range: std::ops::Range<u32>) -> Vec<TokenId> {
        range.map(TokenId).collect()
    }

    #[test]
    fn the_next_turn_finds_the_last_ones_blocks_where_they_went() {
        let mut index = PrefixIndex::default();
        let first = tokens(0..150);
        index.note(&key("d0", 1), &mut Prefixes::new(0, &first), 64, 100);
        let check = |worker, salt, prompt: &[TokenId], expect| {
            let mut prompt = Prefixes::new(salt, prompt);
            assert_eq!(index.matched_tokens(&worker, &mut prompt, 64), expect);
        };
        check(key("d0", 1), 0, &tokens(0..400), 128);
        check(key("d0", 1), 0, &tokens(0..100), 64);
        check(key("d0", 1), 0, &tokens(1..400), 0);
        check(key("d0", 1), 7, &tokens(0..400), 0);
        check(key("d1", 1), 0, &tokens(0..400), 0);
        check(key("d0", 2), 0, &tokens(0..400), 0);
    }

    #[test]
    fn a_worker_is_not_thought_to_hold_more_than_its_pool() {
        let mut index = PrefixIndex::default();
        let worker = key("d0", 1);
        let prompts: Vec<_> = (0..10).map(|at| tokens(1000 * at..1000 * at + 4)).collect();
        for prompt in &prompts {
            index.note(&worker, &mut Prefixes::new(0, prompt), 2, 6);
            // The first is asked for again and again.
            index.note(&worker, &mut Prefixes::new(0, &prompts[0]), 2, 6);
        }
        let matched = |prompt| index.matched_tokens(&worker, &mut Prefixes::new(0, prompt), 2);
        assert_eq!(
            prompts.iter().map(|prompt| matched(prompt)).collect::<Vec<_>>(),
            [4, 0, 0, 0, 0, 0, 0, 0, 4, 4]
        );
        let held = &index.workers[&worker];
        assert_eq!((held.blocks.len(), held.by_use.len()), (6, 6));
        // More than fits: its beginning is what stays.
        let long = tokens(50_000..50_100);
        index.note(&worker, &mut Prefixes::new(0, &long), 2, 6);
        assert_eq!(index.matched_tokens(&worker, &mut Prefixes::new(0, &long), 2), 12);
    }

    #[test]
    fn who_left_is_forgotten() {
        let mut index = PrefixIndex::default();
        let prompt = tokens(0..64);
        index.note(&key("d0", 1), &mut Prefixes::new(0, &prompt), 64, 10);
        index.note(&key("d1", 1), &mut Prefixes::new(0, &prompt), 64, 10);
        index.retain(|worker| &*worker.id == "d1");
        assert_eq!(index.workers.len(), 1);
    }
}
