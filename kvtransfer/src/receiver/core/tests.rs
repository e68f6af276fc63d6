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
const RESERVE: Duration = Duration::from_secs(60);
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
    let (lease, reserve) = (LEASE, RESERVE);
    ReceiverOptions {
        worker_id,
        incarnation: INCARNATION,
        fingerprint,
        layout,
        lease,
        reserve,
        tickets_max: 4,
    }
}

impl Rig {
    fn new() -> Self {
        let now = Instant::now();
        let mut core = ReceiverCore::new(options(), vec!["inproc://decode-0".to_owned()]);
        core.handle_peer_up(PREFILL, "prefill-0", 5);
        core.handle_peer_up(STRANGER, "prefill-1", 5);
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
        self.frame(PREFILL, &encode_push(KEY, 1, Push::Finish(TOKEN), Bytes::new()));
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
    encode_push(key, 1, Push::Blocks(run), body)
}

/// Committed, whatever the report says.
fn committed(events: &[ReceiverEvent], expected: TicketId) -> bool {
    matches!(events, [ReceiverEvent::Committed { ticket, first_token: TOKEN, .. }] if *ticket == expected)
}

#[test]
fn all_pieces_and_the_first_token_commit() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.layer(1);
    assert_eq!(rig.events(), []);
    rig.finish();
    assert!(committed(&rig.events(), TICKET));
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
    assert!(committed(&rig.events(), TICKET));
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
    // A replayed ticket is refused; who replays it need not wait to find out.
    rig.frame(STRANGER, &resume(1));
    assert!(matches!(&rig.replies()[..], [(STRANGER, KEY, Reply::Refused(_))]));
    assert_eq!((rig.events(), rig.core.stats().violations), (vec![], 1));
}

#[test]
fn a_revoked_ticket_is_dead_at_once_and_its_sender_is_told() {
    let mut rig = Rig::new();
    rig.layer(0);
    let _ = rig.core.revoke(TICKET);
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
        // Damage shows in the copy, which lies in a block of the ticket that ends for it. Nothing else had a place.
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
    rig.frame(PREFILL, &encode_push(KEY, 1, Push::Finish(TokenId(43)), Bytes::new()));
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { .. }]));
}

#[test]
fn only_one_worker_may_push() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.frame(STRANGER, &blocks(KEY, 1, 0, &[&[9; 64]], 4));
    rig.frame(STRANGER, &encode_push(KEY, 1, Push::Abort(String::new()), Bytes::new()));
    assert!(matches!(&rig.replies()[..], [(STRANGER, KEY, Reply::Refused(_)), (STRANGER, ..)]));
    rig.core.handle_peer_lost(STRANGER, false, &"gone", rig.now);
    rig.layer(1);
    rig.finish();
    assert!(committed(&rig.events(), TICKET));
    assert_eq!(rig.written.0.len(), 4);
}

#[test]
fn abort_and_loss_end_the_ticket() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.frame(PREFILL, &encode_push(KEY, 1, Push::Abort("deadline".to_owned()), Bytes::new()));
    let events = rig.events();
    assert!(matches!(&events[..], [ReceiverEvent::Aborted { reason, .. }] if reason.contains("deadline")));

    let mut rig = Rig::new();
    rig.layer(0);
    rig.core.handle_peer_lost(PREFILL, false, &"killed", rig.now);
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
    rig.core.handle_peer_lost(PREFILL, false, &"killed", rig.now);
    assert!(committed(&rig.events(), TICKET));
    assert_eq!(rig.replies(), [], "there is nobody to answer");
}

#[test]
fn the_lease_counts_from_the_first_frame_and_arriving_bytes_renew_it() {
    let mut rig = Rig::new();
    rig.now += RESERVE - Duration::from_millis(1);
    rig.core.handle_timeout(rig.now);
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
    rig.frame(PREFILL, &encode_push(key, 1, Push::Finish(TOKEN), Bytes::new()));
    assert!(committed(&rig.events(), key.ticket_id));
}

