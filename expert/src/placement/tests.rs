use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn every_expert_has_one_owner_and_shares_are_even(
        experts in 1usize..300, workers in 1usize..40, first in 0usize..4, count in 0usize..5,
    ) {
        let layers = first..first + count;
        for placement in [
            Placement::contiguous(layers.clone(), experts, workers)?,
            Placement::round_robin(layers.clone(), experts, workers)?,
        ] {
            prop_assert_eq!(placement.layers().collect::<Vec<_>>(), layers.clone().collect::<Vec<_>>());
            for layer in layers.clone() {
                let mut seen = vec![0; experts];
                for rank in 0..workers {
                    let share = placement.share(rank);
                    let mine = share.iter().find(|(l, _)| *l == layer).map_or(&[][..], |(_, e)| e);
                    prop_assert!(mine.len() >= experts / workers);
                    prop_assert!(mine.len() <= experts.div_ceil(workers));
                    for &expert in mine {
                        prop_assert!(placement.holds(rank, layer, expert));
                        seen[usize::from(expert.0)] += 1;
                    }
                }
                prop_assert!(seen.iter().all(|&n| n == 1), "{:?}", seen);
            }
        }
    }

    #[test]
    fn contiguous_ranges_are_the_documented_ones(experts in 1usize..300, workers in 1usize..40) {
        let placement = Placement::contiguous([0], experts, workers)?;
        let owners = placement.owners(0).expect("layer 0");
        for rank in 0..workers {
            let range = rank * experts / workers..(rank + 1) * experts / workers;
            prop_assert!(owners[range].iter().all(|&owner| usize::from(owner) == rank), "{:?}", owners);
        }
    }

    #[test]
    fn the_version_follows_the_content(
        owners in prop::collection::vec(0u16..4, 1..20), change in any::<prop::sample::Index>(),
    ) {
        let make = |owners: Vec<u16>| Placement::new(4, owners.len(), BTreeMap::from([(3, owners)]));
        let placement = make(owners.clone())?;
        prop_assert_eq!(placement.version(), make(owners.clone())?.version());
        let mut other = owners;
        let at = change.index(other.len());
        other[at] = (other[at] + 1) % 4;
        prop_assert_ne!(placement.version(), make(other)?.version());
    }
}

#[test]
fn versions_differ_with_layers_and_workers() {
    let base = Placement::contiguous(1..4, 16, 2).expect("valid");
    for other in [
        Placement::contiguous(1..5, 16, 2),
        Placement::contiguous(2..5, 16, 2),
        Placement::contiguous(1..4, 16, 3),
        Placement::round_robin(1..4, 16, 2),
    ] {
        assert_ne!(base.version(), other.expect("valid").version());
    }
}

#[test]
fn impossible_tables_are_refused() {
    let check = |workers, experts, row: Vec<u16>, expected: PlacementError| {
        let table = Placement::new(workers, experts, BTreeMap::from([(7, row)]));
        assert_eq!(table, Err(expected));
    };
    check(0, 1, vec![0], PlacementError::Workers { workers: 0 });
    check(5000, 1, vec![0], PlacementError::Workers { workers: 5000 });
    check(1, 0, vec![], PlacementError::Experts { experts: 0 });
    check(1, 65_537, vec![], PlacementError::Experts { experts: 65_537 });
    let incomplete = PlacementError::Incomplete { layer: 7, found: 1, expected: 2 };
    check(2, 2, vec![0], incomplete);
    let unknown = PlacementError::UnknownWorker { layer: 7, expert: 1, rank: 2, workers: 2 };
    check(2, 2, vec![1, 2], unknown);
    assert_eq!(Placement::contiguous([0], 4, 0), Err(PlacementError::Workers { workers: 0 }));
    assert_eq!(Placement::contiguous([0], 0, 2), Err(PlacementError::Experts { experts: 0 }));
}

#[test]
fn unknown_layers_and_experts_have_no_owner() {
    let placement = Placement::contiguous([2], 4, 2).expect("valid");
    assert_eq!(placement.owners(1), None);
    assert!(!placement.holds(0, 1, ExpertId(0)));
    assert!(!placement.holds(0, 2, ExpertId(4)));
    assert!(!placement.holds(1, 2, ExpertId(0)));
}
