use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use crossbeam_channel::{Sender, bounded};
use engine::{Engine, ExpertBatch, Experts, ExpertsError, LocalExperts, Sampled};
use fabric::{Fabric, Hub};
use kvtransfer::{KvTicket, SenderEvent};
use model::{BlockId, TokenId};
use proto::sequence::Sequence;
use tokio_stream::Stream;
use tonic::{Code, Status};

use super::*;
use crate::finish::Finish;
use crate::outbox::{self, Doorbell, Inbox};
use crate::scheduler::Limits;
use support::{KV_BLOCKS, Prefill, engine, engine_with, request, single_run};

#[path = "steady.rs"]
mod steady;
#[path = "../../tests/support/mod.rs"]
mod support;

mod drafts;
mod prompts;

/// Enough for a whole completion in these tests.
const EVENTS_MAX: usize = 64;
const BATCH_MAX: usize = 4;
const QUEUE_MAX: usize = 8;
const DRAFTS: usize = 3;
/// Prompt tokens between two steps: a prompt of any length takes several rounds.
const PREFILL_TOKENS: usize = 24;
const LEASE: Duration = Duration::from_secs(3600);

/// Experts that fail while told to.
struct FlakyExperts {
    experts: LocalExperts,
    failing: Arc<AtomicBool>,
}

impl Experts for FlakyExperts {
    fn dispatch(&mut self, cpu: &compute::Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(ExpertsError::Unavailable {
                worker: "expert-1".to_owned(),
                detail: "gone".to_owned(),
            });
        }
        self.experts.dispatch(cpu, batch)
    }

    fn combine(&mut self, cpu: &compute::Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        self.experts.combine(cpu, out)
    }
}

/// A worker whose rounds the test makes itself, and a prefill side on the same in-process fabric.
struct Rig {
    worker: Worker,
    prefill: Prefill,
    submit: Sender<Submission>,
    finish: Sender<TicketId>,
    doorbell: Doorbell,
    drain: Sender<Instant>,
    failing: Arc<AtomicBool>,
}

impl Rig {
    fn new() -> Self {
        let failing = Arc::new(AtomicBool::new(false));
        let flaky = |experts: LocalExperts| FlakyExperts { experts, failing: Arc::clone(&failing) };
        let engine = engine_with(|experts| Box::new(flaky(experts)));
        Self::with(engine, support::engine(), Arc::clone(&failing))
    }

    /// One for decode and one for prefill.
    fn with(engine: Engine, prefill: Engine, failing: Arc<AtomicBool>) -> Self {
        let hub = Hub::new();
        let end = |worker: &str, incarnation| {
            Fabric::in_process(&hub, worker, incarnation, fabric::Limits::default()).expect("a free name")
        };
        let receiver = support::receiver(end("decode-0", 7), &engine, LEASE);
        let prefill = Prefill::with(end("prefill-0", 8), prefill);
        let limits = Limits {
            sequences_max: 8,
            queue_max: QUEUE_MAX,
            batch_max: BATCH_MAX,
            step_rows_max: 1 + DRAFTS,
            kv_blocks: KV_BLOCKS,
            block_tokens: engine.kv_layout().block_tokens,
            reader_stall_max: Duration::from_secs(3600),
            rerun_tokens: 1,
        };
        let intake = Arc::new(Intake::new(engine.config(), engine.fingerprint().clone()));
        let (submit, submissions) = bounded(16);
        let (doorbell, heard) = Doorbell::new();
        let (drain, drain_by) = bounded(1);
        let (finish, finishes) = bounded(16);
        let inputs = Inputs { submissions, finishes, doorbell: heard, drain: drain_by };
        let metrics = Metrics::new(KV_BLOCKS);
        let scheduler = Scheduler::new(limits);
        let worker = {
            let speculation = Some(Speculation::new(DRAFTS));
            Worker::new(Parts {
                engine,
                tier: KvTier::none(),
                scheduler,
                receiver,
                intake,
                inputs,
                metrics,
                speculation,
                prefill_tokens_max: PREFILL_TOKENS,
            })
        };
        Self { worker, prefill, submit, finish, doorbell, drain, failing }
    }

