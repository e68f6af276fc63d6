//! Frames in flight, in no order, and the connections that they travel on.

use std::collections::BTreeMap;

use bytes::Bytes;
use fabric::Frame;
use kvtransfer::{Outlet, Unsent};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::once_in;

/// One connection; the same number at both ends.
pub type Link = u64;

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToDecode,
    ToPrefill,
}

#[derive(Debug, Clone)]
pub struct Packet {
    pub link: Link,
    pub direction: Direction,
    pub head: Bytes,
    pub body: Bytes,
}

/// Which prefill worker a connection belongs to, and whether it still carries frames.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub prefill: usize,
    pub open: bool,
}

#[derive(Default)]
pub struct Network {
    pub in_flight: Vec<Packet>,
    pub connections: BTreeMap<Link, Connection>,
    /// Queues have no room now and then.
    pub full: bool,
}

/// Frames in flight at most: beyond, queues are full.
const IN_FLIGHT_MAX: usize = 40;

impl Network {
    pub fn connect(&mut self, prefill: usize) -> Link {
        let link = self.connections.len() as Link;
        self.connections.insert(link, Connection { prefill, open: true });
        link
    }

    /// Frames that travel already may still arrive: worse than any transport that we have.
    pub fn cut(&mut self, link: Link) {
        if let Some(connection) = self.connections.get_mut(&link) {
            connection.open = false;
        }
    }

    pub fn open_links(&self) -> Vec<Link> {
        self.connections.iter().filter(|(_, connection)| connection.open).map(|(&link, _)| link).collect()
    }

    /// Takes any frame out, or a copy of it.
    pub fn take(&mut self, rng: &mut StdRng) -> Option<Packet> {
        if self.in_flight.is_empty() {
            return None;
        }
        let index = rng.random_range(0..self.in_flight.len());
        if once_in(rng, 8) {
            return Some(self.in_flight[index].clone());
        }
        Some(self.in_flight.swap_remove(index))
    }

    pub fn outlet(&mut self, direction: Direction) -> Exit<'_> {
        Exit { network: self, direction }
    }
}

/// One side's way into the network.
pub struct Exit<'a> {
    network: &'a mut Network,
    direction: Direction,
}

impl Outlet<Link> for Exit<'_> {
    fn try_send(&mut self, link: Link, frame: Frame) -> Result<(), Unsent> {
        if !self.network.connections.get(&link).is_some_and(|connection| connection.open) {
            return Err(Unsent::Gone);
        }
        if self.network.full || self.network.in_flight.len() >= IN_FLIGHT_MAX {
            return Err(Unsent::Full);
        }
        let body = frame.body.concat().into();
        let packet = Packet { link, direction: self.direction, head: frame.head, body };
        self.network.in_flight.push(packet);
        Ok(())
    }
}
