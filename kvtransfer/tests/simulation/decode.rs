//! Decode's side: memory, who owns which block of it, and the receiver under test.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kvtransfer::receiver::ReceiverCore;
use kvtransfer::{BlockSink, KvTicket, ReceiverEvent, ReceiverOptions, Reservation, TicketId};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};

use crate::network::{Direction, Link, Network, Packet};

pub const BLOCKS: usize = 12;
pub const LEASE: Duration = Duration::from_secs(10);
pub const ADDRESS: &str = "sim://decode";

/// Rows of 16 bytes, blocks of 4 rows, 3 layers.
pub fn layout() -> KvLayout {
    KvLayout { format: KvFormat::F32, layers: 3, latent: 2, rope: 2, block_tokens: 4 }
}

/// What every row of `sequence` must hold: its owner's stamp, and where it is.
pub fn row(sequence: u64, layer: u32, position: usize) -> [u8; 16] {
    let place = u64::from(layer) << 32 | position as u64;
    let mut row = [0; 16];
    row[..8].copy_from_slice(&sequence.to_le_bytes());
    row[8..].copy_from_slice(&place.to_le_bytes());
    row
}

/// Rows of a prompt in one of its blocks.
pub fn rows_in(prompt_tokens: usize, block: usize) -> usize {
    let block_tokens = layout().block_tokens;
    (prompt_tokens - block * block_tokens).min(block_tokens)
}

/// The token that stands for a sequence.
pub fn first_token(sequence: u64) -> TokenId {
    TokenId(sequence as u32)
}

/// A sequence that holds blocks here.
pub struct Owner {
    pub sequence: u64,
    pub prompt_tokens: usize,
    first_block: usize,
    block_table: Vec<usize>,
    committed: bool,
}

pub struct Decode {
    core: ReceiverCore<Link>,
    memory: Memory,
    pub issued: u64,
    pub committed: u64,
    pub restarts: u64,
    /// Of processes that are gone.
    stale_before: u64,
    incarnation: u64,
}

/// Memory and the oracle's books over it.
struct Memory {
    /// `[block][layer][row]`
    rows: Vec<[u8; 16]>,
    free: Vec<usize>,
    owners: BTreeMap<TicketId, Owner>,
}

impl Decode {
    pub fn new() -> Self {
        Self::start(1)
    }

    fn start(incarnation: u64) -> Self {
        let fingerprint = ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Reference,
            kv_layout_digest: layout().digest(),
            backend: "cpu/portable".to_owned(),
            arithmetic_revision: 1,
        };
        let options = ReceiverOptions {
            worker_id: "decode".to_owned(),
            incarnation,
            fingerprint,
            layout: layout(),
            lease: LEASE,
            tickets_max: BLOCKS,
        };
        Self {
            core: ReceiverCore::new(options, ADDRESS.to_owned()),
            memory: Memory::new(),
            issued: 0,
            committed: 0,
            restarts: 0,
            stale_before: 0,
            incarnation,
        }
    }

    /// Everything in it is gone; frames that were sent to it are not.
    pub fn restart(&mut self) {
        let (issued, committed, restarts) = (self.issued, self.committed, self.restarts + 1);
        let stale_before = self.dead_pushes();
        let fresh = Self::start(self.incarnation + 1);
        *self = Self { issued, committed, restarts, stale_before, ..fresh };
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Frames that the fence has stopped.
    pub fn dead_pushes(&self) -> u64 {
        self.stale_before + self.core.stats().stale
    }

    /// Blocks for a new sequence, and its ticket; `None` without room. `cached` blocks are there already.
    pub fn admit(
        &mut self,
        sequence: u64,
        prompt_tokens: usize,
        cached: usize,
        now: Instant,
    ) -> Option<KvTicket> {
        let blocks = layout().blocks_for(prompt_tokens);
        if self.memory.free.len() < blocks {
            return None;
        }
        // Each process counts from 0, so that names come back: only the incarnation tells them apart.
        let ticket = TicketId(self.core.stats().issued);
        let reservation = Reservation { first_block: cached, prompt_tokens };
        let issued = self.core.issue(reservation, ticket, now).expect("a sound reservation");
        let block_table = self.memory.free.split_off(self.memory.free.len() - blocks);
        let owner = Owner { sequence, prompt_tokens, first_block: cached, block_table, committed: false };
        self.memory.adopt_cached(&owner);
        self.memory.owners.insert(ticket, owner);
        self.issued += 1;
        Some(issued)
    }

    pub fn receive(&mut self, packet: &Packet, now: Instant) {
        self.core.handle_frame(packet.link, &packet.head, &packet.body.clone().into(), now, &mut self.memory);
        self.take_events();
    }

    pub fn lose(&mut self, link: Link) {
        self.core.handle_peer_lost(link, &"cut");
        self.take_events();
    }

    pub fn tick(&mut self, now: Instant, network: &mut Network) {
        self.core.handle_timeout(now);
        self.take_events();
        self.core.flush(&mut network.outlet(Direction::ToPrefill));
    }

    /// The request of a ticket ends, for its client's reasons or because it is done.
    pub fn release(&mut self, ticket: TicketId) {
        self.core.revoke(ticket);
        self.memory.release(ticket);
    }

    pub fn tickets(&self, committed: bool) -> Vec<TicketId> {
        let of_kind = self.memory.owners.iter().filter(|(_, owner)| owner.committed == committed);
        of_kind.map(|(&ticket, _)| ticket).collect()
    }

    pub fn check(&self) {
        self.core.check_invariants();
        self.memory.check();
        for ticket in self.memory.owners.keys() {
            assert!(self.core.is_alive(*ticket), "{ticket} ended and nobody was told");
        }
    }

    pub fn assert_baseline(&self) {
        assert!(self.memory.owners.is_empty());
        assert_eq!(self.memory.free.len(), BLOCKS, "blocks have leaked");
    }

    fn take_events(&mut self) {
        for event in self.core.take_events() {
            match event {
                ReceiverEvent::Committed { ticket, first_token: token } => {
                    let owner = self.memory.owners.get_mut(&ticket).expect("a commit for a dead ticket");
                    assert!(!owner.committed, "{ticket} committed twice");
                    assert_eq!(token, first_token(owner.sequence));
                    owner.committed = true;
                    self.committed += 1;
                }
                ReceiverEvent::Expired { ticket } | ReceiverEvent::Aborted { ticket, .. } => {
                    let owner = self.memory.owners.get(&ticket).expect("a second end for a ticket");
                    assert!(!owner.committed, "{ticket} failed after its commit");
                    self.memory.release(ticket);
                }
            }
        }
    }
}

