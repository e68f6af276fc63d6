//! Health is forward progress: 200 only when every tier has a live worker that makes steps while it has
//! work, and a pair could be placed. The body says which tier or worker is at fault.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use crate::placement::{self, Need, Tier};
use crate::service::Service;

/// The verdict and its reasons.
#[derive(Debug, Serialize)]
pub(crate) struct Health {
    status: &'static str,
    /// Which router process answers: whoever started one can tell it from another behind the same address.
    pid: u32,
    /// Why not, one sentence each.
    problems: Vec<String>,
    tiers: BTreeMap<&'static str, TierHealth>,
}

#[derive(Debug, Default, Serialize)]
struct TierHealth {
    /// Workers that hold a lease.
    live: usize,
    /// Those of them that have work and make no steps.
    stalled: Vec<String>,
    /// Those that take no new sequences.
    draining: Vec<String>,
    /// Steps of all, since each started.
    steps_total: u64,
}

impl Health {
    /// Whether requests can be expected to succeed.
    pub fn ok(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Looks at the registry as it is now.
pub(crate) fn health(service: &Service, now: Instant) -> Health {
    let mut tiers: BTreeMap<&'static str, TierHealth> =
        Tier::ALL.into_iter().map(|tier| (tier.name(), TierHealth::default())).collect();
    let workers = service.registry.workers();
    let mut able = Vec::new();
    for worker in &workers {
        let tier = tiers.entry(worker.tier.name()).or_default();
        let load = worker.load();
        tier.live += 1;
        tier.steps_total += worker.steps_total();
        if load.draining {
            tier.draining.push(worker.key.id.to_string());
        }
        if worker.stalled(now, service.config.stall_max()) {
            tier.stalled.push(worker.key.id.to_string());
        } else {
            able.push(load);
        }
    }
    let problems = problems(service, &tiers, &able);
    let status = if problems.is_empty() { "ok" } else { "unavailable" };
    Health { status, pid: std::process::id(), problems, tiers }
}

fn problems(
    service: &Service,
    tiers: &BTreeMap<&'static str, TierHealth>,
    able: &[placement::WorkerLoad],
) -> Vec<String> {
    let mut problems = Vec::new();
    if service.draining() {
        problems.push("the router is shutting down".to_owned());
    }
    for (name, tier) in tiers {
        if tier.live > 0 && tier.stalled.len() == tier.live {
            problems.push(format!(
                "every {name} worker has work and makes no steps: {}",
                tier.stalled.join(", ")
            ));
        }
    }
    let smallest = Need { prompt_tokens: 1, lifetime_tokens: 2, only_prefill: false, excluded: &[] };
    match placement::place(able, &smallest) {
        Ok(_) => {}
        Err(error) => problems.push(error.to_string()),
    }
    let experts = tiers.get(Tier::Expert.name()).map_or(0, |tier| tier.live - tier.stalled.len());
    let experts_min = service.config.expert_workers_min;
    if experts < experts_min {
        problems.push(format!("{experts} of {experts_min} expert workers are live and make steps"));
    }
    problems
}

pub(super) async fn respond(State(service): State<Arc<Service>>) -> (StatusCode, Json<Health>) {
    let health = health(&service, Instant::now());
    let status = if health.ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health))
}
