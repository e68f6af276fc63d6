//! What goes wrong, to processes and connections now and then, and to single frames on their way.

use std::time::Duration;

use fabric::Frame;
use kvtransfer::TicketId;
use kvtransfer::wire::{decode_push, decode_reply};

use super::{
    BASELINE_MAX, DECODES, Decode, Fault, Happening, History, LinkId, Met, PREFILLS, Packet, Prefill, RngExt,
    SILENCE_MAX, Worker, address, incarnation,
};

impl History {
    /// One fault, and when the next one comes.
    pub(super) fn fault(&mut self) {
        match self.rng.random_range(0..20) {
            0 => self.kill(),
            1..3 => self.pause(),
            3..12 => self.abort(),
            12..15 => self.partition(),
            _ => self.reset(),
        }
        if self.sequences < self.wanted {
            self.after_us(1_000..40_000, Happening::Fault);
        }
    }

    /// Notes that a fault has met a hand-off. The time that its ends are allowed begins anew; what they have taken
    /// since the fault before is measured first, so that no fault covers for another.
    pub(super) fn meet(&mut self, sequence: u64, by: &'static str) {
        self.meet_since(sequence, by, self.now);
    }

    /// Notes that a hand-off meets a fault that has been there since `since`: from there on it is counted.
    pub(super) fn meet_since(&mut self, sequence: u64, by: &'static str, since: Duration) {
        let Some(request) = self.requests.get(&sequence) else { return };
        for worker in [Worker::Prefill(request.prefill), Worker::Decode(request.decode)] {
            // One that is stopped can do nothing: it is measured from when it goes on.
            if self.process(worker).paused.is_none() {
                self.measure(sequence, worker);
            }
        }
        if let Some(request) = self.requests.get_mut(&sequence) {
            let met = request.met.get_or_insert(Met { first: since, last: since, by, faults: 0 });
            met.faults += 1;
            if since >= met.last {
                (met.last, met.by) = (since, by);
            }
        }
    }

    /// Notes what follows from a fault: the time that is allowed runs on, unless the fault was before the hand-off.
    pub(super) fn meet_again(&mut self, sequence: u64, by: &'static str) {
        if self.requests.get(&sequence).is_some_and(|request| request.met.is_none()) {
            self.meet(sequence, by);
        }
    }

    /// How long an end has held a hand-off since the last fault that met it, if it does; and since the first.
    pub(super) fn measure(&mut self, sequence: u64, worker: Worker) {
        let (now, resumed) = (self.now, self.process(worker).resumed);
        let Some(request) = self.requests.get(&sequence) else { return };
        let open = match worker {
            Worker::Prefill(_) => request.at_prefill,
            Worker::Decode(_) => request.at_decode,
        };
        let Some(met) = request.met.filter(|_| open) else { return };
        // A process that was stopped meanwhile has had only the time since.
        let taken = |fault: Duration| now - fault.max(resumed).min(now);
        self.tally.met_by_fault += 1;
        self.tally.baseline_max = self.tally.baseline_max.max(taken(met.last));
        self.tally.prolonged_max = self.tally.prolonged_max.max((taken(met.first), met.faults));
        if taken(met.last) > BASELINE_MAX {
            self.tally.object(|| {
                format!(
                    "sequence {sequence}: {worker:?} had it {:?} after {met:?}, at {now:?}",
                    taken(met.last)
                )
            });
        }
    }

