//! Who holds which block of a KV pool, and the prefix cache: which blocks hold KV that another sequence can use.
//!
//! A sequence [reserves](BlockPool::reserve) a [`BlockTable`]: the longest prefix of its prompt that is cached, shared with
//! whoever else holds it, and blocks of its own for the rest. A block of its own that is full is
//! [committed](BlockPool::commit): from then on others find it, and nobody writes to it any more. A
//! [released](BlockPool::release) block that was committed stays cached until its memory is needed; the others are
//! free at once.
//!
//! ```text
//!            reserve              commit (full)                 release by the last holder
//!  unused ───────────► own block ───────────────► shared block ───────────────────────────► cached
//!    ▲ ▲                   │ release                  ▲              reserve finds it          │ │
//!    │ └───────────────────┘                          └────────────────────────────────────────┘ │
//!    └───────────────────────────────── evicted: leaf first, for a reserve ──────────────────────┘
//! ```
//!
//! Behind the pool may lie a [`LowerTier`]: what is evicted is offered to it, and what a prompt does not find here comes back
//! from it into blocks of the sequence's own, which are committed at once.
//!
//! Invariants, all in [`BlockPool::check_invariants`]: a block is unused, held or cached; only committed blocks have more
//! than one holder; who holds a committed block holds every block before it, so that a cached block has nothing but
//! cached blocks behind it and can be evicted when they are. Deliberately absent: bytes ([`crate::KvPool`]), clocks, threads.

mod leaves;
mod tree;

use model::{BlockDigest, BlockHash, BlockId, TokenId};

pub(crate) use self::leaves::{Leaves, Rank};
pub(crate) use self::tree::ATTENTION_PARITY_TOKENS;
use self::tree::{Found, Prefix, Tree};
use crate::lower_tier::{LowerTier, Source};

/// What a sequence wants to hold.
#[derive(Debug, Clone, Copy)]
pub struct Reservation<'a> {
    /// Whose cache: sequences of different salts share nothing.
    pub salt: u64,
    /// Tokens whose KV may be found.
    pub prompt: &'a [TokenId],
    /// Full blocks of the prompt that may be shared at most. Nobody writes to a shared block, so a sequence that
    /// computes its prompt's last token needs that token's block for itself.
    pub shared_max: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Blocks that the sequence may [grow](BlockPool::grow) to, at least `blocks`: their numbers get their memory now, so
    /// that growing allocates nothing.
    pub blocks_max: usize,
}

/// A sequence's blocks in order of position. Given back with [`BlockPool::release`].
#[derive(Debug)]
#[must_use = "blocks that are not released are lost"]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// Blocks that were found at reservation, restored ones included.
    shared: usize,
    /// Blocks that are in the tree.
    committed: usize,
    salt: u64,
    /// Of the last committed block.
    hash: BlockHash,
    /// The next block's hash is that of other tokens: no more of this sequence can be found.
    closed: bool,
}

impl BlockTable {
    /// The blocks in order of position.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many blocks at the start were found at reservation: their KV is there.
    pub fn shared(&self) -> usize {
        self.shared
    }
}

/// Reference counts of all blocks of a pool, and the tree of those that can be found.
#[derive(Debug)]
pub struct BlockPool {
    block_tokens: usize,
    /// Tables that list the block, by block.
    holders: Vec<u32>,
    /// Neither held nor cached. The last released are the first handed out: their memory is the likeliest in cache.
    unused: Vec<BlockId>,
    tree: Tree,
    evictions: u64,
    restored: Restored,
}

/// Blocks that came back from a lower tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// From memory of the host.
    pub host: u64,
    /// From the disk.
    pub disk: u64,
}

impl BlockPool {
    /// `blocks_max` unused blocks, at most `u32::MAX`, of `block_tokens` tokens each.
    pub fn new(blocks_max: usize, block_tokens: usize) -> Self {
        Self {
            block_tokens,
            holders: vec![0; blocks_max],
            unused: (0..blocks_max).rev().map(|block| BlockId(block as u32)).collect(),
            tree: Tree::new(blocks_max, block_tokens),
            evictions: 0,
            restored: Restored::default(),
        }
    }

