//! [`v1::KvTicket`] ⇄ [`KvTicket`]: a decode worker's permission to push a sequence's KV blocks, once.
//!
//! Checked here: what holds for any ticket. Whether the sizes fit a KV layout is for `kvtransfer`, which
//! knows one; whether the ticket lives is for the decode worker that issued it.

use std::fmt;
use std::time::Duration;

use model::ExecutionFingerprint;

use crate::field::{FieldError, name};
use crate::{fingerprint, v1};

/// Longest worker id, bytes.
pub const WORKER_ID_BYTES_MAX: usize = 128;
/// Longest host:port or fabric URI, bytes.
pub const ADDRESS_BYTES_MAX: usize = 256;
/// Longest lease a ticket may name: leases are renewed by arriving bytes, not made long.
pub const LEASE_MAX: Duration = Duration::from_secs(300);

/// Most further fabric addresses of one worker: a NIC for each GPU of a node.
pub const RAILS_MAX: usize = 8;

/// Names a ticket within its worker's incarnation: random, never reused there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct TicketId(pub u64);

impl fmt::Display for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A reservation on a decode worker. Fields as in `cluster.proto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvTicket {
    /// The decode worker.
    pub worker_id: String,
    /// Its process start: a ticket dies with it.
    pub incarnation: u64,
    /// Names the ticket within the incarnation.
    pub ticket_id: TicketId,
    /// Where to push to.
    pub fabric_address: String,
    /// What the pushing worker must be.
    pub fingerprint: ExecutionFingerprint,
    /// First block that is still missing, counted in blocks from the sequence's start.
    pub first_block: u32,
    /// Missing blocks. 0 when the prefix cache held them all: only the first token is expected then.
    pub blocks: u32,
    /// Tokens of the whole prompt, those of present blocks included.
    pub prompt_tokens: u32,
    /// Bytes expected in each layer.
    pub bytes_per_layer: u64,
    /// Layers of the KV layout.
    pub layers: u32,
    /// Silence, from the transfer's first frame on, after which the ticket is dead.
    pub lease: Duration,
    /// Time from issue to the first frame, after which the ticket is dead: it covers the wait in prefill's queue.
    pub reserve: Duration,
    /// Generation of the transfer's first path. 0: the worker cannot resume a transfer.
    pub generation: u32,
    /// Further addresses of the worker, each a path of its own.
    pub fabric_rails: Vec<String>,
}

impl KvTicket {
    /// Checks a ticket off the wire.
    ///
    /// # Errors
    /// Names the field that is missing or out of bounds.
    pub fn from_wire(wire: &v1::KvTicket) -> Result<Self, FieldError> {
        name("worker_id", &wire.worker_id, WORKER_ID_BYTES_MAX)?;
        name("fabric_address", &wire.fabric_address, ADDRESS_BYTES_MAX)?;
        let wire_fingerprint = wire.fingerprint.as_ref().ok_or_else(|| FieldError::missing("fingerprint"))?;
        let fingerprint =
            fingerprint::from_wire(wire_fingerprint).map_err(|error| error.within("fingerprint"))?;
        if wire.prompt_tokens == 0 {
            return Err(FieldError::missing("prompt_tokens"));
        }
        if wire.layers == 0 {
            return Err(FieldError::missing("layers"));
        }
        // A block holds at least one token, so there are never more blocks than tokens.
        if wire.first_block.checked_add(wire.blocks).is_none_or(|end| end > wire.prompt_tokens) {
            return Err(FieldError::out_of_range(
                "blocks",
                format_args!("{} from block {}", wire.blocks, wire.first_block),
                format_args!("within a prompt of {} tokens", wire.prompt_tokens),
            ));
        }
        if (wire.blocks == 0) != (wire.bytes_per_layer == 0) {
            return Err(FieldError::out_of_range(
                "bytes_per_layer",
                wire.bytes_per_layer,
                format_args!("what {} blocks hold", wire.blocks),
            ));
        }
        let lease = Duration::from_millis(u64::from(wire.lease_ms));
        if lease.is_zero() || lease > LEASE_MAX {
            return Err(FieldError::out_of_range(
                "lease_ms",
                wire.lease_ms,
                format_args!("1 to {}", LEASE_MAX.as_millis()),
            ));
        }
        let reserve = match wire.reserve_ms {
            0 => lease,
            ms => Duration::from_millis(u64::from(ms)),
        };
        if reserve > LEASE_MAX {
            let allowed = format_args!("at most {}", LEASE_MAX.as_millis());
            return Err(FieldError::out_of_range("reserve_ms", wire.reserve_ms, allowed));
        }
        if wire.fabric_rails.len() > RAILS_MAX {
            let allowed = format_args!("at most {RAILS_MAX}");
            return Err(FieldError::out_of_range("fabric_rails", wire.fabric_rails.len(), allowed));
        }
        for rail in &wire.fabric_rails {
            name("fabric_rails", rail, ADDRESS_BYTES_MAX)?;
        }
        Ok(Self {
            worker_id: wire.worker_id.clone(),
            incarnation: wire.incarnation,
            ticket_id: TicketId(wire.ticket_id),
            fabric_address: wire.fabric_address.clone(),
            fingerprint,
            first_block: wire.first_block,
            blocks: wire.blocks,
            prompt_tokens: wire.prompt_tokens,
            bytes_per_layer: wire.bytes_per_layer,
            layers: wire.layers,
            lease,
            reserve,
            generation: wire.generation,
            fabric_rails: wire.fabric_rails.clone(),
        })
    }

    /// The wire's form. A lease beyond what the field holds is cut: shorter is safe.
    pub fn to_wire(&self) -> v1::KvTicket {
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        v1::KvTicket {
            worker_id: self.worker_id.clone(),
            incarnation: self.incarnation,
            ticket_id: self.ticket_id.0,
            fabric_address: self.fabric_address.clone(),
            fingerprint: Some(fingerprint::to_wire(&self.fingerprint)),
            first_block: self.first_block,
            blocks: self.blocks,
            prompt_tokens: self.prompt_tokens,
            bytes_per_layer: self.bytes_per_layer,
            layers: self.layers,
            lease_ms: millis(self.lease),
            reserve_ms: millis(self.reserve),
            generation: self.generation,
            fabric_rails: self.fabric_rails.clone(),
        }
    }

    /// The block behind the last one expected, counted from the sequence's start.
    pub fn end_block(&self) -> u32 {
        self.first_block + self.blocks
    }
}

#[cfg(test)]
mod tests;
