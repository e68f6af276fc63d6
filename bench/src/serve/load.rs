//! Sends the requests of a load point and collects what came of them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

pub use super::conversation::{Outcome, Target};
use crate::workload::{Pattern, RequestId};

/// The part of a timed load point that is not measured: the server fills up.
const SETTLING: u32 = 10;

/// How requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Load {
    /// So many clients, each waiting for its answer.
    Closed {
        /// Clients at a time.
        clients: u32,
    },
    /// Arrivals that wait for nobody.
    Open {
        /// Their mean rate.
        requests_per_s: f64,
    },
}

/// Where a load point ends.
#[derive(Debug, Clone, Copy)]
pub enum Extent {
    /// So many requests; what still runs when time is up is cut off.
    Requests {
        /// Requests at most.
        requests: u32,
        /// Time at most.
        duration_max: Duration,
    },
    /// Requests arrive for so long; what still runs then is waited for.
    Time(Duration),
}

/// Bounds of a load point.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Where it ends.
    pub extent: Extent,
    /// Open loop: requests in flight at most.
    pub in_flight_max: usize,
    /// Open loop: how arrivals are spread.
    pub pattern: Pattern,
}

/// What came of a load point.
#[derive(Debug)]
pub struct Measured {
    /// One per request, sent or not.
    pub outcomes: Vec<Outcome>,
    /// When it began.
    pub start: Instant,
    /// What rates are taken over: from the first request to the last outcome, or what lies behind the settling.
    pub window: Range<Instant>,
}

impl Extent {
    fn requests(&self) -> u32 {
        match self {
            Self::Requests { requests, .. } => *requests,
            Self::Time(_) => u32::MAX,
        }
    }

    /// No request is sent behind this.
    fn last_arrival(&self, start: Instant) -> Instant {
        match self {
            Self::Requests { duration_max: time, .. } | Self::Time(time) => start + *time,
        }
    }

    /// No request runs behind this; a request's own limit holds in any case.
    fn deadline(&self, start: Instant, timeout: Duration) -> Instant {
        match self {
            Self::Requests { duration_max, .. } => start + *duration_max,
            Self::Time(time) => start + *time + timeout,
        }
    }
}

/// Runs one load point to its bounds. `point` tells its prompts and arrivals from other points'.
pub async fn run(target: Arc<Target>, load: Load, bounds: Bounds, point: u32) -> Measured {
    let start = Instant::now();
    let outcomes = match load {
        Load::Closed { clients } => closed(target, clients, bounds, point, start).await,
        Load::Open { requests_per_s } => open(target, requests_per_s, bounds, point, start).await,
    };
    let window = match bounds.extent {
        Extent::Requests { .. } => start..Instant::now(),
        Extent::Time(time) => settled(start, time),
    };
    Measured { outcomes, start, window }
}

/// What rates of a timed load point are taken over.
pub fn settled(start: Instant, time: Duration) -> Range<Instant> {
    start + time / SETTLING..start + time
}

async fn closed(
    target: Arc<Target>,
    clients: u32,
    bounds: Bounds,
    point: u32,
    start: Instant,
) -> Vec<Outcome> {
    let deadline = bounds.extent.deadline(start, target.timeout);
    let last_arrival = bounds.extent.last_arrival(start);
    let requests = bounds.extent.requests();
    let next = Arc::new(AtomicU32::new(0));
    let mut running = JoinSet::new();
    for _ in 0..clients.min(requests) {
        let (target, next) = (Arc::clone(&target), Arc::clone(&next));
        running.spawn(async move {
            let mut outcomes = Vec::new();
            while Instant::now() < last_arrival {
                let index = next.fetch_add(1, Relaxed);
                if index >= requests {
                    break;
                }
                outcomes.extend(target.converse(RequestId { point, index }, Instant::now(), deadline).await);
            }
            outcomes
        });
    }
    running.join_all().await.into_iter().flatten().collect()
}

async fn open(
    target: Arc<Target>,
    requests_per_s: f64,
    bounds: Bounds,
    point: u32,
    start: Instant,
) -> Vec<Outcome> {
    let deadline = bounds.extent.deadline(start, target.timeout);
    let arrivals = target.workload.arrivals(bounds.pattern, requests_per_s, point);
    let mut running = JoinSet::new();
    let mut outcomes = Vec::new();
    for (index, arrival) in (0..bounds.extent.requests()).zip(arrivals) {
        let at = start + arrival;
        if at >= bounds.extent.last_arrival(start) {
            break;
        }
        sleep_until(at).await;
        while let Some(ended) = running.try_join_next() {
            outcomes.extend(ended_with(ended, at));
        }
        if running.len() >= bounds.in_flight_max {
            outcomes.push(lost(at, "not_sent"));
            continue;
        }
        let target = Arc::clone(&target);
        running.spawn(async move { target.converse(RequestId { point, index }, at, deadline).await });
    }
    while let Some(ended) = running.join_next().await {
        outcomes.extend(ended_with(ended, Instant::now()));
    }
    outcomes
}

/// A task that panicked is a bug here, and still one request without an answer.
fn ended_with(ended: Result<Vec<Outcome>, JoinError>, now: Instant) -> Vec<Outcome> {
    ended.unwrap_or_else(|_| vec![lost(now, "generator")])
}

fn lost(due: Instant, kind: &'static str) -> Outcome {
    Outcome { due, ended: due, refused: 0, reuse: None, answer: Err(kind.into()) }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { clients } => write!(f, "concurrency {clients}"),
            Self::Open { requests_per_s } => {
                write!(f, "{} requests/s", crate::table::number(*requests_per_s))
            }
        }
    }
}
