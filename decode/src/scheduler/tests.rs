use std::sync::Arc;

use engine::{Evicted, Source};
use model::{BlockDigest, BlockId, Stopping};
use proptest::prelude::*;
use proto::share::Share;

use super::*;
use crate::finish::FinishRule;

mod memory;

const EOS: TokenId = TokenId(1);
const WORD: TokenId = TokenId(50);
const LIMITS: Limits = Limits {
    sequences_max: 6,
    queue_max: 4,
    batch_max: 3,
    step_rows_max: 1,
    kv_blocks: 12,
    block_tokens: 4,
    reader_stall_max: Duration::from_millis(100),
    rerun_tokens: 1,
};

fn rule(max_tokens: u32) -> FinishRule {
    let stopping = Stopping { max_tokens, min_tokens: 0, ignore_eos: false, stop_token_ids: vec![] };
    FinishRule::new(&stopping, &[EOS])
}

/// Prompts of one tenant begin alike.
fn admission(prompt_tokens: usize, max_tokens: u32) -> Admission {
    let prompt = (0..prompt_tokens as u32).map(|token| TokenId(200 + token)).collect();
    let rule = rule(max_tokens);
    Admission { prompt, cache_salt: 0, share: Share::default(), rule, deadline: None, prefill_here: false }
}

/// Queues and admits; `None` when it has to wait.
fn admit(scheduler: &mut Scheduler, admission: Admission) -> Option<SequenceId> {
    let now = Instant::now();
    let id = scheduler.submit(admission, now).expect("it may wait");
    scheduler.admit_next(&mut (), now).map(|(admitted, _)| assert_eq!(admitted, id)).map(|()| id)
}

/// A scheduler with `count` running sequences of one block each.
fn running(count: u64, now: Instant) -> (Scheduler, Vec<SequenceId>) {
    let mut scheduler = Scheduler::new(LIMITS);
    let ids: Vec<_> = (0..count)
        .map(|index| {
            let id = admit(&mut scheduler, admission(1, 3)).expect("room");
            scheduler.apply(id, Event::Armed(TicketId(index)), now);
            scheduler.apply(id, Event::HandedOff(WORD), now);
            id
        })
        .collect();
    scheduler.check_invariants();
    (scheduler, ids)
}

fn end_of(scheduler: &mut Scheduler, id: SequenceId) -> End {
    assert_eq!(scheduler.next_finished(), Some(id));
    let end = scheduler.release(id).expect("finished");
    scheduler.check_invariants();
    end
}

#[test]
fn admission_takes_the_prompts_blocks_and_growth_the_others() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    let id = admit(&mut scheduler, admission(7, 8)).expect("room");
    let blocks = |scheduler: &Scheduler| scheduler.sequence(id).map(|sequence| sequence.block_table().len());
    assert_eq!((blocks(&scheduler), scheduler.free_blocks()), (Some(2), 10));
    scheduler.apply(id, Event::HandedOff(WORD), now);
    let mut batch = Vec::new();
    for expect in [2, 3, 3, 3, 3, 4, 4] {
        scheduler.schedule(&mut batch, &mut ());
        assert_eq!((batch.as_slice(), blocks(&scheduler)), (&[id][..], Some(expect)));
        scheduler.apply(id, Event::Sampled(WORD), now);
        scheduler.check_invariants();
    }
    assert!(matches!(end_of(&mut scheduler, id), End::Finished(Finish::Length)));
}

#[test]
fn what_fits_no_empty_pool_is_refused_and_so_is_one_too_many_in_the_queue() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    let never = scheduler.submit(admission(40, 9), now);
    assert_eq!(never, Err(NotAdmitted::NeverFits { blocks: 13, blocks_max: 12 }));
    admit(&mut scheduler, admission(40, 8)).expect("fits exactly");
    for _ in 0..4 {
        assert_eq!(admit(&mut scheduler, admission(5, 5)), None, "it could not reach its worst case");
        scheduler.check_invariants();
    }
    assert_eq!(scheduler.queued(Priority::Interactive), 4);
    assert_eq!(scheduler.submit(admission(1, 1), now), Err(NotAdmitted::QueueFull { queued: 4 }));
}