    fn meet_where(&mut self, worker: Worker, by: &'static str) -> Vec<u64> {
        let met: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, request)| match worker {
                Worker::Prefill(prefill) => request.prefill == prefill,
                Worker::Decode(decode) => request.decode == decode,
            })
            .map(|(&sequence, _)| sequence)
            .collect();
        met.iter().for_each(|&sequence| self.meet(sequence, by));
        met
    }

    fn any_worker(&mut self) -> Worker {
        match self.rng.random_range(0..PREFILLS + DECODES) {
            prefill @ 0..PREFILLS => Worker::Prefill(prefill),
            other => Worker::Decode(other - PREFILLS),
        }
    }

    /// At once where the kernel tells, after silence where it does not; and whether it was silence.
    fn notice(&mut self) -> (Duration, bool) {
        let jitter = Duration::from_micros(self.rng.random_range(100..50_000));
        if self.once_in(2) { (jitter, false) } else { (SILENCE_MAX + jitter, true) }
    }

    fn kill(&mut self) {
        let worker = self.any_worker();
        self.tally.fault(Fault::Kill);
        for link in self.links_of(worker) {
            self.close(link);
            let other = self.other_end(link, worker);
            let (after, silent) = self.notice();
            self.tell(other, link, after, silent);
        }
        let met = self.meet_where(worker, "a kill");
        // Its memory is gone, and with it its end of every hand-off.
        let epoch = self.process(worker).epoch + 1;
        match worker {
            Worker::Prefill(prefill) => self.prefills[prefill] = Prefill::start(),
            Worker::Decode(decode) => {
                self.decodes[decode].count(&mut self.tally);
                self.decodes[decode] = Decode::start(address(decode), incarnation(decode, epoch));
            }
        }
        self.resume(worker);
        self.process(worker).epoch = epoch;
        self.come_round(worker);
        for sequence in met {
            self.done(sequence, worker);
            let after = self.now + self.notice().0;
            self.at(
                after,
                match worker {
                    Worker::Prefill(_) => Happening::Release(sequence),
                    Worker::Decode(_) => Happening::Cancel(sequence),
                },
            );
        }
    }

    fn pause(&mut self) {
        let worker = self.any_worker();
        if self.process(worker).paused.is_some() {
            return;
        }
        self.tally.fault(Fault::Pause);
        let long = self.once_in(3);
        let for_us = self.rng.random_range(if long { 1_500_000..4_000_000 } else { 1_000..300_000 });
        let until = self.now + Duration::from_micros(for_us);
        let pause = (self.now, until);
        self.process(worker).paused = Some(pause);
        for sequence in self.meet_where(worker, "a pause") {
            self.notice_pause(sequence, pause);
        }
        if until >= self.now + SILENCE_MAX {
            for link in self.links_of(worker) {
                self.at(self.now + SILENCE_MAX, Happening::Cut(link));
            }
        }
    }

    /// The router gives a hand-off up whose worker has been silent for too long; at the stopped end that waits.
    pub(super) fn notice_pause(&mut self, sequence: u64, (since, until): (Duration, Duration)) {
        if until >= since + SILENCE_MAX {
            let jitter = Duration::from_micros(self.rng.random_range(100..50_000));
            self.at(since + SILENCE_MAX + jitter, Happening::Release(sequence));
            self.at(since + SILENCE_MAX + jitter, Happening::Cancel(sequence));
        }
    }

    fn abort(&mut self) {
        let count = self.requests.len();
        if count == 0 {
            return;
        }
        let Some((&sequence, request)) = self.requests.iter().nth(self.rng.random_range(0..count)) else {
            return;
        };
        let (prefill, epoch) = (request.prefill, request.prefill_epoch);
        self.tally.fault(Fault::Abort);
        self.meet(sequence, "an abort");
        if self.once_in(2) {
            // The client went away.
            self.after_us(0..5_000, Happening::Cancel(sequence));
        } else if self.processes[prefill].epoch == epoch && self.processes[prefill].paused.is_none() {
            // Prefill gives up by itself, and says so.
            if self.prefills[prefill].abort(sequence) {
                self.done(sequence, Worker::Prefill(prefill));
            }
        } else {
            self.after_us(0..5_000, Happening::Cancel(sequence));
        }
        self.after_us(0..20_000, Happening::Release(sequence));
    }

    fn partition(&mut self) {
        let Some(link) = self.any_link() else { return };
        self.tally.fault(Fault::Partition);
        let long = self.once_in(2);
        let for_us = self.rng.random_range(if long { 1_500_000..3_000_000 } else { 1_000..500_000 });
        let until = self.now + Duration::from_micros(for_us);
        let since = self.now;
        if let Some(link) = self.links.get_mut(&link) {
            // One within another does not end it.
            let (since, until) = link.partitioned.filter(|&(_, end)| end > until).unwrap_or((since, until));
            link.partitioned = Some((since, until));
        }
        self.meet_on(link, "a partition");
        if until >= self.now + SILENCE_MAX {
            self.at(self.now + SILENCE_MAX, Happening::Cut(link));
        }
    }

    fn reset(&mut self) {
        let Some(link) = self.any_link() else { return };
        self.tally.fault(Fault::Reset);
        self.meet_on(link, "a reset");
        self.lose(link, Duration::from_millis(30));
    }

    /// A connection ends because one end has not heard of the other for too long.
    pub(super) fn cut_after_silence(&mut self, link: LinkId) {
        if self.links.get(&link).is_some_and(|link| link.open) {
            // What the partition or the pause met that caused it is measured from there.
            let on = self.on(link);
            on.into_iter().for_each(|sequence| self.meet_again(sequence, "silence"));
        }
        // Also where it has broken meanwhile: who has not heard of that hears it now.
        self.lose(link, Duration::from_millis(30));
    }

    fn lose(&mut self, link: LinkId, within: Duration) {
        let Some((prefill, decode)) = self.links.get(&link).map(|link| (link.prefill, link.decode)) else {
            return;
        };
        self.close(link);
        for worker in [Worker::Prefill(prefill), Worker::Decode(decode)] {
            let after = within.mul_f64(self.rng.random::<f64>());
            self.tell(worker, link, after, true);
        }
    }

    fn tell(&mut self, worker: Worker, link: LinkId, after: Duration, process_lives: bool) {
        let epoch = self.process(worker).epoch;
        self.at(self.now + after, Happening::Told { worker, epoch, link, process_lives });
    }

    fn close(&mut self, link: LinkId) {
        if let Some(link) = self.links.get_mut(&link) {
            link.open = false;
        }
    }

    fn links_of(&self, worker: Worker) -> Vec<LinkId> {
        let open = self.links.iter().filter(|(_, link)| {
            link.open
                && match worker {
                    Worker::Prefill(prefill) => link.prefill == prefill,
                    Worker::Decode(decode) => link.decode == decode,
                }
        });
        open.map(|(&id, _)| id).collect()
    }

    fn any_link(&mut self) -> Option<LinkId> {
        let open: Vec<LinkId> = self.links.iter().filter(|(_, link)| link.open).map(|(&id, _)| id).collect();
        (!open.is_empty()).then(|| open[self.rng.random_range(0..open.len())])
    }

    fn other_end(&self, link: LinkId, worker: Worker) -> Worker {
        let link = &self.links[&link];
        match worker {
            Worker::Prefill(_) => Worker::Decode(link.decode),
            Worker::Decode(_) => Worker::Prefill(link.prefill),
        }
    }

    fn meet_on(&mut self, link: LinkId, by: &'static str) {
        self.on(link).into_iter().for_each(|sequence| self.meet(sequence, by));
    }

    /// Hand-offs whose path a connection is, or may become.
    fn on(&self, link: LinkId) -> Vec<u64> {
        let Some((prefill, decode)) = self.links.get(&link).map(|link| (link.prefill, link.decode)) else {
            return Vec::new();
        };
        let on = self.requests.iter().filter(|(_, request)| {
            request.prefill == prefill
                && request.decode == decode
                && request.at_prefill
                && request.path.is_none_or(|path| path == link)
        });
        on.map(|(&sequence, _)| sequence).collect()
    }

    /// Frames leave; what becomes of each on its way is drawn here.
    pub(super) fn send(&mut self, frames: Vec<(LinkId, Frame)>, from_prefill: bool) {
        for (id, frame) in frames {
            let Some((prefill, decode)) = self.links.get(&id).map(|link| (link.prefill, link.decode)) else {
                continue;
            };
            let to = if from_prefill { Worker::Decode(decode) } else { Worker::Prefill(prefill) };
            let mut packet = Packet { link: id, to, head: frame.head, body: frame.body.concat().into() };
            let sequence = self.sequence_of(&packet, decode);
            if from_prefill && let Some(sequence) = sequence {
                self.moved(sequence, id);
            }
            if self.loses(id) {
                self.tally.fault(Fault::Lose);
                sequence.into_iter().for_each(|sequence| self.meet(sequence, "a lost frame"));
                continue;
            }
            if !packet.body.is_empty() && self.once_in(500) {
                self.tally.fault(Fault::Damage);
                let mut body = packet.body.to_vec();
                let at = self.rng.random_range(0..body.len());
                body[at] ^= 1 << self.rng.random_range(0..8);
                packet.body = body.into();
                sequence.into_iter().for_each(|sequence| self.meet(sequence, "a damaged frame"));
            }
            if self.once_in(30) {
                self.tally.fault(Fault::Repeat);
                self.depart(packet.clone(), 20..50_000);
            }
            if self.once_in(40) {
                self.tally.fault(Fault::Delay);
                sequence.into_iter().for_each(|sequence| self.meet(sequence, "a delayed frame"));
                self.depart(packet, 1_000..400_000);
            } else {
                self.depart(packet, 20..400);
            }
        }
    }

    /// Whether a frame is lost: alone, or with all that come after it for a while.
    fn loses(&mut self, id: LinkId) -> bool {
        if self.links.get(&id).is_some_and(|link| link.lossy > self.now) {
            return true;
        }
        let lost = self.once_in(2_000);
        if lost && self.once_in(4) {
            let lossy = self.now + Duration::from_micros(self.rng.random_range(0..2_000_000));
            self.links.entry(id).and_modify(|link| link.lossy = lossy);
        }
        lost
    }

    /// A frame is on its way for some microseconds.
    fn depart(&mut self, packet: Packet, for_us: std::ops::Range<u64>) {
        self.in_flight += 1;
        if let Some(link) = self.links.get_mut(&packet.link) {
            link.in_flight += usize::from(matches!(packet.to, Worker::Decode(_)));
        }
        self.after_us(for_us, Happening::Deliver(packet));
    }

    /// A hand-off pushes on `path`. Where nothing passes there, that is a fault of its own: older perhaps than the
    /// hand-off's being there, and counted from its beginning.
    fn moved(&mut self, sequence: u64, path: LinkId) {
        let partitioned = self.links.get(&path).and_then(|link| link.partitioned);
        let Some(request) = self.requests.get_mut(&sequence) else { return };
        let moved = request.path.replace(path) != Some(path);
        if let Some((since, until)) = partitioned
            && moved
            && until > self.now
        {
            self.meet_since(sequence, "a path that was partitioned", since);
        }
    }

    fn sequence_of(&self, packet: &Packet, decode: usize) -> Option<u64> {
        let key = match packet.to {
            Worker::Decode(_) => decode_push(&packet.head).ok()?.0,
            Worker::Prefill(_) => decode_reply(&packet.head).ok()?.0,
        };
        let ticket: TicketId = key.ticket_id;
        self.by_ticket.get(&(decode, key.incarnation / DECODES as u64, ticket)).copied()
    }
}
