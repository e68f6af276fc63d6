//! The ends' ways into decode's memory and into the network.

use fabric::Frame;
use kvtransfer::{BlockSink, Outlet, TicketId, Unsent};

use super::{BLOCKS, End, Holds, Link, Packet, ROW_BYTES, Request};

/// Decode's memory with the oracle's eye on it: all requests use the same blocks, one after another.
pub(super) struct Sink<'a> {
    pub(super) memory: &'a mut [[u8; ROW_BYTES]; BLOCKS],
    pub(super) requests: &'a [Request],
    pub(super) incarnation: u64,
    pub(super) blocks: usize,
    pub(super) wrong: Option<String>,
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
pub(super) struct Exit<'a> {
    pub(super) link: Option<Link>,
    pub(super) to: End,
    pub(super) packets: &'a mut Vec<Packet>,
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
