use super::*;

/// The same histories each time; `trireme bench chaos transfer` tries others. 5000 and 5001 are where a worker that was killed while
/// it was stopped did not come round again, and where a stopped one got requests that nobody gave up.
#[test]
fn under_every_fault_nothing_is_foreign_nothing_leaks_and_everything_ends() {
    for seed in [0, 1_000, 5_000, 5_001] {
        let tally = histories(seed, 2_000, 2);
        assert_eq!(tally.objections, Vec::<String>::new(), "{tally}");
        assert_eq!((tally.foreign_bytes, tally.leaked_blocks), (0, 0));
        // Histories in which nothing succeeds, or nothing fails, prove nothing.
        assert!(tally.committed > tally.issued / 4, "{tally}");
        assert!(tally.ended + tally.released > tally.issued / 20, "{tally}");
        assert!(tally.fenced > 100, "the fence was hardly tried: {tally}");
        assert!(tally.faults.iter().all(|&count| count > 0), "a fault never came: {tally}");
    }
}

#[test]
fn equal_seeds_give_equal_histories() {
    let run = || histories(7, 1_000, 1);
    assert_eq!(run().to_string(), run().to_string());
}
