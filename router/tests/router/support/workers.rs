//! Workers that speak the protocol and say what a script tells them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures::Stream;
use proto::membership::{Announcement, announce};
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::v1::prefill_server::{Prefill, PrefillServer};
use proto::v1::{self, decode_event, prefill_event};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

use super::Cluster;

/// The demo model's end of sequence.
pub const TINY_EOS: u32 = 1;

/// What decode does behind the last scripted token.
#[derive(Debug, Clone)]
pub enum End {
    /// Ends for the reason that the tokens give, `length` where they give none.
    Finish,
    /// Says nothing more until it is cancelled.
    Hang,
    /// Breaks the stream.
    Fail(Status),
}

/// What prefill does with a prompt.
#[derive(Debug, Clone)]
pub enum PrefillBehaviour {
    Answer,
    /// Takes the request and says nothing until it is cancelled.
    Hang,
    Fail(Status),
}

/// What a pair of workers answers.
#[derive(Clone)]
pub struct Script {
    /// Tokens of choice i: `answers[i % answers.len()]`.
    pub answers: Vec<Vec<u32>>,
    pub tokens_per_message: usize,
    pub end: End,
    /// What decode says to a reservation.
    pub reserve: Result<(), Status>,
    pub prefill: PrefillBehaviour,
    /// Each message of decode takes one permit, where there is a gate.
    pub gate: Option<Arc<Semaphore>>,
}

impl Script {
    /// Answers with these tokens.
    pub fn tokens(tokens: Vec<u32>) -> Self {
        Self {
            answers: vec![tokens],
            tokens_per_message: 1,
            end: End::Finish,
            reserve: Ok(()),
            prefill: PrefillBehaviour::Answer,
            gate: None,
        }
    }

    /// Answers with this text and the end of sequence.
    pub fn text(text: &str) -> Self {
        let mut tokens = super::tokens(text);
        tokens.push(TINY_EOS);
        Self::tokens(tokens)
    }
}

/// What may differ between workers of a test.
#[derive(Clone)]
pub struct WorkerOptions {
    pub incarnation: u64,
    pub backend: String,
    pub weights: [u8; 16],
    pub wire_major: u32,
    pub kv_blocks_max: u32,
    pub steps_total: u64,
    pub running: u32,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            incarnation: rand::random(),
            backend: "cpu/test".to_owned(),
            weights: [7; 16],
            wire_major: proto::WIRE_MAJOR,
            kv_blocks_max: 4096,
            steps_total: 0,
            running: 0,
        }
    }
}

/// A worker process, as far as the router can tell.
pub struct FakeWorker {
    pub id: String,
    seen: Arc<Seen>,
    announcement: Option<Announcement>,
    server: JoinHandle<()>,
}

/// What a worker saw; every field wakes its waiters.
struct Seen {
    requests: watch::Sender<Vec<v1::SequenceRequest>>,
    cancelled: watch::Sender<usize>,
    finished: watch::Sender<usize>,
    report: Mutex<v1::WorkerReport>,
}

/// Hand-offs between the fake prefill and decode workers of this process, by ticket id.
fn handoffs() -> &'static Mutex<HashMap<u64, oneshot::Sender<()>>> {
    static HANDOFFS: std::sync::OnceLock<Mutex<HashMap<u64, oneshot::Sender<()>>>> =
        std::sync::OnceLock::new();
    HANDOFFS.get_or_init(Mutex::default)
}

impl FakeWorker {
    pub async fn prefill(cluster: &Cluster, id: &str, script: Script) -> Self {
        Self::start(cluster, id, v1::Role::Prefill, script, WorkerOptions::default()).await
    }

    pub async fn decode(cluster: &Cluster, id: &str, script: Script) -> Self {
        Self::start(cluster, id, v1::Role::Decode, script, WorkerOptions::default()).await
    }