    /// One round; what it leaves behind is consistent.
    fn round(&mut self) -> bool {
        let goes_on = self.worker.receive();
        self.worker.schedule();
        let outcome = self.worker.step();
        self.worker.postprocess(outcome);
        self.worker.prefill();
        self.worker.scheduler.check_invariants();
        assert_eq!(
            self.worker.scheduler.is_empty(),
            self.worker.seats.is_empty(),
            "every sequence has its seat"
        );
        goes_on
    }

    fn submit(&self, sequence: &Sequence, events_max: usize) -> Inbox {
        self.submit_to(sequence, events_max, false)
    }

    fn submit_to(&self, sequence: &Sequence, events_max: usize, prefill_here: bool) -> Inbox {
        let wire = sequence.to_wire();
        let checked = self.worker.intake.check(Some(&wire), Instant::now()).expect("a sound request");
        let checked = checked.prefill_here(prefill_here);
        let (outbox, inbox) = outbox::channel(events_max, self.doorbell.clone());
        assert!(self.submit.try_send(checked.submit_with(outbox)).is_ok());
        inbox
    }

    /// Submits and takes the ticket.
    fn reserve(&mut self, sequence: &Sequence, events_max: usize) -> (Inbox, KvTicket) {
        let mut inbox = self.submit(sequence, events_max);
        self.round();
        match next(&mut inbox) {
            Some(SequenceEvent::Ticket(ticket)) => (inbox, *ticket),
            other => panic!("{other:?} instead of a ticket"),
        }
    }

    /// Submits and hands the KV over: the sequence runs from the next round on.
    fn start(&mut self, sequence: &Sequence) -> (Inbox, Sampled) {
        let (inbox, ticket) = self.reserve(sequence, EVENTS_MAX);
        let first = self.prefill.push(sequence, ticket);
        (inbox, first)
    }

    fn rounds_until_empty(&mut self) {
        while !self.worker.scheduler.is_empty() {
            self.round();
        }
        self.assert_baseline();
    }

    fn assert_baseline(&self) {
        assert_eq!(self.worker.scheduler.free_blocks(), KV_BLOCKS, "every block is free again");
        assert!(self.worker.seats.is_empty());
    }
}

/// The next event, if there is one by now.
fn next(inbox: &mut Inbox) -> Option<SequenceEvent> {
    match Pin::new(inbox).poll_next(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(event) => event,
        Poll::Pending => None,
    }
}

/// Tokens up to the end, and the end.
fn drain(inbox: &mut Inbox) -> (Vec<Sampled>, SequenceEvent) {
    let mut tokens = Vec::new();
    loop {
        match next(inbox).expect("an end") {
            SequenceEvent::HandedOff { .. } => {
                assert!(tokens.is_empty(), "the hand-off comes before the tokens")
            }
            SequenceEvent::Token(token, _) => tokens.push(token),
            end => return (tokens, end),
        }
    }
}

fn failure_code(end: SequenceEvent) -> Code {
    match end {
        SequenceEvent::Failed(failure) => Status::from(failure).code(),
        other => panic!("{other:?} instead of a failure"),
    }
}

/// Equal as bits: `==` on floats would let -0.0 and 0.0 pass for each other.
fn assert_same_bits(found: &[Sampled], expect: &[Sampled]) {
    let bits = |sampled: &Sampled| {
        let top: Vec<_> = sampled.top.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect();
        (sampled.token, sampled.logprob.to_bits(), top)
    };
    assert_eq!(found.iter().map(bits).collect::<Vec<_>>(), expect.iter().map(bits).collect::<Vec<_>>());
}

