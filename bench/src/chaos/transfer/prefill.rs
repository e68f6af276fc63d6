//! Prefill's side: sequences that push what they are asked for, in any order, and the sender under test.

use std::collections::BTreeMap;
use std::time::Instant;

use kvtransfer::sender::SenderCore;
use kvtransfer::{KvTicket, Outlet, SenderEvent, TransferError, TransferId};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::decode::{first_token, layout, row, rows_in};
use super::history::LinkId;
use super::tally::Tally;

pub(super) struct Prefill {
    core: SenderCore<LinkId>,
    transfers: BTreeMap<TransferId, Transfer>,
}

struct Transfer {
    sequence: u64,
    prompt_tokens: usize,
    /// Layer, first block, blocks.
    runs: Vec<(u32, u32, u32)>,
    /// Of these pushed, on the path that it takes now.
    pushed: usize,
    /// All is sent, on this path, and the first token on whatever path.
    finished: bool,
    finished_once: bool,
}

impl Prefill {
    pub(super) fn start() -> Self {
        Self { core: SenderCore::new(), transfers: BTreeMap::new() }
    }

    pub(super) fn begin(
        &mut self,
        sequence: u64,
        ticket: KvTicket,
        now: Instant,
        rng: &mut StdRng,
        tally: &mut Tally,
    ) -> Option<TransferId> {
        let mut runs = Vec::new();
        for layer in 0..ticket.layers {
            let mut block = ticket.first_block;
            while block < ticket.end_block() {
                let blocks = rng.random_range(1..=ticket.end_block() - block);
                runs.push((layer, block, blocks));
                block += blocks;
            }
        }
        runs.shuffle(rng);
        let prompt_tokens = ticket.prompt_tokens as usize;
        match self.core.begin(ticket, now) {
            Ok(id) => {
                self.transfers.insert(
                    id,
                    Transfer {
                        sequence,
                        prompt_tokens,
                        runs,
                        pushed: 0,
                        finished: false,
                        finished_once: false,
                    },
                );
                Some(id)
            }
            Err(error) => {
                tally.object(|| format!("no transfer for a fresh ticket: {error}"));
                None
            }
        }
    }

    /// Pushes something of some transfer, the first token when nothing else is left. Gives the sequences that have ended.
    pub(super) fn push(
        &mut self,
        rng: &mut StdRng,
        outlet: &mut impl Outlet<LinkId>,
        tally: &mut Tally,
    ) -> Vec<u64> {
        let unfinished = self.transfers.iter().filter(|(_, transfer)| !transfer.finished);
        let count = unfinished.clone().count();
        if count == 0 {
            return Vec::new();
        }
        let Some((&id, _)) = unfinished.clone().nth(rng.random_range(0..count)) else { return Vec::new() };
        let Some(transfer) = self.transfers.get_mut(&id) else { return Vec::new() };
        let outcome = match transfer.runs.get(transfer.pushed) {
            None => self.core.finish(id, first_token(transfer.sequence), outlet),
            Some(&(layer, first_block, blocks)) => {
                let bytes: Vec<Vec<u8>> =
                    (first_block..first_block + blocks).map(|block| transfer.piece(layer, block)).collect();
                let pieces: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
                let last = (first_block + blocks - 1) as usize;
                let last_rows = rows_in(transfer.prompt_tokens, last, layout().block_tokens);
                self.core.push_blocks(id, layer, first_block, &pieces, last_rows as u32, outlet)
            }
        };
        match outcome {
            Ok(()) if transfer.pushed < transfer.runs.len() => transfer.pushed += 1,
            Ok(()) => (transfer.finished, transfer.finished_once) = (true, true),
            Err(TransferError::Full) => {}
            Err(TransferError::Ended(_)) => return self.take_events(tally),
            Err(error) => tally.object(|| format!("a permitted push is refused: {error}")),
        }
        Vec::new()
    }

    /// Gives a sequence's transfer up; whether there was one.
    pub(super) fn abort(&mut self, sequence: u64) -> bool {
        let found = self.transfers.iter().find(|(_, transfer)| transfer.sequence == sequence);
        let Some((&id, _)) = found else { return false };
        self.core.abort(id, "cancelled");
        self.transfers.remove(&id);
        true
    }

    pub(super) fn receive(&mut self, link: LinkId, head: &[u8], tally: &mut Tally) -> Vec<u64> {
        self.core.handle_frame(link, head);
        self.take_events(tally)
    }

    pub(super) fn connected(&mut self, address: &str, link: LinkId, incarnation: u64, now: Instant) {
        self.core.handle_connected(address, link, incarnation, now);
    }

    pub(super) fn dial_failed(&mut self, address: &str, now: Instant, tally: &mut Tally) -> Vec<u64> {
        self.core.handle_dial_failed(address, now);
        self.take_events(tally)
    }

    pub(super) fn lose(
        &mut self,
        link: LinkId,
        process_lives: bool,
        now: Instant,
        tally: &mut Tally,
    ) -> Vec<u64> {
        self.core.handle_peer_lost(link, process_lives, now);
        self.take_events(tally)
    }

    pub(super) fn next_dial(&mut self) -> Option<String> {
        self.core.next_dial().map(|dial| dial.address)
    }

    pub(super) fn tick(
        &mut self,
        now: Instant,
        outlet: &mut impl Outlet<LinkId>,
        tally: &mut Tally,
    ) -> Vec<u64> {
        self.core.handle_timeout(now);
        self.core.flush(now, outlet);
        self.core.check_invariants();
        self.take_events(tally)
    }

    /// Sequences whose transfers live.
    pub(super) fn sequences(&self) -> impl Iterator<Item = u64> + '_ {
        self.transfers.values().map(|transfer| transfer.sequence)
    }

    pub(super) fn check_baseline(&self, tally: &mut Tally) {
        for sequence in self.sequences() {
            tally.object(|| format!("the transfer of sequence {sequence} outlives everything"));
        }
        let stats = self.core.stats();
        let ended = stats.committed + stats.refused + stats.lost + stats.aborted;
        if stats.begun != ended {
            tally.object(|| format!("{} transfers have begun and {ended} have ended", stats.begun));
        }
    }

    fn take_events(&mut self, tally: &mut Tally) -> Vec<u64> {
        let mut ended = Vec::new();
        for event in self.core.take_events() {
            let (SenderEvent::Committed { id }
            | SenderEvent::Refused { id, .. }
            | SenderEvent::Lost { id }
            | SenderEvent::Resumed { id, .. }) = event;
            if let SenderEvent::Resumed { .. } = event {
                if let Some(transfer) = self.transfers.get_mut(&id) {
                    (transfer.pushed, transfer.finished) = (0, false);
                }
                continue;
            }
            let Some(transfer) = self.transfers.remove(&id) else {
                tally.object(|| format!("transfer {id} has a second end"));
                continue;
            };
            if matches!(event, SenderEvent::Committed { .. }) && !transfer.finished_once {
                tally.object(|| format!("transfer {id} committed before everything was sent"));
            }
            ended.push(transfer.sequence);
        }
        ended
    }
}

impl Transfer {
    fn piece(&self, layer: u32, block: u32) -> Vec<u8> {
        let block_tokens = layout().block_tokens;
        let start = block as usize * block_tokens;
        let rows = rows_in(self.prompt_tokens, block as usize, block_tokens);
        (start..start + rows).flat_map(|position| row(self.sequence, layer, position)).collect()
    }
}