#[test]
fn seats_are_bounded_too_and_the_next_takes_the_first_that_is_free() {
    let now = Instant::now();
    let (mut scheduler, ids) = running(6, now);
    assert!(scheduler.free_blocks() > 0);
    let seventh = scheduler.submit(admission(1, 1), now).expect("it may wait");
    assert_eq!(scheduler.admit_next(&mut (), now), None);
    scheduler.apply(ids[2], Event::Stopped, now);
    assert!(matches!(end_of(&mut scheduler, ids[2]), End::Finished(Finish::StopString)));
    let later = now + Duration::from_millis(5);
    assert_eq!(scheduler.admit_next(&mut (), later), Some((seventh, Duration::from_millis(5))));
    scheduler.check_invariants();
}

#[test]
fn what_is_queued_can_be_cancelled_and_overdue() {
    let now = Instant::now();
    let (mut scheduler, _) = running(6, now);
    let cancelled = scheduler.submit(admission(1, 1), now).expect("it may wait");
    let deadline = Some(now + Duration::from_millis(20));
    let late = scheduler.submit(Admission { deadline, ..admission(1, 1) }, now).expect("it may wait");
    scheduler.apply(cancelled, Event::Failed(Failure::Cancelled), now);
    assert!(matches!(end_of(&mut scheduler, cancelled), End::Failed(Failure::Cancelled)));
    scheduler.tick(now + Duration::from_millis(20));
    assert!(matches!(end_of(&mut scheduler, late), End::Failed(Failure::DeadlineExceeded)));
    assert_eq!(scheduler.queued(Priority::Interactive), 0);
}

#[test]
fn a_sequence_runs_from_its_first_token_to_its_last() {
    let now = Instant::now();
    let (mut scheduler, ids) = running(1, now);
    let sequence = scheduler.sequence(ids[0]).expect("runs");
    assert_eq!(sequence.step_input(), Some((&WORD, 1)), "the first token is computed behind a prompt of one");
    assert_eq!(sequence.length(), 2);
    scheduler.apply(ids[0], Event::Sampled(TokenId(51)), now);
    assert_eq!(scheduler.sequence(ids[0]).and_then(Sequence::step_input), Some((&TokenId(51), 2)));
    scheduler.apply(ids[0], Event::Sampled(TokenId(52)), now);
    assert!(matches!(end_of(&mut scheduler, ids[0]), End::Finished(Finish::Length)));
    assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks);
}

#[test]
fn the_first_token_may_be_the_last() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    for (first, max_tokens, expect) in [(EOS, 3, Finish::EndOfSequence), (WORD, 1, Finish::Length)] {
        let id = admit(&mut scheduler, admission(5, max_tokens)).expect("room");
        scheduler.apply(id, Event::HandedOff(first), now);
        assert!(matches!(end_of(&mut scheduler, id), End::Finished(finish) if finish == expect));
    }
    assert!(scheduler.is_empty());
}

#[test]
fn more_sequences_than_fit_a_step_take_turns() {
    let (mut scheduler, ids) = running(5, Instant::now());
    let mut batch = Vec::new();
    let mut turns = Vec::new();
    for _ in 0..5 {
        scheduler.schedule(&mut batch, &mut ());
        assert_eq!(batch.len(), LIMITS.batch_max);
        turns.extend_from_slice(&batch);
    }
    for id in ids {
        assert_eq!(turns.iter().filter(|&&turn| turn == id).count(), 3, "15 turns among 5");
    }
}

#[test]
fn a_paused_sequence_keeps_its_blocks_and_loses_its_turns() {
    let now = Instant::now();
    let (mut scheduler, ids) = running(2, now);
    let mut batch = Vec::new();
    scheduler.apply(ids[0], Event::ReaderFull, now);
    scheduler.schedule(&mut batch, &mut ());
    assert_eq!(batch, [ids[1]]);
    assert_eq!((scheduler.running(), scheduler.runnable()), (2, 1));
    scheduler.apply(ids[0], Event::ReaderReady, now);
    scheduler.schedule(&mut batch, &mut ());
    assert_eq!(batch.len(), 2);
    scheduler.check_invariants();
}

