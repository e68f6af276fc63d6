//! Decode's side: memory, the oracle's books over it, and the receiver under test.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtransfer::receiver::ReceiverCore;
use kvtransfer::{BlockSink, KvTicket, Outlet, ReceiverEvent, ReceiverOptions, Reservation, TicketId};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};

use super::history::LinkId;
use super::tally::Tally;

/// Blocks of a pool: some twenty hand-offs at once.
pub(super) const BLOCKS: usize = 64;
/// Short, so that a history need not last long; whatever else ends a ticket is faster.
pub(super) const LEASE: Duration = Duration::from_secs(5);
pub(super) const ROW_BYTES: usize = 16;

/// Where a worker is reached: two paths, that fail one by one.
pub(super) fn rails(address: &str) -> Vec<String> {
    vec![address.to_owned(), format!("{address}/rail")]
}

/// Rows of 16 bytes, blocks of 4 rows, 3 layers.
pub(super) fn layout() -> KvLayout {
    KvLayout { format: KvFormat::F32, layers: 3, latent: 2, rope: 2, block_tokens: 4 }
}

/// What every row of `sequence` must hold: its owner's stamp, and where it is.
pub(super) fn row(sequence: u64, layer: u32, position: usize) -> [u8; ROW_BYTES] {
    let place = u64::from(layer) << 32 | position as u64;
    let mut row = [0; ROW_BYTES];
    row[..8].copy_from_slice(&sequence.to_le_bytes());
    row[8..].copy_from_slice(&place.to_le_bytes());
    row
}

/// Rows of a prompt in one of its blocks.
pub(super) fn rows_in(prompt_tokens: usize, block: usize, block_tokens: usize) -> usize {
    (prompt_tokens - block * block_tokens).min(block_tokens)
}

/// The token that stands for a sequence.
pub(super) fn first_token(sequence: u64) -> TokenId {
    TokenId(sequence as u32)
}

/// How a ticket ended by the machine's word.
pub(super) enum Ended {
    Committed(TicketId),
    Otherwise(TicketId),
}

pub(super) struct Decode {
    core: ReceiverCore<LinkId>,
    memory: Memory,
    pub(super) incarnation: u64,
}

struct Owner {
    sequence: u64,
    prompt_tokens: usize,
    first_block: usize,
    block_table: Vec<usize>,
    committed: bool,
}

struct Memory {
    layout: KvLayout,
    /// `[block][layer][row]`
    rows: Vec<[u8; ROW_BYTES]>,
    free: Vec<usize>,
    owners: BTreeMap<TicketId, Owner>,
    /// Places asked for that no live ticket may have.
    wrong: Option<String>,
}

