use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::lower_tier::Evicted;

const BLOCK: usize = 4;

fn tokens(ids: impl IntoIterator<Item = u32>) -> Vec<TokenId> {
    ids.into_iter().map(TokenId).collect()
}

/// A reservation that leaves the block of the prompt's last token unshared.
fn want(prompt: &[TokenId], blocks: usize) -> Reservation<'_> {
    Reservation { salt: 0, prompt, shared_max: (prompt.len().max(1) - 1) / BLOCK, blocks, blocks_max: blocks }
}

/// Reserves, "computes" and gives back: `prompt`'s full blocks are cached.
fn cache(pool: &mut BlockPool, prompt: &[TokenId]) -> Vec<BlockId> {
    let mut table = pool.reserve(want(prompt, prompt.len().div_ceil(BLOCK)), &mut ()).expect("room");
    pool.commit(&mut table, prompt);
    let blocks = table.blocks().to_vec();
    pool.release(table);
    pool.check_invariants([]);
    blocks
}

#[test]
fn what_was_evicted_comes_back_and_is_found() {
    let mut pool = BlockPool::new(6, BLOCK);
    let (mut kept, mut memory) = (Kept::default(), vec![(0, Vec::new()); 6]);
    let prompt = tokens(0..24);
    for (at, block) in cache(&mut pool, &prompt).into_iter().enumerate() {
        memory[block.0 as usize] = (0, prompt[..(at + 1) * BLOCK].to_vec());
    }
    let large = pool.reserve(want(&tokens(50..70), 5), &mut Below(&mut kept, &mut memory)).expect("room");
    assert_eq!((pool.evictions(), pool.cached_blocks(), kept.blocks.len()), (5, 1, 5));
    pool.release(large);
    let missing = pool.missing(0, &prompt, 6);
    assert_eq!(missing.len(), 5);
    assert!(missing.iter().all(|digest| kept.blocks.contains_key(digest)), "named as they were kept");
    let back = pool.reserve(want(&prompt, 6), &mut Below(&mut kept, &mut memory)).expect("room");
    assert_eq!((back.shared(), pool.restored().host), (5, 4), "the last token's block is not shared");
    pool.check_invariants([&back]);
    let other = pool.reserve(want(&prompt, 5), &mut ()).expect("shares");
    assert_eq!(other.shared(), 5, "found without a tier");
    pool.release(back);
    pool.release(other);
    // Another tenant's are other blocks.
    let asked = pool.missing(1, &prompt, 6);
    assert!(asked.iter().all(|digest| !kept.blocks.contains_key(digest)));
}

#[test]
fn what_cannot_be_restored_ends_the_prefix() {
    let mut pool = BlockPool::new(4, BLOCK);
    let (mut kept, mut memory) = (Kept::default(), vec![(0, Vec::new()); 4]);
    let prompt = tokens(0..16);
    for (at, block) in cache(&mut pool, &prompt).into_iter().enumerate() {
        memory[block.0 as usize] = (0, prompt[..(at + 1) * BLOCK].to_vec());
    }
    pool.keep_cached(&mut Below(&mut kept, &mut memory));
    let all = pool.reserve(want(&[], 4), &mut ()).expect("evicts them");
    pool.release(all);
    kept.breaks = kept.calls + 2;
    let back =
        pool.reserve(Reservation { shared_max: 4, ..want(&prompt, 4) }, &mut Below(&mut kept, &mut memory));
    let back = back.expect("room");
    assert_eq!((back.shared(), back.blocks().len()), (1, 4));
    pool.check_invariants([&back]);
    pool.release(back);
}

#[test]
fn the_longest_cached_prefix_of_full_blocks_is_shared() {
    let mut pool = BlockPool::new(16, BLOCK);
    let first = cache(&mut pool, &tokens(0..14));
    assert_eq!((pool.cached_blocks(), pool.free_blocks()), (3, 16), "the partial block is not kept");
    let check = |pool: &mut BlockPool, prompt: Vec<TokenId>, shared: usize| {
        let table = pool.reserve(want(&prompt, 5), &mut ()).expect("room");
        assert_eq!(table.shared(), shared, "{prompt:?}");
        assert_eq!(table.blocks()[..shared], first[..shared]);
        assert_eq!(pool.free_blocks(), 11);
        pool.check_invariants([&table]);
        pool.release(table);
    };
    check(&mut pool, tokens(0..20), 3);
    check(&mut pool, tokens(0..13), 3);
    check(&mut pool, tokens(0..12), 2);
    check(&mut pool, tokens((0..9).chain(90..99)), 2);
    check(&mut pool, tokens([0, 1, 2]), 0);
    check(&mut pool, tokens(1..14), 0);
}