impl Memory {
    fn new() -> Self {
        let rows = vec![[0; 16]; BLOCKS * layout().layers * layout().block_tokens];
        Self { rows, free: (0..BLOCKS).collect(), owners: BTreeMap::new() }
    }

    fn start(block: usize, layer: u32) -> usize {
        (block * layout().layers + layer as usize) * layout().block_tokens
    }

    /// A prefix hit: these rows hold what they should before anything is pushed.
    fn adopt_cached(&mut self, owner: &Owner) {
        for layer in 0..layout().layers as u32 {
            for index in 0..owner.first_block {
                let start = Self::start(owner.block_table[index], layer);
                for offset in 0..layout().block_tokens {
                    self.rows[start + offset] =
                        row(owner.sequence, layer, index * layout().block_tokens + offset);
                }
            }
        }
    }

    fn release(&mut self, ticket: TicketId) {
        if let Some(owner) = self.owners.remove(&ticket) {
            // The last freed go out first: a late write would hit the next owner.
            self.free.extend(owner.block_table);
        }
    }

    /// Committed sequences have their own bytes, all of them.
    fn check(&self) {
        for (ticket, owner) in self.owners.iter().filter(|(_, owner)| owner.committed) {
            for layer in 0..layout().layers as u32 {
                for position in 0..owner.prompt_tokens {
                    let block = owner.block_table[position / layout().block_tokens];
                    let at = Self::start(block, layer) + position % layout().block_tokens;
                    let expected = row(owner.sequence, layer, position);
                    assert_eq!(self.rows[at], expected, "{ticket}: layer {layer}, position {position}");
                }
            }
        }
    }
}

impl BlockSink for Memory {
    fn place(
        &mut self,
        ticket: TicketId,
        block_in_sequence: u32,
        layer: u32,
        bytes: usize,
    ) -> Option<&mut [u8]> {
        let owner = self.owners.get(&ticket).expect("a write for a dead ticket");
        assert!(!owner.committed, "a write into a running sequence");
        let index = block_in_sequence as usize;
        assert!(index >= owner.first_block, "a write into the prefix cache");
        assert_eq!(bytes, 16 * rows_in(owner.prompt_tokens, index));
        let start = Self::start(owner.block_table[index], layer);
        Some(self.rows[start..start + bytes / 16].as_flattened_mut())
    }
}
