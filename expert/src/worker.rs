//! The device thread: frames in, experts' results out. Hop 8, on the worker.
//!
//! `receive → step → reply`. Whatever frames wait are taken together; those of one layer become one
//! batch, so that each expert's weights are read once for all sources. A result depends on its own row
//! alone, so who else is in the batch changes no bit.
//!
//! The worker keeps no state between frames: a frame may come twice, sources may vanish, and nothing a
//! frame says can end this thread. A frame that cannot be answered (no readable head) is dropped and
//! counted; any other wrong frame is answered with the reason.

mod step;

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use compute::Cpu;
use crossbeam_channel::RecvTimeoutError;
use engine::{ExpertBank, ExpertsError};
use fabric::{Arrivals, Channel, Event, Fabric, Frame, PeerId, SendError};
use prost::Message;
use proto::v1::{CombineHead, DispatchHead};

use crate::metrics::Metrics;
use crate::wire::{Share, check_dispatch};
use step::{Dispatch, Step};

/// An idle thread wakes this often: to show that it lives, and to see that it is to stop.
const IDLE_TURN: Duration = Duration::from_millis(50);
/// A turn with undelivered replies comes back this soon; about what a reply takes to leave.
const BUSY_TURN: Duration = Duration::from_micros(200);

/// Everything the device thread owns.
pub(crate) struct Worker {
    fabric: Fabric,
    events: Arrivals,
    /// The channel that this role has no use for; peers come and go on it all the same.
    kv_events: Arrivals,
    share: Share,
    step: Step,
    /// Replies that their peers have not taken yet, oldest first.
    outbox: VecDeque<(PeerId, Frame)>,
    replies_queued_max: usize,
    metrics: Arc<Metrics>,
    stop: Arc<AtomicBool>,
}

/// What a [`Worker`] is made of.
pub(crate) struct Parts {
    pub fabric: Fabric,
    pub share: Share,
    pub bank: ExpertBank,
    pub cpu: Cpu,
    pub replies_queued_max: usize,
    pub metrics: Arc<Metrics>,
    pub stop: Arc<AtomicBool>,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            events: parts.fabric.receiver(Channel::Experts),
            kv_events: parts.fabric.receiver(Channel::Kv),
            fabric: parts.fabric,
            step: Step::new(parts.bank, parts.cpu, parts.share.wire),
            share: parts.share,
            outbox: VecDeque::new(),
            replies_queued_max: parts.replies_queued_max,
            metrics: parts.metrics,
            stop: parts.stop,
        }
    }

    /// Runs until told to stop or until the fabric closes.
    pub(crate) fn run(mut self) {
        let mut batch = Vec::new();
        while !self.stop.load(Ordering::Relaxed) && self.receive(&mut batch) {
            // Stable: within a layer, frames keep their order of arrival.
            batch.sort_by_key(Dispatch::layer);
            let mut layers = batch.chunk_by(|a, b| a.layer() == b.layer());
            if let Err(error) = layers.try_for_each(|layer| self.compute(layer)) {
                // Nothing that it is asked from now on would be answered. Its sources see it go, and ask elsewhere.
                let error: &dyn Error = error.source().unwrap_or(&error);
                tracing::error!(%error, cause = ?error.source(), "the device failed");
                return;
            }
            batch.clear();
            self.flush();
            // Unread, it would fill up and let no new peer in.
            while self.kv_events.try_recv().is_ok() {}
            self.metrics.turn();
        }
    }

    /// Waits for a frame, then takes what else is there, up to a step's size. `false`: the fabric closed.
    fn receive(&mut self, batch: &mut Vec<Dispatch>) -> bool {
        let patience = if self.outbox.is_empty() { IDLE_TURN } else { BUSY_TURN };
        let first = match self.events.recv_timeout(patience) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        };
        let mut vectors = 0;
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                Event::Frame { peer, head, body } => {
                    if let Some(dispatch) = self.accept(peer, &head, body.into_bytes()) {
                        vectors += dispatch.vectors();
                        batch.push(dispatch);
                    }
                }
                Event::PeerLost { peer, .. } => self.outbox.retain(|(to, _)| *to != peer),
                Event::PeerUp { .. } => {}
            }
            // A frame holds at most `vectors_max`, so that one more never doubles the step's memory.
            let room = vectors < self.share.vectors_max;
            next = if room { self.events.try_recv().ok() } else { None };
        }
        true
    }

    fn accept(&mut self, peer: PeerId, head: &[u8], body: Bytes) -> Option<Dispatch> {
        let Ok(head) = DispatchHead::decode(head) else {
            self.metrics.frames_unreadable.inc();
            return None;
        };
        match check_dispatch(&head, body.len(), &self.share) {
            Ok(()) => Some(Dispatch { peer, head, body }),
            Err(refusal) => {
                tracing::warn!(peer = ?peer, %refusal, "dispatch refused");
                self.refuse(peer, &head, refusal.to_string());
                None
            }
        }
    }

    /// # Errors
    /// The device has failed, and with it the worker.
    fn compute(&mut self, layer: &[Dispatch]) -> Result<(), ExpertsError> {
        // Which requests these rows belong to, only their sources know: their spans name them.
        let _hop = tracing::info_span!("experts", hop = 8, layer = layer[0].layer()).entered();
        match self.step.run(layer) {
            Ok(bodies) => {
                self.metrics.step(layer.len(), layer.iter().map(Dispatch::vectors).sum());
                for (dispatch, body) in layer.iter().zip(bodies) {
                    let vectors = dispatch.vectors() as u32;
                    self.reply(dispatch.peer, combine_head(&dispatch.head, vectors, String::new()), body);
                }
            }
            Err(error @ ExpertsError::Device(_)) => return Err(error),
            // The placement promises an expert that was not loaded: refuse, and say so loudly.
            Err(error) => {
                tracing::error!(%error, "experts cannot be computed");
                for dispatch in layer {
                    self.refuse(dispatch.peer, &dispatch.head, error.to_string());
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, peer: PeerId, head: &DispatchHead, reason: String) {
        self.metrics.frames_refused.inc();
        self.reply(peer, combine_head(head, 0, reason), Bytes::new());
    }

    fn reply(&mut self, peer: PeerId, head: CombineHead, body: Bytes) {
        if self.outbox.len() >= self.replies_queued_max {
            self.metrics.replies_dropped.inc();
            self.outbox.pop_front();
        }
        self.outbox.push_back((peer, Frame { head: head.encode_to_vec().into(), body: vec![body] }));
    }

    /// Hands over what the peers take now. A peer that takes nothing holds nobody else up.
    fn flush(&mut self) {
        for _ in 0..self.outbox.len() {
            let Some((peer, frame)) = self.outbox.pop_front() else {
                return;
            };
            match self.fabric.try_send(peer, Channel::Experts, frame) {
                Ok(()) => {}
                Err(SendError::Full(frame)) => self.outbox.push_back((peer, frame)),
                Err(SendError::Gone | SendError::Oversized(_)) => {
                    self.metrics.replies_dropped.inc();
                }
            }
        }
    }
}

fn combine_head(dispatch: &DispatchHead, vectors: u32, refused: String) -> CombineHead {
    CombineHead {
        source_incarnation: dispatch.source_incarnation,
        sequence: dispatch.sequence,
        vectors,
        refused,
    }
}
