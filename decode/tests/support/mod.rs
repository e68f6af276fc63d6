//! A prefill worker in a few lines, and the oracle: the same sequence on one engine without any hand-off.

use std::time::{Duration, Instant};

use engine::{
    Engine, EngineOptions, ExpertBank, Experts, FollowedInput, LocalExperts, LogitsWanted, Sampled,
    SequenceInput, SequenceSampler,
};
use fabric::Fabric;
use kvtransfer::{KvTicket, Receiver, ReceiverOptions, Sender, SenderEvent, TransferError};
use model::{BlockId, Checkpoint, Device, Numerics, SamplingParams, Stopping, TokenId};
use proto::sequence::Sequence;
use proto::trace::TraceContext;

/// Blocks of every pool in these tests: a few sequences of a few blocks.
pub const KV_BLOCKS: usize = 24;
/// Its weights are random, and so is what its MTP module drafts.
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_fp8_mtp");
/// Most of what its module drafts stands.
#[allow(dead_code, reason = "each test binary uses its own part")]
pub const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tiny");

/// An engine with all experts in place, in the numerics that serves.
pub fn engine() -> Engine {
    engine_with(|experts| Box::new(experts))
}

/// One over another checkpoint.
#[allow(dead_code, reason = "each test binary uses its own part")]
pub fn engine_of(checkpoint: &str) -> Engine {
    load(checkpoint, true, |experts| Box::new(experts))
}

/// The usual one, but for its MTP module.
#[allow(dead_code, reason = "each test binary uses its own part")]
pub fn engine_without_mtp() -> Engine {
    load(FIXTURE, false, |experts| Box::new(experts))
}

/// The same with its experts wrapped.
pub fn engine_with(wrap: impl FnOnce(LocalExperts) -> Box<dyn Experts>) -> Engine {
    load(FIXTURE, true, wrap)
}

fn load(checkpoint: &str, mtp: bool, wrap: impl FnOnce(LocalExperts) -> Box<dyn Experts>) -> Engine {
    let checkpoint = Checkpoint::open(checkpoint).expect("the fixture lies in the repository");
    let options = EngineOptions {
        device: Device::Cpu,
        numerics: Numerics::Fp8,
        kv_format: None,
        kv_blocks_max: KV_BLOCKS,
        threads: 1,
        step_tokens_max: 256,
        mtp,
    };
    let mut progress = |_, _| {};
    let bank =
        ExpertBank::load_all(&checkpoint, options.numerics, options.mtp, &mut progress).expect("experts");
    Engine::load(&checkpoint, &options, wrap(LocalExperts::new(bank)), &mut progress).expect("engine")
}

/// A request for `max_tokens` tokens behind a prompt of `prompt_tokens`, both drawn from `seed`.
pub fn request(engine: &Engine, seed: u64, prompt_tokens: usize, max_tokens: u32) -> Sequence {
    let vocabulary = engine.config().vocab_size as u64;
    // Any spread will do: a multiplicative walk through the vocabulary, past the special tokens.
    let token = |at: u64| TokenId((2 + (seed * 31 + at * 7919 + at * at * 13) % (vocabulary - 2)) as u32);
    Sequence {
        request_id: format!("test-{seed}"),
        trace: TraceContext::root(),
        prompt: (0..prompt_tokens as u64).map(token).collect(),
        sampling: SamplingParams {
            temperature: 0.8,
            repetition_penalty: 1.1,
            presence_penalty: 0.3,
            seed,
            logprobs: Some(2),
            ..SamplingParams::greedy()
        },
        stopping: Stopping { max_tokens, min_tokens: 0, ignore_eos: true, stop_token_ids: Vec::new() },
        choice: 0,
        deadline: None,
        fingerprint: engine.fingerprint().clone(),
        cache_salt: 0,
        share: proto::share::Share::default(),
    }
}

/// All tokens of `sequence` from one engine, prompt and completion in one place, alone in its batch.
pub fn single_run(engine: &mut Engine, sequence: &Sequence) -> Vec<Sampled> {
    let mut sampler = SequenceSampler::new(&sequence.sampling, sequence.choice, &sequence.prompt);
    let blocks: Vec<BlockId> = (0..KV_BLOCKS as u32).map(BlockId).collect();
    let mut sampled: Vec<Sampled> = Vec::new();
    let mut next = sequence.prompt.clone();
    let mut position = 0;
    while sampled.len() < sequence.stopping.max_tokens as usize {
        let input =
            SequenceInput { tokens: &next, position, block_table: &blocks, logits: LogitsWanted::Last };
        let mut logits = engine.step(&[input], &mut ()).expect("step").logits.to_vec();
        position += next.len();
        let token = sampler.sample(&mut logits, position, &[]);
        sampler.observe(token.token);
        next = vec![token.token];
        sampled.push(token);
    }
    sampled
}

