//! What a source sees when a worker dies, hangs, comes back, lies, or answers late.

mod support;

use std::time::Duration;

use engine::{Experts, ExpertsError};
use expert::Placement;
use fabric::{Channel, Event, Fabric, Frame, Limits, PeerId};
use model::{Checkpoint, Numerics};
use prost::Message;
use proto::v1::{CombineHead, DispatchHead};
use support::{Batch, Network, PATIENCE, Worker, checkpoint, local, placement, remote, runtime};

const NUMERICS: Numerics = Numerics::Fp8;
const FIXTURE: &str = "v3_fp8_mtp";

struct Scene {
    checkpoint: Checkpoint,
    network: Network,
    placement: Placement,
    batch: Batch,
    expected: Vec<u32>,
}

impl Scene {
    /// Two workers' placement, and a batch that needs both.
    fn new(network: Network) -> Self {
        let checkpoint = checkpoint(FIXTURE);
        let placement = placement(&checkpoint, 2);
        let layer = placement.layers().next().expect("a MoE layer");
        let batch = Batch::random(&checkpoint, NUMERICS, layer, 12, 3);
        let expected = batch.run(&mut local(&checkpoint, NUMERICS)).expect("local experts");
        Self { checkpoint, network, placement, batch, expected }
    }

    fn worker(&self, rank: usize, incarnation: u64) -> Worker {
        let fabric = self.network.join(&format!("expert-{rank}"), incarnation);
        Worker::start(&self.checkpoint, NUMERICS, &self.placement, rank, fabric)
    }

    fn source(&self, timeout: Duration) -> impl Experts + use<> {
        let addresses = vec!["inproc://expert-0".to_owned(), "inproc://expert-1".to_owned()];
        let fabric = self.network.join("prefill-0", 7);
        remote(&self.checkpoint, NUMERICS, &self.placement, addresses, fabric, timeout)
    }

    fn assert_answered(&self, source: &mut dyn Experts) {
        assert_eq!(self.batch.run(source).expect("an answer"), self.expected);
    }
}

fn assert_unavailable(outcome: Result<Vec<u32>, ExpertsError>, worker: &str) {
    match outcome {
        Err(ExpertsError::Unavailable { worker: named, .. }) => assert!(named.contains(worker), "{named}"),
        other => panic!("{worker} should be unavailable: {other:?}"),
    }
}

/// A worker's end of the fabric without a worker behind it.
struct Puppet {
    fabric: Fabric,
}

impl Puppet {
    fn dispatch(&self) -> (PeerId, DispatchHead) {
        let events = self.fabric.receiver(Channel::Experts);
        loop {
            if let Event::Frame { peer, head, .. } = events.recv_timeout(PATIENCE).expect("a dispatch") {
                return (peer, DispatchHead::decode(head).expect("a head"));
            }
        }
    }

    fn reply(&self, peer: PeerId, head: Vec<u8>, body: Vec<u8>) {
        let frame = Frame { head: head.into(), body: vec![body.into()] };
        self.fabric.try_send(peer, Channel::Experts, frame).expect("room for a reply");
    }
}

fn combine_head(dispatch: &DispatchHead) -> CombineHead {
    CombineHead {
        source_incarnation: dispatch.source_incarnation,
        sequence: dispatch.sequence,
        vectors: dispatch.experts.len() as u32,
        refused: String::new(),
    }
}

#[test]
fn a_dead_worker_is_named_and_taken_back_after_its_restart() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let scene = Scene::new(Network::in_process());
    let _first = scene.worker(0, 1);
    let second = scene.worker(1, 1);
    let mut source = scene.source(PATIENCE);
    scene.assert_answered(&mut source);
    second.kill();
    assert_unavailable(scene.batch.run(&mut source), "expert-1");
    assert_unavailable(scene.batch.run(&mut source), "expert-1");
    let _second = scene.worker(1, 2);
    scene.assert_answered(&mut source);
}

#[test]
fn a_worker_that_was_never_there_is_named() {
    let scene = Scene::new(Network::in_process());
    assert_unavailable(scene.batch.run(&mut scene.source(PATIENCE)), "expert-0");
}

#[test]
fn a_hanging_worker_costs_the_timeout_and_no_more() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let scene = Scene::new(Network::in_process());
    let _first = scene.worker(0, 1);
    let hanging = Puppet { fabric: scene.network.join("expert-1", 1) };
    let mut source = scene.source(Duration::from_millis(50));
    // That this returns at all is the point.
    assert_unavailable(scene.batch.run(&mut source), "expert-1");
    // Its answer to the batch that was given up comes before the answer to the next.
    let (peer, dispatch) = hanging.dispatch();
    let size = dispatch.experts.len() * dispatch.hidden as usize * 2;
    hanging.reply(peer, combine_head(&dispatch).encode_to_vec(), vec![0xff; size]);
    assert_unavailable(scene.batch.run(&mut source), "expert-1");
}

