use std::collections::BTreeSet;

use fabric::{Fabric, Hub, Limits};
use kvtransfer::{BlockSink, Receiver, ReceiverEvent, ReceiverOptions, Reservation, TicketId};
use model::{ExecutionFingerprint, KvFormat, ModelConfig, Numerics};
use proptest::prelude::*;

use super::*;
use crate::scheduler::{Arrival, Limits as SchedulerLimits};

const KV_BLOCKS: usize = 12;
const FIRST_TOKEN: TokenId = TokenId(42);

fn layout() -> KvLayout {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_fp8_aligned/config.json");
    let text = std::fs::read_to_string(path).expect("the fixture lies in the repository");
    KvLayout::for_model(&ModelConfig::from_json(&text).expect("a configuration"), KvFormat::Fp8, 0)
}

/// Decode's end, as full of holes as it may be until the commit.
struct Decode {
    receiver: Receiver,
    pieces: Pieces,
    events: Vec<ReceiverEvent>,
}

#[derive(Default)]
struct Pieces(BTreeMap<(u32, u32), Vec<u8>>);

impl BlockSink for Pieces {
    fn place(&mut self, _ticket: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        let twice = self.0.contains_key(&(block, layer));
        assert!(!twice, "block {block} of layer {layer} came twice");
        Some(self.0.entry((block, layer)).or_insert_with(|| vec![0; bytes]))
    }
}

impl Decode {
    fn poll(&mut self, now: Instant) {
        self.events.extend(self.receiver.poll(now, &mut self.pieces));
    }
}

/// A prompt on its way, with a pool whose rows say where they belong.
struct Scene {
    handoff: Handoff,
    scheduler: Scheduler,
    kv: KvPool,
    layout: KvLayout,
    decode: Decode,
    now: Instant,
    id: SequenceId,
    ticket: TicketId,
}

impl Scene {
    /// `receive_frames_max`: what decode's end of the fabric takes before it pushes back.
    fn new(prompt_tokens: usize, step_tokens_max: usize, receive_frames_max: usize) -> Self {
        let layout = layout();
        let hub = Hub::new();
        let now = Instant::now();
        let limits = Limits { receive_frames_max, ..Limits::default() };
        let ours = Fabric::in_process(&hub, "prefill-0", 1, Limits::default()).expect("an end");
        let theirs = Fabric::in_process(&hub, "decode-0", 2, limits).expect("an end");
        let options = ReceiverOptions {
            worker_id: "decode-0".to_owned(),
            incarnation: 2,
            fingerprint: ExecutionFingerprint {
                weights: [0; 16],
                numerics: Numerics::Fp8,
                kv_layout_digest: layout.digest(),
                backend: "cpu".to_owned(),
                arithmetic_revision: 1,
            },
            layout: layout.clone(),
            lease: ReceiverOptions::LEASE,
            reserve: ReceiverOptions::LEASE,
            tickets_max: 4,
        };
        let mut receiver = Receiver::new(theirs, options);
        let ticket = receiver.issue(Reservation { first_block: 0, prompt_tokens }, now).expect("a ticket");
        let mut scheduler = Scheduler::new(SchedulerLimits {
            queue_requests_max: 4,
            queue_tokens_max: 4096,
            active_max: 4,
            step_tokens_max,
            block_tokens: layout.block_tokens,
            kv_blocks: KV_BLOCKS,
            rerun_tokens: 0,
        });
        let id = SequenceId(0);
        scheduler
            .submit(
                Arrival {
                    id,
                    request_id: "request".into(),
                    cache_salt: 0,
                    share: proto::share::Share::default(),
                    prompt: (0..prompt_tokens as u32).map(TokenId).collect(),
                    recompute: false,
                    deadline: None,
                },
                now,
            )
            .expect("room");
        let mut handoff = Handoff::new(Sender::new(ours), &layout);
        handoff.begin(id, "request", &ticket, now).expect("begun");
        let decode = Decode { receiver, pieces: Pieces::default(), events: Vec::new() };
        let kv = KvPool::new(layout.clone(), KV_BLOCKS).expect("a small pool");
        Self { handoff, scheduler, kv, layout, decode, now, id, ticket: ticket.ticket_id }
    }

    /// "Computes" the next chunk: rows appear in the pool layer by layer, and the observer hears of each.
    fn step(&mut self) -> bool {
        let mut step = Vec::new();
        self.scheduler.schedule(&mut step, &mut (), Instant::now());
        let Some(&chunk) = step.first() else { return false };
        for layer in 0..self.layout.layers {
            for position in chunk.start..chunk.start + chunk.tokens {
                self.write_row(position, layer);
            }
            self.handoff.during(&self.scheduler, &step).layer_done(layer, &self.kv);
        }
        self.scheduler.complete(&step);
        if chunk.last {
            self.handoff.finish(self.id, FIRST_TOKEN, self.now);
        }
        true
    }

    fn write_row(&mut self, position: usize, layer: usize) {
        let row_bytes = self.layout.row_bytes();
        let (block, row) = (position / self.layout.block_tokens, position % self.layout.block_tokens);
        let block = self.scheduler.block_table(self.id)[block];
        let mut bytes = self.kv.block_layer(block, layer).to_vec();
        bytes[row * row_bytes..(row + 1) * row_bytes].fill(mark(position, layer));
        self.kv.write_block_layer(block, layer, &bytes);
    }

