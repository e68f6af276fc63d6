use std::time::{Duration, Instant};

use fabric::Frame;
use model::{ExecutionFingerprint, Numerics, TokenId};
use proto::ticket::TicketId;

use super::*;
use crate::wire::{decode_push, encode_reply};

const ADDRESS: &str = "quic://127.0.0.1:4433";
const INCARNATION: u64 = 7;
const LEASE: Duration = Duration::from_secs(10);
const DECODE: u32 = 1;
const TOKEN: TokenId = TokenId(42);

fn key(ticket: u64) -> TicketKey {
    TicketKey { incarnation: INCARNATION, ticket_id: TicketId(ticket) }
}

/// Blocks 1 and 2 of 3 layers.
fn ticket(ticket: u64) -> KvTicket {
    KvTicket {
        worker_id: "decode-0".to_owned(),
        incarnation: INCARNATION,
        ticket_id: TicketId(ticket),
        fabric_address: ADDRESS.to_owned(),
        fingerprint: ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Fp8,
            kv_layout_digest: 1,
            backend: "cpu/portable".to_owned(),
            arithmetic_revision: 1,
        },
        first_block: 1,
        blocks: 2,
        prompt_tokens: 150,
        bytes_per_layer: 100,
        layers: 3,
        lease: LEASE,
        reserve: LEASE,
        generation: 1,
        fabric_rails: Vec::new(),
    }
}

/// What left, unless told otherwise by `refuse`.
#[derive(Default)]
struct Wire {
    sent: Vec<(u32, TicketKey, Push)>,
    generations: Vec<u32>,
    attempts: usize,
    refuse: Option<Unsent>,
}

impl Outlet<u32> for Wire {
    fn try_send(&mut self, peer: u32, frame: Frame) -> Result<(), Unsent> {
        self.attempts += 1;
        if let Some(refusal) = self.refuse {
            return Err(refusal);
        }
        let (key, generation, push) = decode_push(&frame.head).expect("our own");
        self.generations.push(generation);
        self.sent.push((peer, key, push));
        Ok(())
    }
}

struct Rig {
    core: SenderCore<u32>,
    wire: Wire,
    now: Instant,
}

impl Rig {
    fn new() -> Self {
        Self { core: SenderCore::new(), wire: Wire::default(), now: Instant::now() }
    }

    /// With one transfer, for ticket 1, connected.
    fn pushing() -> (Self, TransferId) {
        let mut rig = Self::new();
        let id = rig.begin(1);
        rig.core.handle_connected(ADDRESS, DECODE, INCARNATION, rig.now);
        (rig, id)
    }

    fn begin(&mut self, number: u64) -> TransferId {
        self.core.begin(ticket(number), self.now).expect("room")
    }

    fn dial(&mut self) -> Option<String> {
        self.core.next_dial().map(|dial| dial.address)
    }

    fn push(&mut self, id: TransferId) -> Result<(), TransferError> {
        let pushed = self.core.push_blocks(id, 0, 1, &[b"one", b"two"], 3, &mut self.wire);
        self.core.check_invariants();
        pushed
    }

    fn reply(&mut self, peer: u32, key: TicketKey, reply: Reply) -> Vec<SenderEvent> {
        self.core.handle_frame(peer, &encode_reply(key, reply).head);
        self.core.check_invariants();
        self.core.take_events()
    }

    fn after(&mut self, time: Duration) -> Vec<SenderEvent> {
        self.now += time;
        self.core.handle_timeout(self.now);
        self.core.flush(self.now, &mut self.wire);
        self.core.check_invariants();
        self.core.take_events()
    }
}

