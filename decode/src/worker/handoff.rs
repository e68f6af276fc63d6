//! What a hand-off brings: blocks into the pool, complete sequences into the batch.
//!
//! A push is copied into the pool here, on the device thread and between two rounds. So once a ticket is revoked, no write to its
//! blocks is left anywhere. Deliberately not here: the tickets' states ([`kvtransfer::Receiver`]), and what is revoked when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::KvPool;
use kvtransfer::{BlockSink, ReceiverEvent, TransferReport};
use model::{BlockId, TokenId};
use proto::ticket::TicketId;

use super::Worker;
use crate::error::Failure;
use crate::outbox::SequenceEvent;
use crate::scheduler::{Event, Scheduler};

impl Worker {
    /// Lets arrived blocks into the pool, and sequences whose KV is complete into the batch.
    pub(super) fn poll_receiver(&mut self, now: Instant) {
        let mut sink = PoolSink { scheduler: &self.scheduler, pool: self.engine.kv_mut() };
        for event in self.receiver.poll(now, &mut sink) {
            match event {
                ReceiverEvent::Committed { ticket, first_token, report } => {
                    self.hand_off(ticket, first_token, &report, now);
                }
                ReceiverEvent::Expired { ticket } => self.fail_ticket(ticket, Failure::LeaseExpired, now),
                ReceiverEvent::Aborted { ticket, reason } => {
                    self.fail_ticket(ticket, Failure::HandoffAborted(Arc::from(reason)), now);
                }
            }
        }
    }

    fn hand_off(&mut self, ticket: TicketId, first_token: TokenId, report: &TransferReport, now: Instant) {
        let Some(id) = self.scheduler.by_ticket(ticket) else { return };
        let Some(seat) = self.seats.get_mut(&id) else { return };
        if !self.intake.in_vocabulary(first_token) {
            // One such token would fail the whole batch that it is stepped in.
            let reason = Arc::from("the first token is not in the vocabulary");
            return self.fail_ticket(ticket, Failure::HandoffAborted(reason), now);
        }
        let handoff = now.duration_since(seat.issued_at);
        self.metrics.handoff_time.observe(handoff);
        self.metrics.handoff_stages.observe(report);
        seat.committed_at = Some(now);
        seat.sampler.observe(first_token);
        seat.span = tracing::info_span!(
            "decode",
            hop = 11,
            request_id = %seat.request_id,
            trace_id = %seat.trace.trace_id(),
            parent_id = %seat.trace.span_id(),
            handoff_bytes = report.bytes,
            handoff_resumes = report.resumes,
            handoff_reserved_us = micros(report.reserved),
            handoff_arriving_us = micros(report.arriving),
            handoff_finishing_us = micros(report.finishing),
        );
        seat.outbox.send(SequenceEvent::HandedOff { handoff });
        self.scheduler.apply(id, Event::HandedOff(first_token), now);
    }

    fn fail_ticket(&mut self, ticket: TicketId, failure: Failure, now: Instant) {
        if let Some(id) = self.scheduler.by_ticket(ticket) {
            self.scheduler.apply(id, Event::Failed(failure), now);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Where arrived blocks go: into the pool, at the block that the ticket's sequence holds for that position.
struct PoolSink<'a> {
    scheduler: &'a Scheduler,
    pool: &'a mut KvPool,
}

impl BlockSink for PoolSink<'_> {
    fn place(
        &mut self,
        ticket: TicketId,
        block_in_sequence: u32,
        layer: u32,
        bytes: usize,
    ) -> Option<&mut [u8]> {
        let block: Option<BlockId> = self
            .scheduler
            .by_ticket(ticket)
            .and_then(|id| self.scheduler.sequence(id))
            .and_then(|sequence| sequence.block_table().get(block_in_sequence as usize).copied());
        let place = block.and_then(|block| self.pool.block_layer_mut(block, layer as usize, bytes));
        if place.is_none() {
            // The receiver checked the ticket just now: its books and the scheduler's have come apart.
            tracing::error!(%ticket, block_in_sequence, "a live ticket has no block here");
        }
        place
    }
}