/// The prefill side of hand-offs.
pub struct Prefill {
    pub engine: Engine,
    sender: Sender,
    events: Vec<SenderEvent>,
}

impl Prefill {
    #[allow(dead_code, reason = "each test binary uses its own part")]
    pub fn new(fabric: Fabric) -> Self {
        Self::with(fabric, engine())
    }

    pub fn with(fabric: Fabric, engine: Engine) -> Self {
        Self { engine, sender: Sender::new(fabric), events: Vec::new() }
    }

    /// Computes the prompt, queues all of its KV for `ticket` with the first token behind it, and returns that token.
    pub fn push(&mut self, sequence: &Sequence, ticket: KvTicket) -> Sampled {
        let blocks: Vec<BlockId> = (0..KV_BLOCKS as u32).map(BlockId).collect();
        let prompt = &sequence.prompt;
        let input =
            SequenceInput { tokens: prompt, position: 0, block_table: &blocks, logits: LogitsWanted::Last };
        let input = FollowedInput { sequence: input, before: &[] };
        let mut logits = self.engine.step_with_mtp(&[input], &mut ()).expect("step").logits.to_vec();
        let mut sampler = SequenceSampler::new(&sequence.sampling, sequence.choice, prompt);
        let first = sampler.sample(&mut logits, prompt.len(), &[]);
        self.push_blocks(prompt.len(), ticket, first.token);
        first
    }

    /// Queues those of the first `prompt_tokens` rows of the pool that `ticket` asks for, whatever they hold.
    pub fn push_blocks(&mut self, prompt_tokens: usize, ticket: KvTicket, first: TokenId) {
        let layout = self.engine.kv_layout().clone();
        let count = layout.blocks_for(prompt_tokens);
        let last_rows = prompt_tokens - (count - 1) * layout.block_tokens;
        let first_block = ticket.first_block;
        let transfer = self.sender.begin(ticket, Instant::now()).expect("the ticket is live");
        for layer in 0..layout.layers {
            let blocks: Vec<_> = (first_block as usize..count)
                .map(|block| {
                    let rows = if block + 1 == count { last_rows } else { layout.block_tokens };
                    (self.engine.kv().block_layer(BlockId(block as u32), layer), rows * layout.row_bytes())
                })
                .collect();
            let pieces: Vec<&[u8]> = blocks.iter().map(|(bytes, len)| &bytes[..*len]).collect();
            if !pieces.is_empty() {
                offer(&mut self.sender, &mut self.events, |sender| {
                    sender.push_blocks(transfer, layer as u32, first_block, &pieces, last_rows as u32)
                });
            }
        }
        offer(&mut self.sender, &mut self.events, |sender| sender.finish(transfer, first));
    }

    /// The ends of `count` hand-offs, as soon as they are known.
    pub fn events(&mut self, count: usize) -> Vec<SenderEvent> {
        while self.events.len() < count {
            std::thread::yield_now();
            self.events.extend(self.sender.poll(Instant::now()));
        }
        std::mem::take(&mut self.events)
    }
}

/// Offers until it is taken: the connection is made on another thread.
fn offer(
    sender: &mut Sender,
    events: &mut Vec<SenderEvent>,
    mut push: impl FnMut(&mut Sender) -> Result<(), TransferError>,
) {
    while let Err(error) = push(sender) {
        assert!(matches!(error, TransferError::Full), "{error}");
        std::thread::yield_now();
        events.extend(sender.poll(Instant::now()));
    }
}

/// The decode side of hand-offs on `fabric`, for `engine`'s layout.
pub fn receiver(fabric: Fabric, engine: &Engine, lease: Duration) -> Receiver {
    let options = ReceiverOptions {
        worker_id: "decode-0".to_owned(),
        incarnation: 7,
        fingerprint: engine.fingerprint().clone(),
        layout: engine.kv_layout().clone(),
        lease,
        reserve: lease,
        tickets_max: 64,
    };
    Receiver::new(fabric, options)
}