#[test]
fn a_transfer_waits_for_its_connection_then_pushes_then_ends() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS));
    let second = rig.begin(2);
    assert_eq!(rig.dial(), None, "one dial for both");
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert_eq!(rig.wire.attempts, 0);

    rig.core.handle_connected(ADDRESS, DECODE, INCARNATION, rig.now);
    rig.push(id).expect("room");
    rig.push(second).expect("room");
    rig.core.finish(id, TOKEN, &mut rig.wire).expect("room");
    let [(DECODE, first, Push::Blocks(run)), _, (DECODE, last, Push::Finish(TOKEN))] = &rig.wire.sent[..]
    else {
        panic!("{:?}", rig.wire.sent)
    };
    assert_eq!((*first, *last), (key(1), key(1)));
    assert_eq!((run.layer, run.first_block, run.blocks, run.last_rows), (0, 1, 2, 3));
    assert_eq!(rig.reply(DECODE, key(1), Reply::Committed), [SenderEvent::Committed { id }]);
    assert!(matches!(rig.push(id), Err(TransferError::Ended(_))));
    // A third finds the connection there.
    let third = rig.begin(3);
    rig.push(third).expect("room");
}

#[test]
fn stale_and_refused_end_it_with_decodes_words() {
    for reply in [Reply::Stale("gone".to_owned()), Reply::Refused("gone".to_owned())] {
        let (mut rig, id) = Rig::pushing();
        let detail = "gone".to_owned();
        assert_eq!(rig.reply(DECODE, key(1), reply.clone()), [SenderEvent::Refused { id, detail }]);
        assert_eq!(rig.reply(DECODE, key(1), reply), [], "once");
    }
}

#[test]
fn nobody_else_can_end_a_transfer() {
    let (mut rig, id) = Rig::pushing();
    assert_eq!(rig.reply(DECODE + 1, key(1), Reply::Committed), []);
    assert_eq!(rig.reply(DECODE, key(2), Reply::Committed), []);
    let other = TicketKey { incarnation: 8, ..key(1) };
    assert_eq!(rig.reply(DECODE, other, Reply::Committed), []);
    rig.core.handle_frame(DECODE, b"\xff\xff nonsense");
    assert_eq!(rig.core.stats().unexpected, 4);
    rig.push(id).expect("still alive");
}

#[test]
fn no_room_is_handed_back_and_not_tried_again_before_the_next_poll() {
    let (mut rig, id) = Rig::pushing();
    rig.wire.refuse = Some(Unsent::Full);
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert!(matches!(rig.core.finish(id, TOKEN, &mut rig.wire), Err(TransferError::Full)));
    assert_eq!(rig.wire.attempts, 1, "nothing was copied for nothing");
    rig.wire.refuse = None;
    assert_eq!(rig.after(Duration::ZERO), []);
    rig.push(id).expect("room now");
}

#[test]
fn a_process_that_is_gone_loses_its_transfers() {
    let (mut rig, id) = Rig::pushing();
    rig.push(id).expect("room");
    let second = rig.begin(2);
    rig.core.handle_peer_lost(DECODE, false, rig.now);
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }, SenderEvent::Lost { id: second }]);
    rig.dial();
    rig.begin(3);
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS), "the next one connects anew");
}

#[test]
fn a_lost_path_is_dialled_anew_and_the_transfer_goes_on_where_it_was() {
    let (mut rig, id) = Rig::pushing();
    rig.dial();
    rig.push(id).expect("room");
    rig.core.handle_peer_lost(DECODE, true, rig.now);
    assert_eq!(rig.after(Duration::from_millis(50)), []);
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS));
    rig.core.handle_connected(ADDRESS, 2, INCARNATION, rig.now);
    assert!(matches!(rig.push(id), Err(TransferError::Full)), "it does not know what has landed");
    rig.after(Duration::ZERO);
    assert_eq!(rig.wire.sent.last(), Some(&(2, key(1), Push::Resume)));
    assert_eq!(rig.wire.generations.last(), Some(&2));
    // Of layer 0 the first block has landed, the second has not.
    let held = Reply::Held { generation: 2, landed: vec![0b01] };
    let missing = 5;
    assert_eq!(rig.reply(2, key(1), held.clone()), [SenderEvent::Resumed { id, missing }]);
    assert_eq!(rig.reply(2, key(1), held), [], "asked once, answered once");
    rig.push(id).expect("room");
    let Some((2, _, Push::Blocks(run))) = rig.wire.sent.last() else { panic!("{:?}", rig.wire.sent) };
    assert_eq!((run.first_block, run.blocks, run.last_rows), (2, 1, 3));
    assert_eq!(rig.core.stats().repeated, 1);
    let sent = rig.wire.sent.len();
    rig.push(id).expect("nothing to do");
    assert_eq!(rig.wire.sent.len(), sent);
}