    /// Blocks for a sequence, the longest cached prefix of its prompt first, then what `tier` has of the rest; cached blocks of
    /// others go where memory is short. `None` and no change where fewer are free.
    pub fn reserve(&mut self, reservation: Reservation<'_>, tier: &mut dyn LowerTier) -> Option<BlockTable> {
        let Reservation { salt, prompt, shared_max, blocks, blocks_max } = reservation;
        let mut table = BlockTable {
            blocks: Vec::with_capacity(blocks_max.max(blocks)),
            shared: 0,
            committed: 0,
            salt,
            hash: BlockHash::root(salt),
            closed: false,
        };
        let mut from_cache = 0;
        for tokens in prompt.chunks_exact(self.block_tokens).take(shared_max.min(blocks)) {
            let hash = table.hash.extend(tokens);
            let prefix = Prefix { parent: table.blocks.last().copied(), salt, hash, tokens };
            let Found::Block(block) = self.tree.find(prefix) else { break };
            from_cache += usize::from(self.holders[block.0 as usize] == 0);
            table.blocks.push(block);
            table.hash = hash;
        }
        let own = blocks - table.blocks.len();
        if own > self.free_blocks() - from_cache {
            return None;
        }
        for &block in &table.blocks {
            self.hold(block);
        }
        table.shared = table.blocks.len();
        table.committed = table.shared;
        let missing = self.held_below(&table, prompt, shared_max.min(blocks), tier);
        table.blocks.extend((0..own).map_while(|_| self.take(tier)));
        self.restore(&mut table, prompt, missing, tier);
        Some(table)
    }

    /// Full blocks of `prompt` behind those of `table`, up to `shared_max` in all, that `tier` has.
    fn held_below(
        &self,
        table: &BlockTable,
        prompt: &[TokenId],
        shared_max: usize,
        tier: &mut dyn LowerTier,
    ) -> usize {
        let mut rest = prompt.chunks_exact(self.block_tokens).take(shared_max).skip(table.shared);
        let Some(first) = rest.next() else { return 0 };
        let parent = table.blocks.last().copied();
        let mut digest =
            self.tree.digest(Prefix { parent, salt: table.salt, hash: table.hash, tokens: first });
        let mut held = 0;
        while tier.holds(&digest) {
            held += 1;
            let Some(tokens) = rest.next() else { break };
            digest = digest.extend(tokens);
        }
        held
    }

    /// Brings up to `missing` blocks back behind those that were found, as far as they can be had one after another.
    fn restore(
        &mut self,
        table: &mut BlockTable,
        prompt: &[TokenId],
        missing: usize,
        tier: &mut dyn LowerTier,
    ) {
        for tokens in prompt.chunks_exact(self.block_tokens).skip(table.shared).take(missing) {
            let at = table.shared;
            let hash = table.hash.extend(tokens);
            let parent = at.checked_sub(1).map(|before| table.blocks[before]);
            let prefix = Prefix { parent, salt: table.salt, hash, tokens };
            if self.tree.find(prefix) != Found::Nothing {
                return;
            }
            match tier.restore(&self.tree.digest(prefix), table.blocks[at]) {
                Some(Source::Host) => self.restored.host += 1,
                Some(Source::Disk) => self.restored.disk += 1,
                None => return,
            }
            self.tree.insert(table.blocks[at], prefix);
            table.hash = hash;
            table.shared += 1;
            table.committed += 1;
        }
    }

    /// The blocks of `prompt` behind those that are cached, each with what names it: what a lower tier may be asked for
    /// before the sequence is let in. At most `shared_max` blocks from the start are looked at.
    pub fn missing(&self, salt: u64, prompt: &[TokenId], shared_max: usize) -> Vec<BlockDigest> {
        let (mut parent, mut hash) = (None, BlockHash::root(salt));
        let mut digest = None::<BlockDigest>;
        let mut missing = Vec::new();
        for tokens in prompt.chunks_exact(self.block_tokens).take(shared_max) {
            if let Some(before) = &digest {
                let next = before.extend(tokens);
                missing.push(next);
                digest = Some(next);
                continue;
            }
            hash = hash.extend(tokens);
            let prefix = Prefix { parent, salt, hash, tokens };
            if let Found::Block(block) = self.tree.find(prefix) {
                parent = Some(block);
            } else {
                let first = self.tree.digest(prefix);
                missing.push(first);
                digest = Some(first);
            }
        }
        missing
    }

    /// Offers every block that nobody holds to `tier`, those at the end of their sequences first: for a pool that ends.
    pub fn keep_cached(&self, tier: &mut dyn LowerTier) {
        for (block, evicted) in self.tree.idle_blocks() {
            tier.keep(block, &evicted);
        }
    }

    /// Adds blocks of the sequence's own until it has `blocks` of them; cached blocks of others go where memory is short.
    /// `false` and no change where fewer are free.
    pub fn grow(&mut self, table: &mut BlockTable, blocks: usize, tier: &mut dyn LowerTier) -> bool {
        let more = blocks.saturating_sub(table.blocks.len());
        if more > self.free_blocks() {
            return false;
        }
        table.blocks.extend((0..more).map_while(|_| self.take(tier)));
        true
    }

