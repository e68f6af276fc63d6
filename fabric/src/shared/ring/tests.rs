use std::os::fd::AsFd;

use std::collections::VecDeque;

use super::*;
use crate::shared::new_bell;

/// A producer and a consumer that map each other's memory, as two processes would.
struct Pair {
    producer: Producer,
    consumer: Consumer,
    /// The producer's side, to be written as a hostile peer would.
    writes: Arc<Ours>,
    layout: Layout,
}

fn limits() -> Limits {
    Limits {
        head_bytes_max: 1 << 10,
        body_bytes_max: 4 << 10,
        send_frames_max: 4,
        send_bytes_max: 8 << 10,
        ..Limits::default()
    }
}

fn pair() -> Pair {
    let (limits, channel) = (limits(), Channel::Kv);
    let layout = Layout::of(&limits);
    let side = || Arc::new(Ours::new(layout.bytes()).expect("memory"));
    let map = |side: &Ours| {
        let file = side.file().as_fd().try_clone_to_owned().expect("a descriptor");
        Arc::new(Theirs::map(&file, layout.bytes()).expect("a mapping"))
    };
    let (a, b) = (side(), side());
    let producer = Producer::new(a.clone(), map(&b), channel, new_bell().expect("a bell"), &limits);
    let consumer = Consumer::new(b, map(&a), layout, channel, &limits);
    Pair { producer, consumer, writes: a, layout }
}

fn frame(byte: u8, body_bytes: usize) -> Frame {
    Frame { head: Bytes::from(vec![byte; 3]), body: vec![Bytes::from(vec![byte; body_bytes])] }
}

#[test]
fn places_come_back_in_order_and_never_overlap() {
    let mut pair = pair();
    let mut held: VecDeque<(u8, SharedBody)> = VecDeque::new();
    let mut byte = 0_u8;
    // Sizes that do not divide the arena, so that its end is reached at many places.
    for step in 0..5_000_usize {
        byte = byte.wrapping_add(1);
        let bytes = step * 377 % 3_900;
        if pair.producer.offer(frame(byte, bytes)).is_ok() {
            let (head, body) = pair.consumer.take().expect("sound").expect("a frame");
            assert_eq!((&*head, body.len()), (&[byte; 3][..], bytes));
            held.push_back((byte, body));
        } else {
            assert!(!held.is_empty(), "an empty ring takes any frame");
        }
        if held.len() == 4 || step % 3 == 0 {
            let back = if step % 2 == 0 { held.pop_front() } else { held.pop_back() };
            if let Some((byte, body)) = back {
                assert!(
                    body.to_vec().iter().all(|&b| b == byte),
                    "a frame was overwritten while it was held"
                );
            }
        }
    }
}

#[test]
fn full_by_frames_and_by_bytes_until_dropped() {
    let mut pair = pair();
    let bodies: Vec<_> = (0..4)
        .map(|i| {
            pair.producer.offer(frame(i, 10)).expect("room");
            pair.consumer.take().expect("sound").expect("a frame").1
        })
        .collect();
    assert!(matches!(pair.producer.offer(frame(9, 10)), Err(SendError::Full(f)) if f.body_bytes() == 10));
    drop(bodies);
    pair.producer.offer(frame(0, 4_000)).expect("room again");
    pair.producer.offer(frame(1, 4_000)).expect("8 KiB are the bound");
    assert!(matches!(pair.producer.offer(frame(2, 4_000)), Err(SendError::Full(_))));
}

#[test]
fn what_a_peer_writes_is_checked_before_it_is_used() {
    let far = 1 << 40;
    let cases: [(u64, u64, u64); 5] = [
        // place, head bytes, body bytes
        (far, 1, 1),
        (u64::MAX, 1, 1),
        (0, u64::from(u32::MAX), 0),
        (0, 0, u64::from(u32::MAX)),
        (12_000, 1_000, 4_000),
    ];
    for (place, head, body) in cases {
        let mut pair = pair();
        let entry = pair.layout.entry(Channel::Kv, 0);
        pair.writes.publish(entry, place);
        pair.writes.publish(entry + 8, head << 32 | body);
        pair.writes.publish(Layout::produced(Channel::Kv), 1);
        assert!(pair.consumer.take().is_err(), "a frame at {place} with {head} + {body} bytes");
    }
}

#[test]
fn a_peer_that_takes_more_than_was_sent_frees_nothing_that_is_under_way() {
    let mut pair = pair();
    for i in 0..4 {
        pair.producer.offer(frame(i, 10)).expect("room");
    }
    let claims = &pair.consumer.ours;
    claims.publish(Layout::consumed(Channel::Kv), u64::MAX);
    pair.producer.offer(frame(5, 10)).expect("its own loss: the ring is empty by its word");
    assert_eq!(pair.producer.places.under_way(), (1, 64));
}

#[test]
fn a_header_that_does_not_match_its_memory_is_refused() {
    let layout = Layout::of(&limits());
    let read = |entries, arena, bytes| Layout::read(entries, arena, bytes).is_ok();
    let (entries, arena) = (layout.entries as u64, layout.arena_bytes as u64);
    assert!(read(entries, arena, layout.bytes()));
    assert!(!read(entries, arena, layout.bytes() - 1));
    assert!(!read(0, arena, layout.bytes()));
    assert!(!read(u64::MAX, arena, layout.bytes()));
    assert!(!read(entries, u64::MAX, layout.bytes()));
    assert!(!read(entries + 1, arena + 4096, layout.bytes()));
}

#[test]
fn memory_that_can_shrink_is_refused() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let file = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&file, 4096).expect("room");
    assert!(Theirs::map(&file, 1 << 20).is_err());
}