#[test]
fn a_handed_off_batch_gives_the_bits_of_single_runs() {
    let mut rig = Rig::new();
    // A block and a bit, whole blocks only, less than a block, and one that crosses a block while it decodes.
    let shapes = [(70, 12), (128, 9), (5, 20), (60, 10)];
    let mut oracle = engine();
    let mut running = Vec::new();
    for (seed, (prompt_tokens, max_tokens)) in (1..).zip(shapes) {
        let sequence = request(&oracle, seed, prompt_tokens, max_tokens);
        let (inbox, first) = rig.start(&sequence);
        running.push((sequence, inbox, first));
    }
    rig.rounds_until_empty();
    for (sequence, mut inbox, first) in running {
        let (tokens, end) = drain(&mut inbox);
        assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }), "{end:?}");
        let expect = single_run(&mut oracle, &sequence);
        assert_same_bits(&[first], &expect[..1]);
        assert_same_bits(&tokens, &expect[1..]);
    }
    let committed = rig.prefill.events(4);
    assert!(committed.iter().all(|event| matches!(event, SenderEvent::Committed { .. })), "{committed:?}");
}

/// The round in which the last block is committed is the round whose step runs the sequence: nothing is waited for.
#[test]
fn a_sequence_is_stepped_in_the_round_that_commits_it() {
    let mut rig = Rig::new();
    let sequence = request(&engine(), 1, 70, 3);
    let (mut inbox, _first) = rig.start(&sequence);
    assert!(next(&mut inbox).is_none(), "nothing is committed yet");
    rig.round();
    assert!(matches!(next(&mut inbox), Some(SequenceEvent::HandedOff { .. })));
    assert!(matches!(next(&mut inbox), Some(SequenceEvent::Token(..))), "a step later");
    rig.rounds_until_empty();
}

#[test]
fn the_next_turn_takes_only_what_is_missing_and_gives_the_same_bits() {
    let mut rig = Rig::new();
    let mut oracle = engine();
    // 70 rows and 79 more are two full blocks; the third turn's prompt ends with a block, and all of it is here.
    let mut sequence = request(&oracle, 21, 70, 80);
    let mut known = 0;
    for (turn, extra, expect_first_block) in [(0, 10, 0), (1, 10, 2), (2, 0, 4)] {
        let expect = single_run(&mut oracle, &sequence);
        let (mut inbox, ticket) = rig.reserve(&sequence, 128);
        assert_eq!(
            (ticket.first_block, known),
            (expect_first_block, expect_first_block as usize),
            "turn {turn}"
        );
        rig.prefill.push(&sequence, ticket);
        rig.rounds_until_empty();
        let (tokens, end) = drain(&mut inbox);
        assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }), "{end:?}");
        assert_same_bits(&tokens, &expect[1..]);
        sequence.prompt.extend(expect.iter().map(|sampled| sampled.token));
        known = (sequence.prompt.len() - 1) / 64;
        sequence.prompt.extend((0..extra).map(|at| TokenId(3 + at)));
        if turn == 1 {
            sequence.prompt.truncate(256);
        }
        sequence.stopping.max_tokens = if turn == 0 { 110 } else { 20 };
    }
    let committed = rig.prefill.events(3);
    assert!(committed.iter().all(|event| matches!(event, SenderEvent::Committed { .. })), "{committed:?}");
    assert_eq!(
        rig.worker.metrics.text().lines().find(|line| line.starts_with("decode_prefix_hit_tokens_total")),
        Some("decode_prefix_hit_tokens_total 384")
    );
}

#[test]
fn the_first_token_may_end_the_sequence() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 1, 10, 1);
    let (mut inbox, _) = rig.start(&sequence);
    rig.rounds_until_empty();
    let (tokens, end) = drain(&mut inbox);
    assert!(tokens.is_empty(), "the router has it from prefill");
    assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }));
    assert_eq!(rig.worker.metrics.steps.get(), 0);
}

#[test]
fn a_stop_token_ends_the_sequence_and_is_named() {
    let mut rig = Rig::new();
    let mut sequence = request(&rig.prefill.engine, 2, 10, 12);
    let mut expect = single_run(&mut engine(), &sequence);
    let stop = expect[4].token;
    let at = expect.iter().position(|sampled| sampled.token == stop).expect("it is in there");
    expect.truncate(at + 1);
    sequence.stopping.stop_token_ids = vec![stop];
    let (mut inbox, _) = rig.start(&sequence);
    rig.rounds_until_empty();
    let (tokens, end) = drain(&mut inbox);
    assert_same_bits(&tokens, &expect[1..]);
    assert!(matches!(end, SequenceEvent::Finished { finish: Finish::StopToken(token), .. } if token == stop));
}

