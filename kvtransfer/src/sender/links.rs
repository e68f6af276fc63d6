//! Connections to decode workers' addresses: which stand, which are being dialled, which have failed and are tried again.
//!
//! An address that has failed is given up for a while that doubles with each failure, and then probed by a dial of its
//! own, as long as anybody has transfers there: no request waits for a probe while another path stands.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How long an address that has failed is left alone at first, and at most.
const PROBE_MIN: Duration = Duration::from_millis(50);
const PROBE_MAX: Duration = Duration::from_secs(5);

/// Every address that anybody wants, and the dials that shall begin.
#[derive(Clone, Hash)]
pub(super) struct Links<P> {
    links: BTreeMap<String, Link<P>>,
    dials: VecDeque<Dial>,
}

/// A connection that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Dial {
    /// The address's place in its ticket: it is dialled from our end of the same place.
    pub rail: usize,
    /// Where to.
    pub address: String,
}

#[derive(Clone, Hash)]
enum Link<P> {
    Dialling {
        failures: u32,
    },
    Up {
        peer: P,
        incarnation: u64,
        /// It had no room. No frame is made for it until the next flush, and then copied for nothing.
        full: bool,
    },
    Down {
        failures: u32,
        probe_at: Instant,
    },
}

impl<P: Copy + Eq> Links<P> {
    pub(super) fn new() -> Self {
        Self { links: BTreeMap::new(), dials: VecDeque::new() }
    }

    /// The connection of those to `addresses`, and to this incarnation, on which `load` is least.
    pub(super) fn best(
        &self,
        addresses: &[String],
        incarnation: u64,
        load: impl Fn(P) -> usize,
    ) -> Option<P> {
        let up = addresses.iter().filter_map(|address| match self.links.get(address) {
            Some(Link::Up { peer, incarnation: at, .. }) if *at == incarnation => Some(*peer),
            _ => None,
        });
        up.min_by_key(|&peer| load(peer))
    }

    /// Dials an address that is neither up nor being dialled; one that has failed only when its time has come, or by `force`.
    pub(super) fn want(&mut self, rail: usize, address: &str, now: Instant, force: bool) {
        let failures = match self.links.get(address) {
            None => 0,
            Some(Link::Down { failures, probe_at }) if force || *probe_at <= now => *failures,
            Some(_) => return,
        };
        self.links.insert(address.to_owned(), Link::Dialling { failures });
        self.dials.push_back(Dial { rail, address: address.to_owned() });
    }

    pub(super) fn next_dial(&mut self) -> Option<Dial> {
        self.dials.pop_front()
    }

    /// Whether `address` is wanted by anybody.
    pub(super) fn knows(&self, address: &str) -> bool {
        self.links.contains_key(address)
    }

    pub(super) fn connected(&mut self, address: &str, peer: P, incarnation: u64) {
        self.links.insert(address.to_owned(), Link::Up { peer, incarnation, full: false });
    }

    /// Whether a dial was under way there.
    pub(super) fn failed(&mut self, address: &str, now: Instant) -> bool {
        let Some(Link::Dialling { failures }) = self.links.get(address) else { return false };
        let down = down(*failures + 1, now);
        self.links.insert(address.to_owned(), down);
        true
    }

    /// Where the connection went, and to which incarnation there.
    pub(super) fn lost(&mut self, lost: P, now: Instant) -> Option<(String, u64)> {
        self.links.iter_mut().find_map(|(address, link)| match *link {
            Link::Up { peer, incarnation, .. } if peer == lost => {
                *link = down(1, now);
                Some((address.clone(), incarnation))
            }
            _ => None,
        })
    }

    /// Whether an answer of a dial is still to come for one of these.
    pub(super) fn any_dialling(&self, addresses: &[String]) -> bool {
        addresses.iter().any(|address| matches!(self.links.get(address), Some(Link::Dialling { .. })))
    }

    /// Whether a connection stands, to whatever process, that is in the way of a dial.
    pub(super) fn any_up(&self, addresses: &[String]) -> bool {
        addresses.iter().any(|address| matches!(self.links.get(address), Some(Link::Up { .. })))
    }

    pub(super) fn is_full(&self, peer: P) -> bool {
        self.links.values().any(|link| matches!(link, Link::Up { peer: at, full: true, .. } if *at == peer))
    }

    pub(super) fn note_full(&mut self, peer: P) {
        for link in self.links.values_mut() {
            if let Link::Up { peer: at, full, .. } = link {
                *full |= *at == peer;
            }
        }
    }

    /// Everybody may try again.
    pub(super) fn clear_full(&mut self) {
        for link in self.links.values_mut() {
            if let Link::Up { full, .. } = link {
                *full = false;
            }
        }
    }

    /// Forgets addresses that have failed and that nobody uses any more.
    pub(super) fn forget(&mut self, used: impl Fn(&str) -> bool) {
        self.links.retain(|address, link| !matches!(link, Link::Down { .. }) || used(address));
    }
}

fn down<P>(failures: u32, now: Instant) -> Link<P> {
    let wait = PROBE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(PROBE_MAX);
    Link::Down { failures, probe_at: now + wait }
}
