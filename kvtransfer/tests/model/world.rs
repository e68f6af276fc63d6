//! The world that is explored: two ends, the frames between them, and an oracle's books over decode's memory.

mod ports;
mod steps;

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtransfer::receiver::ReceiverCore;
use kvtransfer::sender::SenderCore;
use kvtransfer::{KvTicket, ReceiverOptions, TicketId, TransferId};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics};

use crate::action::{Action, Bounds};

const LEASE: Duration = Duration::from_secs(1);
const ADDRESS: &str = "model://decode";
pub const BLOCKS: usize = 2;
const ROW_BYTES: usize = 16;

type Link = u8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum End {
    Prefill,
    Decode,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Packet {
    link: Link,
    to: End,
    head: Bytes,
    body: Bytes,
}

/// A request, as router and oracle know it.
#[derive(Clone, Hash)]
struct Request {
    ticket_id: TicketId,
    /// Of decode's process that issued the ticket.
    incarnation: u64,
    /// While router and prefill have not brought it there.
    undelivered: bool,
    transfer: Option<TransferId>,
    /// What prefill pushes next: a block, or behind the last one the token.
    next: u8,
    /// Something was sent, and the token was, on whatever path.
    began: bool,
    finished: bool,
    holds: Holds,
}

/// What a request holds at decode.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Holds {
    Receiving,
    Committed,
    Nothing,
}

#[derive(Clone)]
pub struct World {
    bounds: Bounds,
    now: Instant,
    decode: ReceiverCore<Link>,
    prefill: SenderCore<Link>,
    incarnation: u64,
    prefill_incarnation: u64,
    /// Names start over in each process.
    issued_here: u64,
    memory: [[u8; ROW_BYTES]; BLOCKS],
    requests: Vec<Request>,
    tickets: Vec<Arc<KvTicket>>,
    /// Sorted: which came first is forgotten, for any may arrive first.
    packets: Vec<Packet>,
    links: u8,
    /// The one that is up.
    link: Option<Link>,
    dialling: bool,
    /// Ends that have not heard of a lost connection, and whether the other process has ended with it.
    untold: Vec<(End, Link, bool)>,
}

fn layout() -> KvLayout {
    KvLayout { format: KvFormat::F32, layers: 1, latent: 2, rope: 2, block_tokens: 1 }
}

fn stamp(request: usize, block: u32) -> [u8; ROW_BYTES] {
    let mut row = [0xaa; ROW_BYTES];
    row[0] = request as u8 + 1;
    row[1] = block as u8;
    row
}

fn decode(incarnation: u64) -> ReceiverCore<Link> {
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
        reserve: LEASE,
        tickets_max: BLOCKS,
    };
    ReceiverCore::new(options, vec![ADDRESS.to_owned()])
}