#[test]
fn a_dropped_stream_frees_its_blocks_in_any_state() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 3, 70, 30);
    let (waiting, _) = rig.reserve(&sequence, EVENTS_MAX);
    let (running, _) = rig.start(&sequence);
    rig.round();
    rig.round();
    assert_eq!((rig.worker.scheduler.waiting(), rig.worker.scheduler.running()), (1, 1));
    drop(waiting);
    drop(running);
    rig.round();
    rig.assert_baseline();
    // One that is cancelled before the device thread has seen it.
    drop(rig.submit(&sequence, EVENTS_MAX));
    rig.round();
    rig.assert_baseline();
}

#[test]
fn a_push_for_a_cancelled_sequence_lands_nowhere() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 4, 128, 4);
    let (cancelled, ticket) = rig.reserve(&sequence, EVENTS_MAX);
    drop(cancelled);
    rig.round();
    rig.assert_baseline();
    let pool = |rig: &Rig| -> Vec<u8> {
        let kv = rig.worker.engine.kv();
        let blocks = (0..KV_BLOCKS as u32).map(BlockId);
        blocks
            .flat_map(|block| {
                (0..kv.layout().layers).flat_map(move |layer| kv.block_layer(block, layer).into_owned())
            })
            .collect()
    };
    let before = pool(&rig);
    rig.prefill.push(&sequence, ticket);
    while rig.worker.receiver.stats().stale + rig.worker.receiver.stats().committed == 0 {
        rig.round();
    }
    assert!(pool(&rig) == before, "a revoked ticket wrote into the pool");
    assert!(matches!(rig.prefill.events(1)[..], [SenderEvent::Refused { .. }]));
}

#[test]
fn failing_experts_end_their_step_and_nothing_else() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 5, 70, 8);
    let (mut one, _) = rig.start(&sequence);
    let (mut two, _) = rig.start(&sequence);
    let (mut waiting, ticket) = rig.reserve(&sequence, EVENTS_MAX);
    rig.round();
    rig.failing.store(true, Ordering::Relaxed);
    rig.round();
    for inbox in [&mut one, &mut two] {
        let (_, end) = drain(inbox);
        assert_eq!(failure_code(end), Code::Unavailable);
    }
    assert_eq!(rig.worker.scheduler.waiting(), 1, "what was not in the step goes on");
    rig.failing.store(false, Ordering::Relaxed);
    rig.prefill.push(&sequence, ticket);
    rig.rounds_until_empty();
    let (tokens, _) = drain(&mut waiting);
    assert_same_bits(&tokens, &single_run(&mut engine(), &sequence)[1..]);
}

#[test]
fn a_slow_reader_pauses_its_own_sequence_and_loses_no_token() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 6, 10, 16);
    let (mut slow, ticket) = rig.reserve(&sequence, 4);
    rig.prefill.push(&sequence, ticket);
    let (mut fast, _) = rig.start(&sequence);
    while rig.worker.scheduler.running() != 1 || rig.worker.scheduler.runnable() != 0 {
        rig.round();
    }
    assert_eq!(drain(&mut fast).0.len(), 15, "its neighbour did not wait for it");
    let mut tokens = Vec::new();
    let end = loop {
        match next(&mut slow) {
            Some(SequenceEvent::Token(token, _)) => tokens.push(token),
            Some(SequenceEvent::HandedOff { .. }) => {}
            Some(end) => break end,
            None => assert!(rig.round()),
        }
    };
    assert!(matches!(end, SequenceEvent::Finished { .. }));
    assert_same_bits(&tokens, &single_run(&mut engine(), &sequence)[1..]);
    rig.assert_baseline();
}

#[test]
fn a_first_token_outside_the_vocabulary_fails_its_own_sequence_only() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 7, 10, 4);
    let (mut good, _) = rig.start(&sequence);
    let (mut bad, ticket) = rig.reserve(&sequence, EVENTS_MAX);
    rig.prefill.push_blocks(10, ticket, TokenId(u32::MAX));
    rig.rounds_until_empty();
    assert_eq!(failure_code(drain(&mut bad).1), Code::Aborted);
    assert_eq!(drain(&mut good).0.len(), 3);
}