#[test]
fn no_other_path_in_time_is_a_loss() {
    let (mut rig, id) = Rig::pushing();
    rig.push(id).expect("room");
    rig.core.handle_peer_lost(DECODE, true, rig.now);
    assert_eq!(rig.after(RESUME_MAX - Duration::from_millis(1)), []);
    assert_eq!(rig.after(Duration::from_millis(1)), [SenderEvent::Lost { id }]);
}

#[test]
fn a_transfer_that_has_sent_nothing_has_nothing_to_ask() {
    let (mut rig, id) = Rig::pushing();
    rig.dial();
    rig.core.handle_peer_lost(DECODE, true, rig.now);
    rig.after(Duration::from_millis(60));
    rig.core.handle_connected(ADDRESS, 2, INCARNATION, rig.now);
    rig.push(id).expect("room");
    assert!(matches!(rig.wire.sent[..], [(2, _, Push::Blocks(_))]));
}

#[test]
fn an_answer_that_does_not_come_is_asked_for() {
    let (mut rig, id) = Rig::pushing();
    for layer in 0..3 {
        rig.core.push_blocks(id, layer, 1, &[b"one", b"two"], 3, &mut rig.wire).expect("room");
    }
    rig.core.finish(id, TOKEN, &mut rig.wire).expect("room");
    rig.after(Duration::ZERO);
    rig.after(ANSWER_MAX - Duration::from_millis(1));
    assert!(matches!(rig.wire.sent.last(), Some((_, _, Push::Finish(_)))));
    rig.after(Duration::from_millis(1));
    assert_eq!(rig.wire.sent.last(), Some(&(DECODE, key(1), Push::Resume)));
    // The same question, after the same time, for as long as it takes.
    for _ in 0..5 {
        let asked = rig.wire.sent.len();
        rig.after(ANSWER_MAX - Duration::from_millis(1));
        assert_eq!(rig.wire.sent.len(), asked);
        rig.after(Duration::from_millis(1));
        assert_eq!(rig.wire.sent.last(), Some(&(DECODE, key(1), Push::Resume)));
        assert_eq!((rig.wire.sent.len(), rig.wire.generations.last()), (asked + 1, Some(&2)));
    }
    // Whichever of them is answered.
    let held = Reply::Held { generation: 2, landed: vec![0b11_1111] };
    assert_eq!(rig.reply(DECODE, key(1), held.clone()), [SenderEvent::Resumed { id, missing: 0 }]);
    assert_eq!(rig.reply(DECODE, key(1), held), []);
    assert_eq!(rig.reply(DECODE, key(1), Reply::Committed), [SenderEvent::Committed { id }]);
}

#[test]
fn a_question_without_an_answer_outlasts_neither_its_path_nor_the_lease() {
    let (mut rig, id) = Rig::pushing();
    rig.core.finish(id, TOKEN, &mut rig.wire).expect("room");
    rig.after(Duration::ZERO);
    let (mut events, mut asked) = (Vec::new(), Duration::ZERO);
    while events.is_empty() && asked < 2 * LEASE {
        events = rig.after(ANSWER_MAX);
        asked += ANSWER_MAX;
    }
    assert_eq!((events, asked), (vec![SenderEvent::Lost { id }], LEASE));
}

#[test]
fn what_is_not_of_the_ticket_cannot_have_landed() {
    let (mut rig, id) = Rig::pushing();
    rig.dial();
    rig.push(id).expect("room");
    rig.core.handle_peer_lost(DECODE, true, rig.now);
    rig.after(Duration::from_millis(60));
    rig.core.handle_connected(ADDRESS, 2, INCARNATION, rig.now);
    rig.after(Duration::ZERO);
    for landed in [vec![], vec![1 << 6], vec![0, 0]] {
        let mut rig = Rig { core: rig.core.clone(), wire: Wire::default(), now: rig.now };
        let events = rig.reply(2, key(1), Reply::Held { generation: 2, landed });
        assert!(matches!(&events[..], [SenderEvent::Refused { .. }]), "{events:?}");
    }
}