impl World {
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            now: Instant::now(),
            decode: decode(1),
            prefill: SenderCore::new(),
            incarnation: 1,
            prefill_incarnation: 1,
            issued_here: 0,
            memory: [[0; ROW_BYTES]; BLOCKS],
            requests: Vec::new(),
            tickets: Vec::new(),
            packets: Vec::new(),
            links: 0,
            link: None,
            dialling: false,
            untold: Vec::new(),
        }
    }

    /// Hashes all that decides how things go on.
    pub fn hash_state(&self, into: &mut impl Hasher) {
        let Bounds {
            requests,
            repeats,
            losses,
            cuts,
            aborts,
            decode_crashes,
            prefill_crashes,
            leases,
            waits,
            ..
        } = self.bounds;
        (requests, repeats, losses, cuts, aborts, decode_crashes, prefill_crashes, leases, waits).hash(into);
        self.decode.hash_state(into);
        self.prefill.hash_state(into);
        (self.now, self.incarnation, self.prefill_incarnation, self.issued_here, self.memory).hash(into);
        (&self.requests, &self.packets, self.link, self.dialling, &self.untold).hash(into);
    }

    /// All that may happen now.
    pub fn actions(&self) -> Vec<Action> {
        let Bounds {
            requests,
            losses,
            repeats,
            cuts,
            aborts,
            decode_crashes,
            prefill_crashes,
            leases,
            waits,
            ..
        } = self.bounds;
        let mut actions = Vec::new();
        if requests > 0 && self.requests.iter().all(|request| request.holds == Holds::Nothing) {
            actions.push(Action::Admit);
        }
        for (index, request) in self.requests.iter().enumerate() {
            if request.undelivered {
                actions.push(Action::Begin(index));
            }
            if request.transfer.is_some() && request.next <= self.bounds.prompt_tokens {
                actions.push(Action::Push(index));
            }
            if request.transfer.is_some() && aborts > 0 {
                actions.push(Action::Abort(index));
            }
            if request.holds != Holds::Nothing {
                actions.push(Action::Release(index));
            }
        }
        for frame in 0..self.packets.len() {
            if frame > 0 && self.packets[frame] == self.packets[frame - 1] {
                continue;
            }
            actions.push(Action::Deliver { frame, again: false });
            if repeats > 0 {
                actions.push(Action::Deliver { frame, again: true });
            }
            if losses > 0 {
                actions.push(Action::Lose(frame));
            }
        }
        if self.dialling {
            actions.push(Action::Connect { succeeds: true });
            if cuts > 0 {
                actions.push(Action::Connect { succeeds: false });
            }
        }
        for (index, (_, _, ended)) in self.untold.iter().enumerate() {
            actions.push(Action::Tell { index, ended: false });
            // The kernel says so, or its successor.
            if *ended {
                actions.push(Action::Tell { index, ended: true });
            }
        }
        if self.link.is_some() && cuts > 0 {
            actions.push(Action::Cut);
        }
        if decode_crashes > 0 {
            actions.push(Action::CrashDecode);
        }
        if prefill_crashes > 0 {
            actions.push(Action::CrashPrefill);
        }
        if leases > 0 {
            actions.push(Action::Lease);
        }
        if waits > 0 {
            actions.push(Action::Wait);
        }
        actions
    }

    /// Lets one thing happen.
    pub fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Admit => self.admit()?,
            Action::Begin(index) => {
                self.requests[index].undelivered = false;
                let begun = self.prefill.begin((*self.tickets[index]).clone(), self.now);
                self.requests[index].transfer = Some(begun.map_err(|error| error.to_string())?);
            }
            Action::Connect { succeeds } => self.connect(succeeds),
            Action::Push(index) => self.push(index)?,
            Action::Deliver { frame, again } => {
                let packet = if again { self.packets[frame].clone() } else { self.packets.remove(frame) };
                self.bounds.repeats -= u8::from(again);
                self.deliver(packet)?;
            }
            Action::Lose(frame) => {
                self.bounds.losses -= 1;
                self.packets.remove(frame);
            }
            Action::Release(index) => {
                let _ = self.decode.revoke(self.requests[index].ticket_id);
                self.requests[index].holds = Holds::Nothing;
            }
            Action::Abort(index) => {
                self.bounds.aborts -= 1;
                if let Some(transfer) = self.requests[index].transfer.take() {
                    self.prefill.abort(transfer, "cancelled");
                }
            }
            Action::Cut => {
                self.bounds.cuts -= 1;
                self.cut(true, true);
            }
            Action::Tell { index, ended } => {
                let (end, link, _) = self.untold.remove(index);
                match end {
                    End::Decode => self.decode.handle_peer_lost(link, !ended, &"cut", self.now),
                    End::Prefill => self.prefill.handle_peer_lost(link, !ended, self.now),
                }
            }
            Action::CrashDecode => self.crash_decode(),
            Action::CrashPrefill => self.crash_prefill(),
            Action::Lease => {
                self.bounds.leases -= 1;
                self.pass(LEASE.max(Duration::from_secs(2)));
            }
            Action::Wait => {
                self.bounds.waits -= 1;
                self.pass(Duration::from_millis(500));
            }
        }
        self.settle()
    }

    /// What must hold in every state.
    pub fn check(&self) -> Result<(), String> {
        self.decode.check_invariants();
        self.prefill.check_invariants();
        for (index, request) in self.requests.iter().enumerate() {
            let alive = request.incarnation == self.incarnation && self.decode.is_alive(request.ticket_id);
            if request.holds != Holds::Nothing && !alive {
                return Err(format!("request {index} holds blocks and its ticket has ended unnoticed"));
            }
            if request.holds == Holds::Committed {
                for block in 0..u32::from(self.bounds.prompt_tokens) {
                    if self.memory[block as usize] != stamp(index, block) {
                        return Err(format!("block {block} of request {index} is committed and foreign"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Nothing more happens but what time brings.
    pub fn return_to_baseline(mut self) -> Result<(), String> {
        self.packets.clear();
        while !self.untold.is_empty() {
            self.act(Action::Tell { index: 0, ended: false })?;
        }
        // At the first look a sender only learns that it has been sending; then it asks, and is not answered.
        for _ in 0..3 {
            if self.dialling {
                self.connect(false);
                self.settle()?;
            }
            self.pass(LEASE.max(Duration::from_secs(2)));
            self.settle()?;
        }
        for (index, request) in self.requests.iter().enumerate() {
            if request.holds == Holds::Receiving {
                return Err(format!("the ticket of request {index} outlives its lease"));
            }
            // One that its caller is in the middle of is the caller's to end.
            let in_the_middle = request.began && request.next <= self.bounds.prompt_tokens;
            if request.transfer.is_some() && !in_the_middle {
                return Err(format!("the transfer of request {index} outlives its lease"));
            }
        }
        Ok(())
    }
}
