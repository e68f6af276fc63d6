//! What every transport promises. Each test runs over all of them.

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fabric::{Channel, DialError, FabricError, Frame, Limits, LossReason, SendError};
use support::{
    Net, PATIENCE, drained, eventually, frame, lost, pair, pair_with, pattern, received, send, up,
};

/// Makes a test per transport of each function.
macro_rules! over_all_transports {
    ($($name:ident),* $(,)?) => {
        mod in_process {
            $(#[test] fn $name() { super::$name(&super::Net::in_process()); })*
        }
        mod quic {
            $(#[test] fn $name() { super::$name(&super::Net::quic()); })*
        }
        mod shared {
            $(#[test] fn $name() { super::$name(&super::Net::shared()); })*
        }
        mod rdma {
            $(#[test] #[ignore = "needs NIXL: TRIREME_NIXL_LIBRARY"] fn $name() { super::$name(&super::Net::rdma()); })*
        }
    };
}

over_all_transports!(
    frames_keep_their_order_on_each_channel,
    a_frame_of_8_mib_arrives_whole,
    pieces_are_joined_and_empty_parts_stay_empty,
    both_directions_at_once,
    a_consumer_that_stops_reading_stops_its_sender,
    connecting_twice_gives_the_same_peer,
    both_sides_may_connect_at_once,
    a_dropped_end_is_lost_on_both_channels,
    a_restarted_worker_is_another_peer,
    oversized_frames_and_unknown_peers_are_refused,
    a_closed_end_is_closed,
    the_peers_are_bounded,
    absent_and_foreign_addresses_are_refused,
    gathered_bodies_arrive_with_their_checksums,
    bodies_may_be_dropped_in_any_order,
    a_consumer_that_sleeps_is_woken,
    counters_count,
);

fn frames_keep_their_order_on_each_channel(net: &Net) {
    const FRAMES: u32 = 2_000;
    let pair = pair(net);
    std::thread::scope(|scope| {
        for channel in [Channel::Kv, Channel::Experts] {
            let pair = &pair;
            scope.spawn(move || {
                for i in 0..FRAMES {
                    let body = vec![channel as u8; (i % 300) as usize];
                    send(&pair.a, pair.b_at_a, channel, frame(&i.to_le_bytes(), &body));
                }
            });
            scope.spawn(move || {
                let events = pair.b.receiver(channel);
                for i in 0..FRAMES {
                    let (peer, head, body) = received(&events);
                    assert_eq!(peer, pair.a_at_b);
                    assert_eq!(*head, i.to_le_bytes(), "order on {channel:?}");
                    assert_eq!(*body, vec![channel as u8; (i % 300) as usize]);
                }
            });
        }
    });
}

fn a_frame_of_8_mib_arrives_whole(net: &Net) {
    let pair = pair(net);
    let events = pair.b.receiver(Channel::Kv);
    for seed in 0..3 {
        let body = pattern(seed, 8 << 20);
        send(&pair.a, pair.b_at_a, Channel::Kv, frame(b"big", &body));
        let (_, head, got) = received(&events);
        assert_eq!(&*head, b"big");
        assert!(*got == *body, "the body differs, seed {seed}");
    }
}

fn pieces_are_joined_and_empty_parts_stay_empty(net: &Net) {
    let pair = pair(net);
    let events = pair.b.receiver(Channel::Experts);
    let check = |head: &'static str, pieces: &[&'static str], body: &str| {
        let sent = Frame { head: Bytes::from(head), body: pieces.iter().copied().map(Bytes::from).collect() };
        send(&pair.a, pair.b_at_a, Channel::Experts, sent);
        let (_, got_head, got_body) = received(&events);
        assert_eq!((&*got_head, &*got_body), (head.as_bytes(), body.as_bytes()));
    };
    check("head", &["one", "", "two"], "onetwo");
    check("", &["body"], "body");
    check("head", &[], "");
    check("", &[""], "");
}

fn both_directions_at_once(net: &Net) {
    const FRAMES: u64 = 64;
    let pair = pair(net);
    std::thread::scope(|scope| {
        for (end, peer, theirs) in [(&pair.a, pair.b_at_a, 2_u64), (&pair.b, pair.a_at_b, 1)] {
            let ours = 3 - theirs;
            scope.spawn(move || {
                for i in 0..FRAMES {
                    send(end, peer, Channel::Kv, frame(&i.to_le_bytes(), &pattern(ours + i, 200_000)));
                }
            });
            scope.spawn(move || {
                let events = end.receiver(Channel::Kv);
                for i in 0..FRAMES {
                    let (from, head, body) = received(&events);
                    assert_eq!((from, *head == i.to_le_bytes()), (peer, true));
                    assert!(*body == *pattern(theirs + i, 200_000), "frame {i} differs");
                }
            });
        }
    });
}

fn a_consumer_that_stops_reading_stops_its_sender(net: &Net) {
    const BODY_BYTES: usize = 256 << 10;
    const OFFERED: u32 = 512; // 128 MiB, several times what all buffers together may hold
    let limits = Limits {
        body_bytes_max: BODY_BYTES,
        send_bytes_max: 2 * BODY_BYTES,
        receive_bytes_max: 2 << 20,
        ..Limits::default()
    };
    let pair = pair_with(net, limits);
    let body = pattern(7, BODY_BYTES);

    // Offers until nothing has moved for a while: the pipe is full, and bounded.
    let mut accepted = 0_u32;
    let mut last_progress = Instant::now();
    while accepted < OFFERED && last_progress.elapsed() < Duration::from_millis(500) {
        match pair.a.try_send(pair.b_at_a, Channel::Kv, frame(&accepted.to_le_bytes(), &body)) {
            Ok(()) => (accepted, last_progress) = (accepted + 1, Instant::now()),
            Err(SendError::Full(back)) => {
                assert_eq!(back.body_bytes(), BODY_BYTES, "a refused frame comes back whole");
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(accepted < OFFERED / 2, "{accepted} frames of {OFFERED} went into bounded queues");
    assert!(pair.a.stats().sends_full > 0);

    // The other channel is none of its business.
    send(&pair.a, pair.b_at_a, Channel::Experts, frame(b"urgent", b"tokens"));
    assert_eq!(&*received(&pair.b.receiver(Channel::Experts)).1, b"urgent");

    let events = pair.b.receiver(Channel::Kv);
    for i in 0..accepted {
        let (_, head, got) = received(&events);
        assert_eq!(*head, i.to_le_bytes());
        assert!(*got == *body, "frame {i} differs");
    }
    send(&pair.a, pair.b_at_a, Channel::Kv, frame(b"again", b""));
    assert_eq!(&*received(&events).1, b"again");
}

fn connecting_twice_gives_the_same_peer(net: &Net) {
    let (a, b) = (net.open("a"), net.open("b"));
    let ids: HashSet<_> = std::thread::scope(|scope| {
        let dials: Vec<_> = (0..8).map(|_| scope.spawn(|| a.connect(&b.address(), PATIENCE))).collect();
        dials.into_iter().map(|dial| dial.join().expect("no panic").expect("a connection")).collect()
    });
    assert_eq!(ids.len(), 1, "concurrent dials share a connection");
    assert!(ids.contains(&a.connect(&b.address(), PATIENCE).expect("a connection")));
    let info = a.peer(*ids.iter().next().expect("one")).expect("live");
    assert_eq!((info.worker, info.incarnation, info.address), ("b".to_owned(), 1, b.address()));
}

fn both_sides_may_connect_at_once(net: &Net) {
    for _ in 0..8 {
        let (a, b) = (net.open("a"), net.open("b"));
        let start = Barrier::new(2);
        let dial = |from: &fabric::Fabric, to: &fabric::Fabric| {
            start.wait();
            from.connect(&to.address(), PATIENCE).expect("a connection")
        };
        let (b_at_a, a_at_b) = std::thread::scope(|scope| {
            let there = scope.spawn(|| dial(&a, &b));
            let back = dial(&b, &a);
            (there.join().expect("no panic"), back)
        });
        send(&a, b_at_a, Channel::Kv, frame(b"from a", b""));
        send(&b, a_at_b, Channel::Kv, frame(b"from b", b""));
        for (end, expected) in [(&a, b"from b"), (&b, b"from a")] {
            let events = end.receiver(Channel::Kv);
            let head = loop {
                if let fabric::Event::Frame { head, .. } = support::next(&events) {
                    break head;
                }
            };
            assert_eq!(&*head, expected);
        }
    }
}

fn a_dropped_end_is_lost_on_both_channels(net: &Net) {
    let pair = pair(net);
    send(&pair.b, pair.a_at_b, Channel::Kv, frame(b"last words", b""));
    assert_eq!(&*received(&pair.a.receiver(Channel::Kv)).1, b"last words");
    drop(pair.b);
    for channel in [Channel::Kv, Channel::Experts] {
        assert_eq!(lost(&pair.a.receiver(channel)), (pair.b_at_a, LossReason::Closed));
    }
    assert!(pair.a.peer(pair.b_at_a).is_none());
    let sent = pair.a.try_send(pair.b_at_a, Channel::Kv, frame(b"", b""));
    assert!(matches!(sent, Err(SendError::Gone)));
}

fn a_restarted_worker_is_another_peer(net: &Net) {
    let a = net.open("a");
    let mut seen = HashSet::new();
    for incarnation in 1..=3 {
        let b = net.open_with("b", incarnation, Limits::default());
        let peer = a.connect(&b.address(), PATIENCE).expect("a connection");
        assert!(seen.insert(peer), "a peer id came back");
        let events = a.receiver(Channel::Kv);
        let (came_up, info) = up(&events);
        assert_eq!((came_up, info.incarnation), (peer, incarnation));
        drop(b);
        assert_eq!(lost(&events).0, peer);
    }
}

fn oversized_frames_and_unknown_peers_are_refused(net: &Net) {
    let limits = Limits { head_bytes_max: 100, body_bytes_max: 1000, ..Limits::default() };
    let pair = pair_with(net, limits);
    let try_send =
        |head, body| pair.a.try_send(pair.b_at_a, Channel::Kv, frame(&vec![0; head], &vec![0; body]));
    assert!(try_send(100, 1000).is_ok());
    assert!(matches!(try_send(101, 0), Err(SendError::Oversized(f)) if f.head.len() == 101));
    assert!(matches!(try_send(0, 1001), Err(SendError::Oversized(f)) if f.body_bytes() == 1001));

    let stranger = net.open("stranger");
    let gone = stranger.try_send(pair.b_at_a, Channel::Kv, frame(b"", b""));
    assert!(matches!(gone, Err(SendError::Gone)));
    assert!(stranger.peer(pair.b_at_a).is_none());
}

fn a_closed_end_is_closed(net: &Net) {
    let pair = pair(net);
    let events = pair.a.receiver(Channel::Kv);
    pair.a.close();
    pair.a.close();
    drained(&events);
    assert!(matches!(pair.a.try_send(pair.b_at_a, Channel::Kv, frame(b"", b"")), Err(SendError::Gone)));
    assert!(matches!(pair.a.connect(&pair.b.address(), PATIENCE), Err(FabricError::Closed)));
    assert_eq!(lost(&pair.b.receiver(Channel::Kv)), (pair.a_at_b, LossReason::Closed));
}

fn the_peers_are_bounded(net: &Net) {
    let limits = Limits { peers_max: 2, ..Limits::default() };
    let hub = net.open_with("busy", 1, limits);
    let events = hub.receiver(Channel::Kv);
    let others: Vec<_> = (0..3).map(|i| net.open(&format!("w{i}"))).collect();
    for other in &others[..2] {
        other.connect(&hub.address(), PATIENCE).expect("room for two");
        up(&events);
    }
    // Over a network the refused side may learn of it after its own handshake was done.
    match others[2].connect(&hub.address(), PATIENCE) {
        Err(FabricError::Unreachable { .. }) => (),
        Err(other) => panic!("unexpected error {other}"),
        Ok(peer) => {
            let events = others[2].receiver(Channel::Kv);
            up(&events);
            let (gone, reason) = lost(&events);
            assert!(gone == peer && matches!(reason, LossReason::Refused { .. }), "{reason}");
        }
    }
    assert_eq!(hub.stats().peers, 2);
    drop(others);
    lost(&events);
    lost(&events);
    let late = net.open("late");
    late.connect(&hub.address(), PATIENCE).expect("room again");
}

fn absent_and_foreign_addresses_are_refused(net: &Net) {
    let a = net.open("a");
    let nobody = {
        let gone = net.open("gone");
        gone.address()
    };
    let error = a.connect(&nobody, PATIENCE).expect_err("nobody is there");
    let FabricError::Unreachable { address, source } = error else { panic!("unexpected error {error}") };
    assert_eq!(address, nobody);
    let expected = match net {
        Net::InProcess(_) => source == DialError::Absent,
        Net::Quic(_) | Net::Shared(_) | Net::Rdma(..) => matches!(source, DialError::TimedOut(_)),
    };
    assert!(expected, "{source:?}");
    for foreign in ["", "tcp://127.0.0.1:1", "127.0.0.1:1"] {
        let error = a.connect(foreign, PATIENCE).expect_err("no such transport");
        assert!(matches!(error, FabricError::Address { .. }), "{foreign}: {error}");
    }
}

fn gathered_bodies_arrive_with_their_checksums(net: &Net) {
    let pair = pair(net);
    let events = pair.b.receiver(Channel::Kv);
    for round in 0..100_u64 {
        let pieces: Vec<_> = (0..5).map(|i| pattern(10 * round + i, 3_000 * i as usize)).collect();
        let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let head = |checksums: Vec<u64>| checksums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        while let Err(error) = pair.a.try_send_gathered(pair.b_at_a, Channel::Kv, &slices, head) {
            assert!(matches!(error, SendError::Full(_)), "{error}");
            std::thread::yield_now();
        }
        let fabric::Event::Frame { head, body, .. } = support::next(&events) else { panic!("no frame") };
        let mut start = 0;
        for (piece, sum) in pieces.iter().zip(head.chunks_exact(8)) {
            let mut copy = vec![0; piece.len()];
            let copied = body.copy_summed(start, &mut copy).expect("within the body");
            assert!(copy == *piece, "round {round}");
            assert_eq!(copied.to_le_bytes(), sum);
            assert_eq!(copied, fabric::checksum(piece));
            start += piece.len();
        }
        assert_eq!(body.len(), start);
        assert!(body.copy_summed(start, &mut [0]).is_err(), "behind the body");
    }
}

fn bodies_may_be_dropped_in_any_order(net: &Net) {
    // Small queues, so that room has to come back for the frames behind.
    let limits = Limits {
        body_bytes_max: 64 << 10,
        send_frames_max: 8,
        send_bytes_max: 128 << 10,
        receive_bytes_max: 2 << 20,
        ..Limits::default()
    };
    let pair = pair_with(net, limits);
    let events = pair.b.receiver(Channel::Kv);
    let mut held = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0..400 {
                let body = pattern(seed, 1 + seed as usize * 131 % 40_000);
                send(&pair.a, pair.b_at_a, Channel::Kv, frame(&seed.to_le_bytes(), &body));
            }
        });
        for seed in 0..400_u64 {
            let fabric::Event::Frame { head, body, .. } = support::next(&events) else { panic!("no frame") };
            assert_eq!(*head, seed.to_le_bytes());
            held.push((seed, body));
            // The oldest is dropped last of three: its room, and that of the others, must come back all the same.
            while seed % 3 == 2 && !held.is_empty() {
                let (seed, body) = held.pop().expect("not empty");
                let expected = pattern(seed, 1 + seed as usize * 131 % 40_000);
                assert!(*body.into_bytes() == *expected, "frame {seed} differs");
            }
        }
    });
}

fn a_consumer_that_sleeps_is_woken(net: &Net) {
    let pair = pair(net);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let events = pair.b.receiver(Channel::Experts);
            for _ in 0..300 {
                let (_, head, body) = received(&events);
                send(&pair.b, pair.a_at_b, Channel::Experts, frame(&head, &body));
            }
        });
        let events = pair.a.receiver(Channel::Experts);
        for i in 0..300_u32 {
            // Now and then long enough for the other side to fall asleep.
            if i % 30 == 0 {
                assert!(events.recv_timeout(Duration::from_millis(2)).is_err());
            }
            send(&pair.a, pair.b_at_a, Channel::Experts, frame(&i.to_le_bytes(), b"tokens"));
            assert_eq!(*received(&events).1, i.to_le_bytes());
        }
    });
    drop(pair.b);
    assert_eq!(lost(&pair.a.receiver(Channel::Experts)).1, LossReason::Closed);
}

fn counters_count(net: &Net) {
    let pair = pair(net);
    for _ in 0..10 {
        send(&pair.a, pair.b_at_a, Channel::Experts, frame(b"12", b"345"));
    }
    let events = pair.b.receiver(Channel::Experts);
    (0..10).for_each(|_| drop(received(&events)));
    eventually("the sender counts what it wrote", || pair.a.stats().frames_sent == 10);
    let (a, b) = (pair.a.stats(), pair.b.stats());
    assert_eq!((a.bytes_sent, b.frames_received, b.bytes_received), (50, 10, 50));
    assert_eq!((a.peers, a.peers_up, a.peers_lost, b.protocol_errors), (1, 1, 0, 0));
    let shared = u64::from(matches!(net, Net::Shared(_)));
    assert_eq!((a.peers_shared, b.peers_shared), (shared, shared), "how the peers are connected");
    if !matches!(net, Net::InProcess(_)) {
        assert_eq!(a.mtu_bytes_min, 65_507, "loopback's datagrams");
    }
    let b = Arc::new(pair.b);
    pair.a.close();
    eventually("the loss is counted", || b.stats().peers_lost == 1);
    assert_eq!(b.stats().peers, 0);
}
