//! Two prefill workers, a decode worker, the network between them, and what happens to them.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;

use crate::decode::{Decode, LEASE};
use crate::network::{Direction, Link, Network, Packet};
use crate::once_in;
use crate::prefill::Prefill;

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Frames are reordered and repeated, queues are full at times. Nothing else.
    OrderOnly,
    /// Frames are lost and damaged as well, requests cancelled, connections cut, workers killed.
    All,
}

pub struct World {
    pub decode: Decode,
    prefills: [Prefill; 2],
    network: Network,
    /// Ends of cut connections that have not been told yet.
    unaware: Vec<(Direction, Link)>,
    dialling: Vec<(usize, String)>,
    rng: StdRng,
    now: Instant,
    sequences: u64,
    faults: Faults,
}

impl World {
    pub fn new(rng: StdRng, faults: Faults) -> Self {
        Self {
            decode: Decode::new(),
            prefills: [Prefill::new(), Prefill::new()],
            network: Network::default(),
            unaware: Vec::new(),
            dialling: Vec::new(),
            rng,
            now: Instant::now(),
            sequences: 0,
            faults,
        }
    }

    /// Lets one thing happen.
    pub fn event(&mut self) {
        match self.rng.random_range(0..100) {
            0..8 => self.begin(),
            8..45 => self.push(),
            45..80 => self.deliver(),
            80..88 => self.tick(),
            88..92 => self.connect(),
            92..94 => self.finish_a_sequence(),
            94 => self.network.full = !self.network.full,
            _ if self.faults == Faults::All => self.fault(),
            _ => {}
        }
    }

    pub fn check(&self) {
        self.decode.check();
        self.prefills.iter().for_each(Prefill::check);
    }

    /// Lets everything come to its end: what is under way arrives, then time passes.
    pub fn quiesce(&mut self) {
        self.network.full = false;
        // Enough for each transfer's frames several times over.
        for _ in 0..3000 {
            self.connect();
            self.push();
            self.deliver();
            self.tick_without_time();
            self.check();
            if self.prefills.iter().all(Prefill::is_idle) && self.network.in_flight.is_empty() {
                break;
            }
        }
        while let Some((side, link)) = self.unaware.pop() {
            self.tell(side, link);
        }
        for _ in 0..3 {
            self.now += LEASE;
            self.tick_without_time();
        }
        self.check();
        assert!(self.decode.tickets(false).is_empty(), "a ticket outlives its lease");
        assert!(self.prefills.iter().all(Prefill::is_idle), "a transfer outlives its lease");
        for ticket in self.decode.tickets(true) {
            self.decode.release(ticket);
        }
        self.decode.assert_baseline();
    }

    fn begin(&mut self) {
        self.sequences += 1;
        let prompt_tokens = self.rng.random_range(1..18);
        let whole_blocks = prompt_tokens / crate::decode::layout().block_tokens;
        let cached = self.rng.random_range(0..=whole_blocks);
        let Some(ticket) = self.decode.admit(self.sequences, prompt_tokens, cached, self.now) else { return };
        // A ticket may get lost between decode, router and prefill.
        if self.faults == Faults::All && once_in(&mut self.rng, 20) {
            return;
        }
        let prefill = self.rng.random_range(0..2);
        self.prefills[prefill].begin(self.sequences, ticket, &mut self.rng, self.now);
    }

    fn push(&mut self) {
        let prefill = self.rng.random_range(0..2);
        self.prefills[prefill].push(&mut self.rng, &mut self.network);
    }

    fn deliver(&mut self) {
        let Some(mut packet) = self.network.take(&mut self.rng) else { return };
        if self.faults == Faults::All {
            if once_in(&mut self.rng, 60) {
                return;
            }
            if once_in(&mut self.rng, 60) && !packet.body.is_empty() {
                let mut body = packet.body.to_vec();
                let at = self.rng.random_range(0..body.len());
                body[at] ^= 1 << self.rng.random_range(0..8);
                packet.body = body.into();
            }
        }
        self.hand_over(&packet);
    }

    fn hand_over(&mut self, packet: &Packet) {
        match packet.direction {
            Direction::ToDecode => self.decode.receive(packet, self.now),
            Direction::ToPrefill => {
                let prefill = self.network.connections[&packet.link].prefill;
                self.prefills[prefill].receive(packet);
            }
        }
    }

    fn tick(&mut self) {
        // Without faults nobody is silent for a lease.
        let most = if self.faults == Faults::All { 600 } else { 1 };
        self.now += Duration::from_millis(self.rng.random_range(0..=most));
        self.tick_without_time();
    }

    fn tick_without_time(&mut self) {
        self.decode.tick(self.now, &mut self.network);
        for prefill in &mut self.prefills {
            prefill.tick(self.now, &mut self.network);
        }
    }

    /// Dials that were asked for come to an end, and losses are noticed.
    fn connect(&mut self) {
        for (index, prefill) in self.prefills.iter_mut().enumerate() {
            while let Some(address) = prefill.next_dial() {
                self.dialling.push((index, address));
            }
        }
        if let Some((prefill, address)) = self.dialling.pop() {
            if self.faults == Faults::All && once_in(&mut self.rng, 10) {
                self.prefills[prefill].dial_failed(&address);
            } else {
                let link = self.network.connect(prefill);
                self.prefills[prefill].connected(&address, link, self.decode.incarnation());
            }
        }
        if !self.unaware.is_empty() {
            let (side, link) = self.unaware.swap_remove(self.rng.random_range(0..self.unaware.len()));
            self.tell(side, link);
        }
    }

    fn tell(&mut self, side: Direction, link: Link) {
        match side {
            Direction::ToDecode => self.decode.lose(link),
            Direction::ToPrefill => self.prefills[self.network.connections[&link].prefill].lose(link),
        }
    }

    /// A running sequence ends: its blocks go to the next one.
    fn finish_a_sequence(&mut self) {
        let running = self.decode.tickets(true);
        if let Some(ticket) = self.pick(&running) {
            self.decode.release(ticket);
        }
    }

    fn fault(&mut self) {
        match self.rng.random_range(0..10) {
            // The client went away while blocks were on their way.
            0..4 => {
                let receiving = self.decode.tickets(false);
                if let Some(ticket) = self.pick(&receiving) {
                    self.decode.release(ticket);
                }
            }
            4..6 => {
                let prefill = self.rng.random_range(0..2);
                self.prefills[prefill].abort(&mut self.rng);
            }
            6..8 => {
                let links = self.network.open_links();
                if let Some(link) = self.pick(&links) {
                    self.cut(link, true, true);
                }
            }
            8 => {
                for link in self.network.open_links() {
                    self.cut(link, false, true);
                }
                self.decode.restart();
                self.unaware.retain(|(side, _)| *side == Direction::ToPrefill);
            }
            _ => self.kill_prefill(),
        }
    }

    fn kill_prefill(&mut self) {
        let killed = self.rng.random_range(0..2);
        for link in self.network.open_links() {
            if self.network.connections[&link].prefill == killed {
                self.cut(link, true, false);
            }
        }
        self.prefills[killed] = Prefill::new();
        self.dialling.retain(|(prefill, _)| *prefill != killed);
    }

    /// Those who live learn of it later.
    fn cut(&mut self, link: Link, decode_lives: bool, prefill_lives: bool) {
        self.network.cut(link);
        if decode_lives {
            self.unaware.push((Direction::ToDecode, link));
        }
        if prefill_lives {
            self.unaware.push((Direction::ToPrefill, link));
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.random_range(0..from.len())])
    }
}
