//! Sends the requests of a load point and collects what came of them.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::request::{RequestId, RequestShape};
use super::schedule::Poisson;
use crate::client::{Client, ClientError, Streamed};

const PATH: &str = "/v1/completions";
/// The load point that warm-up requests belong to, so that their prompts are not measured again.
const WARM_UP_POINT: u32 = u32::MAX;

/// How requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Load {
    /// So many clients, each waiting for its answer.
    Closed {
        /// Clients at a time.
        clients: u32,
    },
    /// Poisson arrivals.
    Open {
        /// Their mean rate.
        requests_per_s: f64,
    },
}

/// Where a load point ends.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Requests at most.
    pub requests: u32,
    /// Time at most; what still runs then is cut off.
    pub duration_max: Duration,
    /// Open loop: requests in flight at most.
    pub in_flight_max: usize,
}

/// Whom the requests go to, and what they look like.
#[derive(Debug)]
pub struct Target {
    /// The server.
    pub client: Client,
    /// The requests.
    pub shape: RequestShape,
}

/// What came of a load point.
#[derive(Debug)]
pub struct Measured {
    /// One per request, sent or not.
    pub outcomes: Vec<Outcome>,
    /// From the first request to the last outcome.
    pub wall: Duration,
}

/// What came of a request: its answer, or the kind of its failure.
pub type Outcome = Result<Streamed, Cow<'static, str>>;

impl Target {
    /// One request outside any measurement.
    ///
    /// # Errors
    /// Whatever went wrong with it.
    pub async fn warm_up(&self, index: u32) -> Result<(), ClientError> {
        let body = self.shape.body(RequestId { point: WARM_UP_POINT, index });
        self.client.stream(PATH, &body, |_| ()).await.map(drop)
    }

    async fn request(&self, id: RequestId, deadline: Instant) -> Outcome {
        let body = self.shape.body(id);
        match timeout_at(deadline, self.client.stream(PATH, &body, |_| ())).await {
            Ok(answer) => answer.map_err(|error| error.kind()),
            Err(_) => Err("cut_off".into()),
        }
    }
}

/// Runs one load point to its bounds. `point` tells its prompts and arrivals from other points'.
pub async fn run(target: Arc<Target>, load: Load, bounds: Bounds, point: u32) -> Measured {
    let start = Instant::now();
    let deadline = start + bounds.duration_max;
    let outcomes = match load {
        Load::Closed { clients } => closed(target, clients, bounds, point, deadline).await,
        Load::Open { requests_per_s } => open(target, requests_per_s, bounds, point, start).await,
    };
    Measured { outcomes, wall: start.elapsed() }
}

async fn closed(
    target: Arc<Target>,
    clients: u32,
    bounds: Bounds,
    point: u32,
    deadline: Instant,
) -> Vec<Outcome> {
    let next = Arc::new(AtomicU32::new(0));
    let mut running = JoinSet::new();
    for _ in 0..clients.min(bounds.requests) {
        let (target, next) = (Arc::clone(&target), Arc::clone(&next));
        running.spawn(async move {
            let mut outcomes = Vec::new();
            while Instant::now() < deadline {
                let index = next.fetch_add(1, Relaxed);
                if index >= bounds.requests {
                    break;
                }
                outcomes.push(target.request(RequestId { point, index }, deadline).await);
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
    let deadline = start + bounds.duration_max;
    let arrivals = Poisson::new(requests_per_s, target.shape.seed ^ u64::from(point));
    let mut running = JoinSet::new();
    let mut outcomes = Vec::new();
    for (index, arrival) in (0..bounds.requests).zip(arrivals) {
        let at = start + arrival;
        if at >= deadline {
            break;
        }
        sleep_until(at).await;
        while let Some(ended) = running.try_join_next() {
            outcomes.push(outcome(ended));
        }
        if running.len() >= bounds.in_flight_max {
            outcomes.push(Err("not_sent".into()));
            continue;
        }
        let target = Arc::clone(&target);
        running.spawn(async move { target.request(RequestId { point, index }, deadline).await });
    }
    while let Some(ended) = running.join_next().await {
        outcomes.push(outcome(ended));
    }
    outcomes
}

/// A task that panicked is a bug here, and still one request without an answer.
fn outcome(ended: Result<Outcome, tokio::task::JoinError>) -> Outcome {
    ended.unwrap_or_else(|_| Err("generator".into()))
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { clients } => write!(f, "concurrency {clients}"),
            Self::Open { requests_per_s } => write!(f, "{requests_per_s} requests/s"),
        }
    }
}