#[test]
fn time_ends_deadlines_and_stalled_readers() {
    let now = Instant::now();
    let after = |ms| now + Duration::from_millis(ms);
    let (mut scheduler, ids) = running(1, now);
    scheduler.apply(ids[0], Event::ReaderFull, now);
    let late =
        admit(&mut scheduler, Admission { deadline: Some(after(50)), ..admission(1, 1) }).expect("room");
    assert_eq!(scheduler.next_deadline(), Some(after(50)));
    scheduler.tick(after(49));
    assert_eq!(scheduler.next_finished(), None);
    scheduler.tick(after(50));
    assert!(matches!(end_of(&mut scheduler, late), End::Failed(Failure::DeadlineExceeded)));
    assert_eq!(scheduler.next_deadline(), Some(after(100)));
    scheduler.tick(after(100));
    assert!(matches!(end_of(&mut scheduler, ids[0]), End::Failed(Failure::ReaderStalled(_))));
    assert_eq!(scheduler.next_deadline(), None);
}

#[test]
fn a_finished_sequence_holds_its_blocks_until_its_ticket_can_be_revoked() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    let id = admit(&mut scheduler, admission(8, 4)).expect("room");
    scheduler.apply(id, Event::Armed(TicketId(9)), now);
    assert!(scheduler.release(id).is_none(), "it has not finished");
    scheduler.apply(id, Event::Failed(Failure::Cancelled), now);
    assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks - 2);
    assert_eq!(scheduler.sequence(id).and_then(Sequence::ticket), Some(TicketId(9)));
    scheduler.apply(id, Event::HandedOff(WORD), now);
    assert!(matches!(end_of(&mut scheduler, id), End::Failed(Failure::Cancelled)), "the first end wins");
    assert_eq!(scheduler.by_ticket(TicketId(9)), None);
    assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks);
}

#[test]
fn the_next_turn_finds_what_the_last_one_left() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    // Six tokens and six more, of which the last has no row: eleven rows are two blocks and a bit.
    let first = admit(&mut scheduler, admission(6, 6)).expect("room");
    scheduler.apply(first, Event::HandedOff(WORD), now);
    let mut prompt = admission(6, 1).prompt.to_vec();
    prompt.push(WORD);
    for token in 60..65 {
        scheduler.apply(first, Event::Sampled(TokenId(token)), now);
        prompt.push(TokenId(token));
    }
    prompt.extend([TokenId(70), TokenId(71)]);
    let turn = Admission { prompt: prompt.into(), ..admission(0, 1) };
    end_of(&mut scheduler, first);
    assert_eq!((scheduler.free_blocks(), scheduler.cached_blocks()), (LIMITS.kv_blocks, 2));
    let other = Admission { cache_salt: 1, ..turn.clone() };
    let second = admit(&mut scheduler, turn).expect("room");
    assert_eq!(scheduler.sequence(second).map(Sequence::shared_blocks), Some(2));
    let other = admit(&mut scheduler, other).expect("room");
    assert_eq!(scheduler.sequence(other).map(Sequence::shared_blocks), Some(0), "another tenant");
    scheduler.check_invariants();
    let stats = scheduler.prefix_stats();
    assert_eq!((stats.tokens, stats.hit_tokens), (6 + 14 + 14, 8));
}

