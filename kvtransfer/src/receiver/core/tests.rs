use std::time::{Duration, Instant};

use bytes::Bytes;
use fabric::Frame;
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};

use super::*;
use crate::wire::{Run, decode_reply, encode_push, gather};

const INCARNATION: u64 = 7;
const TICKET: TicketId = TicketId(1);
const KEY: TicketKey = TicketKey { incarnation: INCARNATION, ticket_id: TICKET };
const LEASE: Duration = Duration::from_secs(10);
const PREFILL: u32 = 1;
const STRANGER: u32 = 2;
const TOKEN: TokenId = TokenId(42);

/// A core with one ticket: blocks 0 and 1 of a prompt of 6, in 2 layers. Rows have 16 bytes, blocks 4 rows.
struct Rig {
    core: ReceiverCore<u32>,
    now: Instant,
    written: Written,
    outlet: Sent,
}

#[derive(Default)]
struct Written(Vec<(TicketId, u32, u32, Vec<u8>)>);

impl BlockSink for Written {
    fn place(&mut self, ticket: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        self.0.push((ticket, block, layer, vec![0; bytes]));
        self.0.last_mut().map(|(.., place)| place.as_mut_slice())
    }
}

/// Replies that left, to whom; none while `full`.
#[derive(Default)]
struct Sent {
    replies: Vec<(u32, TicketKey, Reply)>,
    full: bool,
}

impl Outlet<u32> for Sent {
    fn try_send(&mut self, peer: u32, frame: Frame) -> Result<(), Unsent> {
        if self.full {
            return Err(Unsent::Full);
        }
        let (key, reply) = decode_reply(&frame.head).expect("our own");
        self.replies.push((peer, key, reply));
        Ok(())
    }
}

fn options() -> ReceiverOptions {
    let layout = KvLayout { format: KvFormat::F32, layers: 2, latent: 2, rope: 2, block_tokens: 4 };
    let fingerprint = ExecutionFingerprint {
        weights: [1; 16],
        numerics: Numerics::Reference,
        kv_layout_digest: layout.digest(),
        backend: "cpu/portable".to_owned(),
        arithmetic_revision: 1,
    };
    let worker_id = "decode-0".to_owned();
    ReceiverOptions { worker_id, incarnation: INCARNATION, fingerprint, layout, lease: LEASE, tickets_max: 4 }
}

impl Rig {
    fn new() -> Self {
        let now = Instant::now();
        let mut core = ReceiverCore::new(options(), "inproc://decode-0".to_owned());
        let reservation = Reservation { first_block: 0, prompt_tokens: 6 };
        let ticket = core.issue(reservation, TICKET, now).expect("room");
        assert_eq!((ticket.blocks, ticket.bytes_per_layer, ticket.layers), (2, 96, 2));
        Self { core, now, written: Written::default(), outlet: Sent::default() }
    }

    fn frame(&mut self, peer: u32, frame: &Frame) {
        let body = frame.body.first().cloned().unwrap_or_default();
        self.core.handle_frame(peer, &frame.head, &body.into(), self.now, &mut self.written);
        self.core.check_invariants();
    }

    /// Both blocks of a layer in one run.
    fn layer(&mut self, layer: u32) {
        self.frame(PREFILL, &blocks(KEY, layer, 0, &[&[layer as u8; 64], &[layer as u8; 32]], 2));
    }

    fn finish(&mut self) {
        self.frame(PREFILL, &encode_push(KEY, Push::Finish(TOKEN), Bytes::new()));
    }

    fn events(&mut self) -> Vec<ReceiverEvent> {
        self.core.take_events()
    }

    fn replies(&mut self) -> Vec<(u32, TicketKey, Reply)> {
        self.core.flush(&mut self.outlet);
        std::mem::take(&mut self.outlet.replies)
    }
}

fn blocks(key: TicketKey, layer: u32, first_block: u32, pieces: &[&[u8]], last_rows: u32) -> Frame {
    let (body, checksums) = gather(pieces);
    let run = Run { layer, first_block, blocks: pieces.len() as u32, last_rows, checksums };
    encode_push(key, Push::Blocks(run), body)
}

const COMMITTED: ReceiverEvent = ReceiverEvent::Committed { ticket: TICKET, first_token: TOKEN };

#[test]
fn all_pieces_and_the_first_token_commit() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.layer(1);
    assert_eq!(rig.events(), []);
    rig.finish();
    assert_eq!(rig.events(), [COMMITTED]);
    assert_eq!(rig.replies(), [(PREFILL, KEY, Reply::Committed)]);
    let expected = [(0, 0, 64), (1, 0, 32), (0, 1, 64), (1, 1, 32)]
        .map(|(block, layer, bytes)| (TICKET, block, layer, vec![layer as u8; bytes]));
    assert_eq!(rig.written.0, expected);
}