    fn poll(&mut self) -> Vec<(SequenceId, Outcome)> {
        self.handoff.poll(&self.scheduler, &self.kv, self.now)
    }

    /// Both ends in turn until the hand-off has ended.
    fn settle(&mut self) -> Outcome {
        for _ in 0..10_000 {
            if let Some((id, outcome)) = self.poll().pop() {
                assert_eq!(id, self.id);
                return outcome;
            }
            self.decode.poll(self.now);
        }
        panic!("the hand-off does not end");
    }

    fn assert_complete(&self, prompt_tokens: usize) {
        let row_bytes = self.layout.row_bytes();
        let blocks = self.layout.blocks_for(prompt_tokens) as u32;
        let expected: BTreeSet<(u32, u32)> = (0..blocks)
            .flat_map(|block| (0..self.layout.layers as u32).map(move |layer| (block, layer)))
            .collect();
        assert_eq!(self.decode.pieces.0.keys().copied().collect::<BTreeSet<_>>(), expected);
        for (&(block, layer), bytes) in &self.decode.pieces.0 {
            for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                let position = block as usize * self.layout.block_tokens + row;
                assert!(position < prompt_tokens, "block {block} is longer than the prompt");
                assert!(
                    bytes.iter().all(|&byte| byte == mark(position, layer as usize)),
                    "position {position}"
                );
            }
        }
        let committed = |event: &ReceiverEvent| matches!(event, ReceiverEvent::Committed { first_token, .. } if *first_token == FIRST_TOKEN);
        assert!(self.decode.events.iter().any(committed), "{:?}", self.decode.events);
    }
}

fn mark(position: usize, layer: usize) -> u8 {
    1 + ((position * 31 + layer * 101) % 255) as u8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_row_arrives_once_whatever_the_chunks_and_the_room(
        prompt_tokens in 1usize..(KV_BLOCKS * 64), step_tokens_max in 1usize..300,
        room_frames in 1usize..12, lazy in any::<bool>(),
    ) {
        // Room for a few frames, down to a single one: decode's end pushes back nearly always.
        let mut scene = Scene::new(prompt_tokens, step_tokens_max, room_frames);
        while scene.step() {
            if !lazy {
                prop_assert!(scene.poll().is_empty());
                scene.decode.poll(scene.now);
            }
        }
        let outcome = scene.settle();
        prop_assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
        scene.assert_complete(prompt_tokens);
        prop_assert!(!scene.handoff.has_backlog());
    }
}

#[test]
fn whole_blocks_leave_while_the_chunk_runs_and_the_partial_one_waits() {
    let mut scene = Scene::new(150, 100, 1024);
    let pieces_after = |scene: &mut Scene| {
        // The first poll makes the connection's news known, the second follows it.
        for _ in 0..2 {
            assert!(scene.poll().is_empty());
            scene.decode.poll(scene.now);
        }
        scene.decode.pieces.0.keys().map(|&(block, _)| block).collect::<BTreeSet<_>>()
    };
    scene.step();
    assert_eq!(pieces_after(&mut scene), BTreeSet::from([0]), "rows 64..100 wait for their block");
    scene.step();
    assert!(matches!(scene.settle(), Outcome::Committed { .. }));
    scene.assert_complete(150);
}

#[test]
fn an_aborted_hand_off_tells_decode_and_is_forgotten() {
    let mut scene = Scene::new(150, 100, 1024);
    scene.step();
    assert!(scene.poll().is_empty());
    scene.decode.poll(scene.now);
    scene.handoff.abort(scene.id, "cancelled");
    scene.handoff.abort(scene.id, "cancelled");
    for _ in 0..2 {
        assert!(scene.poll().is_empty(), "no event follows an abort");
        scene.decode.poll(scene.now);
    }
    let aborted = |event: &ReceiverEvent| matches!(event, ReceiverEvent::Aborted { .. });
    assert!(scene.decode.events.iter().any(aborted), "{:?}", scene.decode.events);
    scene.step();
    assert!(scene.poll().is_empty(), "later layers of the sequence go nowhere");
}

#[test]
fn a_revoked_ticket_is_a_refusal() {
    let mut scene = Scene::new(150, 200, 1024);
    let _ = scene.decode.receiver.revoke(scene.ticket);
    scene.step();
    let outcome = scene.settle();
    assert!(matches!(outcome, Outcome::Refused { .. }), "{outcome:?}");
    assert!(scene.decode.pieces.0.is_empty(), "nothing has landed");
}

#[test]
fn a_dead_decode_is_a_loss() {
    let mut scene = Scene::new(150, 200, 1024);
    scene.step();
    let Scene { decode, mut handoff, scheduler, kv, now, id, .. } = scene;
    drop(decode);
    let ended = handoff.poll(&scheduler, &kv, now);
    assert!(matches!(ended.as_slice(), [(lost, Outcome::Lost)] if *lost == id), "{ended:?}");
}