    /// Starts a worker and waits for its lease.
    pub async fn start(
        cluster: &Cluster,
        id: &str,
        role: v1::Role,
        script: Script,
        options: WorkerOptions,
    ) -> Self {
        let worker = Self::announcing(cluster, id, role, script, options).await;
        worker.leased().await;
        worker
    }

    /// Starts a worker that may not get a lease.
    pub async fn announcing(
        cluster: &Cluster,
        id: &str,
        role: v1::Role,
        script: Script,
        options: WorkerOptions,
    ) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("port");
        let info = info(id, role, &options, listener.local_addr().expect("address"));
        let seen = Arc::new(Seen {
            requests: watch::Sender::new(Vec::new()),
            cancelled: watch::Sender::new(0),
            finished: watch::Sender::new(0),
            report: Mutex::new(v1::WorkerReport {
                incarnation: info.incarnation,
                kv_blocks_free: options.kv_blocks_max,
                steps_total: options.steps_total,
                running: options.running,
                runnable: options.running,
                info: Some(info.clone()),
                ..v1::WorkerReport::default()
            }),
        });
        let fake = Fake { info, script, seen: Arc::clone(&seen) };
        let mut server = tonic::transport::Server::builder()
            .tls_config(cluster.authority.identity().server_tls())
            .expect("identity");
        let services = match role {
            v1::Role::Decode => server.add_service(DecodeServer::new(fake)),
            _ => server.add_service(PrefillServer::new(fake)),
        };
        let server = tokio::spawn(async move {
            services.serve_with_incoming(TcpListenerStream::new(listener)).await.expect("serves");
        });
        let reported = Arc::clone(&seen);
        let routers = vec![cluster.router.control_address().to_string()];
        let announcement = announce(routers, cluster.authority.identity(), move || {
            reported.report.lock().expect("lock").clone()
        });
        Self { id: id.to_owned(), seen, announcement: Some(announcement), server }
    }

    /// Returns when the router lists this worker.
    pub async fn leased(&self) {
        let announcement = self.announcement.as_ref().expect("alive");
        let mut workers = announcement.workers();
        workers
            .wait_for(|workers| workers.iter().any(|info| info.worker_id == self.id))
            .await
            .expect("alive");
    }

    /// Every sequence this worker was asked for, once there are `count`.
    pub async fn requests(&self, count: usize) -> Vec<v1::SequenceRequest> {
        let mut requests = self.seen.requests.subscribe();
        requests.wait_for(|requests| requests.len() >= count).await.expect("alive").clone()
    }

    /// Sequences asked for so far.
    pub fn requests_now(&self) -> usize {
        self.seen.requests.borrow().len()
    }

    /// Returns when `count` streams were dropped by the router before their end.
    pub async fn cancelled(&self, count: usize) {
        self.seen.cancelled.subscribe().wait_for(|cancelled| *cancelled >= count).await.expect("alive");
    }

    /// Returns when the router has said of `count` sequences that their text has ended.
    pub async fn finished(&self, count: usize) {
        self.seen.finished.subscribe().wait_for(|finished| *finished >= count).await.expect("alive");
    }

    /// Changes what the next reports say.
    pub fn report(&self, change: impl FnOnce(&mut v1::WorkerReport)) {
        change(&mut self.seen.report.lock().expect("lock"));
    }

    /// Leaves the router: no more reports.
    pub fn leave(&mut self) {
        self.announcement = None;
    }

    /// Dies: neither reports nor answers any more.
    pub fn kill(&mut self) {
        self.leave();
        self.server.abort();
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub fn info(id: &str, role: v1::Role, options: &WorkerOptions, address: SocketAddr) -> v1::WorkerInfo {
    v1::WorkerInfo {
        worker_id: id.to_owned(),
        role: role.into(),
        incarnation: options.incarnation,
        control_address: address.to_string(),
        fabric_address: format!("inproc://{id}"),
        fingerprint: Some(v1::Fingerprint {
            weights: options.weights.to_vec(),
            numerics: "fp8".to_owned(),
            kv_layout_digest: 1,
            backend: options.backend.clone(),
            arithmetic_revision: 1,
        }),
        wire_major: options.wire_major,
        wire_minor: proto::WIRE_MINOR,
        kv_blocks_max: options.kv_blocks_max,
        kv_block_tokens: 64,
        placement_version: 0,
        kv_tier_blocks: 0,
    }
}

struct Fake {
    info: v1::WorkerInfo,
    script: Script,
    seen: Arc<Seen>,
}

impl Fake {
    fn note(&self, sequence: &v1::SequenceRequest) {
        self.seen.requests.send_modify(|requests| requests.push(sequence.clone()));
    }

    fn watched<T>(&self, events: mpsc::Receiver<Result<T, Status>>) -> Watched<T> {
        Watched { events: ReceiverStream::new(events), ended: false, seen: Arc::clone(&self.seen) }
    }
}

/// The tokens a sequence gets, and why it ends with the last of them.
fn answer(script: &Script, sequence: &v1::SequenceRequest) -> (Vec<v1::GeneratedToken>, v1::DecodeFinished) {
    let stopping = sequence.stopping.clone().expect("resolved");
    let sampling = sequence.sampling.clone().expect("resolved");
    let mut tokens = Vec::new();
    let mut finished = v1::DecodeFinished { first_step_us: 5, decode_us: 6, ..v1::DecodeFinished::default() };
    finished.set_reason(v1::FinishReason::Length);
    for &id in &script.answers[sequence.choice as usize % script.answers.len()] {
        let logprob = sampling.logprobs.map(|_| -0.5);
        let top = (0..sampling.logprobs.unwrap_or(0))
            .map(|rank| v1::TokenLogprob { token_id: id + rank, logprob: -0.5 - rank as f32 });
        tokens.push(v1::GeneratedToken { token_id: id, logprob, top: top.collect() });
        if id == TINY_EOS && !stopping.ignore_eos {
            finished.set_reason(v1::FinishReason::Stop);
            break;
        }
        if stopping.stop_token_ids.contains(&id) {
            finished.set_reason(v1::FinishReason::Stop);
            finished.stop_token_id = Some(id);
            break;
        }
        if tokens.len() == stopping.max_tokens.expect("resolved") as usize {
            break;
        }
    }
    (tokens, finished)
}

#[tonic::async_trait]
impl Prefill for Fake {
    type PrefillStream = Watched<v1::PrefillEvent>;

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let v1::PrefillRequest { sequence, ticket, prompt_logprobs } = request.into_inner();
        let (sequence, ticket) = (sequence.expect("sequence"), ticket.expect("ticket"));
        self.note(&sequence);
        let (sender, events) = mpsc::channel(4);
        match self.script.prefill.clone() {
            PrefillBehaviour::Fail(status) => return Err(status),
            PrefillBehaviour::Hang => {
                tokio::spawn(async move { sender.closed().await });
            }
            PrefillBehaviour::Answer => {
                let (tokens, _) = answer(&self.script, &sequence);
                // Each prompt token has a quarter's probability.
                let told = sequence.prompt.iter().skip(1).map(|&token_id| v1::GeneratedToken {
                    token_id,
                    logprob: Some(0.25f32.ln()),
                    top: vec![v1::TokenLogprob { token_id: 7, logprob: -0.1 }],
                });
                let told: Vec<_> = told.collect();
                tokio::spawn(async move {
                    let first = v1::FirstToken {
                        token: tokens.into_iter().next(),
                        queue_us: 1,
                        compute_us: 2,
                        cached_tokens: 3,
                        prompt: prompt_logprobs.map(|_| told).unwrap_or_default(),
                    };
                    for event in [
                        prefill_event::Event::FirstToken(first),
                        prefill_event::Event::Done(v1::PrefillDone { handoff_us: 4 }),
                    ] {
                        let _ = sender.send(Ok(v1::PrefillEvent { event: Some(event) })).await;
                    }
                    let handoff = handoffs().lock().expect("lock").remove(&ticket.ticket_id);
                    if let Some(handoff) = handoff {
                        let _ = handoff.send(());
                    }
                });
            }
        }
        Ok(Response::new(self.watched(events)))
    }
}