#[test]
fn a_worker_that_takes_no_frames_costs_the_timeout_too() {
    let scene = Scene::new(Network::in_process());
    let limits = || Limits { receive_frames_max: 1, ..Limits::default() };
    let _ends = [0, 1].map(|rank| scene.network.join_with(&format!("expert-{rank}"), 1, limits()));
    let mut source = scene.source(Duration::from_millis(50));
    match scene.batch.run(&mut source) {
        Err(ExpertsError::Unavailable { detail, .. }) => assert_eq!(detail, "no answer in time"),
        other => panic!("{other:?}"),
    }
    match scene.batch.run(&mut source) {
        Err(ExpertsError::Unavailable { detail, .. }) => assert_eq!(detail, "it takes no frames"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_frame_is_sent_again_to_a_worker_that_came_back() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let scene = Scene::new(Network::in_process());
    let _first = scene.worker(0, 1);
    let dying = Puppet { fabric: scene.network.join("expert-1", 1) };
    let mut source = scene.source(PATIENCE);
    let cpu = compute::Cpu::new(1);
    source.dispatch(&cpu, &scene.batch.as_expert_batch()).expect("dispatched");
    dying.dispatch();
    dying.fabric.close();
    let _second = scene.worker(1, 2);
    let mut out = scene.batch.output();
    source.combine(&cpu, &mut out).expect("answered by the second incarnation");
    let found: Vec<u32> = out.iter().map(|value| value.to_bits()).collect();
    assert_eq!(found, scene.expected);
}

#[test]
fn stale_and_unreadable_replies_are_ignored() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let scene = Scene::new(Network::in_process());
    let _first = scene.worker(0, 1);
    let real = scene.worker(1, 1);
    let mut source = scene.source(PATIENCE);
    scene.assert_answered(&mut source);
    real.kill();
    let puppet = Puppet { fabric: scene.network.join("expert-1", 2) };
    let cpu = compute::Cpu::new(1);
    source.dispatch(&cpu, &scene.batch.as_expert_batch()).expect("dispatched");
    let (peer, dispatch) = puppet.dispatch();
    let size = dispatch.experts.len() * dispatch.hidden as usize * 2;
    puppet.reply(peer, vec![0xff; 40], Vec::new());
    let old = CombineHead { sequence: dispatch.sequence - 1, ..combine_head(&dispatch) };
    puppet.reply(peer, old.encode_to_vec(), vec![0x40; size]);
    let foreign = CombineHead { source_incarnation: 8, ..combine_head(&dispatch) };
    puppet.reply(peer, foreign.encode_to_vec(), vec![0x40; size]);
    // The one that counts: all zeros.
    puppet.reply(peer, combine_head(&dispatch).encode_to_vec(), vec![0; size]);
    let mut out = scene.batch.output();
    source.combine(&cpu, &mut out).expect("answered");
    let hidden = out.len() / scene.batch.vectors();
    for (slot, vector) in out.chunks_exact(hidden).enumerate() {
        let owners = scene.placement.owners(scene.batch.layer).expect("a MoE layer");
        let puppets = owners[usize::from(scene.batch.ids[slot])] == 1;
        assert_eq!(vector.iter().all(|&value| value == 0.0), puppets, "slot {slot}");
    }
}

#[test]
fn a_wrong_reply_is_a_rejection_that_says_why() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let check = |change: fn(&mut CombineHead, &mut Vec<u8>), expect: &str| {
        let scene = Scene::new(Network::in_process());
        let _first = scene.worker(0, 1);
        let puppet = Puppet { fabric: scene.network.join("expert-1", 1) };
        let mut source = scene.source(PATIENCE);
        let cpu = compute::Cpu::new(1);
        source.dispatch(&cpu, &scene.batch.as_expert_batch()).expect("dispatched");
        let (peer, dispatch) = puppet.dispatch();
        let mut head = combine_head(&dispatch);
        let mut body = vec![0; dispatch.experts.len() * dispatch.hidden as usize * 2];
        change(&mut head, &mut body);
        puppet.reply(peer, head.encode_to_vec(), body);
        match source.combine(&cpu, &mut scene.batch.output()) {
            Err(ExpertsError::Rejected { detail, .. }) => assert!(detail.contains(expect), "{detail}"),
            other => panic!("{expect}: {other:?}"),
        }
    };
    check(|head, _| head.refused = "placement_version is 3".to_owned(), "placement_version is 3");
    check(|head, _| head.vectors += 1, "vectors");
    check(|_, body| body.truncate(body.len() - 1), "bytes");
}

#[test]
fn sources_and_workers_with_different_tables_refuse_each_other() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let scene = Scene::new(Network::in_process());
    let config = scene.checkpoint.config();
    let other = Placement::round_robin(scene.placement.layers(), config.n_routed_experts, 2).expect("valid");
    let _workers: Vec<Worker> = (0..2)
        .map(|rank| {
            let fabric = scene.network.join(&format!("expert-{rank}"), 1);
            Worker::start(&scene.checkpoint, NUMERICS, &other, rank, fabric)
        })
        .collect();
    match scene.batch.run(&mut scene.source(PATIENCE)) {
        Err(ExpertsError::Rejected { detail, .. }) => {
            assert!(detail.contains("placement_version"), "{detail}")
        }
        other => panic!("{other:?}"),
    }
}
