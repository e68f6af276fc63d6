//! Frames that no honest source sends. A worker answers with a reason or drops them, and serves the next one.

mod support;

use bytes::Bytes;
use fabric::{Channel, Event, Fabric, Frame, Limits, PeerId};
use model::Numerics;
use prost::Message;
use proto::v1::{CombineHead, DispatchHead};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use support::{Batch, Network, PATIENCE, Worker, checkpoint, local, placement, remote, runtime};

const NUMERICS: Numerics = Numerics::Fp8;

struct Attacker {
    fabric: Fabric,
    peer: PeerId,
}

impl Attacker {
    fn send(&self, head: impl Into<Bytes>, body: impl Into<Bytes>) {
        let frame = Frame { head: head.into(), body: vec![body.into()] };
        self.fabric.try_send(self.peer, Channel::Experts, frame).expect("room for a frame");
    }

    fn reply(&self) -> CombineHead {
        let events = self.fabric.receiver(Channel::Experts);
        loop {
            if let Event::Frame { head, .. } = events.recv_timeout(PATIENCE).expect("a reply") {
                return CombineHead::decode(head).expect("a head");
            }
        }
    }
}

#[test]
fn wrong_frames_are_refused_by_name_and_garbage_is_survived() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let checkpoint = checkpoint("v3_fp8_mtp");
    let config = checkpoint.config();
    let network = Network::in_process();
    let placement = placement(&checkpoint, 1);
    let worker = Worker::start(&checkpoint, NUMERICS, &placement, 0, network.join("expert-0", 1));
    let fabric = network.join("attacker", 9);
    let peer = fabric.connect(&worker.fabric.address(), PATIENCE).expect("connected");
    let attacker = Attacker { fabric, peer };

    let layer = placement.layers().next().expect("a MoE layer");
    let good = DispatchHead {
        source_incarnation: 9,
        sequence: 1,
        layer: layer as u32,
        placement_version: placement.version(),
        tokens: 1,
        hidden: config.hidden_size as u32,
        experts: vec![0, 1],
        experts_per_token: vec![2],
    };
    let body = vec![0; config.hidden_size + 4 * config.hidden_size.div_ceil(128)];
    attacker.send(good.encode_to_vec(), body.clone());
    let reply = attacker.reply();
    assert_eq!((reply.vectors, reply.refused.as_str(), reply.sequence), (2, "", 1));

    let check = |change: fn(&mut DispatchHead), expect: &str| {
        let mut head = good.clone();
        head.sequence = 2;
        change(&mut head);
        attacker.send(head.encode_to_vec(), body.clone());
        let reply = attacker.reply();
        assert!(reply.refused.contains(expect), "{:?} does not name {expect:?}", reply.refused);
        assert_eq!((reply.vectors, reply.sequence, reply.source_incarnation), (0, 2, 9));
    };
    check(|head| head.placement_version = 0, "placement_version");
    check(|head| head.layer = 0, "layer 0");
    check(|head| head.experts[0] = 9_999, "expert 9999");
    check(|head| head.hidden *= 2, "hidden");
    check(|head| head.tokens = u32::MAX, "tokens");
    check(|head| head.tokens = 2, "experts_per_token");
    check(|head| head.experts_per_token[0] = u32::MAX, "experts_per_token");

    let seed = 20_261_122;
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let valid = good.encode_to_vec();
    for _ in 0..500 {
        let mut head = valid.clone();
        if rng.random_bool(0.5) {
            let at = rng.random_range(0..head.len());
            head[at] ^= 1 << rng.random_range(0..8);
        } else {
            head = vec![0; rng.random_range(0..200)];
            rng.fill_bytes(&mut head);
        }
        let mut noise = body.clone();
        rng.fill_bytes(&mut noise);
        attacker.send(head, noise);
    }

    let batch = Batch::random(&checkpoint, NUMERICS, layer, 3, 5);
    let source = network.join("prefill-0", 7);
    let addresses = vec![worker.fabric.address()];
    let mut remote = remote(&checkpoint, NUMERICS, &placement, addresses, source, PATIENCE);
    let expected = batch.run(&mut local(&checkpoint, NUMERICS)).expect("local experts");
    assert_eq!(batch.run(&mut remote).expect("still served"), expected);
    let metrics = worker.handle.metrics_text();
    let unread = metrics.lines().any(|line| line == "expert_frames_unreadable_total 0");
    assert!(!unread, "unreadable frames are counted:\n{metrics}");
}

#[test]
fn a_source_that_takes_no_replies_holds_nobody_up() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let checkpoint = checkpoint("v3_fp8_mtp");
    let network = Network::in_process();
    let placement = placement(&checkpoint, 1);
    let worker = Worker::start(&checkpoint, NUMERICS, &placement, 0, network.join("expert-0", 1));
    let layer = placement.layers().next().expect("a MoE layer");
    let deaf = network.join_with("deaf", 9, Limits { receive_frames_max: 1, ..Limits::default() });
    let peer = deaf.connect(&worker.fabric.address(), PATIENCE).expect("connected");
    let deaf = Attacker { fabric: deaf, peer };
    let hidden = checkpoint.config().hidden_size;
    // More than the worker keeps: the oldest are dropped.
    for sequence in 0..600 {
        let head = DispatchHead {
            source_incarnation: 9,
            sequence,
            layer: layer as u32,
            placement_version: placement.version(),
            tokens: 1,
            hidden: hidden as u32,
            experts: vec![0],
            experts_per_token: vec![1],
        };
        deaf.send(head.encode_to_vec(), vec![0; hidden + 4 * hidden.div_ceil(128)]);
    }
    let batch = Batch::random(&checkpoint, NUMERICS, layer, 3, 5);
    let addresses = vec![worker.fabric.address()];
    let source = network.join("prefill-0", 7);
    let mut remote = remote(&checkpoint, NUMERICS, &placement, addresses, source, PATIENCE);
    let expected = batch.run(&mut local(&checkpoint, NUMERICS)).expect("local experts");
    assert_eq!(batch.run(&mut remote).expect("served"), expected);
    let metrics = worker.handle.metrics_text();
    let none_dropped = metrics.lines().any(|line| line == "expert_replies_dropped_total 0");
    assert!(!none_dropped, "dropped replies are counted:\n{metrics}");
}