#[test]
fn order_does_not_matter() {
    let mut rig = Rig::new();
    rig.finish();
    rig.frame(PREFILL, &blocks(KEY, 1, 1, &[&[1; 32]], 2));
    rig.layer(0);
    assert_eq!(rig.events(), []);
    rig.frame(PREFILL, &blocks(KEY, 1, 0, &[&[1; 64]], 4));
    assert_eq!(rig.events(), [COMMITTED]);
}

#[test]
fn a_duplicate_writes_nothing_and_counts_once() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.layer(0);
    assert_eq!((rig.written.0.len(), rig.core.stats().duplicates), (2, 2));
    rig.layer(1);
    rig.finish();
    assert_eq!(rig.replies().len(), 1);
    rig.events();

    // After the commit the blocks are the sequence's: decode appends to the last one.
    rig.layer(1);
    assert_eq!(rig.written.0.len(), 4);
    assert_eq!(rig.replies(), []);
    // A repeated last frame asks whether the commit was heard of.
    rig.finish();
    assert_eq!(rig.replies(), [(PREFILL, KEY, Reply::Committed)]);
    assert_eq!(rig.events(), []);
}

#[test]
fn a_revoked_ticket_is_dead_at_once_and_its_sender_is_told() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.core.revoke(TICKET);
    assert!(matches!(&rig.replies()[..], [(PREFILL, KEY, Reply::Stale(_))]));
    rig.layer(1);
    rig.finish();
    assert_eq!(rig.written.0.len(), 2, "only what came before");
    assert_eq!(rig.core.stats().stale, 2);
    assert!(matches!(&rig.replies()[..], [(PREFILL, KEY, Reply::Stale(_))]), "one answer for both");
    assert_eq!(rig.events(), [], "whoever revokes knows");
}

#[test]
fn another_incarnation_and_an_unknown_ticket_are_stale() {
    let mut rig = Rig::new();
    for key in [TicketKey { incarnation: 6, ..KEY }, TicketKey { ticket_id: TicketId(9), ..KEY }] {
        rig.frame(PREFILL, &blocks(key, 0, 0, &[&[0; 64]], 4));
        assert!(matches!(&rig.replies()[..], [(PREFILL, to, Reply::Stale(_))] if *to == key));
    }
    assert!(rig.written.0.is_empty());
    rig.layer(0);
    assert_eq!(rig.written.0.len(), 2, "the ticket itself is untouched");
}

#[test]
fn what_the_ticket_does_not_permit_kills_it() {
    let good = || blocks(KEY, 0, 0, &[&[0; 64], &[0; 32]], 2);
    let mut damaged = good();
    let mut body = damaged.body[0].to_vec();
    body[95] ^= 1;
    damaged.body = vec![body.into()];
    let mut short = good();
    short.body = vec![short.body[0].slice(1..)];
    let cases = [
        ("checksum of layer 0, block 1", damaged),
        ("95 bytes", short),
        ("layer is 2", blocks(KEY, 2, 0, &[&[0; 64]], 4)),
        ("blocks 1..1+2", blocks(KEY, 0, 1, &[&[0; 32], &[0; 32]], 2)),
        ("last_rows is 4", blocks(KEY, 0, 1, &[&[0; 64]], 4)),
    ];
    for (expected, frame) in cases {
        let mut rig = Rig::new();
        rig.frame(PREFILL, &frame);
        // A checksum is taken of the copy, which lies in the ticket's own blocks; for anything else there is no copy.
        let copies = if expected.starts_with("checksum") { 2 } else { 0 };
        assert_eq!(rig.written.0.len(), copies, "{expected}");
        let replies = rig.replies();
        let [(PREFILL, KEY, Reply::Refused(detail))] = &replies[..] else { panic!("{replies:?}") };
        assert!(detail.contains(expected), "{detail}");
        assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { ticket: TICKET, .. }]), "{expected}");
        assert!(!rig.core.is_alive(TICKET));
    }
}

#[test]
fn a_second_first_token_must_be_the_first() {
    let mut rig = Rig::new();
    rig.finish();
    rig.finish();
    assert_eq!(rig.events(), []);
    rig.frame(PREFILL, &encode_push(KEY, Push::Finish(TokenId(43)), Bytes::new()));
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { .. }]));
}