const RAIL: &str = "quic://127.0.0.2:4433";

fn with_rails(number: u64) -> KvTicket {
    KvTicket { fabric_rails: vec![RAIL.to_owned()], ..ticket(number) }
}

#[test]
fn transfers_spread_over_rails_and_a_failed_one_is_probed_and_comes_back() {
    let mut rig = Rig::new();
    let first = rig.core.begin(with_rails(1), rig.now).expect("room");
    assert_eq!([rig.dial(), rig.dial()].map(Option::unwrap), [ADDRESS, RAIL]);
    rig.core.handle_connected(ADDRESS, 1, INCARNATION, rig.now);
    rig.core.handle_connected(RAIL, 2, INCARNATION, rig.now);
    let second = rig.core.begin(with_rails(2), rig.now).expect("room");
    rig.push(first).expect("room");
    rig.push(second).expect("room");
    let peers: Vec<u32> = rig.wire.sent.iter().map(|(peer, ..)| *peer).collect();
    assert_eq!(peers, [1, 2], "one each");

    // The other rail takes over at once, without a dial.
    rig.core.handle_peer_lost(1, true, rig.now);
    assert_eq!(rig.after(Duration::ZERO), []);
    assert_eq!(rig.wire.sent.last(), Some(&(2, key(1), Push::Resume)));
    assert_eq!(rig.dial(), None, "a rail that has just failed is left alone for a moment");
    rig.after(Duration::from_millis(50));
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS));
    rig.core.handle_dial_failed(ADDRESS, rig.now);
    rig.after(Duration::from_millis(99));
    assert_eq!(rig.dial(), None, "longer each time");
    rig.after(Duration::from_millis(1));
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS));
    rig.core.handle_connected(ADDRESS, 3, INCARNATION, rig.now);
    let third = rig.core.begin(with_rails(3), rig.now).expect("room");
    rig.push(third).expect("room");
    assert!(matches!(rig.wire.sent.last(), Some((3, _, Push::Blocks(_)))), "it is used again");
}

#[test]
fn each_rail_is_dialled_as_the_one_that_it_is() {
    let mut rig = Rig::new();
    rig.core.begin(with_rails(1), rig.now).expect("room");
    let dials: Vec<Dial> = std::iter::from_fn(|| rig.core.next_dial()).collect();
    let of = |rail, address: &str| Dial { rail, address: address.to_owned() };
    assert_eq!(dials, [of(0, ADDRESS), of(1, RAIL)]);
}

#[test]
fn a_process_that_is_gone_is_gone_on_all_of_its_rails() {
    let mut rig = Rig::new();
    let first = rig.core.begin(with_rails(1), rig.now).expect("room");
    rig.core.handle_connected(ADDRESS, 1, INCARNATION, rig.now);
    rig.core.handle_connected(RAIL, 2, INCARNATION, rig.now);
    let second = rig.core.begin(with_rails(2), rig.now).expect("room");
    rig.push(first).expect("room");
    rig.push(second).expect("room");
    rig.core.handle_peer_lost(2, false, rig.now);
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id: first }, SenderEvent::Lost { id: second }]);
}

#[test]
fn one_failed_dial_of_two_loses_nobody() {
    let mut rig = Rig::new();
    let id = rig.core.begin(with_rails(1), rig.now).expect("room");
    rig.core.handle_dial_failed(ADDRESS, rig.now);
    rig.core.check_invariants();
    assert_eq!(rig.core.take_events(), []);
    rig.core.handle_dial_failed(RAIL, rig.now);
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }]);
}

#[test]
fn a_decode_worker_that_cannot_resume_is_not_asked() {
    let mut rig = Rig::new();
    let old = KvTicket { generation: 0, ..ticket(1) };
    let id = rig.core.begin(old, rig.now).expect("room");
    rig.core.handle_connected(ADDRESS, DECODE, INCARNATION, rig.now);
    rig.push(id).expect("room");
    rig.core.handle_peer_lost(DECODE, true, rig.now);
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }]);
}