#[tonic::async_trait]
impl Decode for Fake {
    type GenerateStream = Watched<v1::DecodeEvent>;

    async fn generate(
        &self,
        request: Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let sequence = request.into_inner().sequence.expect("sequence");
        self.note(&sequence);
        self.script.reserve.clone()?;
        let ticket = v1::KvTicket {
            worker_id: self.info.worker_id.clone(),
            incarnation: self.info.incarnation,
            ticket_id: rand::random(),
            fabric_address: self.info.fabric_address.clone(),
            fingerprint: self.info.fingerprint.clone(),
            blocks: sequence.prompt.len().div_ceil(64) as u32,
            prompt_tokens: sequence.prompt.len() as u32,
            bytes_per_layer: 1,
            layers: 1,
            lease_ms: 1500,
            ..v1::KvTicket::default()
        };
        let (sender, events) = mpsc::channel(4);
        let (handoff, handed_over) = oneshot::channel();
        handoffs().lock().expect("lock").insert(ticket.ticket_id, handoff);
        tokio::spawn(decode(self.script.clone(), sequence, ticket, handed_over, sender));
        Ok(Response::new(self.watched(events)))
    }

    async fn finish(
        &self,
        request: Request<v1::FinishRequest>,
    ) -> Result<Response<v1::FinishResponse>, Status> {
        assert_eq!(request.into_inner().incarnation, self.info.incarnation);
        self.seen.finished.send_modify(|finished| *finished += 1);
        Ok(Response::new(v1::FinishResponse {}))
    }
}