#[test]
fn salts_share_nothing() {
    let mut pool = BlockPool::new(8, BLOCK);
    let prompt = tokens(0..9);
    cache(&mut pool, &prompt);
    let other = pool.reserve(Reservation { salt: 1, ..want(&prompt, 3) }, &mut ()).expect("room");
    assert_eq!(other.shared(), 0);
    pool.release(other);
}

#[test]
fn blocks_that_fill_while_a_sequence_runs_are_found_while_it_runs() {
    let mut pool = BlockPool::new(8, BLOCK);
    let prompt = tokens(0..6);
    let mut running = pool.reserve(want(&prompt, 4), &mut ()).expect("room");
    for length in 6..=12 {
        pool.commit(&mut running, &tokens(0..length));
        let found = pool.reserve(want(&tokens(0..40), 4), &mut ()).expect("room");
        assert_eq!(found.shared(), length as usize / BLOCK);
        pool.check_invariants([&running, &found]);
        pool.release(found);
    }
    pool.release(running);
}

#[test]
fn two_that_compute_the_same_end_up_with_one_copy() {
    let mut pool = BlockPool::new(8, BLOCK);
    let prompt = tokens(0..10);
    let mut one = pool.reserve(want(&prompt, 3), &mut ()).expect("room");
    let mut two = pool.reserve(want(&prompt, 3), &mut ()).expect("room");
    assert_eq!(pool.free_blocks(), 2);
    pool.commit(&mut two, &prompt);
    pool.commit(&mut one, &prompt);
    assert_eq!(one.blocks()[..2], two.blocks()[..2]);
    assert_ne!(one.blocks()[2], two.blocks()[2], "a partial block is never shared");
    assert_eq!(pool.free_blocks(), 4);
    pool.check_invariants([&one, &two]);
    pool.release(two);
    pool.check_invariants([&one]);
    pool.release(one);
    assert_eq!((pool.free_blocks(), pool.cached_blocks()), (8, 2));
}

#[test]
fn a_reservation_that_does_not_fit_changes_nothing() {
    let mut pool = BlockPool::new(6, BLOCK);
    let prompt = tokens(0..12);
    cache(&mut pool, &prompt);
    let large = pool.reserve(want(&tokens(50..60), 3), &mut ()).expect("room beside the cache");
    assert_eq!((pool.cached_blocks(), pool.evictions()), (3, 0));
    // Two are found, which takes them off what is free: one is left for the five that are missing.
    assert!(pool.reserve(want(&prompt, 7), &mut ()).is_none());
    assert_eq!((pool.cached_blocks(), pool.evictions()), (3, 0));
    pool.check_invariants([&large]);
    pool.release(large);
}

#[test]
fn memory_is_taken_from_the_cache_leaf_first_and_only_as_needed() {
    let mut pool = BlockPool::new(6, BLOCK);
    let old = tokens(0..16);
    cache(&mut pool, &old);
    let table = pool.reserve(want(&tokens(100..120), 4), &mut ()).expect("evicts two");
    assert_eq!((pool.cached_blocks(), pool.evictions()), (2, 2));
    pool.release(table);
    let found = pool.reserve(want(&old, 4), &mut ()).expect("room");
    assert_eq!(found.shared(), 2, "the start of the prompt is what is left of it");
    pool.release(found);
}

#[test]
fn the_least_recently_used_goes_first_and_the_deep_outlive_the_shallow() {
    let mut pool = BlockPool::new(4, BLOCK);
    let (a, b) = (tokens(0..4), tokens(10..14));
    for prompt in [&a, &b, &a] {
        let mut table =
            pool.reserve(Reservation { shared_max: 1, ..want(prompt, 1) }, &mut ()).expect("room");
        pool.commit(&mut table, prompt);
        pool.release(table);
    }
    let keep = pool.reserve(want(&[], 3), &mut ()).expect("one goes");
    let hit = |pool: &mut BlockPool, prompt: &[TokenId]| {
        let table =
            pool.reserve(Reservation { shared_max: 8, ..want(prompt, 0) }, &mut ()).expect("nothing taken");
        pool.release(table);
        pool.tree.find(Prefix {
            parent: None,
            salt: 0,
            hash: BlockHash::root(0).extend(&prompt[..BLOCK]),
            tokens: &prompt[..BLOCK],
        }) != Found::Nothing
    };
    assert!(hit(&mut pool, &a) && !hit(&mut pool, &b), "a was used last");
    pool.release(keep);

    let mut pool = BlockPool::new(4, BLOCK);
    let deep = cache(&mut pool, &tokens(0..12));
    cache(&mut pool, &tokens(20..24));
    let keep = pool.reserve(want(&[], 1), &mut ()).expect("one goes");
    assert!(
        !deep.contains(&keep.blocks()[0]),
        "the block at a prompt's start is the cheapest to compute again"
    );
    pool.release(keep);
}