#[test]
fn a_failed_dial_loses_whoever_waits_for_it() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    rig.dial();
    rig.core.handle_dial_failed(ADDRESS, rig.now);
    rig.core.check_invariants();
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }]);
}

#[test]
fn a_restarted_worker_is_waited_for_and_never_confused_with_its_predecessor() {
    let (mut rig, _) = Rig::pushing();
    rig.dial();
    let restarted = KvTicket { incarnation: 8, ..ticket(2) };
    let id = rig.core.begin(restarted, rig.now).expect("room");
    // The old connection has not been missed yet.
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    rig.core.handle_peer_lost(DECODE, false, rig.now);
    rig.core.take_events();
    assert_eq!(rig.dial().as_deref(), Some(ADDRESS));
    rig.core.handle_connected(ADDRESS, 2, 8, rig.now);
    rig.push(id).expect("room");
    assert!(matches!(rig.wire.sent[..], [(2, ..)]));
}

#[test]
fn a_ticket_of_a_dead_process_is_lost_within_two_seconds() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    rig.core.handle_connected(ADDRESS, DECODE, INCARNATION + 1, rig.now);
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert_eq!(rig.after(CONNECTING_MAX - Duration::from_millis(1)), []);
    assert_eq!(rig.after(Duration::from_millis(1)), [SenderEvent::Lost { id }]);
}

#[test]
fn no_answer_for_a_lease_loses_the_transfer() {
    let (mut rig, id) = Rig::pushing();
    rig.core.finish(id, TOKEN, &mut rig.wire).expect("room");
    rig.after(Duration::ZERO);
    assert_eq!(rig.after(LEASE - Duration::from_millis(1)), []);
    assert_eq!(rig.after(Duration::from_millis(1)), [SenderEvent::Lost { id }]);
}

#[test]
fn a_transfer_that_never_begins_ends_with_its_reservation() {
    let (mut rig, id) = Rig::pushing();
    assert_eq!(rig.after(LEASE), [SenderEvent::Lost { id }]);
}

#[test]
fn a_transfer_that_waits_for_its_next_layer_renews_its_lease() {
    let (mut rig, id) = Rig::pushing();
    assert_eq!(rig.after(LEASE - Duration::from_millis(1)), [], "in the queue nothing renews it");
    assert_eq!(rig.wire.sent, []);
    rig.push(id).expect("room");
    rig.after(Duration::ZERO);
    for _ in 0..8 {
        assert_eq!(rig.after(LEASE / 4), []);
    }
    let renewals = rig.wire.sent.iter().filter(|(.., push)| *push == Push::Renew).count();
    assert_eq!(renewals, 8);
}

#[test]
fn an_abort_says_goodbye_when_there_is_room() {
    let (mut rig, id) = Rig::pushing();
    rig.wire.refuse = Some(Unsent::Full);
    rig.core.abort(id, "cancelled");
    assert_eq!(rig.after(Duration::ZERO), [], "no event: the caller knows");
    rig.wire.refuse = None;
    rig.after(Duration::ZERO);
    rig.after(Duration::ZERO);
    assert_eq!(rig.wire.sent, [(DECODE, key(1), Push::Abort("cancelled".to_owned()))]);
    rig.core.abort(id, "again");
    assert_eq!(rig.core.stats().aborted, 1);
}

#[test]
fn pushes_outside_the_ticket_are_the_callers_bug() {
    let (mut rig, id) = Rig::pushing();
    let piece: &[u8] = b"x";
    for (layer, first_block, pieces) in
        [(3, 1, 1), (0, 0, 1), (0, 1, 3), (0, 3, 1), (0, 1, 0), (0, u32::MAX, 1)]
    {
        let pieces = vec![piece; pieces];
        let pushed = rig.core.push_blocks(id, layer, first_block, &pieces, 1, &mut rig.wire);
        assert!(matches!(pushed, Err(TransferError::OutsideTicket { .. })), "{layer} {first_block}");
    }
    let again = rig.core.begin(ticket(1), rig.now);
    assert!(matches!(again, Err(TransferError::TicketInUse(TicketId(1)))));
    assert_eq!(rig.wire.attempts, 0);
}
