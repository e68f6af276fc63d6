use model::TokenId;
use proptest::prelude::*;

use super::*;

const BLOCK: usize = 4;

/// Block `at` of a chain of its own.
fn chain(salt: u64, at: usize) -> Evicted {
    let mut parent = BlockDigest::root(salt);
    let mut digest = parent.extend(&[TokenId(0); BLOCK]);
    for _ in 0..at {
        (parent, digest) = (digest, digest.extend(&[TokenId(0); BLOCK]));
    }
    Evicted { digest, parent, depth_tokens: (at * BLOCK) as u64 }
}

fn store(tier: &mut HostTier, block: &Evicted) {
    if !tier.touch(&block.digest) {
        tier.store(block, |bytes| bytes.copy_from_slice(&block.digest.0));
    }
    tier.check_invariants();
}

/// Whether it is here and whole.
fn read(tier: &HostTier, block: &Evicted) -> bool {
    let Some((stored, _)) = tier.get(&block.digest) else { return false };
    assert!(stored.is_whole());
    assert_eq!(stored.bytes(), block.digest.0);
    true
}

#[test]
fn the_end_of_a_chain_goes_before_what_it_needs() {
    let mut tier = HostTier::new(4, 32);
    // As a pool gives them up.
    for at in (0..4).rev() {
        store(&mut tier, &chain(1, at));
    }
    store(&mut tier, &chain(2, 0));
    store(&mut tier, &chain(3, 0));
    let here: Vec<_> = (0..4).map(|at| read(&tier, &chain(1, at))).collect();
    assert_eq!(here, [true, true, false, false]);
    assert_eq!(tier.evictions(), 2);
}

#[test]
fn the_dear_outlive_the_cheap_and_age_all_the_same() {
    let mut tier = HostTier::new(3, 32);
    let deep = Evicted { depth_tokens: 100_000, ..chain(1, 0) };
    store(&mut tier, &deep);
    for salt in 10..20 {
        store(&mut tier, &chain(salt, 0));
    }
    assert!(read(&tier, &deep), "25 times as dear as they");
    for salt in 20..100 {
        store(&mut tier, &chain(salt, 0));
    }
    assert!(!read(&tier, &deep), "nobody has asked for it");
}

#[test]
fn what_went_back_into_the_pool_goes_first() {
    let mut tier = HostTier::new(2, 32);
    let (one, two) = (chain(1, 0), chain(2, 0));
    store(&mut tier, &one);
    store(&mut tier, &two);
    tier.restored(&two.digest);
    store(&mut tier, &chain(3, 0));
    assert!(read(&tier, &one) && !read(&tier, &two));
    // Evicted again it is as good as new, without a copy.
    tier.restored(&one.digest);
    assert!(tier.touch(&one.digest));
    store(&mut tier, &chain(4, 0));
    assert!(read(&tier, &one) && !read(&tier, &chain(3, 0)));
}

#[test]
fn memory_that_the_disk_still_reads_is_not_written_over() {
    let mut tier = HostTier::new(1, 32);
    let (one, two) = (chain(1, 0), chain(2, 0));
    let held = tier.store(&one, |bytes| bytes.fill(7));
    store(&mut tier, &two);
    assert!(held.is_whole() && held.bytes() == [7; 32]);
    drop(held);
    store(&mut tier, &one);
    assert!(read(&tier, &one));
}

#[derive(Debug, Clone)]
enum Op {
    Store(u64, usize),
    FromDisk(u64, usize),
    Touch(u64, usize),
    Restored(u64, usize),
    Remove(u64, usize),
}

fn op() -> impl Strategy<Value = Op> {
    (0..6u8, 0..3u64, 0..6usize).prop_map(|(kind, salt, at)| match kind {
        0 | 1 => Op::Store(salt, at),
        2 => Op::FromDisk(salt, at),
        3 => Op::Touch(salt, at),
        4 => Op::Restored(salt, at),
        _ => Op::Remove(salt, at),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Tenants' blocks in any order: bounded, each one its own, none without its checksum.
    #[test]
    fn the_books_balance(ops in prop::collection::vec(op(), 1..150), blocks_max in 1usize..8) {
        let mut tier = HostTier::new(blocks_max, 32);
        for op in ops {
            match op {
                Op::Store(salt, at) => store(&mut tier, &chain(salt, at)),
                Op::FromDisk(salt, at) => {
                    let block = chain(salt, at);
                    let mut stored = StoredBlock::zeroed(32);
                    stored.fill(&block, |bytes| bytes.copy_from_slice(&block.digest.0));
                    tier.insert(block.digest, Arc::new(stored), Source::Disk);
                    prop_assert!(read(&tier, &block));
                }
                Op::Touch(salt, at) => {
                    let block = chain(salt, at);
                    prop_assert_eq!(tier.touch(&block.digest), tier.get(&block.digest).is_some());
                }
                Op::Restored(salt, at) => tier.restored(&chain(salt, at).digest),
                Op::Remove(salt, at) => {
                    tier.remove(&chain(salt, at).digest);
                    prop_assert!(!read(&tier, &chain(salt, at)));
                }
            }
            tier.check_invariants();
            prop_assert!(tier.len() <= blocks_max);
            for (salt, at) in (0..3).flat_map(|salt| (0..6).map(move |at| (salt, at))) {
                read(&tier, &chain(salt, at));
            }
        }
    }
}
