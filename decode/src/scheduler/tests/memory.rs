//! Memory under the worst that requests can do: what the scheduler's module doc promises, shown on whole workloads.

use super::*;
use crate::scheduler::sequence::State;

/// A generator of its own, so that a seed means the same for ever.
struct Random(u64);

impl Random {
    /// Below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn limits(kv_blocks: usize, step_rows_max: usize) -> Limits {
    Limits { sequences_max: 32, queue_max: 1000, batch_max: 8, step_rows_max, kv_blocks, ..LIMITS }
}

/// Runs rounds as the worker does until everything has ended. `tokens` says what a step gives a sequence. Returns the steps
/// that each class' last sequence needed, and how many turns were passed over.
fn run_dry(
    scheduler: &mut Scheduler,
    mut accepted: impl FnMut(usize) -> usize,
    mut token: impl FnMut(&Sequence) -> TokenId,
) -> (usize, u64) {
    let now = Instant::now();
    let mut batch = Vec::new();
    let mut steps = 0;
    while !scheduler.is_empty() {
        while let Some((id, _)) = scheduler.admit_next(&mut (), now) {
            scheduler.apply(id, Event::HandedOff(WORD), now);
        }
        scheduler.schedule(&mut batch, &mut ());
        scheduler.check_invariants();
        assert!(!batch.is_empty() || scheduler.next_finished().is_some(), "everybody pauses: a freeze");
        for &id in &batch {
            let sequence = scheduler.sequence(id).expect("scheduled");
            let rows = sequence.rows_max(LIMITS.block_tokens);
            assert!(rows >= 1, "{id:?} has no row for its token");
            for _ in 0..accepted(rows.min(scheduler.limits().step_rows_max)) {
                let Some(sequence) = scheduler.sequence(id) else { break };
                if !matches!(sequence.state, State::Running { .. }) {
                    break;
                }
                let token = token(sequence);
                scheduler.apply(id, Event::Sampled(token), now);
            }
        }
        while let Some(id) = scheduler.next_finished() {
            let end = scheduler.release(id).expect("finished");
            assert!(matches!(end, End::Finished(_)), "{id:?} was not let finish: {end:?}");
        }
        scheduler.check_invariants();
        steps += 1;
        assert!(steps < 100_000, "no end in sight");
    }
    (steps, scheduler.plan_stats().memory_pauses)
}

/// Teaches the estimate that completions are short, so that admission lets many in.
fn teach_short(scheduler: &mut Scheduler) {
    for _ in 0..64 {
        scheduler.lengths.observe(2, true);
    }
}

/// The estimate says two tokens, every sequence runs to its `max_tokens`: all of them get there.
#[test]
fn adversarial_lengths_never_run_out_of_blocks() {
    let mut pauses = 0;
    for seed in 1..=16_u64 {
        println!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut scheduler = Scheduler::new(limits(40, 1 + seed as usize % 4));
        teach_short(&mut scheduler);
        let now = Instant::now();
        for _ in 0..40 {
            let prompt_tokens = 1 + random.below(30) as usize;
            let max_tokens = 1 + random.below(160 - prompt_tokens as u64) as u32;
            let tenant = random.below(2);
            let share = Share { tenant, ..Share::default() };
            // Prompts of one tenant begin alike: much is shared.
            let admission = Admission { cache_salt: tenant, share, ..admission(prompt_tokens, max_tokens) };
            scheduler.submit(admission, now).expect("it may wait");
        }
        let accepted = |rows: usize| 1 + random.below(rows as u64) as usize;
        pauses += run_dry(&mut scheduler, accepted, |_| WORD).1;
        assert_eq!(scheduler.free_blocks(), 40);
    }
    assert!(pauses > 0, "the workloads were too kind to show anything");
}

