//! Every state that the hand-off can get into, within bounds, explored one by one: over the machines that serve, not over
//! a drawing of them.
//!
//! One prefill and one decode worker, a pool of two blocks, requests that take turns with them. Frames may overtake each
//! other, come twice and be lost; connections break, with each end told later or not at all; either end crashes and is
//! started anew; requests are cancelled at any point; leases run out. After each step the invariants of `docs/kv-transfer.md`
//! are checked:
//!
//! 1. a place is asked for only for a live ticket, and only for blocks that the ticket permits;
//! 2. a committed sequence has exactly its own bytes, until it ends;
//! 3. every ticket and every transfer has one end;
//! 4. from every state, when nothing more happens but that losses are noticed and leases run out, both ends return to
//!    their baseline; only a transfer that its caller is in the middle of is left, for the caller to end.

mod action;
mod world;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use action::{Action, Bounds};
use world::World;

/// How a state was reached.
struct Step {
    action: Action,
    before: Option<Arc<Step>>,
}

fn history(last: &Option<Arc<Step>>) -> String {
    let mut actions = Vec::new();
    let mut step = last.as_ref();
    while let Some(at) = step {
        actions.push(format!("{:?}", at.action));
        step = at.before.as_ref();
    }
    actions.reverse();
    actions.join(" → ")
}

/// Explores everything within `bounds`, and says how many states and steps there were.
fn explore(bounds: Bounds) -> (usize, usize) {
    let start = World::new(bounds);
    let mut seen = HashSet::from([fingerprint(&start)]);
    let mut open = vec![(start, None)];
    let mut steps = 0;
    while let Some((world, path)) = open.pop() {
        if let Err(objection) = world.clone().return_to_baseline() {
            panic!("no way back to the baseline: {objection}, after {}", history(&path));
        }
        for action in world.actions() {
            steps += 1;
            let mut next = world.clone();
            let outcome = next.act(action);
            let path = Some(Arc::new(Step { action, before: path.clone() }));
            if let Err(objection) = outcome.and_then(|()| next.check()) {
                panic!("{objection}, after {}", history(&path));
            }
            if seen.insert(fingerprint(&next)) {
                open.push((next, path));
            }
        }
    }
    (seen.len(), steps)
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash_state(&mut hasher);
    hasher.finish()
}

fn explored(what: &str, bounds: Bounds, at_least: usize) {
    let (states, steps) = explore(bounds);
    println!("{what}: {states} states, {steps} steps");
    assert!(states >= at_least, "the bounds leave hardly anything to explore: {states} states");
}

#[test]
fn reordered_repeated_and_lost_frames() {
    let bounds = Bounds { requests: 2, repeats: 1, losses: 1, leases: 1, ..Bounds::default() };
    explored("frames", bounds, 100_000);
}

#[test]
fn lost_frames_are_asked_for() {
    let bounds = Bounds { requests: 1, losses: 2, repeats: 1, waits: 3, ..Bounds::default() };
    explored("questions", bounds, 10_000);
}

#[test]
fn paths_break_while_answers_are_awaited() {
    let bounds = Bounds { requests: 1, cuts: 1, losses: 1, waits: 2, prompt_tokens: 1, ..Bounds::default() };
    explored("paths", bounds, 10_000);
}

#[test]
fn broken_connections_and_cancelled_requests() {
    let bounds = Bounds { requests: 2, cuts: 1, aborts: 1, prompt_tokens: 1, ..Bounds::default() };
    explored("connections", bounds, 50_000);
}

#[test]
#[ignore = "minutes: for changes of the machines, by hand"]
fn connections_broken_twice() {
    let bounds = Bounds { requests: 2, cuts: 2, aborts: 1, leases: 1, ..Bounds::default() };
    explored("connections broken twice", bounds, 100_000);
}

#[test]
fn decode_crashes_and_is_started_anew() {
    let bounds = Bounds { requests: 2, decode_crashes: 1, repeats: 1, leases: 1, ..Bounds::default() };
    explored("decode crashes", bounds, 100_000);
}

#[test]
fn prefill_crashes_and_is_started_anew() {
    let bounds = Bounds { requests: 2, prefill_crashes: 1, repeats: 1, leases: 1, ..Bounds::default() };
    explored("prefill crashes", bounds, 100_000);
}

#[test]
#[ignore = "minutes: for changes of the machines, by hand"]
fn everything_once() {
    let bounds = Bounds {
        requests: 2,
        repeats: 1,
        losses: 1,
        cuts: 1,
        aborts: 1,
        decode_crashes: 1,
        prefill_crashes: 1,
        leases: 1,
        waits: 0,
        // One block: what more of them add is in the other explorations.
        prompt_tokens: 1,
    };
    explored("everything", bounds, 100_000);
}
