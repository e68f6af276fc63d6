//! Routed experts on other workers: the client half of dispatch and combine. Hop 8, outbound.
//!
//! One frame per destination worker and layer carries that worker's tokens; one comes back with a
//! vector per (token, expert), which land in the order of the dispatch whoever answered first, so
//! that the sum at the source has the same bits wherever the experts sit. Frames are kept until
//! their answer is in: when a connection breaks meanwhile the worker may be back already, and the
//! same frame goes out once more. The computation is a pure function of its frame, so a worker that
//! sees it twice does no harm.
//!
//! Invariant: a batch either completes with every slot of the output written, or fails with the
//! worker's name within the timeout. Replies of given-up batches carry an old sequence number and are
//! ignored. Replicas, and going on without a dead worker, are deliberately not here.

mod packing;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::{ExpertBatch, Experts, ExpertsError};
use fabric::{Arrivals, Channel, Event, Fabric, Frame, PeerId, SendError};
use prost::Message;
use proto::v1::{CombineHead, DispatchHead};

use crate::wire::{self, WireFormats};
use crate::{Placement, PlacementError};
use packing::{Parcel, UnknownExpert};

/// How long to let a full send queue drain before the next try; about what a small frame takes.
const FULL_RETRY: Duration = Duration::from_micros(100);
/// A worker that is up answers a handshake in milliseconds. One that is not must not hold every
/// step up for the whole timeout.
const CONNECT_MAX: Duration = Duration::from_millis(500);

/// Where the experts are, and how to speak with them.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// Which rank holds which expert.
    pub placement: Placement,
    /// Fabric address of each rank.
    pub workers: Vec<String>,
    /// This process' incarnation.
    pub incarnation: u64,
    /// How rows look; must be what the workers use.
    pub wire: WireFormats,
    /// From a dispatch until its combine gives up. Longer than the fabric's 1.5 s of silence, so that
    /// a connection that died unnoticed is found, renewed and used within one step.
    pub timeout: Duration,
}

/// What happened at the seam, for the metrics of the role that owns it.
#[derive(Debug, Default)]
pub struct DispatchCounters {
    /// Frames sent, resends included.
    pub frames_sent: AtomicU64,
    /// Frames sent a second time after a connection was lost.
    pub frames_resent: AtomicU64,
    /// Replies to batches that were already given up.
    pub replies_stale: AtomicU64,
    /// Batches that failed.
    pub batches_failed: AtomicU64,
}

/// [`Experts`] over a fabric. Owned by the engine, used by its device thread alone.
pub struct RemoteExperts {
    fabric: Fabric,
    events: Arrivals,
    placement: Placement,
    wire: WireFormats,
    incarnation: u64,
    timeout: Duration,
    workers: Vec<Destination>,
    parcels: Vec<Parcel>,
    layer: usize,
    sequence: u64,
    deadline: Instant,
    counters: Arc<DispatchCounters>,
}

/// One expert worker as the source sees it.
struct Destination {
    address: String,
    /// The live connection, if one is known.
    peer: Option<PeerId>,
    state: Delivery,
}

/// Where a batch's frame to one worker stands.
enum Delivery {
    /// Nothing was sent, or all is done.
    Idle,
    /// On its way; kept to be sent again.
    Sent { frame: KeptFrame, resent: bool },
    /// Here, checked, not yet copied out.
    Answered(Bytes),
}

/// A frame that can be sent twice: [`Bytes`] are shared, not copied.
#[derive(Clone)]
struct KeptFrame {
    head: Bytes,
    body: Bytes,
}

impl KeptFrame {
    fn to_frame(&self) -> Frame {
        Frame { head: self.head.clone(), body: vec![self.body.clone()] }
    }
}

impl RemoteExperts {
    /// Connects lazily: a worker that is not up yet is tried at the first dispatch that needs it.
    ///
    /// # Errors
    /// `workers` does not name exactly the placement's ranks.
    pub fn new(fabric: Fabric, options: RemoteOptions) -> Result<Self, PlacementError> {
        let ranks = options.placement.workers();
        if options.workers.len() != ranks {
            return Err(PlacementError::Addresses { addresses: options.workers.len(), workers: ranks });
        }
        let destination = |address| Destination { address, peer: None, state: Delivery::Idle };
        Ok(Self {
            events: fabric.receiver(Channel::Experts),
            fabric,
            placement: options.placement,
            wire: options.wire,
            incarnation: options.incarnation,
            timeout: options.timeout,
            workers: options.workers.into_iter().map(destination).collect(),
            parcels: vec![Parcel::default(); ranks],
            layer: 0,
            sequence: 0,
            deadline: Instant::now(),
            counters: Arc::default(),
        })
    }

