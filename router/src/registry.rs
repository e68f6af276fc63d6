//! The workers that hold a lease here, and the gRPC service on which they hold it.
//!
//! Invariants: at most one live incarnation per worker id; an incarnation that was replaced never comes
//! back; every live worker serves the same weights in the same numerics, because one model name must mean
//! one model. Back ends may differ: placement pairs only equal fingerprints. A worker that leaves,
//! falls silent for a lease or is replaced ends every sequence that waits on it, at once.

mod silence;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use model::ExecutionFingerprint;
use proto::field::FieldError;
use proto::security::{EndpointError, Identity};
use proto::v1;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use self::silence::Silence;
use crate::admission::Cluster;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::placement::disaggregation::{Decision, PrefillOnDecode};
use crate::placement::{self, Need, PlacementError, PrefixIndex, Prefixes, Tier, WorkerLoad};
use crate::worker::{Assignment, Worker, WorkerKey};

/// Replaced incarnations we remember, so that a stopped process that wakes up cannot take its id back.
const REPLACED_MAX: usize = 4096;
/// Answers in flight to one worker: each supersedes the one before.
const ANSWERS_MAX: usize = 4;

/// Why a worker gets no lease.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("info: missing in the first report")]
    NoInfo,
    #[error("{0}")]
    Field(#[from] FieldError),
    #[error("incarnation: the report says {report:016x}, its info {info:016x}")]
    Incarnation { report: u64, info: u64 },
    #[error("incarnation: {0} was replaced by a later process of the same id")]
    Replaced(WorkerKey),
    #[error(
        "fingerprint.{field}: {theirs} here, but live worker {worker} has {ours}; one model name means one model"
    )]
    OtherModel { field: &'static str, theirs: String, worker: WorkerKey, ours: String },
    #[error("worker_id: this router already holds its limit of {0} workers")]
    Full(usize),
    #[error("control_address: {0}")]
    Address(#[from] EndpointError),
}

/// A sequence's two workers, counted against both while held.
pub(crate) struct Placed {
    pub prefill: Assignment,
    pub decode: Assignment,
    /// Prompt tokens that must be computed, where that is.
    pub computed: u64,
    /// Where.
    pub decision: Decision,
}

/// The table of live workers.
pub(crate) struct Registry {
    workers: DashMap<Arc<str>, Lease>,
    replaced: Mutex<VecDeque<WorkerKey>>,
    /// What workers are thought to hold. Choosing and counting are one step under its lock, or two sequences would take the
    /// same last place.
    placing: Mutex<PrefixIndex>,
    /// Wakes whoever waits for a worker or for room.
    changed: Notify,
    identity: Identity,
    metrics: Arc<Metrics>,
    workers_max: usize,
    lease: Duration,
    policy: PrefillOnDecode,
    /// Mean of the last hand-overs, microseconds; 0 before the first.
    handover_us: AtomicU64,
}

/// A table entry: the worker, and which of its connections speaks for it.
struct Lease {
    worker: Arc<Worker>,
    /// Grows when the same incarnation connects anew; the older connection then ends without harm.
    connection: u64,
}

impl Registry {
    pub fn new(config: &Config, identity: Identity, metrics: Arc<Metrics>) -> Self {
        Self {
            workers: DashMap::new(),
            replaced: Mutex::new(VecDeque::new()),
            placing: Mutex::default(),
            changed: Notify::new(),
            identity,
            metrics,
            workers_max: config.workers_max,
            lease: config.lease(),
            policy: config.prefill_on_decode,
            handover_us: AtomicU64::new(0),
        }
    }

    /// Every live worker, ordered by id.
    pub fn workers(&self) -> Vec<Arc<Worker>> {
        let mut workers: Vec<_> = self.workers.iter().map(|lease| Arc::clone(&lease.worker)).collect();
        workers.sort_by(|a, b| a.key.cmp(&b.key));
        workers
    }

    /// Chooses a pair, counts the sequence against it, and notes that its prompt will be there.
    ///
    /// # Errors
    /// As [`placement::place`].
    pub fn place(&self, need: &Need<'_>, prompt: &mut Prefixes<'_>) -> Result<Placed, PlacementError> {
        self.workers.iter().for_each(|lease| prompt.prepare(block_tokens_of(&lease.worker)));
        let mut held = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        let workers = self.workers();
        let mut loads: Vec<WorkerLoad> = workers.iter().map(|worker| worker.load()).collect();
        for load in &mut loads {
            let block_tokens = usize::try_from(load.kv_block_tokens).unwrap_or(usize::MAX);
            load.matched_tokens = held.matched_tokens(&load.key, prompt, block_tokens);
        }
        let pair = placement::place(&loads, need)?;
        let load = |key: &WorkerKey| loads.iter().find(|load| load.key == *key);
        let prefill_load = load(&pair.prefill).ok_or(PlacementError::NoPrefill)?;
        let decode_load = load(&pair.decode).ok_or(PlacementError::NoDecode)?;
        let handover = Duration::from_micros(self.handover_us.load(Ordering::Relaxed));
        let decision = placement::decide(self.policy, (prefill_load, decode_load), need, handover);
        let find = |key: &WorkerKey| workers.iter().find(|worker| worker.key == *key);
        let prefill = find(&pair.prefill).ok_or(PlacementError::NoPrefill)?;
        let decode = find(&pair.decode).ok_or(PlacementError::NoDecode)?;
        note(&mut held, decode, prompt);
        if !decision.on_decode {
            note(&mut held, prefill, prompt);
        }
        // The sum of what is waited for is what is computed, not what is found.
        let computes = if decision.on_decode { decode_load } else { prefill_load };
        let computed = need.prompt_tokens.saturating_sub(computes.matched_tokens).max(1);
        let (on_prefill, on_decode) = if decision.on_decode { (0, computed) } else { (computed, 0) };
        let prompt_tokens = if decision.on_decode { 0 } else { need.prompt_tokens };
        Ok(Placed {
            prefill: prefill.assign(on_prefill, prompt_tokens),
            decode: decode.assign(on_decode, need.prompt_tokens),
            computed,
            decision,
        })
    }

    /// A hand-over took so long, from the first token to a sequence that runs.
    pub fn observe_handover(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let smoothed = |mean: u64| Some(if mean == 0 { took } else { mean - mean / 16 + took / 16 });
        // Never fails: there is always a next value.
        let _ = self.handover_us.fetch_update(Ordering::Relaxed, Ordering::Relaxed, smoothed);
    }

    /// A sequence has ended on `worker`, which holds all of its `tokens` now.
    pub fn holds(&self, worker: &Worker, tokens: &mut Prefixes<'_>) {
        tokens.prepare(block_tokens_of(worker));
        let mut held = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        note(&mut held, worker, tokens);
    }

    /// What the door needs to know of the live workers.
    pub fn cluster(&self) -> Cluster {
        let loads: Vec<WorkerLoad> = self.workers.iter().map(|lease| lease.worker.load()).collect();
        Cluster {
            lifetime_tokens_max: placement::lifetime_tokens_max(&loads),
            pace: placement::prefill_pace(&loads, self.policy),
        }
    }

    /// Resolves at the next report, arrival or departure: a reason to try placing again.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    /// A sequence has given its blocks back: whoever waits for room may try again.
    pub fn room_freed(&self) {
        self.changed.notify_waiters();
    }

    /// Gives a lease, or says what is wrong with the worker. Returns its entry and the connection's number.
    pub fn admit(&self, report: v1::WorkerReport, now: Instant) -> Result<(Arc<Worker>, u64), Refusal> {
        let info = report.info.clone().ok_or(Refusal::NoInfo)?;
        proto::membership::check_info(&info)?;
        if report.incarnation != info.incarnation {
            return Err(Refusal::Incarnation { report: report.incarnation, info: info.incarnation });
        }
        let key = WorkerKey { id: Arc::from(info.worker_id.as_str()), incarnation: info.incarnation };
        if self.replaced.lock().unwrap_or_else(PoisonError::into_inner).contains(&key) {
            return Err(Refusal::Replaced(key));
        }
        let worker = self.make_worker(key, info, report, now)?;
        if self.workers.len() >= self.workers_max && !self.workers.contains_key(&worker.key.id) {
            return Err(Refusal::Full(self.workers_max));
        }
        let admitted = self.enter(worker);
        self.forget_held();
        self.changed.notify_waiters();
        Ok(admitted)
    }

    fn make_worker(
        &self,
        key: WorkerKey,
        info: v1::WorkerInfo,
        report: v1::WorkerReport,
        now: Instant,
    ) -> Result<Worker, Refusal> {
        let fingerprint = match &info.fingerprint {
            Some(wire) => Some(Arc::new(
                proto::fingerprint::from_wire(wire).map_err(|error| error.within("fingerprint"))?,
            )),
            None => None,
        };
        if let Some(fingerprint) = &fingerprint {
            self.same_model(&key, fingerprint)?;
        }
        let tier = match info.role() {
            v1::Role::Prefill => Tier::Prefill,
            v1::Role::Decode => Tier::Decode,
            // `check_info` has refused what is none of the three.
            v1::Role::Expert | v1::Role::Unspecified => Tier::Expert,
        };
        let channel = match tier {
            Tier::Expert => None,
            Tier::Prefill | Tier::Decode => {
                Some(self.identity.endpoint(&info.control_address)?.connect_lazy())
            }
        };
        Ok(Worker::new(key, tier, fingerprint, channel, info, report, now))
    }

    fn same_model(&self, key: &WorkerKey, theirs: &ExecutionFingerprint) -> Result<(), Refusal> {
        for lease in &self.workers {
            let Some(ours) = &lease.worker.fingerprint else { continue };
            // The one whose place it takes has no say: a cluster of one worker may change its model.
            if lease.worker.key.id == key.id {
                continue;
            }
            let refuse = |field, theirs: String, ours: String| {
                Err(Refusal::OtherModel { field, theirs, worker: lease.worker.key.clone(), ours })
            };
            if ours.weights != theirs.weights {
                return refuse("weights", hex(&theirs.weights), hex(&ours.weights));
            }
            if ours.numerics != theirs.numerics {
                return refuse("numerics", theirs.numerics.to_string(), ours.numerics.to_string());
            }
        }
        Ok(())
    }

    fn enter(&self, worker: Worker) -> (Arc<Worker>, u64) {
        match self.workers.entry(Arc::clone(&worker.key.id)) {
            Entry::Occupied(mut entry) if entry.get().worker.key == worker.key => {
                let lease = entry.get_mut();
                lease.connection += 1;
                (Arc::clone(&lease.worker), lease.connection)
            }
            Entry::Occupied(mut entry) => {
                let worker = Arc::new(worker);
                let old = entry.insert(Lease { worker: Arc::clone(&worker), connection: 0 }).worker;
                warn!(old = %old.key, new = %worker.key, "worker replaced by a new incarnation");
                self.remember_replaced(old.key.clone());
                self.metrics.worker_lost(old.tier, "replaced");
                old.end();
                (worker, 0)
            }
            Entry::Vacant(entry) => {
                let worker = Arc::new(worker);
                info!(worker = %worker.key, tier = worker.tier.name(), "worker joined");
                entry.insert(Lease { worker: Arc::clone(&worker), connection: 0 });
                (worker, 0)
            }
        }
    }

    fn remember_replaced(&self, key: WorkerKey) {
        let mut replaced = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        if replaced.len() == REPLACED_MAX {
            replaced.pop_front();
        }
        replaced.push_back(key);
    }

    /// Takes the lease back, unless a newer connection or incarnation holds it.
    pub fn release(&self, worker: &Worker, connection: u64, reason: &'static str) {
        let held =
            |_: &Arc<str>, lease: &Lease| lease.worker.key == worker.key && lease.connection == connection;
        if self.workers.remove_if(&worker.key.id, held).is_some() {
            warn!(worker = %worker.key, reason, "worker left");
            self.metrics.worker_lost(worker.tier, reason);
            worker.end();
            self.forget_held();
            self.changed.notify_waiters();
        }
    }

    /// A process that is gone holds nothing.
    fn forget_held(&self) {
        let mut held = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|key| self.workers.get(&key.id).is_some_and(|lease| lease.worker.key == *key));
    }

    /// Whether `connection` still speaks for the worker.
    fn current(&self, worker: &Worker, connection: u64) -> bool {
        self.workers
            .get(&worker.key.id)
            .is_some_and(|lease| lease.worker.key == worker.key && lease.connection == connection)
    }

    /// Holds one worker's lease for as long as its reports come.
    async fn hold(
        self: Arc<Self>,
        mut reports: Streaming<v1::WorkerReport>,
        answers: mpsc::Sender<Result<v1::RouterReport, Status>>,
    ) {
        let mut silence = Silence::new(self.lease);
        let Some(Ok(Some(first))) = silence.or(reports.message()).await else { return };
        let (worker, connection) = match self.admit(first, Instant::now()) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                warn!(%refusal, "worker refused");
                self.metrics.workers_refused.inc();
                let answer = v1::RouterReport { refused: refusal.to_string(), workers: Vec::new() };
                // The worker may have gone already; then nobody needs the answer.
                let _ = answers.send(Ok(answer)).await;
                return;
            }
        };
        let reason = loop {
            // A full queue means that an answer is still on its way: this one would say the same.
            let _ = answers.try_send(Ok(self.answer()));
            let next = tokio::select! {
                () = worker.gone() => break "replaced",
                next = silence.or(reports.message()) => next,
            };
            match next {
                None => break "silent",
                Some(Err(_)) => break "connection lost",
                Some(Ok(None)) => break "connection closed",
                Some(Ok(Some(report))) if report.incarnation != worker.key.incarnation => {
                    break "wrong incarnation";
                }
                Some(Ok(Some(_))) if !self.current(&worker, connection) => break "reconnected",
                Some(Ok(Some(report))) => {
                    worker.report(report, Instant::now());
                    self.changed.notify_waiters();
                }
            }
        };
        self.release(&worker, connection, reason);
    }

    fn answer(&self) -> v1::RouterReport {
        let workers = self.workers().iter().map(|worker| worker.info.clone()).collect();
        v1::RouterReport { refused: String::new(), workers }
    }

    /// Takes every lease back: the router is about to stop.
    pub fn close(&self) {
        for worker in self.workers() {
            worker.end();
        }
    }
}

/// `trireme.v1.Registry` over a [`Registry`].
pub(crate) struct RegistryService(pub Arc<Registry>);

#[tonic::async_trait]
impl v1::registry_server::Registry for RegistryService {
    type AnnounceStream = ReceiverStream<Result<v1::RouterReport, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<v1::WorkerReport>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        tokio::spawn(Arc::clone(&self.0).hold(request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn note(held: &mut PrefixIndex, worker: &Worker, tokens: &mut Prefixes<'_>) {
    // What the pool has no room for is found as well, as long as the tier behind it has.
    let blocks = u64::from(worker.info.kv_blocks_max) + u64::from(worker.info.kv_tier_blocks);
    let blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
    held.note(&worker.key, tokens, block_tokens_of(worker), blocks);
}

fn block_tokens_of(worker: &Worker) -> usize {
    usize::try_from(worker.info.kv_block_tokens.max(1)).unwrap_or(usize::MAX)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
