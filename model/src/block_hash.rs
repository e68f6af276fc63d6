//! Chained hashes of a prompt's blocks: equal hashes mean equal tokens from the start of the sequence.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::ids::TokenId;

/// Hash of a block and of everything before it.
///
/// xxh3 is fast and not secret: who can choose tokens freely can, with effort, make two prefixes collide. Salts keep
/// tenants apart; a cache that serves tenants who distrust each other compares the tokens as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockHash(pub u128);

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// One hash for each whole block of `tokens`; the partial one at the end has none, as it is still growing.
///
/// `salt` separates what must not be shared (tenants, fingerprints). `block_tokens` of 0 gives no blocks.
pub fn block_hashes(salt: u64, tokens: &[TokenId], block_tokens: usize) -> Vec<BlockHash> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let mut previous = u128::from(salt);
    let blocks = tokens.chunks_exact(block_tokens);
    blocks
        .map(|block| {
            let mut hash = Xxh3::new();
            hash.update(&previous.to_le_bytes());
            for token in block {
                hash.update(&token.0.to_le_bytes());
            }
            previous = hash.digest128();
            BlockHash(previous)
        })
        .collect()
}

#[cfg(test)]
mod tests;
