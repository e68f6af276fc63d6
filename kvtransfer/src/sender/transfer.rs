//! One transfer's state at prefill, and what its ticket permits.

use std::time::{Duration, Instant};

use proto::ticket::KvTicket;

use crate::error::TransferError;
use crate::pieces::Pieces;
use crate::wire::TicketKey;

#[derive(Clone, Hash)]
pub(super) struct Transfer<P> {
    pub(super) key: TicketKey,
    /// Each a path of its own.
    pub(super) addresses: Vec<String>,
    first_block: u32,
    end_block: u32,
    layers: u32,
    pub(super) lease: Duration,
    /// Longest wait for the first push.
    pub(super) reserve: Duration,
    /// Of the path. 0: decode cannot resume.
    pub(super) generation: u32,
    pub(super) state: State<P>,
    /// What decode has by its own word, and what was sent since.
    pub(super) sent: Pieces,
    /// Something has been sent for it at all: decode may know the transfer.
    pub(super) begun: bool,
    /// The first token was sent, and nothing is left but the answer.
    pub(super) finished: bool,
    /// When the transfer was begun, or was last seen to have sent something.
    pub(super) active_at: Instant,
    /// Something was sent since the last timeout: calls that send know no time.
    pub(super) active: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State<P> {
    /// No path yet, and nothing sent.
    Connecting {
        until: Instant,
    },
    /// The path is lost in the middle of it.
    Broken {
        until: Instant,
    },
    /// Asks what has landed, since `asked`, or as soon as there is room.
    Asking {
        peer: P,
        asked: Option<Instant>,
    },
    Pushing {
        peer: P,
    },
}

impl<P: Copy + Eq> Transfer<P> {
    pub(super) fn new(ticket: KvTicket, state: State<P>, now: Instant) -> Self {
        let pieces = ticket.blocks as usize * ticket.layers as usize;
        let mut addresses = vec![ticket.fabric_address.clone()];
        addresses.extend(ticket.fabric_rails.iter().cloned());
        Self {
            key: TicketKey { incarnation: ticket.incarnation, ticket_id: ticket.ticket_id },
            addresses,
            first_block: ticket.first_block,
            end_block: ticket.end_block(),
            layers: ticket.layers,
            lease: ticket.lease,
            reserve: ticket.reserve,
            generation: ticket.generation,
            state,
            sent: Pieces::none(pieces),
            begun: false,
            finished: false,
            active_at: now,
            active: false,
        }
    }

    /// The path, if there is one.
    pub(super) fn peer(&self) -> Option<P> {
        match self.state {
            State::Connecting { .. } | State::Broken { .. } => None,
            State::Asking { peer, .. } | State::Pushing { peer } => Some(peer),
        }
    }

    /// Whether `incarnation` at `address` issued the ticket.
    pub(super) fn goes_to(&self, address: &str, incarnation: u64) -> bool {
        self.key.incarnation == incarnation && self.addresses.iter().any(|of| of == address)
    }

    pub(super) fn is_resumable(&self) -> bool {
        self.generation > 0
    }

    /// Asks for what has landed, on `peer`.
    pub(super) fn ask(&mut self, peer: P) {
        self.generation = self.generation.saturating_add(1);
        self.state = State::Asking { peer, asked: None };
    }

    pub(super) fn pieces(&self) -> usize {
        (self.end_block - self.first_block) as usize * self.layers as usize
    }

    /// A piece's place in the order layer, block.
    pub(super) fn index(&self, layer: u32, block: u32) -> usize {
        let blocks = (self.end_block - self.first_block) as usize;
        layer as usize * blocks + (block - self.first_block) as usize
    }

    /// What the sender can check without a layout; decode checks the rest.
    pub(super) fn permits(&self, layer: u32, first_block: u32, pieces: usize) -> Result<(), TransferError> {
        if layer >= self.layers {
            let permitted = format!("layers below {}", self.layers);
            return Err(TransferError::OutsideTicket { field: "layer", value: layer.into(), permitted });
        }
        let room = self.end_block.saturating_sub(first_block) as usize;
        if first_block < self.first_block || pieces == 0 || pieces > room {
            let permitted = format!("blocks {}..{}", self.first_block, self.end_block);
            let value = u64::from(first_block);
            return Err(TransferError::OutsideTicket { field: "first_block", value, permitted });
        }
        Ok(())
    }
}
