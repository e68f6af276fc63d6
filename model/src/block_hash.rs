//! Chained hashes of a prompt's blocks: equal hashes mean equal tokens from the start of the sequence.

use std::fmt;

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::ids::TokenId;

/// Hash of a block and of everything before it.
///
/// xxh3 is fast and not secret: who can choose tokens freely can, with effort, make two prefixes collide. Salts keep
/// tenants apart; a cache that serves tenants who distrust each other compares the tokens as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// What the first block's hash builds on. `salt` separates what must not be shared (tenants, fingerprints).
    pub fn root(salt: u64) -> Self {
        Self(u128::from(salt))
    }

    /// The hash of the block behind this one.
    #[must_use]
    pub fn extend(self, block: &[TokenId]) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&self.0.to_le_bytes());
        for token in block {
            hash.update(&token.0.to_le_bytes());
        }
        Self(hash.digest128())
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Name of a block's KV where its tokens are not at hand to be compared: SHA-256 over the salt and every token up to the
/// block's end, block by block. Nobody can choose tokens that lead to the KV of others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockDigest(pub [u8; 32]);

impl BlockDigest {
    /// What the first block's digest builds on.
    pub fn root(salt: u64) -> Self {
        Self(Sha256::new().chain_update(b"salt").chain_update(salt.to_le_bytes()).finalize().into())
    }

    /// The digest of the block behind this one.
    #[must_use]
    pub fn extend(&self, block: &[TokenId]) -> Self {
        let mut digest = Sha256::new_with_prefix(self.0);
        for token in block {
            digest.update(token.0.to_le_bytes());
        }
        Self(digest.finalize().into())
    }
}

impl fmt::Debug for BlockDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One hash for each whole block of `tokens`; the partial one at the end has none, as it is still growing.
///
/// `salt` is that of [`BlockHash::root`]. `block_tokens` of 0 gives no blocks.
pub fn block_hashes(salt: u64, tokens: &[TokenId], block_tokens: usize) -> Vec<BlockHash> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let mut hash = BlockHash::root(salt);
    let blocks = tokens.chunks_exact(block_tokens);
    blocks
        .map(|block| {
            hash = hash.extend(block);
            hash
        })
        .collect()
}

#[cfg(test)]
mod tests;