#[test]
fn replies_wait_for_room_and_are_bounded() {
    let mut rig = Rig::new();
    rig.outlet.full = true;
    for ticket in 100..200 {
        let key = TicketKey { ticket_id: TicketId(ticket), ..KEY };
        rig.frame(STRANGER, &encode_push(key, 1, Push::Finish(TOKEN), Bytes::new()));
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
    let _ = rig.core.revoke(TICKET);
    rig.core.issue(reservation, TicketId(5), rig.now).expect("room again");
}

#[test]
fn a_ticket_that_nobody_uses_ends_with_its_reservation() {
    let mut rig = Rig::new();
    rig.core.handle_timeout(rig.now + RESERVE - Duration::from_millis(1));
    assert_eq!(rig.events(), []);
    rig.core.handle_timeout(rig.now + RESERVE);
    assert_eq!(rig.events(), [ReceiverEvent::Expired { ticket: TICKET }]);
}

/// A second connection of the prefill worker.
const RAIL: u32 = 3;

fn resume(generation: u32) -> Frame {
    encode_push(KEY, generation, Push::Resume, Bytes::new())
}

fn on_path(generation: u32, layer: u32) -> Frame {
    let (body, checksums) = gather(&[&[layer as u8; 64], &[layer as u8; 32]]);
    let run = Run { layer, first_block: 0, blocks: 2, last_rows: 2, checksums };
    encode_push(KEY, generation, Push::Blocks(run), body)
}

/// With one layer landed, both connections announced, and the first one lost.
fn broken() -> Rig {
    let mut rig = Rig::new();
    rig.core.handle_peer_up(RAIL, "prefill-0", 5);
    rig.layer(0);
    rig.core.handle_peer_lost(PREFILL, true, &"reset", rig.now);
    assert_eq!(rig.events(), [], "it may go on");
    rig
}

#[test]
fn a_broken_path_is_resumed_and_only_what_is_missing_comes_again() {
    let mut rig = broken();
    rig.frame(RAIL, &resume(2));
    let held = Reply::Held { generation: 2, landed: vec![0b0011] };
    assert_eq!(rig.replies(), [(RAIL, KEY, held.clone())]);
    // Asked again: the answer may have been lost.
    rig.frame(RAIL, &resume(2));
    assert_eq!(rig.replies(), [(RAIL, KEY, held)]);
    rig.frame(RAIL, &on_path(2, 1));
    rig.frame(RAIL, &encode_push(KEY, 2, Push::Finish(TOKEN), Bytes::new()));
    let events = rig.events();
    assert!(committed(&events, TICKET));
    let [ReceiverEvent::Committed { report, .. }] = events[..] else { panic!("{events:?}") };
    assert_eq!((report.bytes, report.resumes), (192, 1));
    assert_eq!(rig.replies(), [(RAIL, KEY, Reply::Committed)]);
    assert_eq!(rig.written.0.len(), 4, "no piece twice");
}

#[test]
fn what_is_late_on_a_broken_path_is_fenced_off() {
    let mut rig = broken();
    rig.frame(PREFILL, &on_path(1, 1));
    rig.frame(RAIL, &on_path(1, 1));
    rig.frame(RAIL, &resume(2));
    rig.frame(PREFILL, &on_path(2, 1));
    rig.frame(RAIL, &on_path(1, 1));
    assert_eq!((rig.core.stats().superseded, rig.written.0.len()), (4, 2));
    rig.frame(RAIL, &on_path(3, 1));
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { .. }]), "nobody opened that path");
}

#[test]
fn a_broken_path_that_nobody_resumes_ends_the_ticket_in_time() {
    let mut rig = broken();
    rig.core.handle_timeout(rig.now + RESUME_MAX - Duration::from_millis(1));
    assert_eq!(rig.events(), []);
    rig.core.handle_timeout(rig.now + RESUME_MAX);
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { ticket: TICKET, .. }]));
    rig.frame(RAIL, &resume(2));
    assert!(matches!(&rig.replies()[..], [(RAIL, KEY, Reply::Stale(_))]));
}

#[test]
fn nobody_but_the_same_process_resumes() {
    for (worker, incarnation) in [("prefill-2", 5), ("prefill-0", 6)] {
        let mut rig = broken();
        rig.core.handle_peer_up(9, worker, incarnation);
        rig.frame(9, &resume(2));
        assert!(
            rig.written.0.len() == 2 && !rig.replies().iter().any(|(.., r)| matches!(r, Reply::Held { .. }))
        );
    }
}

#[test]
fn a_prefill_worker_that_is_started_anew_ends_what_its_predecessor_pushed() {
    let mut rig = Rig::new();
    rig.layer(0);
    rig.core.handle_peer_up(RAIL, "prefill-0", 6);
    assert!(matches!(&rig.events()[..], [ReceiverEvent::Aborted { ticket: TICKET, .. }]));
}

#[test]
fn a_commit_whose_answer_was_lost_is_answered_on_the_next_path() {
    let mut rig = Rig::new();
    rig.core.handle_peer_up(RAIL, "prefill-0", 5);
    rig.layer(0);
    rig.layer(1);
    rig.finish();
    rig.core.handle_peer_lost(PREFILL, true, &"reset", rig.now);
    assert_eq!(rig.replies(), []);
    rig.frame(RAIL, &resume(2));
    assert_eq!(rig.replies(), [(RAIL, KEY, Reply::Committed)]);
}

#[test]
fn a_sender_that_cannot_resume_is_understood() {
    let mut rig = Rig::new();
    rig.frame(PREFILL, &on_path(0, 0));
    rig.frame(PREFILL, &on_path(0, 1));
    rig.frame(PREFILL, &encode_push(KEY, 0, Push::Finish(TOKEN), Bytes::new()));
    assert!(committed(&rig.events(), TICKET));
}

#[test]
fn renewing_keeps_a_silent_transfer_alive() {
    let mut rig = Rig::new();
    rig.layer(0);
    for _ in 0..3 {
        rig.now += LEASE - Duration::from_millis(1);
        rig.frame(PREFILL, &encode_push(KEY, 1, Push::Renew, Bytes::new()));
        rig.core.handle_timeout(rig.now);
    }
    assert_eq!(rig.events(), []);
}