impl Decode {
    pub(super) fn start(address: String, incarnation: u64) -> Self {
        let layout = layout();
        let fingerprint = ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Reference,
            kv_layout_digest: layout.digest(),
            backend: "cpu/portable".to_owned(),
            arithmetic_revision: 1,
        };
        let rows = vec![[0; ROW_BYTES]; BLOCKS * layout.layers * layout.block_tokens];
        let options = ReceiverOptions {
            worker_id: address.clone(),
            incarnation,
            fingerprint,
            layout: layout.clone(),
            lease: LEASE,
            reserve: LEASE,
            tickets_max: BLOCKS,
        };
        let free = (0..BLOCKS).collect();
        let memory = Memory { layout, rows, free, owners: BTreeMap::new(), wrong: None };
        Self { core: ReceiverCore::new(options, rails(&address)), memory, incarnation }
    }

    /// Blocks for a new sequence, and its ticket; `None` without room. `cached` blocks are there already.
    pub(super) fn admit(
        &mut self,
        sequence: u64,
        prompt_tokens: usize,
        cached: usize,
        now: Instant,
        tally: &mut Tally,
    ) -> Option<KvTicket> {
        let blocks = self.memory.layout.blocks_for(prompt_tokens);
        if self.memory.free.len() < blocks {
            return None;
        }
        // Each process counts from 0, so that names come back: only the incarnation tells them apart.
        let ticket = TicketId(self.core.stats().issued);
        let reservation = Reservation { first_block: cached, prompt_tokens };
        let issued = match self.core.issue(reservation, ticket, now) {
            Ok(issued) => issued,
            Err(error) => {
                tally.object(|| format!("no ticket for a sound reservation: {error}"));
                return None;
            }
        };
        let block_table = self.memory.free.split_off(self.memory.free.len() - blocks);
        let owner = Owner { sequence, prompt_tokens, first_block: cached, block_table, committed: false };
        self.memory.adopt_cached(&owner);
        self.memory.owners.insert(ticket, owner);
        tally.issued += 1;
        Some(issued)
    }

    pub(super) fn receive(
        &mut self,
        link: LinkId,
        head: &[u8],
        body: Bytes,
        now: Instant,
        tally: &mut Tally,
    ) -> Vec<Ended> {
        self.core.handle_frame(link, head, &body.into(), now, &mut self.memory);
        if let Some(wrong) = self.memory.wrong.take() {
            tally.object(|| wrong);
        }
        self.take_events(tally)
    }

    pub(super) fn connected(
        &mut self,
        link: LinkId,
        worker: &str,
        incarnation: u64,
        tally: &mut Tally,
    ) -> Vec<Ended> {
        self.core.handle_peer_up(link, worker, incarnation);
        self.take_events(tally)
    }

    pub(super) fn lose(
        &mut self,
        link: LinkId,
        process_lives: bool,
        now: Instant,
        tally: &mut Tally,
    ) -> Vec<Ended> {
        self.core.handle_peer_lost(link, process_lives, &"cut", now);
        self.take_events(tally)
    }

    pub(super) fn tick(
        &mut self,
        now: Instant,
        outlet: &mut impl Outlet<LinkId>,
        tally: &mut Tally,
    ) -> Vec<Ended> {
        self.core.handle_timeout(now);
        self.core.flush(outlet);
        self.core.check_invariants();
        self.take_events(tally)
    }

    /// The request of a ticket ends, for its client's reasons or because it is done. Whether it was still receiving.
    pub(super) fn release(&mut self, ticket: TicketId, tally: &mut Tally) -> bool {
        let receiving = self.memory.owners.get(&ticket).is_some_and(|owner| !owner.committed);
        let _fenced = self.core.revoke(ticket);
        self.memory.release(ticket, tally);
        tally.released += u64::from(receiving);
        receiving
    }

    /// Whether no sequence holds blocks.
    pub(super) fn is_idle(&self) -> bool {
        self.memory.owners.is_empty()
    }

    /// Adds what this process has counted.
    pub(super) fn count(&self, tally: &mut Tally) {
        let stats = self.core.stats();
        tally.fenced += stats.stale + stats.superseded;
        tally.resumed += stats.resumed;
        tally.duplicates += stats.duplicates;
    }

    /// After everything has ended: nothing is held.
    pub(super) fn check_baseline(&self, tally: &mut Tally) {
        let leaked = BLOCKS - self.memory.free.len();
        tally.leaked_blocks += leaked as u64;
        if leaked > 0 {
            tally.object(|| format!("{leaked} blocks of {} were not given back", self.incarnation));
        }
        for ticket in self.memory.owners.keys() {
            tally.object(|| format!("{ticket} outlives everything"));
        }
    }

    fn take_events(&mut self, tally: &mut Tally) -> Vec<Ended> {
        let mut ended = Vec::new();
        for event in self.core.take_events() {
            match event {
                ReceiverEvent::Committed { ticket, first_token: token, .. } => {
                    tally.committed += 1;
                    let Some(owner) = self.memory.owners.get_mut(&ticket).filter(|owner| !owner.committed)
                    else {
                        tally.object(|| format!("{ticket} committed, and was dead or committed already"));
                        continue;
                    };
                    owner.committed = true;
                    if token != first_token(owner.sequence) {
                        tally.object(|| format!("{ticket} goes on from another sequence's token"));
                    }
                    self.memory.check(ticket, tally);
                    ended.push(Ended::Committed(ticket));
                }
                ReceiverEvent::Expired { ticket } | ReceiverEvent::Aborted { ticket, .. } => {
                    tally.ended += 1;
                    if self.memory.owners.get(&ticket).is_none_or(|owner| owner.committed) {
                        tally.object(|| format!("{ticket} ended, and was dead or committed already"));
                        continue;
                    }
                    self.memory.release(ticket, tally);
                    ended.push(Ended::Otherwise(ticket));
                }
            }
        }
        ended
    }
}

impl Memory {
    fn start(&self, block: usize, layer: u32) -> usize {
        (block * self.layout.layers + layer as usize) * self.layout.block_tokens
    }

    /// A prefix hit: these rows hold what they should before anything is pushed.
    fn adopt_cached(&mut self, owner: &Owner) {
        let block_tokens = self.layout.block_tokens;
        for layer in 0..self.layout.layers as u32 {
            for index in 0..owner.first_block {
                let start = self.start(owner.block_table[index], layer);
                for offset in 0..block_tokens {
                    self.rows[start + offset] = row(owner.sequence, layer, index * block_tokens + offset);
                }
            }
        }
    }

    fn release(&mut self, ticket: TicketId, tally: &mut Tally) {
        if self.owners.get(&ticket).is_some_and(|owner| owner.committed) {
            // Once more at its end: what was written since the commit would show.
            self.check(ticket, tally);
        }
        if let Some(owner) = self.owners.remove(&ticket) {
            // The last freed go out first: a late write would hit the next owner.
            self.free.extend(owner.block_table);
        }
    }

    /// Whether a committed sequence has its own bytes, all of them.
    fn check(&self, ticket: TicketId, tally: &mut Tally) {
        let Some(owner) = self.owners.get(&ticket) else { return };
        let block_tokens = self.layout.block_tokens;
        let mut foreign = 0;
        for layer in 0..self.layout.layers as u32 {
            for position in 0..owner.prompt_tokens {
                let at =
                    self.start(owner.block_table[position / block_tokens], layer) + position % block_tokens;
                if self.rows[at] != row(owner.sequence, layer, position) {
                    foreign += ROW_BYTES as u64;
                }
            }
        }
        tally.foreign_bytes += foreign;
        if foreign > 0 {
            tally.object(|| format!("{foreign} foreign bytes in {ticket}, which is committed"));
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
        let index = block_in_sequence as usize;
        let block_tokens = self.layout.block_tokens;
        let wrong = match self.owners.get(&ticket) {
            None => "is dead",
            Some(owner) if owner.committed => "is running",
            Some(owner) if index < owner.first_block => "has this block from the prefix cache",
            Some(owner) if bytes != ROW_BYTES * rows_in(owner.prompt_tokens, index, block_tokens) => {
                "has fewer rows"
            }
            Some(owner) => {
                let start = self.start(owner.block_table[index], layer);
                return Some(self.rows[start..start + bytes / ROW_BYTES].as_flattened_mut());
            }
        };
        self.wrong.get_or_insert_with(|| format!("a write for {ticket}, block {index}, which {wrong}"));
        None
    }
}