#[test]
fn what_nobody_asks_for_ages_whatever_it_cost() {
    let mut pool = BlockPool::new(4, BLOCK);
    cache(&mut pool, &tokens(0..8));
    for round in 0..4000 {
        cache(&mut pool, &tokens(100 + 12 * round..100 + 12 * round + 12));
    }
    let table = pool.reserve(want(&tokens(0..12), 3), &mut ()).expect("room");
    assert_eq!(table.shared(), 0);
    pool.release(table);
}

#[test]
#[should_panic(expected = "released while nobody holds it")]
fn a_block_that_nobody_holds_is_a_broken_invariant() {
    let mut pool = BlockPool::new(2, BLOCK);
    let table = pool.reserve(want(&[], 1), &mut ()).expect("room");
    let again =
        BlockTable { blocks: table.blocks.clone(), ..pool.reserve(want(&[], 0), &mut ()).expect("nothing") };
    pool.release(table);
    pool.release(again);
}

#[test]
fn a_collision_of_hashes_is_a_miss() {
    let mut pool = BlockPool::new(8, BLOCK);
    let (known, asked) = (tokens(0..4), tokens(50..58));
    let hash = BlockHash::root(0).extend(&asked[..BLOCK]);
    let forged = Prefix { parent: None, salt: 0, hash, tokens: &known };
    let holder = pool.reserve(want(&[], 1), &mut ()).expect("room");
    pool.tree.insert(holder.blocks()[0], forged);
    let find = |prefix| pool.tree.find(prefix);
    assert_eq!(find(forged), Found::Block(holder.blocks()[0]));
    assert_eq!(find(Prefix { tokens: &asked[..BLOCK], ..forged }), Found::Collision);
    assert_eq!(find(Prefix { salt: 1, ..forged }), Found::Collision);
    assert_eq!(find(Prefix { parent: Some(BlockId(7)), ..forged }), Found::Collision);

    let mut table = pool.reserve(Reservation { shared_max: 2, ..want(&asked, 2) }, &mut ()).expect("room");
    assert_eq!(table.shared(), 0, "the block is another prompt's");
    pool.commit(&mut table, &asked);
    pool.release(table);
    assert_eq!(pool.cached_blocks(), 0, "what lies behind it cannot be found either");
    pool.release(holder);
    assert_eq!(pool.free_blocks(), 8);
}

/// What sequences do to a pool. An index picks among those that run.
#[derive(Debug, Clone)]
enum Op {
    Start { tenant: u64, prompt: Vec<TokenId>, extra: usize },
    Advance(prop::sample::Index, Vec<TokenId>),
    End(prop::sample::Index),
}

fn few_tokens(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<TokenId>> {
    // Two tokens: prefixes meet all the time.
    prop::collection::vec((0u32..2).prop_map(TokenId), length)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u64..2, few_tokens(0..24), 0usize..12)
            .prop_map(|(tenant, prompt, extra)| Op::Start { tenant, prompt, extra }),
        6 => (any::<prop::sample::Index>(), few_tokens(1..6)).prop_map(|(at, tokens)| Op::Advance(at, tokens)),
        4 => any::<prop::sample::Index>().prop_map(Op::End),
    ]
}

/// A sequence, what it holds, and the tokens whose KV it has "computed".
struct Running {
    tenant: u64,
    table: BlockTable,
    tokens: Vec<TokenId>,
    room: usize,
}

/// Memory whose blocks say what was written to them: tenant and tokens from the sequence's start.
type Memory = Vec<(u64, Vec<TokenId>)>;

/// Writes `tokens[from..]` where the table says, as a step would.
fn compute(memory: &mut Memory, running: &Running, from: usize) {
    for at in from / BLOCK..running.tokens.len().div_ceil(BLOCK) {
        let end = running.tokens.len().min((at + 1) * BLOCK);
        memory[running.table.blocks()[at].0 as usize] = (running.tenant, running.tokens[..end].to_vec());
    }
}

/// What a pool gave up, with what was written there. Loses every `loses`th block, and finds every `breaks`th broken.
#[derive(Default)]
struct Kept {
    blocks: HashMap<BlockDigest, (u64, Vec<TokenId>)>,
    loses: usize,
    breaks: usize,
    calls: usize,
    restored: u64,
}

