//! The block-hash tree: which block holds the KV of which tokens, and which of them goes first.
//!
//! A node is a block that can be found, under the block before it in its sequence. The hash leads to a node; what counts is
//! that salt, parent and tokens are equal, so a collision of hashes costs a hit and never gives a sequence somebody
//! else's KV.
//!
//! Nodes are evicted leaf first, the one with the lowest priority first. Priorities are GreedyDual's (Young, 1994): what it
//! would cost to compute the block again, on top of the priority of the last block evicted; so among equally old
//! blocks the cheaper goes, and the dearest goes as well once it is old enough. Equal ones go by last use.

use std::collections::HashMap;

use model::{BlockDigest, BlockHash, BlockId, TokenId};

use super::leaves::Leaves;
use crate::lower_tier::Evicted;

/// The context at which attention costs a token as much as everything else. In V3 everything else takes 2 × 37 G
/// operations, absorbed attention 2 × 61 layers × 128 heads × (576 + 512) for each token of context: 4,356.
pub(crate) const ATTENTION_PARITY_TOKENS: u64 = 4096;

/// Where a block is looked for, and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prefix<'a> {
    /// The block before it.
    pub(super) parent: Option<BlockId>,
    pub(super) salt: u64,
    pub(super) hash: BlockHash,
    /// Its tokens.
    pub(super) tokens: &'a [TokenId],
}

/// What a hash leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    Block(BlockId),
    /// A block of other tokens.
    Collision,
}

/// Blocks that can be found. Holders are counted by its owner, who says when the first comes and the last goes.
#[derive(Debug)]
pub(super) struct Tree {
    block_tokens: usize,
    /// By block; `None` for blocks that are not in the tree.
    nodes: Vec<Option<Node>>,
    /// Tokens of each block, `block_tokens` a block.
    tokens: Vec<TokenId>,
    by_hash: HashMap<BlockHash, BlockId>,
    /// Idle nodes without children: by priority, then by last use.
    leaves: Leaves,
    /// Nodes that nobody holds.
    idle: usize,
    /// Priority of the last node evicted.
    inflation: u64,
    /// Counts moments at which a block was let go.
    uses: u64,
}

#[derive(Debug, Clone)]
struct Node {
    parent: Option<BlockId>,
    salt: u64,
    hash: BlockHash,
    digest: BlockDigest,
    children: u32,
    /// Tokens before this block.
    depth_tokens: u64,
    /// `None` while somebody holds it.
    idle: Option<Idle>,
}

#[derive(Debug, Clone, Copy)]
struct Idle {
    priority: u64,
    last_use: u64,
}

impl Tree {
    pub(super) fn new(blocks_max: usize, block_tokens: usize) -> Self {
        Self {
            block_tokens,
            nodes: vec![None; blocks_max],
            tokens: vec![TokenId(0); blocks_max * block_tokens],
            // A block is committed during a step: nothing may have to grow then.
            by_hash: HashMap::with_capacity(blocks_max),
            leaves: Leaves::new(blocks_max),
            idle: 0,
            inflation: 0,
            uses: 0,
        }
    }

    pub(super) fn find(&self, prefix: Prefix<'_>) -> Found {
        let Some(&block) = self.by_hash.get(&prefix.hash) else { return Found::Nothing };
        let same = self.node(block).is_some_and(|node| {
            node.parent == prefix.parent
                && node.salt == prefix.salt
                && self.tokens[self.range(block)] == *prefix.tokens
        });
        if same { Found::Block(block) } else { Found::Collision }
    }

    /// Takes in a block that somebody holds, under a parent that the same sequence holds. Nothing was found there.
    pub(super) fn insert(&mut self, block: BlockId, prefix: Prefix<'_>) {
        let Prefix { parent, salt, hash, tokens } = prefix;
        let digest = self.digest(prefix);
        let mut depth_tokens = 0;
        if let Some(parent) = parent.and_then(|parent| self.node_mut(parent)) {
            parent.children += 1;
            depth_tokens = parent.depth_tokens + tokens.len() as u64;
        }
        let range = self.range(block);
        self.tokens[range].copy_from_slice(tokens);
        self.by_hash.insert(hash, block);
        self.nodes[block.0 as usize] =
            Some(Node { parent, salt, hash, digest, children: 0, depth_tokens, idle: None });
    }

    /// What names the KV of the block of `prefix`, whose parent is in the tree.
    pub(super) fn digest(&self, prefix: Prefix<'_>) -> BlockDigest {
        let parent = prefix.parent.and_then(|parent| self.node(parent));
        parent.map_or_else(|| BlockDigest::root(prefix.salt), |node| node.digest).extend(prefix.tokens)
    }

    /// Somebody holds the block again.
    pub(super) fn wake(&mut self, block: BlockId) {
        let Some(node) = self.node_mut(block) else { return };
        if node.idle.take().is_some() {
            self.idle -= 1;
            self.leaves.remove(block.0);
        }
    }

