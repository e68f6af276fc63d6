//! Pools of equal blocks, what is in them, and the order in which they are walked.

use memmap2::{Advice, MmapMut};

/// Bytes of a pool: far more than any cache holds.
pub(crate) const POOL_BYTES: usize = 256 << 20;

/// What a destination holds before anything has landed.
const UNTOUCHED: u8 = 1;

/// A pool of equal blocks, on huge pages as a worker's is.
pub(crate) struct Pool {
    bytes: MmapMut,
    block_bytes: usize,
    blocks: usize,
}

impl Pool {
    /// Every page written, none of it a source's block.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn empty(block_bytes: usize) -> std::io::Result<Self> {
        let blocks = POOL_BYTES / block_bytes;
        let mut bytes = MmapMut::map_anon(blocks * block_bytes)?;
        // Without them the pool is only slower.
        let _ = bytes.advise(Advice::HugePage);
        bytes.fill(UNTOUCHED);
        Ok(Self { bytes, block_bytes, blocks })
    }

    /// Each block filled with what [`Self::verify`] knows it by.
    ///
    /// # Errors
    /// As [`Self::empty`].
    pub fn filled(block_bytes: usize) -> std::io::Result<Self> {
        let mut pool = Self::empty(block_bytes)?;
        for block in 0..pool.blocks {
            stamp(block, pool.get_mut(block));
        }
        Ok(pool)
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn get(&self, block: usize) -> &[u8] {
        &self.bytes[block * self.block_bytes..][..self.block_bytes]
    }

    pub fn get_mut(&mut self, block: usize) -> &mut [u8] {
        &mut self.bytes[block * self.block_bytes..][..self.block_bytes]
    }

    /// Several blocks at once, each of them once.
    pub fn get_many(&mut self, wanted: &[usize]) -> Option<Vec<&mut [u8]>> {
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_unstable_by_key(|&index| wanted[index]);
        let mut found: Vec<Option<&mut [u8]>> = wanted.iter().map(|_| None).collect();
        let (mut rest, mut behind) = (&mut self.bytes[..], 0);
        for index in order {
            let (_, from) = rest.split_at_mut_checked((wanted[index] - behind) * self.block_bytes)?;
            let (block, after) = from.split_at_mut_checked(self.block_bytes)?;
            (rest, behind) = (after, wanted[index].checked_add(1)?);
            found[index] = Some(block);
        }
        found.into_iter().collect()
    }

    /// All of it.
    pub fn into_bytes(self) -> bytes::Bytes {
        bytes::Bytes::from_owner(self.bytes)
    }

    /// How many blocks hold exactly what their source holds, and how many something else. Those that nothing has landed
    /// in are neither.
    pub fn verify(&self) -> (usize, usize) {
        let (mut right, mut wrong) = (0, 0);
        let mut expected = vec![0; self.block_bytes];
        for source in 0..self.blocks {
            let got = self.get(destination(source, self.blocks));
            if got.iter().take(16).all(|&byte| byte == UNTOUCHED) {
                continue;
            }
            stamp(source, &mut expected);
            if got == expected { right += 1 } else { wrong += 1 }
        }
        (right, wrong)
    }
}

/// A block's content: a word made of its number, over and over, and its complement at the end, so that a shifted copy is
/// seen.
fn stamp(block: usize, into: &mut [u8]) {
    let word = (block as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for chunk in into.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    if let Some(last) = into.as_chunks_mut::<8>().0.last_mut() {
        *last = (!word).to_le_bytes();
    }
}

/// Where a source's block belongs: a fixed permutation, so that what is written is scattered as well.
pub(crate) fn destination(source: usize, blocks: usize) -> usize {
    let step = 7919 % blocks;
    let step = if greatest_common_divisor(step, blocks) == 1 { step } else { 1 };
    (source * step + 13) % blocks
}

/// The `number`-th message's blocks, in a scattered order that both processes know.
pub(crate) fn message(number: usize, per_message: usize, blocks: usize) -> impl Iterator<Item = usize> {
    let mut step = 104_729 % blocks;
    while greatest_common_divisor(step, blocks) != 1 {
        step += 1;
    }
    (number * per_message..(number + 1) * per_message).map(move |index| index % blocks * step % blocks)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_block_is_sent_once_a_round_to_a_place_of_its_own() {
        for blocks in [POOL_BYTES / 9216, POOL_BYTES / 41_984, 256] {
            let sent: HashSet<_> = (0..blocks).flat_map(|number| message(number, 1, blocks)).collect();
            let places: HashSet<_> = (0..blocks).map(|source| destination(source, blocks)).collect();
            assert_eq!((sent.len(), places.len()), (blocks, blocks));
        }
    }

    #[test]
    fn a_block_in_the_wrong_place_is_seen() {
        let block_bytes = POOL_BYTES / 16;
        let source = Pool::filled(block_bytes).expect("memory");
        let mut pool = Pool::empty(block_bytes).expect("memory");
        assert_eq!(pool.verify(), (0, 0));
        pool.get_mut(destination(3, 16)).copy_from_slice(source.get(3));
        assert_eq!(pool.verify(), (1, 0));
        pool.get_mut(destination(4, 16)).copy_from_slice(source.get(3));
        assert_eq!(pool.verify(), (1, 1));
    }
}