    /// Makes the full blocks of `tokens` findable: the sequence's tokens from its start whose KV is computed. Blocks that
    /// are findable already cost nothing.
    ///
    /// What is read from such a block must follow from the tokens up to its end. An MTP module's rows do, because each lies
    /// in the slot of the token that it was made with.
    ///
    /// Where another sequence has committed the same tokens first, its block takes the place of the sequence's own, which
    /// is free from here on: both hold the same bits.
    pub fn commit(&mut self, table: &mut BlockTable, tokens: &[TokenId]) {
        let full = tokens.chunks_exact(self.block_tokens).enumerate().skip(table.committed);
        for (at, tokens) in full {
            if table.closed || at >= table.blocks.len() {
                return;
            }
            let hash = table.hash.extend(tokens);
            let parent = at.checked_sub(1).map(|before| table.blocks[before]);
            let prefix = Prefix { parent, salt: table.salt, hash, tokens };
            match self.tree.find(prefix) {
                Found::Nothing => self.tree.insert(table.blocks[at], prefix),
                Found::Block(block) => {
                    self.hold(block);
                    let own = std::mem::replace(&mut table.blocks[at], block);
                    self.let_go(own);
                }
                Found::Collision => {
                    table.closed = true;
                    return;
                }
            }
            table.committed = at + 1;
            table.hash = hash;
        }
    }

    /// Gives a sequence's blocks back. Those that are committed stay cached.
    pub fn release(&mut self, table: BlockTable) {
        for &block in table.blocks.iter().rev() {
            self.let_go(block);
        }
    }

    /// How many blocks [`Self::reserve`] could hand out now: unused and cached ones.
    pub fn free_blocks(&self) -> usize {
        self.unused.len() + self.tree.idle()
    }

    /// Tables that list `block`.
    pub fn holders(&self, block: BlockId) -> u32 {
        self.holders[block.0 as usize]
    }

    /// How many blocks at the table's start other tables hold too. Behind them it is the only holder: who holds a block
    /// that more than one table lists holds every block before it.
    pub fn in_common(&self, table: &BlockTable) -> usize {
        table.blocks.partition_point(|&block| self.holders(block) > 1)
    }

    /// Blocks that nobody holds and that can still be found.
    pub fn cached_blocks(&self) -> usize {
        self.tree.idle()
    }

    /// Blocks in the pool.
    pub fn blocks_max(&self) -> usize {
        self.holders.len()
    }

    /// Cached blocks that had to go since the start.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Blocks that came back since the start.
    pub fn restored(&self) -> Restored {
        self.restored
    }

    fn hold(&mut self, block: BlockId) {
        let holders = &mut self.holders[block.0 as usize];
        *holders += 1;
        if *holders == 1 {
            self.tree.wake(block);
        }
    }

    fn let_go(&mut self, block: BlockId) {
        let holders = &mut self.holders[block.0 as usize];
        assert!(*holders > 0, "block {block} released while nobody holds it");
        *holders -= 1;
        if *holders == 0 && !self.tree.rest(block) {
            self.unused.push(block);
        }
    }

    /// A block for one sequence alone.
    fn take(&mut self, tier: &mut dyn LowerTier) -> Option<BlockId> {
        let block = self.unused.pop().or_else(|| {
            let (block, evicted) = self.tree.evict()?;
            tier.keep(block, &evicted);
            self.evictions += 1;
            Some(block)
        })?;
        self.holders[block.0 as usize] = 1;
        Some(block)
    }

    /// Checks the books against the tables that are out. For tests and simulation; costs a walk over everything.
    ///
    /// # Panics
    /// Where they do not balance.
    pub fn check_invariants<'a>(&self, tables: impl IntoIterator<Item = &'a BlockTable>) {
        let mut holders = vec![0; self.holders.len()];
        for table in tables {
            assert!(table.shared <= table.committed && table.committed <= table.blocks.len());
            for (at, block) in table.blocks.iter().enumerate() {
                holders[block.0 as usize] += 1;
                assert_eq!(self.tree.contains(*block), at < table.committed, "block {block} at {at}");
            }
            let committed = &table.blocks[..table.committed];
            for (at, &block) in committed.iter().enumerate() {
                let before = at.checked_sub(1).map(|at| committed[at]);
                assert_eq!(self.tree.parent(block), before, "a table follows the tree");
            }
        }
        assert_eq!(holders, self.holders, "holders of each block");
        let mut unused = vec![false; self.holders.len()];
        for block in &self.unused {
            let twice = std::mem::replace(&mut unused[block.0 as usize], true);
            assert!(!twice, "block {block} is unused twice");
        }
        for (at, &holders) in holders.iter().enumerate() {
            let cached = self.tree.contains(BlockId(at as u32));
            assert_eq!(unused[at], holders == 0 && !cached, "block {at}: {holders} holders, cached {cached}");
            assert!(holders <= 1 || cached, "block {at} is shared and cannot be found");
        }
        self.tree.check_invariants(&self.holders);
    }
}

#[cfg(test)]
mod tests;
