//! Where blocks go that a pool has no room for, and where they come back from.
//!
//! A [`crate::BlockPool`] calls this as it hands out memory: at these moments the block's bytes are still what they were,
//! or nobody's yet. So nothing has to be remembered for later, and no block is ever written while it waits to be saved.

use model::{BlockDigest, BlockId};

/// A block that a pool gives up: what must be known to find it again, and what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Names its KV.
    pub digest: BlockDigest,
    /// Names the block before it: without that one it cannot be used. A first block's is its salt's root.
    pub parent: BlockDigest,
    /// Tokens before it.
    pub depth_tokens: u64,
}

/// Where a restored block was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Memory of the host.
    Host,
    /// The disk; it came through memory of the host.
    Disk,
}

/// What lies behind a pool. `()` is nothing.
pub trait LowerTier {
    /// Whether the block can be restored at once. It is worth more from here on, so that what a pool evicts to make room for
    /// it does not push it out.
    fn holds(&mut self, digest: &BlockDigest) -> bool;

    /// `block` is about to be used for something else. May be refused.
    fn keep(&mut self, block: BlockId, evicted: &Evicted);

    /// Writes a block's KV into `block`. `None`: it is not here, or not whole; nobody reads what `block` holds then.
    fn restore(&mut self, digest: &BlockDigest, block: BlockId) -> Option<Source>;
}

impl LowerTier for () {
    fn holds(&mut self, _: &BlockDigest) -> bool {
        false
    }

    fn keep(&mut self, _: BlockId, _: &Evicted) {}

    fn restore(&mut self, _: &BlockDigest, _: BlockId) -> Option<Source> {
        None
    }
}