#[test]
fn only_one_worker_may_push() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.frame(STRANGER, &blocks(KEY, 1, 0, &[&[9; 64]], 4));
    rig.frame(STRANGER, &encode_push(KEY, Push::Abort(String::new()), Bytes::new()));
    assert!(matches!(&rig.replies()[..], [(STRANGER, KEY, Reply::Refused(_)), (STRANGER, ..)]));
    rig.core.handle_peer_lost(STRANGER, &"gone");
    rig.layer(1);
    rig.finish();
    assert_eq!(rig.events(), [COMMITTED]);
    assert_eq!(rig.written.0.len(), 4);
}

#[test]
fn abort_and_loss_end_the_ticket() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.frame(PREFILL, &encode_push(KEY, Push::Abort("deadline".to_owned()), Bytes::new()));
    let events = rig.events();
    assert!(matches!(&events[..], [ReceiverEvent::Aborted { reason, .. }] if reason.contains("deadline")));

    let mut rig = Rig::new();
    rig.layer(0);
    rig.core.handle_peer_lost(PREFILL, &"silent for too long");
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { ticket: TICKET, .. }]));
    rig.layer(1);
    assert_eq!(rig.written.0.len(), 2);
}

#[test]
fn a_committed_ticket_outlives_its_pusher() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.layer(1);
    rig.finish();
    rig.core.handle_peer_lost(PREFILL, &"killed");
    assert_eq!(rig.events(), [COMMITTED]);
    assert_eq!(rig.replies(), [], "there is nobody to answer");
}

#[test]
fn arriving_bytes_renew_the_lease() {
    let mut rig = Rig::new();
    rig.now += LEASE - Duration::from_millis(1);
    rig.layer(0);
    rig.now += LEASE - Duration::from_millis(1);
    rig.core.handle_timeout(rig.now);
    assert_eq!(rig.events(), []);
    rig.now += Duration::from_millis(1);
    rig.core.handle_timeout(rig.now);
    assert_eq!(rig.events(), [ReceiverEvent::Expired { ticket: TICKET }]);
    assert!(matches!(&rig.replies()[..], [(PREFILL, KEY, Reply::Stale(_))]));
    rig.layer(1);
    assert_eq!(rig.written.0.len(), 2);
}

#[test]
fn refused_frames_do_not_renew_a_lease() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.now += LEASE;
    rig.frame(STRANGER, &blocks(KEY, 1, 0, &[&[9; 64]], 4));
    rig.core.handle_timeout(rig.now);
    assert_eq!(rig.events(), [ReceiverEvent::Expired { ticket: TICKET }]);
}

#[test]
fn a_fully_cached_prompt_waits_for_its_token_alone() {
    let mut rig = Rig::new();
    let key = TicketKey { ticket_id: TicketId(2), ..KEY };
    let cached = Reservation { first_block: 2, prompt_tokens: 8 };
    let ticket = rig.core.issue(cached, key.ticket_id, rig.now).expect("room");
    assert_eq!((ticket.blocks, ticket.bytes_per_layer), (0, 0));
    rig.frame(PREFILL, &encode_push(key, Push::Finish(TOKEN), Bytes::new()));
    assert_eq!(rig.events(), [ReceiverEvent::Committed { ticket: key.ticket_id, first_token: TOKEN }]);
}

#[test]
fn replies_wait_for_room_and_are_bounded() {
    let mut rig = Rig::new();
    rig.outlet.full = true;
    for ticket in 100..200 {
        let key = TicketKey { ticket_id: TicketId(ticket), ..KEY };
        rig.frame(STRANGER, &encode_push(key, Push::Finish(TOKEN), Bytes::new()));
        assert_eq!(rig.replies(), []);
    }
    assert_eq!(rig.core.stats().replies_dropped, 92);
    rig.outlet.full = false;
    assert_eq!(rig.replies().len(), 8);
}

#[test]
fn tickets_are_bounded_and_names_unique() {
    let mut rig = Rig::new();
    let reservation = Reservation { first_block: 0, prompt_tokens: 1 };
    let twice = rig.core.issue(reservation, TICKET, rig.now);
    assert!(matches!(twice, Err(TransferError::TicketInUse(TICKET))));
    for ticket in 2..5 {
        rig.core.issue(reservation, TicketId(ticket), rig.now).expect("room for four");
    }
    let fifth = rig.core.issue(reservation, TicketId(5), rig.now);
    assert!(matches!(fifth, Err(TransferError::TooMany { max: 4 })));
    rig.core.revoke(TICKET);
    rig.core.issue(reservation, TicketId(5), rig.now).expect("room again");
}