    /// Nobody holds the block any more. `false` when it is not in the tree.
    pub(super) fn rest(&mut self, block: BlockId) -> bool {
        self.uses += 1;
        let (inflation, last_use) = (self.inflation, self.uses);
        let Some(node) = self.node_mut(block) else { return false };
        let priority = inflation + ATTENTION_PARITY_TOKENS + node.depth_tokens;
        node.idle = Some(Idle { priority, last_use });
        if node.children == 0 {
            self.leaves.insert(block.0, (priority, last_use));
        }
        self.idle += 1;
        true
    }

    /// Removes the leaf that is worth the least.
    pub(super) fn evict(&mut self) -> Option<(BlockId, Evicted)> {
        let ((priority, _), block) = self.leaves.pop_first()?;
        let block = BlockId(block);
        self.inflation = self.inflation.max(priority);
        self.idle -= 1;
        let node = self.nodes[block.0 as usize].take()?;
        self.by_hash.remove(&node.hash);
        let Node { parent, salt, digest, depth_tokens, .. } = node;
        let evicted = |parent| (block, Evicted { digest, parent, depth_tokens });
        let Some(parent_block) = parent else { return Some(evicted(BlockDigest::root(salt))) };
        // Leaves go first, so that it is still here.
        let parent = self.node_mut(parent_block)?;
        parent.children -= 1;
        let evicted = evicted(parent.digest);
        if let (0, Some(Idle { priority, last_use })) = (parent.children, parent.idle) {
            self.leaves.insert(parent_block.0, (priority, last_use));
        }
        Some(evicted)
    }

    /// Idle blocks, children before their parents.
    pub(super) fn idle_blocks(&self) -> Vec<(BlockId, Evicted)> {
        let nodes = self.nodes.iter().enumerate();
        let idle = nodes.filter_map(|(at, node)| Some((BlockId(at as u32), node.as_ref()?)));
        let idle = idle.filter(|(_, node)| node.idle.is_some()).map(|(block, node)| {
            let parent = node.parent.and_then(|parent| self.node(parent));
            let parent = parent.map_or_else(|| BlockDigest::root(node.salt), |parent| parent.digest);
            let Node { digest, depth_tokens, .. } = *node;
            (block, Evicted { digest, parent, depth_tokens })
        });
        let mut idle: Vec<_> = idle.collect();
        idle.sort_by_key(|(_, evicted)| std::cmp::Reverse(evicted.depth_tokens));
        idle
    }

    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.node(block).is_some()
    }

    pub(super) fn parent(&self, block: BlockId) -> Option<BlockId> {
        self.node(block)?.parent
    }

    /// Nodes that nobody holds.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    fn node(&self, block: BlockId) -> Option<&Node> {
        self.nodes[block.0 as usize].as_ref()
    }

    fn node_mut(&mut self, block: BlockId) -> Option<&mut Node> {
        self.nodes[block.0 as usize].as_mut()
    }

    fn range(&self, block: BlockId) -> std::ops::Range<usize> {
        let start = block.0 as usize * self.block_tokens;
        start..start + self.block_tokens
    }

    /// # Panics
    /// Where nodes, index, leaves and `holders` do not agree.
    pub(super) fn check_invariants(&self, holders: &[u32]) {
        let mut children = vec![0; self.nodes.len()];
        let (mut nodes, mut idle, mut leaves) = (0, 0, 0);
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let block = BlockId(at as u32);
            nodes += 1;
            assert_eq!(self.by_hash.get(&node.hash), Some(&block), "the hash of block {block}");
            assert_eq!(node.idle.is_none(), holders[at] > 0, "block {block} is idle while nobody holds it");
            let before = node.parent.map_or(BlockHash::root(node.salt), |parent| {
                children[parent.0 as usize] += 1;
                let parent = self.node(parent).expect("a node's parent is in the tree");
                assert!(parent.idle.is_none() || node.idle.is_some(), "block {block} outlives its parent");
                assert_eq!(parent.salt, node.salt);
                parent.hash
            });
            assert_eq!(
                before.extend(&self.tokens[self.range(block)]),
                node.hash,
                "block {block} is its tokens'"
            );
            if let Some(Idle { priority, last_use }) = node.idle {
                idle += 1;
                let rank = self.leaves.rank(block.0);
                let leaf = rank == Some((priority, last_use));
                assert!(leaf || rank.is_none(), "block {block} has its own rank");
                assert_eq!(leaf, node.children == 0, "idle leaves can be evicted");
                leaves += usize::from(leaf);
            }
        }
        assert_eq!((self.by_hash.len(), self.idle, self.leaves.len()), (nodes, idle, leaves));
        for (node, children) in self.nodes.iter().zip(children) {
            assert_eq!(node.as_ref().map_or(0, |node| node.children), children, "children are counted");
        }
    }
}
