//! What an expert worker counts, and how it is read.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

/// Counters of one worker. Written by its device thread, read by anybody.
pub(crate) struct Metrics {
    registry: Registry,
    /// Turns of the device thread's loop: what health looks at.
    turns: AtomicU64,
    steps: Counter,
    frames: Counter,
    vectors: Counter,
    /// Frames whose head is no `DispatchHead`; nobody can be told.
    pub frames_unreadable: Counter,
    /// Frames answered with a refusal.
    pub frames_refused: Counter,
    /// Replies that their peer never took.
    pub replies_dropped: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("expert");
        let mut counter = |name, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        Self {
            steps: counter("steps", "Layers computed, each for one or more dispatches"),
            frames: counter("dispatches", "Dispatch frames answered with vectors"),
            vectors: counter("vectors", "Vectors computed, one per token and expert"),
            frames_unreadable: counter("frames_unreadable", "Frames dropped because their head is malformed"),
            frames_refused: counter("frames_refused", "Dispatch frames answered with a refusal"),
            replies_dropped: counter("replies_dropped", "Replies that their peer did not take"),
            turns: AtomicU64::new(0),
            registry,
        }
    }

    pub(crate) fn turn(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn step(&self, frames: usize, vectors: usize) {
        self.steps.inc();
        self.frames.inc_by(frames as u64);
        self.vectors.inc_by(vectors as u64);
    }

    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    pub(crate) fn steps_total(&self) -> u64 {
        self.steps.get()
    }

    /// In Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail; half a page would still be better than none.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