#[test]
fn a_prompt_of_full_blocks_is_shared_to_its_end_and_not_before_it_is_here() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    let shared = |scheduler: &Scheduler, id| scheduler.sequence(id).map(Sequence::shared_blocks);
    let one = admit(&mut scheduler, admission(8, 4)).expect("room");
    let two = admit(&mut scheduler, admission(8, 4)).expect("room");
    assert_eq!(shared(&scheduler, two), Some(0), "its KV is on the way");
    scheduler.apply(one, Event::HandedOff(WORD), now);
    let three = admit(&mut scheduler, admission(8, 4)).expect("room");
    assert_eq!(shared(&scheduler, three), Some(2));
    scheduler.apply(two, Event::HandedOff(WORD), now);
    scheduler.apply(three, Event::HandedOff(WORD), now);
    scheduler.check_invariants();
    assert_eq!(
        scheduler.free_blocks(),
        LIMITS.kv_blocks - 2,
        "one copy of the prompt, and no completion has been computed yet"
    );
}

/// One step of a random life. `usize` picks among the sequences that exist.
#[derive(Clone, Debug)]
enum Op {
    Submit {
        share: Share,
        prompt_tokens: usize,
        max_tokens: u32,
        deadline_ms: Option<u64>,
        prefill_here: bool,
    },
    Prefill(usize, TokenId),
    Admit,
    HandOff(usize, TokenId),
    Step(TokenId),
    Reader(usize, bool),
    Cancel(usize),
    Stop(usize),
    LeaseExpired(usize),
    HandoffAborted(usize),
    RestoreAsked(usize),
    Restored(usize),
    FailAll,
    Pass {
        ms: u64,
    },
    Release,
}

fn share() -> impl Strategy<Value = Share> {
    (0u64..2, 1u32..3, prop::sample::select(Priority::ALL.to_vec()))
        .prop_map(|(tenant, weight, priority)| Share { tenant, weight, priority })
}

fn op() -> impl Strategy<Value = Op> {
    let token = prop_oneof![1 => Just(EOS), 9 => (2u32..100).prop_map(TokenId)];
    prop_oneof![
        6 => (share(), 1usize..20, 1u32..30, prop::option::of(1u64..300), any::<bool>()).prop_map(
            |(share, prompt_tokens, max_tokens, deadline_ms, prefill_here)| {
                Op::Submit { share, prompt_tokens, max_tokens, deadline_ms, prefill_here }
            }
        ),
        4 => (1usize..30, token.clone()).prop_map(|(tokens_max, token)| Op::Prefill(tokens_max, token)),
        6 => Just(Op::Admit),
        6 => (any::<usize>(), token.clone()).prop_map(|(at, token)| Op::HandOff(at, token)),
        8 => token.prop_map(Op::Step),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(at, full)| Op::Reader(at, full)),
        2 => any::<usize>().prop_map(Op::Cancel),
        1 => any::<usize>().prop_map(Op::Stop),
        1 => any::<usize>().prop_map(Op::LeaseExpired),
        1 => any::<usize>().prop_map(Op::HandoffAborted),
        2 => any::<usize>().prop_map(Op::RestoreAsked),
        2 => any::<usize>().prop_map(Op::Restored),
        1 => Just(Op::FailAll),
        2 => (1u64..120).prop_map(|ms| Op::Pass { ms }),
        6 => Just(Op::Release),
    ]
}

/// What drives a scheduler in a random test, with its own record of who is alive.
struct World {
    scheduler: Scheduler,
    now: Instant,
    alive: Vec<SequenceId>,
    ended: usize,
    admitted: usize,
    next_ticket: u64,
    tier: Kept,
    restoring: BTreeSet<SequenceId>,
}

/// A tier that keeps everything, and loses every third block that it is asked for.
#[derive(Debug, Default)]
struct Kept {
    blocks: BTreeSet<BlockDigest>,
    asked: usize,
}

impl LowerTier for Kept {
    fn holds(&mut self, digest: &BlockDigest) -> bool {
        self.blocks.contains(digest)
    }

    fn keep(&mut self, _: BlockId, evicted: &Evicted) {
        self.blocks.insert(evicted.digest);
    }

    fn restore(&mut self, digest: &BlockDigest, _: BlockId) -> Option<Source> {
        self.asked += 1;
        if self.asked.is_multiple_of(3) {
            self.blocks.remove(digest);
        }
        self.blocks.contains(digest).then_some(Source::Host)
    }
}

