use std::collections::{HashMap, HashSet};
use std::time::Duration;

use engine::{Evicted, Source};
use model::BlockDigest;
use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    queue_requests_max: 6,
    queue_tokens_max: 900,
    active_max: 4,
    step_tokens_max: 100,
    block_tokens: 64,
    kv_blocks: 12,
    rerun_tokens: 0,
};

/// A prompt whose tokens are its own.
fn arrival(id: u64, prompt_tokens: usize) -> Arrival {
    prompt(id, (0..prompt_tokens as u32).map(|token| TokenId(1000 * (1 + id as u32) + token)).collect())
}

fn prompt(id: u64, prompt: Vec<TokenId>) -> Arrival {
    let request_id = format!("request-{id}").into();
    let share = Share::default();
    Arrival {
        id: SequenceId(id),
        request_id,
        cache_salt: 0,
        share,
        prompt: prompt.into(),
        recompute: false,
        deadline: None,
    }
}

/// What can happen to a scheduler, in any order.
#[derive(Debug, Clone)]
enum Event {
    Submit {
        /// Prompts of one tenant and family begin alike.
        tenant: u64,
        family: u32,
        prompt_tokens: usize,
        deadline_ms: Option<u64>,
    },
    /// Forms a step (when none runs) or ends the running one.
    Step,
    StepFails,
    /// Cancels or ends the hand-off of one of the sequences submitted so far.
    Remove(prop::sample::Index),
    RestoreAsked(prop::sample::Index),
    Restored(prop::sample::Index),
    Elapse {
        ms: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0u64..2, 0u32..3, 0usize..900, prop::option::of(0u64..60)).prop_map(
            |(tenant, family, prompt_tokens, deadline_ms)| {
                Event::Submit { tenant, family, prompt_tokens, deadline_ms }
            }
        ),
        6 => Just(Event::Step),
        1 => Just(Event::StepFails),
        3 => any::<prop::sample::Index>().prop_map(Event::Remove),
        2 => (1u64..40).prop_map(|ms| Event::Elapse { ms }),
        2 => any::<prop::sample::Index>().prop_map(Event::RestoreAsked),
        2 => any::<prop::sample::Index>().prop_map(Event::Restored),
    ]
}

/// A tier that keeps everything, and loses every third block that it is asked for.
#[derive(Debug, Default)]
struct Kept {
    blocks: HashSet<BlockDigest>,
    asked: usize,
    restored: u64,
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
        let here = self.blocks.contains(digest);
        self.restored += u64::from(here);
        here.then_some(Source::Host)
    }
}

/// The scheduler and what an observer knows about it.
struct World {
    tier: Kept,
    /// Those that a disk was asked for, and those that have ever been: their place in the queue is another.
    restoring: HashSet<SequenceId>,
    were_restoring: HashSet<SequenceId>,
    rerun_tokens: usize,
    scheduler: Scheduler,
    step: Vec<Chunk>,
    now: Instant,
    /// Prompt length and tokens computed of each sequence that is still in.
    known: HashMap<SequenceId, (usize, usize)>,
    /// The longest prompts computed, by tenant and family: nothing beyond can be cached.
    computed: HashMap<(u64, u32), usize>,
    families: HashMap<SequenceId, (u64, u32)>,
    submitted: Vec<SequenceId>,
}

