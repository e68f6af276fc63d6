use proptest::prelude::*;

use super::*;

#[test]
fn allocation_is_all_or_nothing() {
    let mut allocator = BlockAllocator::new(3);
    let two = allocator.allocate(2).expect("three are free");
    assert_eq!(two, [BlockId(0), BlockId(1)]);
    assert_eq!(allocator.allocate(2), None);
    assert_eq!(allocator.free_blocks(), 1);
    assert_eq!(allocator.allocate(0), Some(vec![]));
    allocator.free(&two);
    assert_eq!(allocator.allocate(3).map(|blocks| blocks.len()), Some(3));
    allocator.check_invariants();
}

#[test]
#[should_panic(expected = "freed while not in use")]
fn a_block_is_freed_once() {
    let mut allocator = BlockAllocator::new(2);
    let blocks = allocator.allocate(1).expect("two are free");
    allocator.free(&blocks);
    allocator.free(&blocks);
}

proptest! {
    /// Any order of allocating and freeing hands out no block twice and loses none.
    #[test]
    fn no_block_has_two_owners(steps in prop::collection::vec((0usize..9, any::<prop::sample::Index>()), 1..200)) {
        let blocks_max = 24;
        let mut allocator = BlockAllocator::new(blocks_max);
        let mut owned: Vec<Vec<BlockId>> = Vec::new();
        for (count, index) in steps {
            if count == 0 && !owned.is_empty() {
                let blocks = owned.swap_remove(index.index(owned.len()));
                allocator.free(&blocks);
            } else if let Some(blocks) = allocator.allocate(count) {
                prop_assert_eq!(blocks.len(), count);
                owned.push(blocks);
            }
            allocator.check_invariants();
            let mut all: Vec<_> = owned.iter().flatten().collect();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len() + allocator.free_blocks(), blocks_max);
        }
    }
}