    /// Counters that outlive a borrow: the engine takes the whole client in.
    pub fn counters(&self) -> Arc<DispatchCounters> {
        Arc::clone(&self.counters)
    }

    fn try_dispatch(&mut self, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        self.sequence += 1;
        self.layer = batch.layer;
        self.deadline = Instant::now() + self.timeout;
        for worker in &mut self.workers {
            worker.state = Delivery::Idle;
        }
        // Connections lost since the last batch, and answers that came too late for it.
        while let Ok(event) = self.events.try_recv() {
            self.apply(event)?;
        }
        let owners =
            self.placement.owners(batch.layer).ok_or_else(|| rejected(batch.layer, "no routed experts"))?;
        packing::pack(owners, batch.expert_ids, batch.topk, &mut self.parcels).map_err(
            |UnknownExpert(expert)| rejected(batch.layer, format!("expert {expert} has no worker")),
        )?;
        for rank in 0..self.workers.len() {
            if !self.parcels[rank].is_empty() {
                let frame = self.frame(rank, batch);
                self.send(rank, &frame)?;
                self.workers[rank].state = Delivery::Sent { frame, resent: false };
            }
        }
        Ok(())
    }

    fn frame(&mut self, rank: usize, batch: &ExpertBatch<'_>) -> KeptFrame {
        let parcel = &mut self.parcels[rank];
        let mut body = Vec::with_capacity(parcel.tokens.len() * self.wire.activation_row_bytes());
        for &token in &parcel.tokens {
            batch.activations.encode_row(token as usize, &mut body);
        }
        let head = DispatchHead {
            source_incarnation: self.incarnation,
            sequence: self.sequence,
            layer: batch.layer as u32,
            placement_version: self.placement.version(),
            tokens: parcel.tokens.len() as u32,
            hidden: self.wire.hidden as u32,
            // Lent for the encoding, so that the lists keep their memory.
            experts: std::mem::take(&mut parcel.experts),
            experts_per_token: std::mem::take(&mut parcel.experts_per_token),
        };
        let encoded = head.encode_to_vec();
        (parcel.experts, parcel.experts_per_token) = (head.experts, head.experts_per_token);
        KeptFrame { head: encoded.into(), body: body.into() }
    }

