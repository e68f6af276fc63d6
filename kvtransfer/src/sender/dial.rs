//! Connections to decode workers, made where waiting for them costs nothing.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use fabric::{Fabric, PeerId};

/// A worker that has just issued a ticket answers within milliseconds.
const CONNECT_DEADLINE: Duration = Duration::from_millis(1500);

/// Threads at once. What is not dialled in time is lost in time, see the core's `CONNECTING_MAX`.
const DIALS_MAX: usize = 16;

/// An address, and the connection to it if there is one.
type Outcome = (String, Option<PeerId>);

/// Dials addresses, each on a thread of its own that lives no longer than [`CONNECT_DEADLINE`]: one worker that does
/// not answer must not delay the others.
pub(super) struct Dialer {
    fabric: Fabric,
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
    /// Dials whose outcome has not been taken.
    under_way: usize,
}

impl Dialer {
    pub(super) fn new(fabric: Fabric) -> Self {
        Self { fabric, outcomes: bounded(DIALS_MAX), under_way: 0 }
    }

    /// Whether another dial may begin.
    pub(super) fn has_room(&self) -> bool {
        self.under_way < DIALS_MAX
    }

    /// Connects to `address`; [`Self::next`] says with what result.
    pub(super) fn dial(&mut self, address: String) {
        self.under_way += 1;
        if connects_at_once(&address) {
            return connect(&self.fabric, address, &self.outcomes.0);
        }
        let (fabric, outcomes, dialled) = (self.fabric.clone(), self.outcomes.0.clone(), address.clone());
        let spawned = thread::Builder::new()
            .name("kv-dial".to_owned())
            .spawn(move || connect(&fabric, dialled, &outcomes));
        if let Err(error) = spawned {
            tracing::warn!(%address, %error, "no thread to connect to a decode worker");
            // There is room, and the other end is this very struct's.
            let _ = self.outcomes.0.send((address, None));
        }
    }

    /// A dial that has ended since the last call.
    pub(super) fn next(&mut self) -> Option<Outcome> {
        let outcome = self.outcomes.1.try_recv().ok()?;
        self.under_way -= 1;
        Some(outcome)
    }
}

fn connect(fabric: &Fabric, address: String, outcomes: &Sender<Outcome>) {
    let peer = fabric
        .connect(&address, CONNECT_DEADLINE)
        .inspect_err(|error| tracing::warn!(%address, %error, "cannot connect to a decode worker"))
        .ok();
    // Nobody listens when the sender is gone: then nobody needs the peer.
    let _ = outcomes.send((address, peer));
}

/// Within a process a connection is two entries in a table.
fn connects_at_once(address: &str) -> bool {
    address.starts_with("inproc://")
}
