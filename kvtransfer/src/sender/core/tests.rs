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
    }
}

/// What left, unless told otherwise by `refuse`.
#[derive(Default)]
struct Wire {
    sent: Vec<(u32, TicketKey, Push)>,
    attempts: usize,
    refuse: Option<Unsent>,
}

impl Outlet<u32> for Wire {
    fn try_send(&mut self, peer: u32, frame: Frame) -> Result<(), Unsent> {
        self.attempts += 1;
        if let Some(refusal) = self.refuse {
            return Err(refusal);
        }
        let (key, push) = decode_push(&frame.head).expect("our own");
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
        rig.core.handle_connected(ADDRESS, DECODE, INCARNATION);
        (rig, id)
    }

    fn begin(&mut self, number: u64) -> TransferId {
        self.core.begin(ticket(number), self.now).expect("room")
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
        self.core.flush(&mut self.wire);
        self.core.check_invariants();
        self.core.take_events()
    }
}

#[test]
fn a_transfer_waits_for_its_connection_then_pushes_then_ends() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    assert_eq!(rig.core.next_dial().as_deref(), Some(ADDRESS));
    let second = rig.begin(2);
    assert_eq!(rig.core.next_dial(), None, "one dial for both");
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert_eq!(rig.wire.attempts, 0);

    rig.core.handle_connected(ADDRESS, DECODE, INCARNATION);
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
fn a_peer_that_is_gone_loses_its_transfers() {
    let (mut rig, id) = Rig::pushing();
    rig.wire.refuse = Some(Unsent::Gone);
    assert!(matches!(rig.push(id), Err(TransferError::Ended(_))));
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }]);

    let (mut rig, id) = Rig::pushing();
    let second = rig.begin(2);
    rig.core.handle_peer_lost(DECODE);
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }, SenderEvent::Lost { id: second }]);
    rig.core.next_dial();
    rig.begin(3);
    assert_eq!(rig.core.next_dial().as_deref(), Some(ADDRESS), "the next one connects anew");
}

#[test]
fn a_failed_dial_loses_whoever_waits_for_it() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    rig.core.next_dial();
    rig.core.handle_dial_failed(ADDRESS);
    rig.core.check_invariants();
    assert_eq!(rig.core.take_events(), [SenderEvent::Lost { id }]);
}

#[test]
fn a_restarted_worker_is_waited_for_and_never_confused_with_its_predecessor() {
    let (mut rig, _) = Rig::pushing();
    rig.core.next_dial();
    let restarted = KvTicket { incarnation: 8, ..ticket(2) };
    let id = rig.core.begin(restarted, rig.now).expect("room");
    // The old connection has not been missed yet.
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    rig.core.handle_peer_lost(DECODE);
    rig.core.take_events();
    assert_eq!(rig.core.next_dial().as_deref(), Some(ADDRESS));
    rig.core.handle_connected(ADDRESS, 2, 8);
    rig.push(id).expect("room");
    assert!(matches!(rig.wire.sent[..], [(2, ..)]));
}

#[test]
fn a_ticket_of_a_dead_process_is_lost_within_two_seconds() {
    let mut rig = Rig::new();
    let id = rig.begin(1);
    rig.core.handle_connected(ADDRESS, DECODE, INCARNATION + 1);
    assert!(matches!(rig.push(id), Err(TransferError::Full)));
    assert_eq!(rig.after(Duration::from_millis(1999)), []);
    assert_eq!(rig.after(Duration::from_millis(1)), [SenderEvent::Lost { id }]);
}

#[test]
fn silence_for_a_lease_loses_the_transfer_and_sending_renews_it() {
    let (mut rig, id) = Rig::pushing();
    assert_eq!(rig.after(LEASE - Duration::from_millis(1)), []);
    rig.push(id).expect("room");
    assert_eq!(rig.after(Duration::from_millis(1)), []);
    assert_eq!(rig.after(LEASE - Duration::from_millis(1)), []);
    assert_eq!(rig.after(Duration::from_millis(1)), [SenderEvent::Lost { id }]);
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
