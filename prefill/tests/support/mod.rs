//! A prefill worker behind its real service, decode's end of its hand-offs, and the oracle: the same prompt on one
//! engine, whole and alone.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use engine::{
    Engine, EngineOptions, ExpertBank, ExpertBatch, Experts, ExpertsError, FollowedInput, LocalExperts,
    LogitsWanted, Sampled, SequenceInput, SequenceSampler,
};
use fabric::{Fabric, Hub, Limits};
use kvtransfer::{BlockSink, Receiver, ReceiverEvent, ReceiverOptions, Reservation, Sender};
use model::{BlockId, Checkpoint, Device, Numerics, SamplingParams, Stopping, TokenId};
use prefill::{Config, Handle, Node};
use proto::security::Identity;
use proto::sequence::Sequence;
use proto::ticket::{KvTicket, TicketId};
use proto::trace::TraceContext;
use proto::v1;
use proto::v1::prefill_client::PrefillClient;
use proto::v1::prefill_event::Event;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Blocks of every pool in these tests: a few prompts of a few blocks.
pub const KV_BLOCKS: usize = 6;
const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_fp8_mtp");

/// An engine with all experts in place, in the numerics that serves, with an MTP module: what holds of its cache holds of
/// the others.
pub fn engine() -> Engine {
    engine_with(|experts| Box::new(experts))
}

/// The same with its experts wrapped.
pub fn engine_with(wrap: impl FnOnce(LocalExperts) -> Box<dyn Experts>) -> Engine {
    let checkpoint = Checkpoint::open(CHECKPOINT).expect("the fixture lies in the repository");
    let options = EngineOptions {
        device: Device::Cpu,
        numerics: Numerics::Fp8,
        kv_format: None,
        kv_blocks_max: KV_BLOCKS,
        threads: 1,
        step_tokens_max: 256,
        mtp: true,
    };
    let mut progress = |_, _| {};
    let bank =
        ExpertBank::load_all(&checkpoint, options.numerics, options.mtp, &mut progress).expect("experts");
    Engine::load(&checkpoint, &options, wrap(LocalExperts::new(bank)), &mut progress).expect("engine")
}

/// Experts that fail while told to.
pub struct FlakyExperts {
    pub experts: LocalExperts,
    pub failing: Arc<AtomicBool>,
}

impl Experts for FlakyExperts {
    fn dispatch(&mut self, cpu: &compute::Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(ExpertsError::Unavailable {
                worker: "expert-1".to_owned(),
                detail: "gone".to_owned(),
            });
        }
        self.experts.dispatch(cpu, batch)
    }

    fn combine(&mut self, cpu: &compute::Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        self.experts.combine(cpu, out)
    }
}