impl World {
    fn new(rerun_tokens: usize) -> Self {
        Self {
            tier: Kept::default(),
            restoring: HashSet::new(),
            were_restoring: HashSet::new(),
            rerun_tokens,
            scheduler: Scheduler::new(Limits { rerun_tokens, ..LIMITS }),
            step: Vec::new(),
            now: Instant::now(),
            known: HashMap::new(),
            computed: HashMap::new(),
            families: HashMap::new(),
            submitted: Vec::new(),
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Submit { tenant, family, prompt_tokens, deadline_ms } => {
                self.submit((tenant, family), prompt_tokens, deadline_ms);
            }
            Event::Step if self.step.is_empty() => self.form_step(),
            Event::Step => {
                for chunk in self.step.drain(..).collect::<Vec<_>>() {
                    if let Some((_, computed)) = self.known.get_mut(&chunk.id) {
                        *computed += chunk.tokens;
                    }
                    let longest = self.computed.entry(self.families[&chunk.id]).or_default();
                    *longest = (*longest).max(chunk.start + chunk.tokens);
                    self.scheduler.complete(&[chunk]);
                }
            }
            Event::StepFails => {
                for chunk in &self.step {
                    self.known.remove(&chunk.id);
                }
                self.scheduler.fail(&self.step);
                self.step.clear();
            }
            Event::Remove(index) if !self.submitted.is_empty() => {
                self.remove(*index.get(&self.submitted));
            }
            Event::RestoreAsked(index) if !self.submitted.is_empty() => {
                let id = *index.get(&self.submitted);
                // Unknown and admitted ones are ignored.
                if self.known.contains_key(&id) && self.scheduler.block_table(id).is_empty() {
                    self.restoring.insert(id);
                    self.were_restoring.insert(id);
                }
                let missing = self.scheduler.missing(id).len();
                assert!(
                    missing * LIMITS.block_tokens < self.known.get(&id).map_or(1, |known| known.0.max(1))
                );
                self.scheduler.restore_asked(id);
            }
            Event::Restored(index) if !self.submitted.is_empty() => {
                let id = *index.get(&self.submitted);
                self.restoring.remove(&id);
                self.scheduler.restored(id, self.now);
            }
            Event::Remove(_) | Event::RestoreAsked(_) | Event::Restored(_) => {}
            Event::Elapse { ms } => {
                self.now += Duration::from_millis(ms);
                for id in self.scheduler.overdue(self.now) {
                    self.remove(id);
                }
            }
        }
    }

    fn submit(&mut self, family: (u64, u32), prompt_tokens: usize, deadline_ms: Option<u64>) {
        let id = SequenceId(self.submitted.len() as u64);
        let tokens = (0..prompt_tokens as u32).map(|token| TokenId(1000 * family.1 + token));
        let priority = Priority::ALL[family.1 as usize % 2];
        let share = Share { tenant: family.0, weight: 1 + family.1, priority };
        let mut arrival = Arrival { cache_salt: family.0, share, ..prompt(id.0, tokens.collect()) };
        self.families.insert(id, family);
        arrival.deadline = deadline_ms.map(|ms| self.now + Duration::from_millis(ms));
        let outcome = self.scheduler.submit(arrival, self.now);
        self.submitted.push(id);
        match outcome {
            Ok(()) => drop(self.known.insert(id, (prompt_tokens, 0))),
            Err(Refusal::Empty) => assert_eq!(prompt_tokens, 0),
            Err(Refusal::TooLong { pool_tokens, .. }) => assert!(prompt_tokens > pool_tokens),
            Err(Refusal::QueueRequests { .. } | Refusal::QueueTokens { .. }) => {
                assert!(self.scheduler.waiting() > 0, "an empty queue refuses nobody");
            }
        }
    }

    fn form_step(&mut self) {
        self.scheduler.schedule(&mut self.step, &mut self.tier, self.now);
        let restored = self.scheduler.prefix_stats().host_hit_tokens;
        assert_eq!(restored, self.tier.restored * LIMITS.block_tokens as u64);
        assert!(self.step.iter().all(|chunk| !self.restoring.contains(&chunk.id)), "its KV is on the way");
        let tokens: usize = self.step.iter().map(|chunk| chunk.tokens).sum();
        assert!(tokens <= LIMITS.step_tokens_max);
        for chunk in &self.step {
            let cached = self.scheduler.cached_tokens(chunk.id);
            let longest = self.computed.get(&self.families[&chunk.id]).copied().unwrap_or(0);
            assert!(cached <= longest, "{cached} tokens found, {longest} computed");
            let (prompt_tokens, computed) = self.known.get_mut(&chunk.id).expect("known");
            let first = *computed == 0;
            if first {
                *computed = cached.saturating_sub(self.rerun_tokens);
            }
            assert!(chunk.tokens > 0);
            assert_eq!(chunk.start, *computed, "each token is computed once, in order");
            assert_eq!(chunk.last, chunk.start + chunk.tokens == *prompt_tokens);
        }
        // Within a tenant's class prompts are admitted in order of arrival.
        for (id, family) in &self.families {
            let waits =
                |id: &SequenceId| self.known.contains_key(id) && self.scheduler.block_table(*id).is_empty();
            let class = |(tenant, family): (u64, u32)| (tenant, family % 2);
            let earlier = |(other, whose): (&SequenceId, &(u64, u32))| {
                let moved = self.were_restoring.contains(other);
                class(*whose) == class(*family) && other < id && waits(other) && !moved
            };
            assert!(waits(id) || !self.known.contains_key(id) || !self.families.iter().any(earlier));
        }
    }