async fn decode(
    script: Script,
    sequence: v1::SequenceRequest,
    ticket: v1::KvTicket,
    handed_over: oneshot::Receiver<()>,
    sender: mpsc::Sender<Result<v1::DecodeEvent, Status>>,
) {
    let send = async |event| {
        // Fails when the router has cancelled; then nobody listens.
        let _ = sender.send(Ok(v1::DecodeEvent { event: Some(event) })).await;
    };
    send(decode_event::Event::Ticket(ticket)).await;
    tokio::select! {
        result = handed_over => if result.is_err() { return },
        () = sender.closed() => return,
    }
    send(decode_event::Event::Handoff(v1::HandoffDone { handoff_us: 9 })).await;
    let (tokens, finished) = answer(&script, &sequence);
    for message in tokens[1..].chunks(script.tokens_per_message) {
        if let Some(gate) = &script.gate {
            tokio::select! {
                permit = gate.acquire() => permit.expect("open").forget(),
                () = sender.closed() => return,
            }
        }
        send(decode_event::Event::Tokens(v1::DecodedTokens {
            tokens: message.to_vec(),
            accepted_drafts: message.len() as u32 - 1,
            rejected_drafts: 2,
        }))
        .await;
    }
    match script.end {
        End::Finish => send(decode_event::Event::Finished(finished)).await,
        End::Hang => sender.closed().await,
        End::Fail(status) => {
            let _ = sender.send(Err(status)).await;
        }
    }
}

/// A stream that notes when it is dropped before its end: that is how a worker sees a cancel.
pub struct Watched<T> {
    events: ReceiverStream<Result<T, Status>>,
    ended: bool,
    seen: Arc<Seen>,
}

impl<T> Stream for Watched<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.events).poll_next(cx);
        if matches!(next, Poll::Ready(None | Some(Err(_)))) {
            self.ended = true;
        }
        next
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        if !self.ended {
            self.seen.cancelled.send_modify(|cancelled| *cancelled += 1);
        }
    }
}
