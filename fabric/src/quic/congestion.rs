//! No congestion control, for loopback: there is no network to share, and what a socket cannot hold is bounded by the send
//! window. A controller's pacing would cost a timer for every few datagrams.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory};

/// A window beyond what is ever in flight. quinn paces no window over 4 GiB.
const WINDOW_BYTES: u64 = 1 << 33;

/// Makes controllers that do not control.
#[derive(Clone)]
pub(crate) struct Uncontrolled;

impl ControllerFactory for Uncontrolled {
    fn build(self: Arc<Self>, _: Instant, _: u16) -> Box<dyn Controller> {
        Box::new(Self)
    }
}

impl Controller for Uncontrolled {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _: u16) {}

    fn window(&self) -> u64 {
        WINDOW_BYTES
    }

    fn initial_window(&self) -> u64 {
        WINDOW_BYTES
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