#[test]
fn without_room_a_request_waits_and_one_too_many_is_refused_with_a_hint() {
    let mut rig = Rig::new();
    // 23 of 24 blocks, at worst.
    let sequence = request(&rig.prefill.engine, 8, 100, 23 * 64 - 100);
    let (large, _) = rig.reserve(&sequence, EVENTS_MAX);
    let small = request(&rig.prefill.engine, 9, 64 * 23, 1);
    let mut waiting: Vec<_> = (0..QUEUE_MAX).map(|_| rig.submit(&small, EVENTS_MAX)).collect();
    rig.round();
    assert!(waiting.iter_mut().all(|inbox| next(inbox).is_none()), "they wait");
    let mut refused = rig.submit(&small, EVENTS_MAX);
    rig.round();
    let refusal = match next(&mut refused) {
        Some(SequenceEvent::Refused(refusal)) => refusal,
        other => panic!("{other:?} instead of a refusal"),
    };
    assert!(matches!(refusal, Refusal::NoRoom { queued: QUEUE_MAX, .. }), "{refusal:?}");
    assert!(Status::from(refusal).metadata().contains_key(crate::RETRY_AFTER_METADATA));
    drop(large);
    // One round sees that nobody reads any more, and what it frees is given on before the next.
    rig.round();
    assert!(matches!(next(&mut waiting[0]), Some(SequenceEvent::Ticket(_))));
    assert!(next(&mut waiting[1]).is_none());
    drop(waiting);
    rig.rounds_until_empty();
}

#[test]
fn text_that_has_ended_is_a_finish_and_no_failure() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 8, 10, 40);
    let (mut inbox, ticket) = rig.reserve(&sequence, EVENTS_MAX);
    let id = ticket.ticket_id;
    rig.prefill.push(&sequence, ticket);
    rig.round();
    rig.finish.try_send(id).expect("room");
    rig.rounds_until_empty();
    let (_, end) = drain(&mut inbox);
    assert!(matches!(end, SequenceEvent::Finished { finish: Finish::StopString, .. }), "{end:?}");
    let text = rig.worker.metrics.text();
    assert!(text.contains("decode_finished_total 1") && !text.contains("decode_failures_total{"), "{text}");
    // Late, twice, of nobody: nothing to do.
    rig.finish.try_send(id).expect("room");
    rig.round();
}

#[test]
fn a_passed_deadline_ends_a_waiting_sequence() {
    let mut rig = Rig::new();
    let mut sequence = request(&rig.prefill.engine, 10, 10, 4);
    sequence.deadline = Some(Duration::from_millis(1));
    let mut inbox = rig.submit(&sequence, EVENTS_MAX);
    rig.round();
    rig.rounds_until_empty();
    let code = match next(&mut inbox) {
        // Whether the millisecond passes before or after the ticket is the machine's business.
        Some(SequenceEvent::Refused(refusal)) => Status::from(refusal).code(),
        Some(SequenceEvent::Ticket(_)) => failure_code(next(&mut inbox).expect("an end")),
        other => panic!("{other:?}"),
    };
    assert_eq!(code, Code::DeadlineExceeded);
}

#[test]
fn draining_refuses_the_new_and_lets_the_running_end() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 11, 10, 4);
    let (mut running, _) = rig.start(&sequence);
    rig.round();
    rig.drain.try_send(Instant::now() + Duration::from_secs(3600)).expect("heard once");
    let mut late = rig.submit(&sequence, EVENTS_MAX);
    while rig.round() {}
    assert!(matches!(next(&mut late), Some(SequenceEvent::Refused(Refusal::Draining))));
    assert_eq!(drain(&mut running).0.len(), 3);
    rig.assert_baseline();
}

#[test]
fn a_dropped_handle_fails_what_runs() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 12, 10, 40);
    let (mut running, _) = rig.start(&sequence);
    rig.round();
    let (unused, _) = bounded(1);
    drop(std::mem::replace(&mut rig.drain, unused));
    while rig.round() {}
    assert_eq!(failure_code(drain(&mut running).1), Code::Unavailable);
    rig.assert_baseline();
}