    fn remove(&mut self, id: SequenceId) {
        self.known.remove(&id);
        self.restoring.remove(&id);
        self.scheduler.remove(id);
    }

    /// Without new events everything that waits is computed, and then nothing is held.
    fn drain(&mut self) {
        for id in std::mem::take(&mut self.restoring) {
            self.scheduler.restored(id, self.now);
            self.scheduler.check_invariants();
        }
        for _ in 0..200 {
            self.apply(Event::Step);
            self.scheduler.check_invariants();
            let computed = self.known.iter().filter(|(_, (prompt, done))| prompt == done);
            for id in computed.map(|(&id, _)| id).collect::<Vec<_>>() {
                self.remove(id);
            }
        }
        assert!(self.known.is_empty(), "left behind: {:?}", self.known);
        assert_eq!(self.scheduler.free_blocks(), LIMITS.kv_blocks);
        assert_eq!(self.scheduler.uncomputed_tokens(), 0);
        assert_eq!((self.scheduler.waiting(), self.scheduler.active()), (0, 0));
    }
}

proptest! {
    // A failing stream is printed, shrunk, together with the seed that reproduces it.
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn books_balance_under_any_event_stream(
        events in prop::collection::vec(event(), 1..120),
        rerun_tokens in 0usize..2,
    ) {
        let mut world = World::new(rerun_tokens);
        for event in events {
            world.apply(event);
            world.scheduler.check_invariants();
        }
        world.drain();
    }
}

fn step_of(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize, bool)> {
    let mut step = Vec::new();
    scheduler.schedule(&mut step, &mut (), Instant::now());
    scheduler.complete(&step);
    let row = |chunk: &Chunk| (chunk.id.0, chunk.start, chunk.tokens, chunk.last);
    step.iter().map(row).collect()
}

#[test]
fn a_step_is_filled_across_sequences_in_order_of_arrival() {
    let mut scheduler = Scheduler::new(LIMITS);
    for (id, prompt_tokens) in [(0, 130), (1, 20), (2, 100)] {
        scheduler.submit(arrival(id, prompt_tokens), Instant::now()).expect("room");
    }
    // The second is less than half of the first and goes beside it; the third is not.
    assert_eq!(step_of(&mut scheduler), [(0, 0, 80, false), (1, 0, 20, true)]);
    assert_eq!(step_of(&mut scheduler), [(0, 80, 50, true), (2, 0, 50, false)]);
    assert_eq!(step_of(&mut scheduler), [(2, 50, 50, true)]);
    assert_eq!(step_of(&mut scheduler), []);
}

