//! Both state machines under random histories: reordered, duplicated, lost and damaged frames, full queues,
//! cancelled requests, lost connections, crashed and restarted workers.
//!
//! An oracle that shares no code with the machines knows which sequence owns each block of decode's memory and what
//! every byte there must be. After each event: no byte was written for a ticket that the oracle holds for dead, and
//! committed sequences have exactly their own bytes. At the end: every transfer and every ticket had one end, and
//! both sides are back at their baseline.
//!
//! `TRIREME_SEED=n cargo test -p kvtransfer --test simulation` repeats one history.

mod decode;
mod network;
mod prefill;
mod world;

use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;

use world::{Faults, World};

/// Events of one history: some ten hand-offs from begin to end.
const EVENTS: usize = 1500;
const HISTORIES: u64 = 100;

fn seeds() -> Vec<u64> {
    match std::env::var("TRIREME_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        // The same ones each time, and one that nobody has tried.
        None => (0..HISTORIES).chain([rand::random()]).collect(),
    }
}

fn run(faults: Faults) -> Vec<World> {
    let history = |seed| {
        println!("TRIREME_SEED={seed}");
        let mut world = World::new(StdRng::seed_from_u64(seed), faults);
        for _ in 0..EVENTS {
            world.event();
            world.check();
        }
        world.quiesce();
        world
    };
    seeds().into_iter().map(history).collect()
}

#[test]
fn under_every_fault_nothing_lands_where_it_must_not_and_everything_ends() {
    let worlds = run(Faults::All);
    // A simulation in which nothing ever succeeds, or nothing ever fails, proves nothing.
    let sum = |count: fn(&World) -> u64| worlds.iter().map(count).sum::<u64>();
    if worlds.len() > 1 {
        assert!(sum(|world| world.decode.committed) > 100, "hardly a hand-off committed");
        assert!(sum(|world| world.decode.dead_pushes()) > 100, "the fence was hardly tried");
        assert!(sum(|world| world.decode.restarts) > 100, "hardly a restart");
    }
}

#[test]
fn without_faults_reordered_and_repeated_frames_all_commit() {
    for world in run(Faults::OrderOnly) {
        assert_eq!(world.decode.committed, world.decode.issued, "a hand-off without faults did not commit");
        assert!(world.decode.issued > 0);
    }
}

/// A coin that falls on heads once in `n`.
fn once_in(rng: &mut StdRng, n: u32) -> bool {
    rng.random_range(0..n) == 0
}
