//! One request, twelve hops: a trace viewer shows the architecture because every hop opens its span.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use serde_json::json;
use support::{demo, http, in_process};
use tracing::{
    Id, Metadata, Subscriber,
    field::{Field, Visit},
    span::Attributes,
};
use tracing_subscriber::{Layer, layer::Context, prelude::*};
use trireme::cluster::Carrier;

/// Hop number to the targets whose spans carried it, and the request ids seen there.
#[derive(Default)]
struct Seen {
    targets: BTreeMap<u64, BTreeSet<String>>,
    requests: BTreeMap<u64, BTreeSet<String>>,
}

struct Collector(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Fields {
    hop: Option<u64>,
    request: Option<String>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "hop" {
            self.hop = Some(value);
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.record_u64(field, value.unsigned_abs());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "request_id" {
            self.request = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, format!("{value:?}").trim_matches('"'));
    }
}

impl<S: Subscriber> Layer<S> for Collector {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let Some(hop) = fields.hop else { return };
        let metadata: &Metadata<'_> = attributes.metadata();
        let mut seen = self.0.lock().expect("no test thread panics here");
        seen.targets.entry(hop).or_default().insert(metadata.target().to_owned());
        seen.requests.entry(hop).or_default().extend(fields.request);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_leaves_a_span_at_every_hop() {
    let seen = Arc::new(Mutex::new(Seen::default()));
    tracing_subscriber::registry().with(Collector(seen.clone())).try_init().expect("the only subscriber");
    let cluster = in_process(&demo(), "", Carrier::InProcess).await;
    let body = json!({
        "model": "tiny", "stream": true, "max_tokens": 4, "ignore_eos": true,
        "messages": [{ "role": "user", "content": "What is a planet?" }],
    });
    let base = format!("http://{}", cluster.http_address());
    http(&base).stream("/v1/chat/completions", &body, |_| {}).await.expect("an answer");
    cluster.shutdown().await;

    let seen = seen.lock().expect("not poisoned");
    let crates: [(u64, &[&str]); 12] = [
        (1, &["router"]),
        (2, &["router"]),
        (3, &["router"]),
        (4, &["router"]),
        (5, &["decode"]),
        (6, &["prefill"]),
        (7, &["prefill", "engine"]),
        (8, &["expert"]),
        (9, &["prefill", "kvtransfer"]),
        (10, &["kvtransfer"]),
        (11, &["decode"]),
        (12, &["decode", "router"]),
    ];
    for (hop, expected) in crates {
        let targets = seen.targets.get(&hop).unwrap_or_else(|| panic!("hop {hop} left no span"));
        for target in targets {
            let root = target.split("::").next().expect("a crate");
            assert!(expected.contains(&root), "hop {hop} is in {target}, the table says {expected:?}");
        }
    }
    // The request's own hops carry its id, the same on every tier.
    let ids: BTreeSet<_> =
        [1_u64, 2, 3, 4, 5, 6, 12].iter().flat_map(|hop| seen.requests[hop].iter().cloned()).collect();
    assert_eq!(ids.len(), 1, "one request, one id: {ids:?}");
}
