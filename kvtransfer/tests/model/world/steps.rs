//! What each thing that happens does, and what both ends do after it.

use std::sync::Arc;
use std::time::Duration;

use kvtransfer::sender::SenderCore;
use kvtransfer::{ReceiverEvent, Reservation, SenderEvent, TicketId, TransferError};
use model::TokenId;

use super::ports::{Exit, Sink};
use super::{ADDRESS, BLOCKS, End, Holds, Packet, ROW_BYTES, Request, World, decode, stamp};

impl World {
    pub(super) fn admit(&mut self) -> Result<(), String> {
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

    pub(super) fn push(&mut self, index: usize) -> Result<(), String> {
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

    pub(super) fn deliver(&mut self, packet: Packet) -> Result<(), String> {
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

    pub(super) fn connect(&mut self, succeeds: bool) {
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

    pub(super) fn cut(&mut self, decode_lives: bool, prefill_lives: bool) {
        let Some(link) = self.link.take() else { return };
        if decode_lives {
            self.untold.push((End::Decode, link, !prefill_lives));
        }
        if prefill_lives {
            self.untold.push((End::Prefill, link, !decode_lives));
        }
        self.untold.sort();
    }

    pub(super) fn crash_decode(&mut self) {
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

    pub(super) fn crash_prefill(&mut self) {
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

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.decode.handle_timeout(self.now);
        self.prefill.handle_timeout(self.now);
    }

    /// What both ends do between any two things that happen: they send what waits and say what has ended.
    pub(super) fn settle(&mut self) -> Result<(), String> {
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