#[test]
fn a_long_prompt_keeps_half_of_every_step_and_short_ones_get_the_other() {
    let mut scheduler = Scheduler::new(Limits { kv_blocks: 40, queue_tokens_max: 3000, ..LIMITS });
    scheduler.submit(arrival(0, 1000), Instant::now()).expect("room");
    let mut next = 1;
    let mut steps = 0;
    while scheduler.block_table(SequenceId(0)).is_empty() || scheduler.remaining(SequenceId(0)) > 0 {
        // Short ones without end, more of them than half a step takes.
        while scheduler.waiting() < 4 {
            scheduler.submit(arrival(next, 30), Instant::now()).expect("room");
            next += 1;
        }
        let step = step_of(&mut scheduler);
        scheduler.check_invariants();
        assert_eq!(step.iter().map(|&(.., tokens, _)| tokens).sum::<usize>(), 100);
        assert!((step[0].0, step[0].2) >= (0, 50), "{step:?}");
        for &(id, .., last) in step.iter().filter(|row| row.0 != 0) {
            if last {
                scheduler.remove(SequenceId(id));
            }
        }
        steps += 1;
    }
    assert!(next > 15, "{next} short ones went by");
    assert!(steps <= 20, "twice as long as alone, not {steps} steps");
}

/// Logits of each of a prompt's tokens take memory: few of them are in one step, and others use the rest of it.
#[test]
fn prompts_with_something_wanted_of_each_token_take_a_few_tokens_of_a_step() {
    let limits =
        Limits { step_tokens_max: 1000, queue_tokens_max: 9000, kv_blocks: 99, active_max: 9, ..LIMITS };
    let mut scheduler = Scheduler::new(limits);
    for (id, tokens, recompute) in [(0, 600, true), (1, 300, true), (2, 700, false), (3, 10, true)] {
        scheduler.submit(Arrival { recompute, ..arrival(id, tokens) }, Instant::now()).expect("room");
    }
    let mut computed = [0; 4];
    let mut steps = Vec::new();
    loop {
        let step = step_of(&mut scheduler);
        scheduler.check_invariants();
        if step.is_empty() {
            break;
        }
        let wanted: usize = step.iter().filter(|chunk| chunk.0 != 2).map(|chunk| chunk.2).sum();
        assert!(wanted <= step::WANTED_TOKENS_MAX, "{step:?}");
        for &(id, start, tokens, _) in &step {
            assert_eq!(start, computed[id as usize], "{step:?}");
            computed[id as usize] += tokens;
        }
        steps.push(step);
    }
    assert_eq!(computed, [600, 300, 700, 10]);
    // 910 tokens, 256 a step; the prompt of which nothing is wanted is through at once.
    assert_eq!(steps.len(), 4, "{steps:?}");
    assert!(steps[0].contains(&(2, 0, 700, true)), "{steps:?}");
}

#[test]
fn tenants_share_by_prompt_tokens_and_batch_waits_until_it_has_aged() {
    let start = Instant::now();
    let limits = Limits { queue_requests_max: 100, queue_tokens_max: 100_000, kv_blocks: 100, ..LIMITS };
    let mut scheduler = Scheduler::new(limits);
    let mut id = 0;
    let mut submit = |scheduler: &mut Scheduler, share, prompt_tokens, now| {
        scheduler.submit(Arrival { share, ..arrival(id, prompt_tokens) }, now).expect("room");
        id += 1;
        id - 1
    };
    let of = |tenant, priority| Share { tenant, weight: 1, priority };
    // One tenant asks for much at once, one for little, one in batch.
    let batch: Vec<_> = (0..5).map(|_| submit(&mut scheduler, of(3, Priority::Batch), 100, start)).collect();
    let heavy: Vec<_> =
        (0..20).map(|_| submit(&mut scheduler, of(1, Priority::Interactive), 100, start)).collect();
    let light: Vec<_> =
        (0..20).map(|_| submit(&mut scheduler, of(2, Priority::Interactive), 50, start)).collect();
    let mut run = |now| {
        let mut step = Vec::new();
        scheduler.schedule(&mut step, &mut (), now);
        scheduler.complete(&step);
        for chunk in step.iter().filter(|chunk| chunk.last) {
            scheduler.remove(chunk.id);
        }
        scheduler.check_invariants();
        let tokens = |ids: &[u64]| -> usize {
            step.iter().filter(|chunk| ids.contains(&chunk.id.0)).map(|chunk| chunk.tokens).sum()
        };
        [tokens(&heavy), tokens(&light), tokens(&batch)]
    };
    let sum =
        |steps: Vec<[usize; 3]>| steps.iter().fold([0; 3], |a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2]]);
    let before = sum((0..8).map(|_| run(start)).collect());
    assert_eq!(before[2], 0, "batch has not aged");
    assert!(before[0].abs_diff(before[1]) <= 150, "{before:?}");
    let after = sum((0..8).map(|_| run(start + BATCH_AGING_MAX)).collect());
    assert!((150..=300).contains(&after[2]), "a quarter is batch's: {after:?}");
}

