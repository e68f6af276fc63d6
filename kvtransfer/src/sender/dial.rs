//! Connections to decode workers, made where waiting for them costs nothing.

use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use fabric::{Fabric, PeerId};

use super::links::Dial;
use crate::budget::DIAL_MAX;

/// Threads at once. What is not dialled in time is lost in time, see the core's `CONNECTING_MAX`.
const DIALS_MAX: usize = 16;

/// What was dialled, and the connection if there is one.
type Outcome = (Dial, Option<PeerId>);

/// Dials addresses, each on a thread of its own that lives no longer than [`DIAL_MAX`]: one worker that does
/// not answer must not delay the others.
pub(super) struct Dialer {
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
    /// Dials whose outcome has not been taken.
    under_way: usize,
}

impl Dialer {
    pub(super) fn new() -> Self {
        Self { outcomes: bounded(DIALS_MAX), under_way: 0 }
    }

    /// Whether another dial may begin.
    pub(super) fn has_room(&self) -> bool {
        self.under_way < DIALS_MAX
    }

    /// Connects from `fabric`; [`Self::next`] says with what result.
    pub(super) fn dial(&mut self, fabric: &Fabric, dial: Dial) {
        self.under_way += 1;
        if connects_at_once(&dial.address) {
            return connect(fabric, dial, &self.outcomes.0);
        }
        let (fabric, outcomes, dialled) = (fabric.clone(), self.outcomes.0.clone(), dial.clone());
        let spawned = thread::Builder::new()
            .name("kv-dial".to_owned())
            .spawn(move || connect(&fabric, dialled, &outcomes));
        if let Err(error) = spawned {
            tracing::warn!(address = dial.address, %error, "no thread to connect to a decode worker");
            // There is room, and the other end is this very struct's.
            let _ = self.outcomes.0.send((dial, None));
        }
    }

    /// A dial that has ended since the last call.
    pub(super) fn next(&mut self) -> Option<Outcome> {
        let outcome = self.outcomes.1.try_recv().ok()?;
        self.under_way -= 1;
        Some(outcome)
    }
}

fn connect(fabric: &Fabric, dial: Dial, outcomes: &Sender<Outcome>) {
    let Dial { rail, address } = &dial;
    let peer = fabric
        .connect(address, DIAL_MAX)
        .inspect_err(|error| tracing::warn!(rail, %address, %error, "cannot connect to a decode worker"))
        .ok();
    // Nobody listens when the sender is gone: then nobody needs the peer.
    let _ = outcomes.send((dial, peer));
}

/// Within a process a connection is two entries in a table.
fn connects_at_once(address: &str) -> bool {
    address.starts_with("inproc://")
}