    /// Hands a frame to the fabric, connecting first where there is no connection, and connecting
    /// anew once where the known one turns out to be gone.
    fn send(&mut self, rank: usize, frame: &KeptFrame) -> Result<(), ExpertsError> {
        let mut connected = false;
        loop {
            let peer = match self.workers[rank].peer {
                Some(peer) => peer,
                None if connected => return Err(self.unavailable(rank, "the connection does not last")),
                None => {
                    connected = true;
                    self.connect(rank)?
                }
            };
            match self.fabric.try_send(peer, Channel::Experts, frame.to_frame()) {
                Ok(()) => {
                    self.counters.frames_sent.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(SendError::Gone) => self.workers[rank].peer = None,
                Err(SendError::Oversized(frame)) => {
                    let detail =
                        format!("a frame of {} bytes exceeds the fabric's limits", frame.body_bytes());
                    return Err(rejected(self.layer, detail));
                }
                Err(SendError::Full(_)) if Instant::now() >= self.deadline => {
                    return Err(self.unavailable(rank, "it takes no frames"));
                }
                // Others may answer meanwhile, and their answers must not fill the queue.
                Err(SendError::Full(_)) => {
                    if let Ok(event) = self.events.recv_timeout(FULL_RETRY) {
                        self.apply(event)?;
                    }
                }
            }
        }
    }

    fn connect(&mut self, rank: usize) -> Result<PeerId, ExpertsError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.fabric.connect(&self.workers[rank].address, left.min(CONNECT_MAX)) {
            Ok(peer) => {
                self.workers[rank].peer = Some(peer);
                Ok(peer)
            }
            Err(error) => Err(self.unavailable(rank, error)),
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), ExpertsError> {
        match event {
            Event::Frame { peer, head, body } => self.answer(peer, &head, body.into_bytes()),
            Event::PeerLost { peer, .. } => self.lose(peer),
            Event::PeerUp { .. } => Ok(()),
        }
    }

    fn answer(&mut self, peer: PeerId, head: &[u8], body: Bytes) -> Result<(), ExpertsError> {
        let Some(rank) = self.workers.iter().position(|worker| worker.peer == Some(peer)) else {
            self.counters.replies_stale.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        let awaited = matches!(self.workers[rank].state, Delivery::Sent { .. });
        let current = |head: &CombineHead| {
            awaited && head.source_incarnation == self.incarnation && head.sequence == self.sequence
        };
        let Some(head) = CombineHead::decode(head).ok().filter(current) else {
            self.counters.replies_stale.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        wire::check_combine(&head, body.len(), self.parcels[rank].slots.len(), &self.wire)
            .map_err(|fault| rejected(self.layer, format!("{}: {fault}", self.workers[rank].address)))?;
        self.workers[rank].state = Delivery::Answered(body);
        Ok(())
    }

    /// A connection is gone. An answer that was awaited on it is asked for once more.
    fn lose(&mut self, peer: PeerId) -> Result<(), ExpertsError> {
        let Some(rank) = self.workers.iter().position(|worker| worker.peer == Some(peer)) else {
            return Ok(());
        };
        self.workers[rank].peer = None;
        let frame = match &mut self.workers[rank].state {
            Delivery::Idle | Delivery::Answered(_) => return Ok(()),
            Delivery::Sent { resent: true, .. } => {
                return Err(self.unavailable(rank, "the connection was lost twice"));
            }
            Delivery::Sent { frame, resent } => {
                *resent = true;
                frame.clone()
            }
        };
        self.counters.frames_resent.fetch_add(1, Ordering::Relaxed);
        self.send(rank, &frame)
    }

    fn try_combine(&mut self, out: &mut [f32]) -> Result<(), ExpertsError> {
        while let Some(rank) = self.awaited() {
            match self.events.recv_deadline(self.deadline) {
                Ok(event) => self.apply(event)?,
                Err(_) => return Err(self.unavailable(rank, "no answer in time")),
            }
        }
        let hidden = self.wire.hidden;
        for (worker, parcel) in self.workers.iter_mut().zip(&self.parcels) {
            let Delivery::Answered(body) = std::mem::replace(&mut worker.state, Delivery::Idle) else {
                continue;
            };
            let vectors = body.chunks_exact(self.wire.result_row_bytes());
            for (&slot, vector) in parcel.slots.iter().zip(vectors) {
                let start = slot as usize * hidden;
                self.wire.read_result(vector, &mut out[start..start + hidden]);
            }
        }
        Ok(())
    }

    fn awaited(&self) -> Option<usize> {
        self.workers.iter().position(|worker| matches!(worker.state, Delivery::Sent { .. }))
    }

    fn unavailable(&self, rank: usize, detail: impl ToString) -> ExpertsError {
        ExpertsError::Unavailable { worker: self.workers[rank].address.clone(), detail: detail.to_string() }
    }

    fn counted<T>(&self, outcome: Result<T, ExpertsError>) -> Result<T, ExpertsError> {
        if outcome.is_err() {
            self.counters.batches_failed.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }
}

impl Experts for RemoteExperts {
    fn dispatch(&mut self, _cpu: &compute::Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        // The engine's step span around it names the requests.
        let _hop = tracing::info_span!("dispatch", hop = 8, layer = batch.layer).entered();
        let outcome = self.try_dispatch(batch);
        self.counted(outcome)
    }

    fn combine(&mut self, _cpu: &compute::Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        let _hop = tracing::info_span!("combine", hop = 8, layer = self.layer).entered();
        let outcome = self.try_combine(out);
        self.counted(outcome)
    }
}

fn rejected(layer: usize, detail: impl ToString) -> ExpertsError {
    ExpertsError::Rejected { layer, detail: detail.to_string() }
}
