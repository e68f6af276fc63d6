//! The world that is explored: two ends, the frames between them, and an oracle's books over decode's memory.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fabric::Frame;
use kvtransfer::receiver::ReceiverCore;
use kvtransfer::sender::SenderCore;
use kvtransfer::{
    BlockSink, KvTicket, Outlet, ReceiverEvent, ReceiverOptions, Reservation, SenderEvent, TicketId,
    TransferError, TransferId, Unsent,
};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};

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

    fn admit(&mut self) -> Result<(), String> {
        self.bounds.requests -= 1;
        let ticket_id = TicketId(self.issued_here);
        self.issued_here += 1;
        let reservation = Reservation { first_block: 0, prompt_tokens: self.bounds.prompt_tokens.into() };
        let ticket =
            self.decode.issue(reservation, ticket_id, self.now).map_err(|error| error.to_string())?;
        self.tickets.push(Arc::new(ticket));
        self.requests.push(Request {
            ticket_id,
            incarnation: self.incarnation,
            undelivered: true,
            transfer: None,
            next: 0,
            began: false,
            finished: false,
            holds: Holds::Receiving,
        });
        Ok(())
    }

    fn push(&mut self, index: usize) -> Result<(), String> {
        let request = &mut self.requests[index];
        let Some(transfer) = request.transfer else { return Ok(()) };
        let mut exit = Exit { link: self.link, to: End::Decode, packets: &mut self.packets };
        let outcome = if request.next < self.bounds.prompt_tokens {
            let block = u32::from(request.next);
            self.prefill.push_blocks(transfer, 0, block, &[&stamp(index, block)], 1, &mut exit)
        } else {
            self.prefill.finish(transfer, TokenId(index as u32), &mut exit)
        };
        match outcome {
            Ok(()) => {
                request.began = true;
                request.finished |= request.next == self.bounds.prompt_tokens;
                request.next += 1;
            }
            Err(TransferError::Full | TransferError::Ended(_)) => {}
            Err(error) => return Err(format!("a permitted push is refused: {error}")),
        }
        Ok(())
    }

    fn deliver(&mut self, packet: Packet) -> Result<(), String> {
        match packet.to {
            End::Prefill => self.prefill.handle_frame(packet.link, &packet.head),
            End::Decode => {
                let mut sink = Sink {
                    memory: &mut self.memory,
                    requests: &self.requests,
                    incarnation: self.incarnation,
                    blocks: self.bounds.prompt_tokens.into(),
                    wrong: None,
                };
                let Packet { link, head, body, .. } = packet;
                self.decode.handle_frame(link, &head, &body.into(), self.now, &mut sink);
                if let Some(wrong) = sink.wrong {
                    return Err(wrong);
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self, succeeds: bool) {
        self.dialling = false;
        if !succeeds {
            self.bounds.cuts = self.bounds.cuts.saturating_sub(1);
            return self.prefill.handle_dial_failed(ADDRESS, self.now);
        }
        self.cut(true, true);
        self.link = Some(self.links);
        self.decode.handle_peer_up(self.links, "prefill", self.prefill_incarnation);
        self.prefill.handle_connected(ADDRESS, self.links, self.incarnation, self.now);
        self.links += 1;
    }

    fn cut(&mut self, decode_lives: bool, prefill_lives: bool) {
        let Some(link) = self.link.take() else { return };
        if decode_lives {
            self.untold.push((End::Decode, link, !prefill_lives));
        }
        if prefill_lives {
            self.untold.push((End::Prefill, link, !decode_lives));
        }
        self.untold.sort();
    }

    fn crash_decode(&mut self) {
        self.bounds.decode_crashes -= 1;
        self.cut(false, true);
        self.untold.retain(|(end, ..)| *end == End::Prefill);
        self.incarnation += 1;
        self.issued_here = 0;
        self.decode = decode(self.incarnation);
        self.memory = [[0; ROW_BYTES]; BLOCKS];
        for request in &mut self.requests {
            request.holds = Holds::Nothing;
        }
    }

    fn crash_prefill(&mut self) {
        self.bounds.prefill_crashes -= 1;
        self.cut(true, false);
        self.untold.retain(|(end, ..)| *end == End::Decode);
        self.dialling = false;
        self.prefill = SenderCore::new();
        self.prefill_incarnation += 1;
        for request in &mut self.requests {
            request.transfer = None;
            request.undelivered = false;
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.decode.handle_timeout(self.now);
        self.prefill.handle_timeout(self.now);
    }

    /// What both ends do between any two things that happen: they send what waits and say what has ended.
    fn settle(&mut self) -> Result<(), String> {
        let mut exit = Exit { link: self.link, to: End::Prefill, packets: &mut self.packets };
        self.decode.flush(&mut exit);
        exit.to = End::Decode;
        self.prefill.flush(self.now, &mut exit);
        self.packets.sort();
        self.dialling |= self.prefill.next_dial().is_some();
        for event in self.decode.take_events() {
            let (ReceiverEvent::Committed { ticket, .. }
            | ReceiverEvent::Expired { ticket }
            | ReceiverEvent::Aborted { ticket, .. }) = event;
            let here = self.incarnation;
            let found = self.requests.iter_mut().enumerate().find(|(_, request)| {
                request.incarnation == here
                    && request.ticket_id == ticket
                    && request.holds == Holds::Receiving
            });
            let Some((index, request)) = found else { return Err(format!("{ticket} has a second end")) };
            request.holds = match event {
                ReceiverEvent::Committed { first_token, .. } if first_token != TokenId(index as u32) => {
                    return Err(format!("request {index} goes on from another one's token"));
                }
                ReceiverEvent::Committed { .. } => Holds::Committed,
                _ => Holds::Nothing,
            };
        }
        for event in self.prefill.take_events() {
            let (SenderEvent::Committed { id }
            | SenderEvent::Refused { id, .. }
            | SenderEvent::Lost { id }
            | SenderEvent::Resumed { id, .. }) = event;
            let found = self.requests.iter_mut().find(|request| request.transfer == Some(id));
            let Some(request) = found else { return Err(format!("transfer {id} has a second end")) };
            if matches!(event, SenderEvent::Resumed { .. }) {
                // It offers everything again.
                request.next = 0;
                continue;
            }
            request.transfer = None;
            if matches!(event, SenderEvent::Committed { .. }) && !request.finished {
                return Err(format!("transfer {id} committed before everything was sent"));
            }
        }
        Ok(())
    }
}

/// Decode's memory with the oracle's eye on it: all requests use the same blocks, one after another.
struct Sink<'a> {
    memory: &'a mut [[u8; ROW_BYTES]; BLOCKS],
    requests: &'a [Request],
    incarnation: u64,
    blocks: usize,
    wrong: Option<String>,
}

impl BlockSink for Sink<'_> {
    fn place(&mut self, ticket: TicketId, block: u32, _layer: u32, bytes: usize) -> Option<&mut [u8]> {
        let live = self.requests.iter().any(|request| {
            request.incarnation == self.incarnation
                && request.ticket_id == ticket
                && request.holds == Holds::Receiving
        });
        let block = block as usize;
        if !live || block >= self.blocks || bytes != ROW_BYTES {
            self.wrong = Some(format!("a write for {ticket}, block {block}, which is not its own"));
            return None;
        }
        Some(&mut self.memory[block])
    }
}

/// The way out: over the connection that is up.
struct Exit<'a> {
    link: Option<Link>,
    to: End,
    packets: &'a mut Vec<Packet>,
}

impl Outlet<Link> for Exit<'_> {
    fn try_send(&mut self, link: Link, frame: Frame) -> Result<(), Unsent> {
        if self.link != Some(link) {
            return Err(Unsent::Gone);
        }
        self.packets.push(Packet { link, to: self.to, head: frame.head, body: frame.body.concat().into() });
        Ok(())
    }
}
