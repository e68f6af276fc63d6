//! After warm-up a round of the worker allocates nothing: drafts, step, sampling, delivery and its own books.

use model::SamplingParams;

use super::*;

/// Rounds before anything is counted: buffers have grown to the batch, and queues to what their readers leave in them.
const WARM_ROUNDS: usize = 30;
/// Those of them in which everybody drafts: a worker tries that whenever measured times tell it to, so possibly never before.
const DRAFTING_ROUNDS: usize = 10;
/// More tokens than a KV block has: the table of a sequence does not grow either.
const COUNTED_ROUNDS: usize = 70;

/// One round without what the rig checks.
fn bare_round(worker: &mut Worker) {
    assert!(worker.receive());
    worker.schedule();
    let outcome = worker.step();
    worker.postprocess(outcome);
    worker.prefill();
}

/// One over the demo model, most of whose drafts stand.
fn drafting_rig() -> Rig {
    let engine = || support::engine_of(support::DEMO);
    let mut rig = Rig::with(engine(), engine(), Arc::default());
    if let Some(speculation) = &mut rig.worker.speculation {
        speculation.always = true;
    }
    rig
}

fn check(mut rig: Rig, sampling: impl Fn(u64) -> SamplingParams) {
    let mut inboxes = Vec::new();
    for seed in 1..=BATCH_MAX as u64 {
        let mut sequence = request(&rig.prefill.engine, seed, 30, 320);
        sequence.sampling = sampling(seed);
        inboxes.push(rig.start(&sequence).0);
    }
    while rig.worker.scheduler.runnable() < BATCH_MAX {
        rig.round();
        inboxes.iter_mut().for_each(|inbox| while next(inbox).is_some() {});
    }
    let mut tokens = 0;
    let drafting = rig.worker.speculation.as_ref().is_some_and(|speculation| speculation.always);
    for round in 0..WARM_ROUNDS + COUNTED_ROUNDS {
        if let Some(speculation) = &mut rig.worker.speculation {
            speculation.always = drafting || round < DRAFTING_ROUNDS;
        }
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
    // One that ends gives its memory back, which is no part of a steady round.
    assert_eq!(rig.worker.scheduler.runnable(), BATCH_MAX, "all of them go on");
    assert!(
        !drafting || tokens > BATCH_MAX * (WARM_ROUNDS + COUNTED_ROUNDS),
        "{tokens} tokens, no draft stood"
    );
}

fn greedy(seed: u64) -> SamplingParams {
    SamplingParams { seed, ..SamplingParams::greedy() }
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.7, top_p: 0.9, top_k: 20, ..greedy(seed) }
}

#[test]
fn a_warm_greedy_round_allocates_nothing() {
    check(Rig::new(), greedy);
}

#[test]
fn a_warm_sampled_round_allocates_nothing() {
    check(Rig::new(), sampled);
}

#[test]
fn a_warm_greedy_round_with_drafts_allocates_nothing() {
    check(drafting_rig(), greedy);
}

#[test]
fn a_warm_sampled_round_with_drafts_allocates_nothing() {
    check(drafting_rig(), sampled);
}