impl World {
    fn new() -> Self {
        let scheduler = Scheduler::new(LIMITS);
        Self {
            scheduler,
            now: Instant::now(),
            alive: Vec::new(),
            ended: 0,
            admitted: 0,
            next_ticket: 0,
            tier: Kept::default(),
            restoring: BTreeSet::new(),
        }
    }

    fn event(&mut self, at: usize, event: Event) {
        if !self.alive.is_empty() {
            let id = self.alive[at % self.alive.len()];
            self.scheduler.apply(id, event, self.now);
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Submit { share, prompt_tokens, max_tokens, deadline_ms, prefill_here } => {
                let deadline = deadline_ms.map(|ms| self.now + Duration::from_millis(ms));
                let cache_salt = share.tenant;
                let admission = Admission {
                    cache_salt,
                    share,
                    deadline,
                    prefill_here,
                    ..admission(prompt_tokens, max_tokens)
                };
                if let Ok(id) = self.scheduler.submit(admission, self.now) {
                    self.admitted += 1;
                    self.alive.push(id);
                }
            }
            Op::Admit => {
                while let Some((id, _)) = self.scheduler.admit_next(&mut self.tier, self.now) {
                    self.scheduler.check_invariants();
                    assert!(!self.restoring.contains(&id), "{id:?}: its KV is on the way");
                    self.scheduler.apply(id, Event::Armed(TicketId(self.next_ticket)), self.now);
                    self.next_ticket += 1;
                }
            }
            Op::HandOff(at, first) => self.event(at, Event::HandedOff(first)),
            Op::Step(token) => {
                let mut batch = Vec::new();
                self.scheduler.schedule(&mut batch, &mut self.tier);
                assert!(batch.len() <= LIMITS.batch_max);
                let steppable = self.scheduler.runnable() - self.scheduler.prefilling.len();
                assert_eq!(batch.is_empty(), steppable == 0, "work is never left lying");
                self.scheduler.check_invariants();
                for id in batch {
                    let sequence = self.scheduler.sequence(id).expect("scheduled sequences exist");
                    let (_, position) = sequence.step_input().expect("scheduled sequences run");
                    let rows = sequence.block_table().len() * LIMITS.block_tokens;
                    assert!(position < rows, "position {position} has no block");
                    self.scheduler.apply(id, Event::Sampled(token), self.now);
                }
            }
            Op::Prefill(tokens_max, token) => {
                let mut chunks = Vec::new();
                self.scheduler.schedule_chunks(tokens_max, &mut chunks);
                let uncomputed = self.scheduler.uncomputed_tokens();
                let tokens: usize = chunks.iter().map(|chunk| chunk.tokens).sum();
                assert_eq!(tokens, uncomputed.min(tokens_max), "the budget is used");
                for Chunk { id, start, tokens, last } in chunks {
                    let sequence = self.scheduler.sequence(id).expect("scheduled sequences exist");
                    assert_eq!(last, start + tokens == sequence.prompt_tokens());
                    let rows = sequence.block_table().len() * LIMITS.block_tokens;
                    assert!(start + tokens <= rows, "a row has no block");
                    let shared = sequence.shared_blocks() * LIMITS.block_tokens;
                    assert!(start + LIMITS.rerun_tokens >= shared, "a found row is computed again");
                    self.scheduler.apply(id, Event::Computed(tokens), self.now);
                    self.scheduler.check_invariants();
                    if last {
                        self.scheduler.apply(id, Event::HandedOff(token), self.now);
                    }
                }
            }
            Op::Reader(at, true) => self.event(at, Event::ReaderFull),
            Op::Reader(at, false) => self.event(at, Event::ReaderReady),
            Op::Cancel(at) => self.event(at, Event::Failed(Failure::Cancelled)),
            Op::Stop(at) => self.event(at, Event::Stopped),
            Op::LeaseExpired(at) => self.event(at, Event::Failed(Failure::LeaseExpired)),
            Op::HandoffAborted(at) => {
                self.event(at, Event::Failed(Failure::HandoffAborted(Arc::from("gone"))))
            }
            Op::RestoreAsked(at) => {
                if let Some(&id) = self.alive.get(at % self.alive.len().max(1)) {
                    if self.scheduler.sequence(id).is_some_and(Sequence::is_queued) {
                        self.restoring.insert(id);
                    }
                    self.scheduler.missing(id);
                    self.scheduler.restore_asked(id);
                }
            }
            Op::Restored(at) => {
                if let Some(&id) = self.alive.get(at % self.alive.len().max(1)) {
                    self.restoring.remove(&id);
                    self.scheduler.restored(id, self.now);
                }
            }
            Op::FailAll => self.scheduler.fail_all(&Failure::Stopping),
            Op::Pass { ms } => {
                self.now += Duration::from_millis(ms);
                self.scheduler.tick(self.now);
                assert!(self.scheduler.next_deadline().is_none_or(|at| at > self.now), "ticked, yet overdue");
            }
            Op::Release => self.release(),
        }
    }

