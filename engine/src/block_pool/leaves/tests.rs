use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const SLOTS: u32 = 24;

proptest! {
    /// The same as a set in order of rank, whatever is added, moved and taken out.
    #[test]
    fn the_lowest_goes_first(ops in prop::collection::vec((0..4u8, 0..SLOTS, 0..6u64, 0..6u64), 0..200)) {
        let mut leaves = Leaves::new(SLOTS as usize);
        let mut model = BTreeSet::new();
        for (kind, slot, worth, use_) in ops {
            match kind {
                0 | 1 => {
                    leaves.insert(slot, (worth, use_));
                    model.retain(|&(_, other)| other != slot);
                    model.insert(((worth, use_), slot));
                }
                2 => {
                    leaves.remove(slot);
                    model.retain(|&(_, other)| other != slot);
                }
                _ => prop_assert_eq!(leaves.pop_first(), model.pop_first()),
            }
            prop_assert_eq!(leaves.len(), model.len());
            for slot in 0..SLOTS {
                let rank = model.iter().find(|(_, other)| *other == slot).map(|(rank, _)| *rank);
                prop_assert_eq!(leaves.rank(slot), rank);
            }
        }
        while let Some(first) = model.pop_first() {
            prop_assert_eq!(leaves.pop_first(), Some(first));
        }
    }
}