/// A cluster's certificates.
pub fn identity() -> Identity {
    let ca_key = KeyPair::generate().expect("key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("certificate").pem();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().expect("key");
    let node = CertificateParams::new(vec!["trireme".to_owned()]).expect("name");
    let cert_pem = node.signed_by(&key, &issuer).expect("certificate").pem();
    Identity { ca_pem, cert_pem, key_pem: key.serialize_pem() }
}

/// A prefill worker and everything around it.
pub struct Scene {
    pub handle: Handle,
    pub client: PrefillClient<Channel>,
    pub identity: Identity,
    pub hub: Hub,
    pub decode: Decode,
    pub oracle: Engine,
}

impl Scene {
    pub async fn new(config: Config) -> Self {
        Self::with_engine(config, engine()).await
    }

    pub async fn with_engine(config: Config, engine: Engine) -> Self {
        Self::announced_to(config, engine, identity(), Vec::new()).await
    }

    pub async fn announced_to(
        config: Config,
        engine: Engine,
        identity: Identity,
        routers: Vec<String>,
    ) -> Self {
        let hub = Hub::new();
        let oracle = self::engine();
        let fabric = Fabric::in_process(&hub, "prefill-0", 1, Limits::default()).expect("an end");
        let node = Node {
            worker_id: "prefill-0".to_owned(),
            incarnation: 1,
            identity: identity.clone(),
            routers,
            fabric_address: fabric.address(),
            sender: Sender::new(fabric),
            engine,
            tier: engine::KvTier::none(),
        };
        let handle = prefill::start(config, node).await.expect("a worker");
        let address = handle.control_address().to_string();
        let channel = identity.endpoint(&address).expect("an address").connect().await.expect("connected");
        let decode = Decode::new(&hub, 1, &oracle);
        Self { handle, client: PrefillClient::new(channel), identity, hub, decode, oracle }
    }

    /// What a killed decode worker and its successor at the same address look like.
    pub fn restart_decode(&mut self, incarnation: u64) {
        self.decode.fabric.close();
        self.decode = Decode::new(&self.hub, incarnation, &self.oracle);
    }

    /// A request for `sequence` with a ticket of this scene's decode.
    pub fn request(&mut self, sequence: &Sequence) -> v1::PrefillRequest {
        let ticket = self.decode.ticket(sequence.prompt.len());
        v1::PrefillRequest {
            sequence: Some(sequence.to_wire()),
            ticket: Some(ticket.to_wire()),
            prompt_logprobs: None,
        }
    }

    pub async fn send(&mut self, request: v1::PrefillRequest) -> Result<Streaming<v1::PrefillEvent>, Status> {
        self.client.prefill(request).await.map(tonic::Response::into_inner)
    }

    /// Runs requests that all succeed to their end, decode polling meanwhile; their first tokens.
    pub async fn complete(&mut self, sequences: &[Sequence]) -> Vec<v1::GeneratedToken> {
        let mut streams = Vec::new();
        for sequence in sequences {
            let request = self.request(sequence);
            streams.push(self.send(request).await.expect("queued"));
        }
        let mut tokens = Vec::new();
        for mut stream in streams {
            tokens.push(self.first_token(&mut stream).await);
            self.done(&mut stream).await;
        }
        tokens
    }

    /// Runs a request whose blocks before `first_block` decode has already; the first token with what is said of it.
    pub async fn complete_from(&mut self, sequence: &Sequence, first_block: usize) -> v1::FirstToken {
        let ticket = self.decode.ticket_from(first_block, sequence.prompt.len());
        let request = v1::PrefillRequest {
            sequence: Some(sequence.to_wire()),
            ticket: Some(ticket.to_wire()),
            prompt_logprobs: None,
        };
        let mut stream = self.send(request).await.expect("queued");
        let first = self.first(&mut stream).await;
        self.done(&mut stream).await;
        first
    }

    pub async fn first_token(&mut self, stream: &mut Streaming<v1::PrefillEvent>) -> v1::GeneratedToken {
        self.first(stream).await.token.expect("a token")
    }

    async fn first(&mut self, stream: &mut Streaming<v1::PrefillEvent>) -> v1::FirstToken {
        match self.next(stream).await.expect("an event").expect("not the end") {
            Event::FirstToken(first) => first,
            other => panic!("{other:?}"),
        }
    }

    pub async fn done(&mut self, stream: &mut Streaming<v1::PrefillEvent>) {
        match self.next(stream).await.expect("an event").expect("not the end") {
            Event::Done(_) => {}
            other => panic!("{other:?}"),
        }
        assert!(self.next(stream).await.expect("a clean end").is_none());
    }

    /// The stream's next event, decode's end of the hand-off moving on meanwhile.
    pub async fn next(&mut self, stream: &mut Streaming<v1::PrefillEvent>) -> Result<Option<Event>, Status> {
        let decode = &mut self.decode;
        let next = stream.message();
        tokio::pin!(next);
        loop {
            tokio::select! {
                event = &mut next => return Ok(event?.and_then(|event| event.event)),
                () = decode.turn() => {}
            }
        }
    }

    /// What the pool of the oracle holds of `prompt`, whole and alone: rows by (block, layer), and the first token.
    pub fn expected(&mut self, sequence: &Sequence) -> (Rows, Sampled) {
        let blocks: Vec<BlockId> = (0..KV_BLOCKS as u32).map(BlockId).collect();
        let prompt = &sequence.prompt;
        let input =
            SequenceInput { tokens: prompt, position: 0, block_table: &blocks, logits: LogitsWanted::Last };
        let input = FollowedInput { sequence: input, before: &[] };
        let output = self.oracle.step_with_mtp(&[input], &mut ());
        let mut logits = output.expect("a step").logits.to_vec();
        let mut sampler = SequenceSampler::new(&sequence.sampling, sequence.choice, prompt);
        let first = sampler.sample(&mut logits, prompt.len(), &[]);
        let layout = self.oracle.kv_layout();
        let mut rows = Rows::new();
        for (block, &id) in blocks.iter().enumerate().take(layout.blocks_for(prompt.len())) {
            for layer in 0..layout.layers {
                let count = (prompt.len() - block * layout.block_tokens).min(layout.block_tokens);
                let bytes = &self.oracle.kv().block_layer(id, layer)[..count * layout.row_bytes()];
                rows.insert((block as u32, layer as u32), bytes.to_vec());
            }
        }
        (rows, first)
    }
}

/// Bytes by (block in the sequence, layer).
pub type Rows = BTreeMap<(u32, u32), Vec<u8>>;

/// Decode's end of hand-offs: it keeps what arrives.
pub struct Decode {
    pub fabric: Fabric,
    receiver: Receiver,
    arrived: Arrived,
    /// First token of each committed ticket, in the order of the commits.
    pub committed: Vec<(TicketId, TokenId)>,
    pub aborted: Vec<TicketId>,
    issued: Vec<TicketId>,
}

#[derive(Default)]
struct Arrived(BTreeMap<TicketId, Rows>);

impl BlockSink for Arrived {
    fn place(&mut self, ticket: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        let rows = self.0.entry(ticket).or_default();
        Some(rows.entry((block, layer)).or_insert_with(|| vec![0; bytes]))
    }
}

impl Decode {
    pub fn new(hub: &Hub, incarnation: u64, engine: &Engine) -> Self {
        let fabric = Fabric::in_process(hub, "decode-0", incarnation, Limits::default()).expect("an end");
        let receiver = receiver(fabric.clone(), incarnation, engine);
        Self {
            fabric,
            receiver,
            arrived: Arrived::default(),
            committed: Vec::new(),
            aborted: Vec::new(),
            issued: Vec::new(),
        }
    }

    pub fn ticket(&mut self, prompt_tokens: usize) -> KvTicket {
        self.ticket_from(0, prompt_tokens)
    }

    /// A ticket for what is missing behind `first_block` blocks.
    pub fn ticket_from(&mut self, first_block: usize, prompt_tokens: usize) -> KvTicket {
        let reservation = Reservation { first_block, prompt_tokens };
        let ticket = self.receiver.issue(reservation, Instant::now()).expect("a ticket");
        self.issued.push(ticket.ticket_id);
        ticket
    }

    /// What arrived for the `nth` ticket issued.
    pub fn rows(&self, nth: usize) -> &Rows {
        static NONE: Rows = Rows::new();
        self.arrived.0.get(&self.issued[nth]).unwrap_or(&NONE)
    }

    pub fn first_token(&self, nth: usize) -> TokenId {
        let ticket = self.issued[nth];
        self.committed.iter().find(|(id, _)| *id == ticket).expect("committed").1
    }

    /// Takes in what has arrived, then lets others run.
    pub async fn turn(&mut self) {
        self.poll();
        tokio::task::yield_now().await;
    }

    pub fn poll(&mut self) {
        for event in self.receiver.poll(Instant::now(), &mut self.arrived) {
            match event {
                ReceiverEvent::Committed { ticket, first_token, .. } => {
                    self.committed.push((ticket, first_token))
                }
                ReceiverEvent::Aborted { ticket, .. } => self.aborted.push(ticket),
                ReceiverEvent::Expired { .. } => {}
            }
        }
    }
}

fn receiver(fabric: Fabric, incarnation: u64, engine: &Engine) -> Receiver {
    let options = ReceiverOptions {
        worker_id: "decode-0".to_owned(),
        incarnation,
        fingerprint: engine.fingerprint().clone(),
        layout: engine.kv_layout().clone(),
        lease: ReceiverOptions::LEASE,
        reserve: ReceiverOptions::LEASE,
        tickets_max: 64,
    };
    Receiver::new(fabric, options)
}

/// A request whose prompt of `prompt_tokens` and sampling are drawn from `seed`.
pub fn sequence(engine: &Engine, seed: u64, prompt_tokens: usize) -> Sequence {
    let vocabulary = engine.config().vocab_size as u64;
    // Any spread will do: a multiplicative walk through the vocabulary, past the special tokens.
    let token = |at: u64| TokenId((2 + (seed * 31 + at * 7919 + at * at * 13) % (vocabulary - 2)) as u32);
    Sequence {
        request_id: format!("test-{seed}"),
        trace: TraceContext::root(),
        prompt: (0..prompt_tokens as u64).map(token).collect(),
        sampling: SamplingParams { temperature: 0.8, seed, logprobs: Some(2), ..SamplingParams::greedy() },
        stopping: Stopping { max_tokens: 8, min_tokens: 0, ignore_eos: true, stop_token_ids: Vec::new() },
        choice: 0,
        deadline: None,
        fingerprint: engine.fingerprint().clone(),
        cache_salt: 0,
        share: proto::share::Share::default(),
    }
}
