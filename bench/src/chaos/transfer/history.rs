//! One history: what happens when, to whom, and who learns of it how late.
//!
//! Time is simulated. A connection whose other end is silent is given up after [`SILENCE_MAX`], and a process that ended is
//! noticed at once where the kernel tells and by silence where not, as the fabric does it. The router notices the same way,
//! and lets go of one end when the other reports that a hand-off has failed.

mod agenda;
mod faults;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use fabric::SILENCE_MAX;
use kvtransfer::{BASELINE_MAX, KvTicket, TicketId};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::agenda::{Exit, Happening, Link, Met, Packet, Process, Request, Worker};
use super::decode::{Decode, Ended, LEASE, layout, rails};
use super::prefill::Prefill;
use super::tally::{Fault, Tally};

pub(super) type LinkId = u64;

const PREFILLS: usize = 2;
const DECODES: usize = 2;
pub(super) struct History {
    rng: StdRng,
    base: Instant,
    now: Duration,
    serial: u64,
    agenda: BTreeMap<(Duration, u64), Happening>,
    prefills: Vec<Prefill>,
    decodes: Vec<Decode>,
    processes: [Process; PREFILLS + DECODES],
    links: BTreeMap<LinkId, Link>,
    requests: BTreeMap<u64, Request>,
    by_ticket: HashMap<(usize, u64, TicketId), u64>,
    sequences: u64,
    wanted: u64,
    in_flight: usize,
    tally: Tally,
}

impl History {
    pub(super) fn new(seed: u64, transfers: u64) -> Self {
        let mut history = Self {
            rng: StdRng::seed_from_u64(seed),
            base: Instant::now(),
            now: Duration::ZERO,
            serial: 0,
            agenda: BTreeMap::new(),
            prefills: (0..PREFILLS).map(|_| Prefill::start()).collect(),
            decodes: (0..DECODES)
                .map(|decode| Decode::start(address(decode), incarnation(decode, 1)))
                .collect(),
            processes: [Process { epoch: 1, ..Process::default() }; PREFILLS + DECODES],
            links: BTreeMap::new(),
            requests: BTreeMap::new(),
            by_ticket: HashMap::new(),
            sequences: 0,
            wanted: transfers,
            in_flight: 0,
            tally: Tally { histories: 1, ..Tally::default() },
        };
        history.after_us(0..1000, Happening::Arrive);
        history.after_us(0..20_000, Happening::Fault);
        (0..PREFILLS).for_each(|prefill| history.come_round(Worker::Prefill(prefill)));
        (0..DECODES).for_each(|decode| history.come_round(Worker::Decode(decode)));
        history
    }

    /// Lets everything happen, and everything come to its end.
    pub(super) fn run(mut self) -> Tally {
        let mut over = None;
        while let Some((at, _)) = self.agenda.first_key_value().map(|(&at, _)| at) {
            if self.sequences >= self.wanted {
                // Whatever is left ends with the leases, and the longest pause before them.
                let end = *over.get_or_insert(at + 3 * LEASE);
                if at > end || self.is_idle() {
                    break;
                }
            }
            let Some(((at, _), happening)) = self.agenda.pop_first() else { break };
            self.now = self.now.max(at);
            self.happen(happening);
        }
        for decode in &self.decodes {
            decode.count(&mut self.tally);
            decode.check_baseline(&mut self.tally);
        }
        for prefill in &self.prefills {
            prefill.check_baseline(&mut self.tally);
        }
        self.tally
    }