impl Kept {
    fn every(&mut self, nth: usize) -> bool {
        self.calls += 1;
        nth > 0 && self.calls.is_multiple_of(nth)
    }
}

/// [`Kept`] behind [`Memory`].
struct Below<'a>(&'a mut Kept, &'a mut Memory);

impl LowerTier for Below<'_> {
    fn holds(&mut self, digest: &BlockDigest) -> bool {
        self.0.blocks.contains_key(digest)
    }

    fn keep(&mut self, block: BlockId, evicted: &Evicted) {
        let content = self.1[block.0 as usize].clone();
        assert_eq!(content.1.len() as u64, evicted.depth_tokens + BLOCK as u64, "whole when it goes");
        if !self.0.every(self.0.loses) {
            self.0.blocks.insert(evicted.digest, content);
        }
    }

    fn restore(&mut self, digest: &BlockDigest, block: BlockId) -> Option<Source> {
        let broken = self.0.every(self.0.breaks);
        self.1[block.0 as usize] = (u64::MAX, Vec::new());
        self.1[block.0 as usize] = self.0.blocks.get(digest).filter(|_| !broken)?.clone();
        self.0.restored += 1;
        Some(Source::Host)
    }
}

proptest! {
    // A failing stream is printed, shrunk, together with the seed that reproduces it.
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever comes in whatever order: the books balance after every event, and every sequence reads from its blocks what
    /// it would have written to them itself, whether it was found here or came back from a lower tier that may lose or
    /// break it.
    #[test]
    fn nobody_reads_what_it_would_not_have_written(
        ops in prop::collection::vec(op(), 1..120),
        has_tier in any::<bool>(),
        loses in 0usize..5,
        breaks in 0usize..5,
    ) {
        let blocks_max = 12;
        let mut kept = Kept { loses: if has_tier { loses } else { 1 }, breaks, ..Kept::default() };
        let mut pool = BlockPool::new(blocks_max, BLOCK);
        let mut memory: Memory = vec![(0, Vec::new()); blocks_max];
        let mut all: Vec<Running> = Vec::new();
        for op in ops {
            match op {
                Op::Start { tenant, prompt, extra } => {
                    let room = prompt.len() + extra;
                    let reservation = Reservation { salt: tenant, ..want(&prompt, room.div_ceil(BLOCK)) };
                    let free = pool.free_blocks();
                    match pool.reserve(reservation, &mut Below(&mut kept, &mut memory)) {
                        Some(mut table) => {
                            prop_assert_eq!(table.blocks().len(), room.div_ceil(BLOCK));
                            let from = table.shared() * BLOCK;
                            prop_assert!(prompt.is_empty() || from < prompt.len(), "the last token is computed");
                            let running = Running { tenant, tokens: prompt, room, table };
                            compute(&mut memory, &running, from);
                            let Running { tokens, .. } = &running;
                            let tokens = tokens.clone();
                            table = running.table;
                            pool.commit(&mut table, &tokens);
                            all.push(Running { tenant, table, tokens, room });
                        }
                        None => prop_assert!(room.div_ceil(BLOCK) > free || pool.free_blocks() == free),
                    }
                }
                Op::Advance(at, tokens) if !all.is_empty() => {
                    let at = at.index(all.len());
                    let running = &mut all[at];
                    let from = running.tokens.len();
                    running.tokens.extend(tokens);
                    running.tokens.truncate(running.room);
                    compute(&mut memory, running, from);
                    pool.commit(&mut running.table, &running.tokens);
                }
                Op::End(at) if !all.is_empty() => {
                    let at = at.index(all.len());
                    pool.release(all.swap_remove(at).table);
                }
                Op::Advance(..) | Op::End(_) => {}
            }
            pool.check_invariants(all.iter().map(|running| &running.table));
            prop_assert_eq!(pool.restored().host, kept.restored);
            for running in &all {
                for (at, block) in running.table.blocks().iter().enumerate().take(running.tokens.len().div_ceil(BLOCK)) {
                    let end = running.tokens.len().min((at + 1) * BLOCK);
                    let expected = (running.tenant, running.tokens[..end].to_vec());
                    prop_assert_eq!(&memory[block.0 as usize], &expected);
                }
            }
        }
        for running in all.drain(..) {
            pool.release(running.table);
        }
        pool.check_invariants([]);
        prop_assert_eq!(pool.free_blocks(), blocks_max);
    }
}
