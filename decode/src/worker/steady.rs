//! After warm-up a round of the worker allocates nothing: step, sampling, delivery and its own books.

use model::SamplingParams;

use super::*;

/// Tokens before anything is counted: buffers have grown to the batch, and queues to what their readers leave in them.
const WARM_ROUNDS: usize = 40;
/// More than a KV block: the table of a sequence does not grow either.
const COUNTED_ROUNDS: usize = 100;

/// One round without what the rig checks.
fn bare_round(worker: &mut Worker) {
    assert!(worker.receive());
    worker.scheduler.schedule(&mut worker.batch, &mut ());
    let outcome = worker.step();
    worker.postprocess(outcome);
}

fn check(sampling: impl Fn(u64) -> SamplingParams) {
    let mut rig = Rig::new();
    let oracle = engine();
    let mut inboxes = Vec::new();
    for seed in 1..=BATCH_MAX as u64 {
        let mut sequence = request(&oracle, seed, 30, 300);
        sequence.sampling = sampling(seed);
        inboxes.push(rig.start(&sequence).0);
    }
    while rig.worker.scheduler.runnable() < BATCH_MAX {
        rig.round();
        inboxes.iter_mut().for_each(|inbox| while next(inbox).is_some() {});
    }
    let mut tokens = 0;
    for round in 0..WARM_ROUNDS + COUNTED_ROUNDS {
        let counted = allocation_counter::measure(|| bare_round(&mut rig.worker));
        if round >= WARM_ROUNDS {
            assert_eq!(counted.count_total, 0, "round {round}");
        }
        // A stream's reader takes what is there, on a thread of its own.
        for inbox in &mut inboxes {
            while let Some(event) = next(inbox) {
                tokens += usize::from(matches!(event, SequenceEvent::Token(..)));
            }
        }
    }
    assert!(tokens >= BATCH_MAX * COUNTED_ROUNDS, "{tokens} tokens");
}

#[test]
fn a_warm_greedy_round_allocates_nothing() {
    check(|seed| SamplingParams { seed, ..SamplingParams::greedy() });
}

#[test]
fn a_warm_sampled_round_allocates_nothing() {
    check(|seed| SamplingParams {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        seed,
        ..SamplingParams::greedy()
    });
}