    /// Whether nothing is left that could still become of anything.
    fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.in_flight == 0
            && self.decodes.iter().all(Decode::is_idle)
            && self.prefills.iter().all(|prefill| prefill.sequences().next().is_none())
    }

    fn happen(&mut self, happening: Happening) {
        // What is for a stopped process waits until it goes on.
        if let Some(worker) = happening.worker(self)
            && let Some((_, until)) = self.process(worker).paused
        {
            if until > self.now {
                return self.at(until + Duration::from_micros(1), happening);
            }
            self.resume(worker);
        }
        match happening {
            Happening::Arrive => self.arrive(),
            Happening::Begin { sequence, ticket } => self.begin(sequence, *ticket),
            // Of a process that has been killed: its successor comes round by itself.
            Happening::Turn { worker, epoch } if self.process(worker).epoch != epoch => {}
            Happening::Turn { worker: Worker::Prefill(prefill), .. } => self.prefill_turn(prefill),
            Happening::Turn { worker: Worker::Decode(decode), .. } => self.decode_turn(decode),
            Happening::Deliver(packet) => self.deliver(packet),
            Happening::Told { worker, epoch, link, process_lives } => {
                self.told(worker, epoch, link, process_lives);
            }
            Happening::Dialled { prefill, epoch, decode, address } => {
                self.dialled(prefill, epoch, decode, &address);
            }
            Happening::Release(sequence) => self.release(sequence),
            Happening::Cancel(sequence) => self.cancel(sequence),
            Happening::Finish { decode, epoch, ticket } => {
                if self.process(Worker::Decode(decode)).epoch == epoch {
                    self.decodes[decode].release(ticket, &mut self.tally);
                }
            }
            Happening::Cut(link) => self.cut_after_silence(link),
            Happening::Fault => self.fault(),
        }
    }

    fn arrive(&mut self) {
        let (prefill, decode) = (self.rng.random_range(0..PREFILLS), self.rng.random_range(0..DECODES));
        let decode_process = *self.process(Worker::Decode(decode));
        let prefill_process = *self.process(Worker::Prefill(prefill));
        // A prefill worker that has stopped gets requests for as long as the router has not noticed.
        let noticed = prefill_process.paused.is_some_and(|(since, _)| self.now >= since + SILENCE_MAX);
        if decode_process.paused.is_none() && !noticed {
            let prompt_tokens = self.rng.random_range(1..40);
            let cached = self.rng.random_range(0..=prompt_tokens / layout().block_tokens);
            let now = self.base + self.now;
            let sequence = self.sequences;
            let admitted = self.decodes[decode].admit(sequence, prompt_tokens, cached, now, &mut self.tally);
            if let Some(ticket) = admitted {
                self.sequences += 1;
                let request = Request {
                    ticket: ticket.ticket_id,
                    prefill,
                    prefill_epoch: prefill_process.epoch,
                    decode,
                    decode_epoch: decode_process.epoch,
                    met: None,
                    path: None,
                    cancelled: false,
                    at_prefill: false,
                    at_decode: true,
                };
                self.by_ticket.insert((decode, decode_process.epoch, ticket.ticket_id), sequence);
                self.requests.insert(sequence, request);
                if let Some(pause) = prefill_process.paused.filter(|&(_, until)| until > self.now) {
                    self.meet_since(sequence, "a pause", pause.0);
                    self.notice_pause(sequence, pause);
                }
                if self.once_in(50) {
                    // The ticket is lost between decode, router and prefill; the router's streams end.
                    self.meet(sequence, "its ticket was lost");
                    self.after_us(0..1_500_000, Happening::Release(sequence));
                } else {
                    self.after_us(100..5_000, Happening::Begin { sequence, ticket: Box::new(ticket) });
                }
            }
        }
        if self.sequences < self.wanted {
            self.after_us(200..2_000, Happening::Arrive);
        }
    }

    fn begin(&mut self, sequence: u64, ticket: KvTicket) {
        let Some(request) = self.requests.get_mut(&sequence) else { return };
        if request.cancelled {
            return;
        }
        let prefill = request.prefill;
        if request.prefill_epoch != self.processes[prefill].epoch {
            // The router's call meets another process: it asks elsewhere, or gives up.
            self.meet_again(sequence, "prefill was restarted");
            return self.after_us(100..5_000, Happening::Release(sequence));
        }
        let now = self.base + self.now;
        let begun = self.prefills[prefill].begin(sequence, ticket, now, &mut self.rng, &mut self.tally);
        request.at_prefill = begun.is_some();
    }

    /// A process has started: its device thread comes round for the first time.
    fn come_round(&mut self, worker: Worker) {
        let epoch = self.process(worker).epoch;
        self.after_us(0..100, Happening::Turn { worker, epoch });
    }

    fn prefill_turn(&mut self, prefill: usize) {
        let now = self.base + self.now;
        let full = self.once_in(20);
        let mut exit = Exit { links: &self.links, full, sent: Vec::new() };
        let end = &mut self.prefills[prefill];
        let mut ended = end.tick(now, &mut exit, &mut self.tally);
        for _ in 0..4 {
            ended.extend(end.push(&mut self.rng, &mut exit, &mut self.tally));
        }
        let sent = exit.sent;
        let busy = end.sequences().next().is_some();
        let mut dials = Vec::new();
        while let Some(address) = end.next_dial() {
            let at = (0..DECODES).find(|&decode| rails(&self::address(decode)).contains(&address));
            dials.extend(at.map(|decode| (decode, address)));
        }
        let epoch = self.process(Worker::Prefill(prefill)).epoch;
        for (decode, address) in dials {
            self.after_us(200..3_000, Happening::Dialled { prefill, epoch, decode, address });
        }
        self.prefill_ended(ended);
        self.send(sent, true);
        let next = if busy { 50..300 } else { 2_000..5_000 };
        self.after_us(next, Happening::Turn { worker: Worker::Prefill(prefill), epoch });
    }

    fn decode_turn(&mut self, decode: usize) {
        let now = self.base + self.now;
        let full = self.once_in(20);
        let mut exit = Exit { links: &self.links, full, sent: Vec::new() };
        let ended = self.decodes[decode].tick(now, &mut exit, &mut self.tally);
        let sent = exit.sent;
        self.decode_ended(decode, ended);
        self.send(sent, false);
        let worker = Worker::Decode(decode);
        let epoch = self.process(worker).epoch;
        self.after_us(300..2_000, Happening::Turn { worker, epoch });
    }

    fn deliver(&mut self, packet: Packet) {
        let Some(link) = self.links.get_mut(&packet.link) else { return };
        if let Some((_, until)) = link.partitioned.filter(|&(_, until)| link.open && until > self.now) {
            return self.at(until + Duration::from_micros(1), Happening::Deliver(packet));
        }
        self.in_flight -= 1;
        link.in_flight -= usize::from(matches!(packet.to, Worker::Decode(_)));
        // Of a lost connection half of what travels still arrives, for whoever is there by now.
        if !link.open && self.rng.random_range(0..2) == 0 {
            return;
        }
        match packet.to {
            Worker::Decode(decode) => {
                let now = self.base + self.now;
                let Packet { link, head, body, .. } = packet;
                let ended = self.decodes[decode].receive(link, &head, body, now, &mut self.tally);
                self.decode_ended(decode, ended);
            }
            Worker::Prefill(prefill) => {
                let ended = self.prefills[prefill].receive(packet.link, &packet.head, &mut self.tally);
                self.prefill_ended(ended);
            }
        }
    }

    fn told(&mut self, worker: Worker, epoch: u64, link: LinkId, process_lives: bool) {
        if self.process(worker).epoch != epoch {
            return;
        }
        let now = self.base + self.now;
        match worker {
            Worker::Decode(decode) => {
                let ended = self.decodes[decode].lose(link, process_lives, now, &mut self.tally);
                self.decode_ended(decode, ended);
            }
            Worker::Prefill(prefill) => {
                let ended = self.prefills[prefill].lose(link, process_lives, now, &mut self.tally);
                self.prefill_ended(ended);
            }
        }
    }

    fn dialled(&mut self, prefill: usize, epoch: u64, decode: usize, address: &str) {
        if self.process(Worker::Prefill(prefill)).epoch != epoch {
            return;
        }
        let silent = self.process(Worker::Decode(decode)).paused.is_some_and(|(_, until)| until > self.now);
        let now = self.base + self.now;
        if silent || self.once_in(30) {
            let ended = self.prefills[prefill].dial_failed(address, now, &mut self.tally);
            return self.prefill_ended(ended);
        }
        let link = self.links.len() as LinkId;
        let lossy = Duration::ZERO;
        self.links.insert(link, Link { prefill, decode, open: true, partitioned: None, lossy, in_flight: 0 });
        // Decode hears of a connection before anything comes over it.
        let worker = format!("prefill-{prefill}");
        let ended = self.decodes[decode].connected(link, &worker, epoch, &mut self.tally);
        self.decode_ended(decode, ended);
        let incarnation = self.decodes[decode].incarnation;
        self.prefills[prefill].connected(address, link, incarnation, now);
    }

    fn release(&mut self, sequence: u64) {
        let Some(request) = self.requests.get(&sequence) else { return };
        let (decode, epoch, ticket) = (request.decode, request.decode_epoch, request.ticket);
        if self.process(Worker::Decode(decode)).epoch == epoch {
            self.decodes[decode].release(ticket, &mut self.tally);
        }
        self.done(sequence, Worker::Decode(decode));
    }

    fn cancel(&mut self, sequence: u64) {
        let Some(request) = self.requests.get_mut(&sequence) else { return };
        request.cancelled = true;
        let (prefill, epoch) = (request.prefill, request.prefill_epoch);
        if self.process(Worker::Prefill(prefill)).epoch == epoch {
            self.prefills[prefill].abort(sequence);
        }
        self.done(sequence, Worker::Prefill(prefill));
    }

    /// Hand-offs that have ended at prefill. The router hears of it.
    fn prefill_ended(&mut self, sequences: Vec<u64>) {
        for sequence in sequences {
            let Some(request) = self.requests.get(&sequence) else { continue };
            let (prefill, receiving) = (request.prefill, request.at_decode);
            self.done(sequence, Worker::Prefill(prefill));
            if receiving {
                self.meet_again(sequence, "prefill reported a failure");
                self.after_us(1_000..5_000, Happening::Release(sequence));
            }
        }
    }

    /// Hand-offs that have ended at decode. The router hears of it.
    fn decode_ended(&mut self, decode: usize, ended: Vec<Ended>) {
        let epoch = self.process(Worker::Decode(decode)).epoch;
        for end in ended {
            let (Ended::Committed(ticket) | Ended::Otherwise(ticket)) = end;
            if matches!(end, Ended::Committed(_)) {
                self.after_us(1_000..30_000, Happening::Finish { decode, epoch, ticket });
            }
            let Some(&sequence) = self.by_ticket.get(&(decode, epoch, ticket)) else { continue };
            self.done(sequence, Worker::Decode(decode));
            if matches!(end, Ended::Otherwise(_)) {
                self.meet_again(sequence, "decode reported a failure");
                self.after_us(1_000..5_000, Happening::Cancel(sequence));
            }
        }
    }

    /// One end has forgotten a hand-off, or has committed it.
    fn done(&mut self, sequence: u64, worker: Worker) {
        self.measure(sequence, worker);
        let Some(request) = self.requests.get_mut(&sequence) else { return };
        match worker {
            Worker::Prefill(_) => request.at_prefill = false,
            Worker::Decode(_) => request.at_decode = false,
        }
        if !request.at_prefill && !request.at_decode {
            let request = self.requests.remove(&sequence);
            if let Some(Request { decode, decode_epoch, ticket, .. }) = request {
                self.by_ticket.remove(&(decode, decode_epoch, ticket));
            }
        }
    }

    fn process(&mut self, worker: Worker) -> &mut Process {
        &mut self.processes[worker.index()]
    }

    fn resume(&mut self, worker: Worker) {
        let now = self.now;
        let process = self.process(worker);
        process.paused = None;
        process.resumed = now;
    }

    fn at(&mut self, at: Duration, happening: Happening) {
        self.serial += 1;
        self.agenda.insert((at, self.serial), happening);
    }

    /// Schedules for some time from now, microseconds.
    fn after_us(&mut self, range: std::ops::Range<u64>, happening: Happening) {
        let after = self.rng.random_range(range);
        self.at(self.now + Duration::from_micros(after), happening);
    }

    fn once_in(&mut self, n: u32) -> bool {
        self.rng.random_range(0..n) == 0
    }
}

/// Of a decode worker's process: no two have the same.
fn incarnation(decode: usize, epoch: u64) -> u64 {
    epoch * DECODES as u64 + decode as u64
}

fn address(decode: usize) -> String {
    format!("sim://decode-{decode}")
}