    fn release(&mut self) {
        while let Some(id) = self.scheduler.next_finished() {
            self.scheduler.release(id).expect("listed as finished");
            self.alive.retain(|&alive| alive != id);
            self.ended += 1;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: the books balance after every event, and after the last end nothing is held.
    #[test]
    fn every_life_returns_to_the_baseline(ops in prop::collection::vec(op(), 1..160)) {
        let mut world = World::new();
        for op in ops {
            world.run(op);
            world.scheduler.check_invariants();
        }
        world.run(Op::FailAll);
        world.release();
        world.scheduler.check_invariants();
        prop_assert!(world.scheduler.is_empty());
        prop_assert_eq!(world.ended, world.admitted, "every admitted sequence ends exactly once");
        prop_assert_eq!(world.scheduler.free_blocks(), LIMITS.kv_blocks);
        prop_assert_eq!(world.scheduler.short(), 0);
    }
}

#[test]
fn a_prompt_that_is_computed_here_takes_chunks_and_finds_what_others_left() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(LIMITS);
    let here = |prompt_tokens| Admission { prefill_here: true, ..admission(prompt_tokens, 3) };
    let first = admit(&mut scheduler, here(10)).expect("room");
    let second = admit(&mut scheduler, here(10)).expect("room");
    let mut chunks = Vec::new();
    let mut run = |scheduler: &mut Scheduler, tokens_max| {
        scheduler.schedule_chunks(tokens_max, &mut chunks);
        for chunk in &chunks {
            scheduler.apply(chunk.id, Event::Computed(chunk.tokens), now);
            if chunk.last {
                scheduler.apply(chunk.id, Event::HandedOff(WORD), now);
            }
            scheduler.check_invariants();
        }
        chunks.iter().map(|chunk| (chunk.id, chunk.start, chunk.tokens, chunk.last)).collect::<Vec<_>>()
    };
    assert_eq!((scheduler.runnable(), scheduler.uncomputed_tokens()), (2, 20));
    assert_eq!(run(&mut scheduler, 6), [(first, 0, 6, false)]);
    assert_eq!(run(&mut scheduler, 6), [(first, 6, 4, true), (second, 0, 2, false)]);
    scheduler.apply(second, Event::Failed(Failure::Cancelled), now);
    assert_eq!((scheduler.running(), scheduler.uncomputed_tokens()), (1, 0));
    assert!(matches!(end_of(&mut scheduler, second), End::Failed(Failure::Cancelled)));
    // Two full blocks of four are there; the row before them is run again for its hidden state.
    let third = admit(&mut scheduler, here(10)).expect("room");
    assert_eq!(run(&mut scheduler, 100), [(third, 7, 3, true)]);
    // A prompt of whole blocks computes its last one.
    let fourth = admit(&mut scheduler, here(8)).expect("room");
    assert_eq!(run(&mut scheduler, 100), [(fourth, 3, 5, true)]);
}
