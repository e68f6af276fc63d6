//! Connections to decode workers, made where waiting for them costs nothing.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use fabric::{Fabric, PeerId};

/// A worker that has just issued a ticket answers within milliseconds.
const CONNECT_DEADLINE: Duration = Duration::from_millis(1500);

/// An address, and the connection to it if there is one.
type Outcome = (String, Option<PeerId>);

/// Dials addresses, each on a thread of its own that lives no longer than [`CONNECT_DEADLINE`]: one worker that does
/// not answer must not delay the others.
pub(super) struct Dialer {
    fabric: Fabric,
    // Holds at most one outcome per address under way, which the core bounds.
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
}

impl Dialer {
    pub(super) fn new(fabric: Fabric) -> Self {
        Self { fabric, outcomes: unbounded() }
    }

    /// Connects to `address`; [`Self::next`] says with what result.
    pub(super) fn dial(&self, address: String) {
        if connects_at_once(&address) {
            return connect(&self.fabric, address, &self.outcomes.0);
        }
        let (fabric, outcomes, dialled) = (self.fabric.clone(), self.outcomes.0.clone(), address.clone());
        let spawned = thread::Builder::new()
            .name("kv-dial".to_owned())
            .spawn(move || connect(&fabric, dialled, &outcomes));
        if let Err(error) = spawned {
            tracing::warn!(%address, %error, "no thread to connect to a decode worker");
            // The other end is this very struct's.
            let _ = self.outcomes.0.send((address, None));
        }
    }

    /// A dial that has ended since the last call.
    pub(super) fn next(&self) -> Option<Outcome> {
        self.outcomes.1.try_recv().ok()
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