/// When the estimate is right, more run at once than worst cases would fit, and hardly anybody pauses.
#[test]
fn a_right_estimate_lets_more_in_and_pauses_are_rare() {
    let now = Instant::now();
    let submit = |scheduler: &mut Scheduler| {
        for _ in 0..100 {
            scheduler.submit(admission(4, 120), now).expect("it may wait");
        }
    };
    // Each ends after eight tokens, of 120 that it might have had.
    let token = |sequence: &Sequence| if sequence.generated >= 8 { EOS } else { WORD };
    let mut worst = Scheduler::new(limits(64, 1));
    submit(&mut worst);
    let mut at_once = 0;
    while worst.admit_next(&mut (), now).is_some() {
        at_once += 1;
    }
    assert_eq!(at_once, 2, "31 blocks each, at worst");
    let mut scheduler = Scheduler::new(limits(64, 1));
    for _ in 0..64 {
        scheduler.lengths.observe(9, true);
    }
    submit(&mut scheduler);
    let mut at_once = 0;
    while let Some((id, _)) = scheduler.admit_next(&mut (), now) {
        scheduler.apply(id, Event::HandedOff(WORD), now);
        at_once += 1;
    }
    scheduler.check_invariants();
    assert!(at_once >= 8, "{at_once} at once");
    let (_, pauses) = run_dry(&mut scheduler, |_| 1, token);
    assert!(pauses * 20 <= 100 * 8, "{pauses} pauses in 800 turns");
}

/// The banker's order is as good as any: where it says no, every other order fails too.
#[test]
fn the_test_says_no_only_where_every_order_fails() {
    let mut verdicts = [0; 2];
    for seed in 1..=300_u64 {
        println!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut scheduler = Scheduler::new(limits(16, 1));
        let now = Instant::now();
        for _ in 0..6 {
            let share = Share::default();
            let tenant = random.below(2);
            let prompt_tokens = 1 + random.below(16) as usize;
            let admission = Admission {
                cache_salt: tenant,
                share,
                ..admission(prompt_tokens, 1 + random.below(64 - prompt_tokens as u64) as u32)
            };
            let Ok(id) = scheduler.submit(admission, now) else { continue };
            // Let in whatever the banker thinks of it: unsafe states are what is wanted here.
            if force(&mut scheduler, id).is_none() {
                continue;
            }
            scheduler.apply(id, Event::HandedOff(WORD), now);
        }
        let holders: Vec<_> =
            scheduler.sequences.values().filter(|sequence| sequence.table.is_some()).collect();
        let expect = some_order(&scheduler, &holders, &mut vec![false; holders.len()]);
        let found = scheduler.banker.safe(&scheduler.blocks, &scheduler.sequences, None);
        assert_eq!(found, expect);
        assert!(
            scheduler.banker.safe(&scheduler.blocks, &scheduler.sequences, None) == found,
            "it leaves nothing"
        );
        verdicts[usize::from(found)] += 1;
    }
    assert!(verdicts[0] > 20 && verdicts[1] > 20, "{verdicts:?}");
}

fn force(scheduler: &mut Scheduler, id: SequenceId) -> Option<()> {
    let sequence = scheduler.sequences.get_mut(&id)?;
    let State::Queued { prompt, cache_salt, .. } = &sequence.state else { return None };
    let blocks = prompt.len().div_ceil(LIMITS.block_tokens);
    let shared_max = prompt.len() / LIMITS.block_tokens;
    let reservation =
        engine::Reservation { salt: *cache_salt, prompt, shared_max, blocks, blocks_max: blocks };
    sequence.table = Some(scheduler.blocks.reserve(reservation, &mut ())?);
    sequence.tokens = prompt.to_vec();
    sequence.state = State::Waiting;
    scheduler.owed += sequence.owed_blocks();
    scheduler.holders += 1;
    Some(())
}

/// Whether the sequences that are not `done` can end one after another, in any order.
fn some_order(scheduler: &Scheduler, holders: &[&Sequence], done: &mut Vec<bool>) -> bool {
    if done.iter().all(|&done| done) {
        return true;
    }
    // Free now: what nobody holds that is not done.
    let mut held = vec![false; scheduler.limits.kv_blocks];
    for (sequence, _) in holders.iter().zip(done.iter()).filter(|&(_, &done)| !done) {
        sequence.block_table().iter().for_each(|block| held[block.0 as usize] = true);
    }
    let free = held.iter().filter(|&&held| !held).count();
    (0..holders.len()).any(|at| {
        let goes = !done[at] && holders[at].owed_blocks() <= free;
        goes && {
            done[at] = true;
            let found = some_order(scheduler, holders, done);
            done[at] = false;
            found
        }
    })
}

