//! Prefill's side: sequences that push what they are asked for, in any order, and the sender under test.

use std::collections::BTreeMap;
use std::time::Instant;

use kvtransfer::sender::SenderCore;
use kvtransfer::{KvTicket, SenderEvent, TransferError, TransferId};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::decode::{first_token, layout, row, rows_in};
use crate::network::{Direction, Link, Network, Packet};

pub struct Prefill {
    core: SenderCore<Link>,
    transfers: BTreeMap<TransferId, Transfer>,
}

struct Transfer {
    sequence: u64,
    prompt_tokens: usize,
    /// Runs not yet pushed: layer, first block, blocks.
    runs: Vec<(u32, u32, u32)>,
    finished: bool,
}

impl Prefill {
    pub fn new() -> Self {
        Self { core: SenderCore::new(), transfers: BTreeMap::new() }
    }

    pub fn begin(&mut self, sequence: u64, ticket: KvTicket, rng: &mut StdRng, now: Instant) {
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
        let id = self.core.begin(ticket, now).expect("room for a transfer");
        let fresh = self.transfers.insert(id, Transfer { sequence, prompt_tokens, runs, finished: false });
        assert!(fresh.is_none(), "a transfer's name came back");
    }

    /// Pushes something of some transfer, the first token when nothing else is left.
    pub fn push(&mut self, rng: &mut StdRng, network: &mut Network) {
        let Some(id) = self.pick(rng, |transfer| !transfer.finished) else { return };
        let Some(transfer) = self.transfers.get_mut(&id) else { return };
        let mut outlet = network.outlet(Direction::ToDecode);
        let outcome = match transfer.runs.last() {
            None => self.core.finish(id, first_token(transfer.sequence), &mut outlet),
            Some(&(layer, first_block, blocks)) => {
                let bytes: Vec<Vec<u8>> =
                    (first_block..first_block + blocks).map(|block| transfer.piece(layer, block)).collect();
                let pieces: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
                let last_rows = rows_in(transfer.prompt_tokens, (first_block + blocks - 1) as usize);
                self.core.push_blocks(id, layer, first_block, &pieces, last_rows as u32, &mut outlet)
            }
        };
        match outcome {
            Ok(()) => transfer.finished = transfer.runs.pop().is_none(),
            Err(TransferError::Full) => {}
            Err(TransferError::Ended(_)) => self.take_events(),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn abort(&mut self, rng: &mut StdRng) {
        if let Some(id) = self.pick(rng, |_| true) {
            self.core.abort(id, "cancelled");
            self.transfers.remove(&id);
        }
    }

    pub fn receive(&mut self, packet: &Packet) {
        self.core.handle_frame(packet.link, &packet.head);
        self.take_events();
    }

    pub fn connected(&mut self, address: &str, link: Link, incarnation: u64) {
        self.core.handle_connected(address, link, incarnation);
    }

    pub fn dial_failed(&mut self, address: &str) {
        self.core.handle_dial_failed(address);
        self.take_events();
    }

    pub fn lose(&mut self, link: Link) {
        self.core.handle_peer_lost(link);
        self.take_events();
    }

    pub fn next_dial(&mut self) -> Option<String> {
        self.core.next_dial()
    }

    pub fn tick(&mut self, now: Instant, network: &mut Network) {
        self.core.handle_timeout(now);
        self.take_events();
        self.core.flush(&mut network.outlet(Direction::ToDecode));
    }

    pub fn check(&self) {
        self.core.check_invariants();
        let stats = self.core.stats();
        let ended = stats.committed + stats.refused + stats.lost + stats.aborted;
        assert_eq!(stats.begun, ended + self.transfers.len() as u64, "a transfer has no end, or two");
    }

    /// Whether every push that can be made has been made.
    pub fn is_idle(&self) -> bool {
        self.transfers.is_empty()
    }

    fn take_events(&mut self) {
        for event in self.core.take_events() {
            let (SenderEvent::Committed { id } | SenderEvent::Refused { id, .. } | SenderEvent::Lost { id }) =
                event;
            let transfer = self.transfers.remove(&id).expect("a second end for a transfer");
            if matches!(event, SenderEvent::Committed { .. }) {
                assert!(transfer.finished, "committed before everything was sent");
            }
        }
    }

    fn pick(&self, rng: &mut StdRng, which: impl Fn(&Transfer) -> bool) -> Option<TransferId> {
        let ids: Vec<_> =
            self.transfers.iter().filter(|(_, transfer)| which(transfer)).map(|(&id, _)| id).collect();
        (!ids.is_empty()).then(|| ids[rng.random_range(0..ids.len())])
    }
}

impl Transfer {
    fn piece(&self, layer: u32, block: u32) -> Vec<u8> {
        let start = block as usize * layout().block_tokens;
        let positions = start..start + rows_in(self.prompt_tokens, block as usize);
        positions.flat_map(|position| row(self.sequence, layer, position)).collect()
    }
}