#[test]
fn nobody_overtakes_a_head_that_lacks_blocks() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(arrival(0, 100), Instant::now()).expect("room");
    step_of(&mut scheduler);
    // 12 blocks needed, 10 free: sequence 0 is computed but not handed off yet.
    scheduler.submit(arrival(1, 768), Instant::now()).expect("room");
    scheduler.submit(arrival(2, 10), Instant::now()).expect("room");
    assert_eq!(step_of(&mut scheduler), []);
    scheduler.remove(SequenceId(0));
    assert_eq!(step_of(&mut scheduler), [(1, 0, 100, false)]);
}

#[test]
fn blocks_of_a_running_step_are_freed_only_when_it_ends() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(arrival(0, 200), Instant::now()).expect("room");
    let mut step = Vec::new();
    scheduler.schedule(&mut step, &mut (), Instant::now());
    scheduler.remove(SequenceId(0));
    assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks - 4);
    scheduler.complete(&step);
    assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks);
    assert_eq!(step_of(&mut scheduler), []);
}

#[test]
fn bounds_refuse_with_their_reason() {
    let mut scheduler = Scheduler::new(LIMITS);
    assert_eq!(scheduler.submit(arrival(0, 0), Instant::now()), Err(Refusal::Empty));
    let too_long = Refusal::TooLong { prompt_tokens: 769, pool_tokens: 768 };
    assert_eq!(scheduler.submit(arrival(1, 769), Instant::now()), Err(too_long));
    scheduler.submit(arrival(2, 700), Instant::now()).expect("room");
    let full = Refusal::QueueTokens { waiting: 700 };
    assert_eq!(scheduler.submit(arrival(3, 201), Instant::now()), Err(full));
    for id in 4..9 {
        scheduler.submit(arrival(id, 1), Instant::now()).expect("room");
    }
    let full = Refusal::QueueRequests { waiting: 6 };
    assert_eq!(scheduler.submit(arrival(9, 1), Instant::now()), Err(full));
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut scheduler = Scheduler::new(LIMITS);
    let tokens: Vec<TokenId> = (0..130).map(TokenId).collect();
    let mut ask = |id, tokens: &[TokenId], salt| {
        scheduler
            .submit(Arrival { cache_salt: salt, ..prompt(id, tokens.to_vec()) }, Instant::now())
            .expect("room");
        let mut chunks = Vec::new();
        loop {
            let step = step_of(&mut scheduler);
            if step.is_empty() {
                break;
            }
            chunks.extend(step.iter().map(|&(_, start, tokens, _)| (start, tokens)));
        }
        let cached = scheduler.cached_tokens(SequenceId(id));
        scheduler.check_invariants();
        scheduler.remove(SequenceId(id));
        assert_eq!(scheduler.free_blocks(), LIMITS.kv_blocks, "cached blocks are free");
        (cached, chunks)
    };
    assert_eq!(ask(0, &tokens, 0), (0, vec![(0, 100), (100, 30)]));
    assert_eq!(ask(1, &tokens, 0), (128, vec![(128, 2)]));
    assert_eq!(ask(2, &tokens[..128], 0), (64, vec![(64, 64)]), "the last token is always computed");
    assert_eq!(ask(3, &tokens[..64], 0), (0, vec![(0, 64)]));
    assert_eq!(ask(4, &tokens, 1), (0, vec![(0, 100), (100, 30)]), "another tenant's");
    let stats = scheduler.prefix_stats();
    assert_eq!((stats.tokens, stats.hit_tokens, stats.evictions), (130 * 3 + 128 + 64, 192, 0));
}