/// While somebody who runs is short of a block, nobody is let in: what ends feeds it first.
#[test]
fn whoever_is_short_comes_before_whoever_waits() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(limits(12, 1));
    teach_short(&mut scheduler);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let id = admit(&mut scheduler, Admission { cache_salt: ids.len() as u64, ..admission(8, 24) });
        let Some(id) = id else { break };
        scheduler.apply(id, Event::HandedOff(WORD), now);
        ids.push(id);
    }
    let waits = scheduler.submit(admission(1, 1), now).expect("it may wait");
    let mut batch = Vec::new();
    let mut was_short = false;
    let mut admitted = false;
    for _ in 0..200 {
        scheduler.schedule(&mut batch, &mut ());
        scheduler.check_invariants();
        if scheduler.short() > 0 {
            was_short = true;
            assert_eq!(scheduler.admit_next(&mut (), now), None);
        }
        for &id in &batch {
            scheduler.apply(id, Event::Sampled(WORD), now);
        }
        while let Some(id) = scheduler.next_finished() {
            scheduler.release(id);
        }
        if scheduler.short() == 0
            && let Some((id, _)) = scheduler.admit_next(&mut (), now)
        {
            admitted |= id == waits;
            scheduler.apply(id, Event::HandedOff(WORD), now);
        }
    }
    assert!(was_short && admitted && scheduler.is_empty(), "short {was_short}, admitted {admitted}");
}

/// One tenant floods the queue, another asks now and then: its requests wait for about one turn each, whatever is queued.
#[test]
fn a_flood_of_one_tenant_does_not_delay_another() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Limits { sequences_max: 1, ..limits(12, 1) });
    let of = |tenant| Admission { share: Share { tenant, ..Share::default() }, ..admission(4, 4) };
    for _ in 0..500 {
        scheduler.submit(of(1), now).expect("it may wait");
    }
    let mut turns_waited = Vec::new();
    for _ in 0..20 {
        let id = scheduler.submit(of(2), now).expect("it may wait");
        let mut turns = 0;
        loop {
            let (next, _) = scheduler.admit_next(&mut (), now).expect("the seat is free");
            scheduler.apply(next, Event::Failed(Failure::Cancelled), now);
            scheduler.release(next);
            if next == id {
                break;
            }
            turns += 1;
        }
        turns_waited.push(turns);
    }
    assert!(turns_waited.iter().all(|&turns| turns <= 2), "{turns_waited:?}");
}

/// Interactive requests without end: batch is let in once it is due, and again and again.
#[test]
fn batch_progresses_under_interactive_overload() {
    let start = Instant::now();
    let mut scheduler = Scheduler::new(Limits { sequences_max: 1, ..limits(12, 1) });
    let of = |priority| Admission { share: Share { priority, ..Share::default() }, ..admission(4, 4) };
    for _ in 0..10 {
        scheduler.submit(of(Priority::Batch), start).expect("it may wait");
    }
    let mut admitted = Vec::new();
    for ms in 0..80 {
        let now = start + Duration::from_millis(ms * 100);
        scheduler.submit(of(Priority::Interactive), now).expect("it may wait");
        scheduler.submit(of(Priority::Interactive), now).expect("it may wait");
        let (id, _) = scheduler.admit_next(&mut (), now).expect("the seat is free");
        let batch = scheduler.sequence(id).is_some_and(|sequence| sequence.share.priority == Priority::Batch);
        admitted.push((now.duration_since(start), batch));
        scheduler.apply(id, Event::Failed(Failure::Cancelled), now);
        scheduler.release(id);
    }
    let batch = |&&(at, batch): &&(Duration, bool)| batch && at <= BATCH_AGING_MAX + Duration::from_secs(3);
    assert!(admitted.iter().all(|&(at, batch)| !batch || at >= BATCH_AGING_MAX));
    assert!(admitted.iter().filter(batch).count() >= 7, "{admitted:?}");
}
