//! Workers come, report, are refused, are replaced and leave; health says what follows.

use proto::v1::registry_client::RegistryClient;
use proto::v1::{Role, WorkerReport};
use serde_json::{Value, json};

use crate::support::workers::info;
use crate::support::{Cluster, FakeWorker, Script, WorkerOptions, chat, config};

/// Announces once by hand and returns what the router says.
async fn refusal(cluster: &Cluster, report: WorkerReport) -> String {
    let address = cluster.router.control_address().to_string();
    let endpoint = cluster.authority.identity().endpoint(&address).expect("address");
    let channel = endpoint.connect().await.expect("connects");
    let reports = tokio_stream::iter([report]);
    let mut answers = RegistryClient::new(channel).announce(reports).await.expect("accepted").into_inner();
    answers.message().await.expect("an answer").expect("one").refused
}

fn report(id: &str, options: &WorkerOptions) -> WorkerReport {
    let address = ([127, 0, 0, 1], 9).into();
    WorkerReport {
        info: Some(info(id, Role::Decode, options, address)),
        incarnation: options.incarnation,
        ..WorkerReport::default()
    }
}

async fn health(cluster: &Cluster) -> (u16, Value) {
    cluster.get("/health").await
}

#[tokio::test]
async fn refusals_name_the_field() {
    let cluster = Cluster::start(config()).await;
    let _decode = FakeWorker::decode(&cluster, "decode-0", Script::text("x")).await;
    let options = WorkerOptions::default();
    let changed = |change: fn(&mut WorkerReport)| {
        let mut report = report("decode-1", &options);
        change(&mut report);
        report
    };
    for (wrong, field) in [
        (changed(|r| r.info = None), "info"),
        (changed(|r| r.incarnation += 1), "incarnation"),
        (changed(|r| r.info.as_mut().expect("info").wire_major = 2), "wire_major"),
        (changed(|r| r.info.as_mut().expect("info").role = 9), "role"),
        (changed(|r| r.info.as_mut().expect("info").worker_id.clear()), "worker_id"),
        (changed(|r| r.info.as_mut().expect("info").fingerprint = None), "fingerprint"),
        (
            changed(|r| {
                r.info.as_mut().expect("info").fingerprint.as_mut().expect("fp").weights = vec![1; 3]
            }),
            "fingerprint.weights",
        ),
        (
            changed(|r| {
                r.info.as_mut().expect("info").fingerprint.as_mut().expect("fp").weights = vec![1; 16]
            }),
            "fingerprint.weights",
        ),
        (
            changed(|r| {
                r.info.as_mut().expect("info").fingerprint.as_mut().expect("fp").numerics = "reference".into()
            }),
            "fingerprint.numerics",
        ),
        (changed(|r| r.info.as_mut().expect("info").control_address = "not an address".into()), "control"),
    ] {
        let refused = refusal(&cluster, wrong).await;
        assert!(refused.contains(field), "{field}: {refused}");
    }
    assert_eq!(refusal(&cluster, report("decode-1", &options)).await, "", "nothing else is wrong with it");
    assert!(cluster.router.metrics_text().contains("router_workers_refused_total 10"));
}

#[tokio::test]
async fn strangers_do_not_even_connect() {
    let cluster = Cluster::start(config()).await;
    let stranger = crate::support::certificates::Authority::new().identity();
    let endpoint = stranger.endpoint(&cluster.router.control_address().to_string()).expect("address");
    let talked = async {
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let reports = tokio_stream::iter([report("decode-9", &WorkerOptions::default())]);
        RegistryClient::new(channel).announce(reports).await.map_err(|status| status.to_string())
    };
    assert!(talked.await.is_err());
    assert!(cluster.router.workers().is_empty());
}

#[tokio::test]
async fn a_new_incarnation_replaces_the_old_for_good() {
    let (cluster, _prefill, _old) = Cluster::with_pair(Script::text("old")).await;
    let options = WorkerOptions { incarnation: 77, ..WorkerOptions::default() };
    let old = report("decode-1", &options);
    let old_worker =
        FakeWorker::start(&cluster, "decode-1", Role::Decode, Script::text("old"), options).await;
    let new = FakeWorker::decode(&cluster, "decode-1", Script::text("new")).await;
    let refused = refusal(&cluster, old).await;
    assert!(refused.contains("replaced"), "{refused}");
    new.leased().await;
    assert_eq!(cluster.router.workers().len(), 3);
    assert!(cluster.router.metrics_text().contains("reason=\"replaced\""));
    drop(old_worker);
}

#[tokio::test]
async fn health_is_forward_progress() {
    let config = router::Config { lease_ms: 1500, stall_ms_max: 1500, expert_workers_min: 1, ..config() };
    let cluster = Cluster::start(config).await;
    let (status, body) = health(&cluster).await;
    assert_eq!((status, &body["status"]), (503, &json!("unavailable")));

    let _prefill = FakeWorker::prefill(&cluster, "prefill-0", Script::text("x")).await;
    let mut decode = FakeWorker::decode(&cluster, "decode-0", Script::text("x")).await;
    let (status, body) = health(&cluster).await;
    assert_eq!(status, 503, "{body}");
    assert!(body["problems"][0].as_str().expect("problem").contains("expert"), "{body}");
    let _expert =
        FakeWorker::start(&cluster, "expert-0", Role::Expert, Script::text("x"), WorkerOptions::default())
            .await;
    let (status, body) = health(&cluster).await;
    assert_eq!((status, &body["tiers"]["decode"]["live"]), (200, &json!(1)), "{body}");

    // Work, and no step: alive, but not healthy.
    decode.report(|report| report.runnable = 3);
    let body = wait_for_status(&cluster, 503).await;
    assert_eq!(body["tiers"]["decode"]["stalled"], json!(["decode-0"]), "{body}");
    // A step is progress.
    decode.report(|report| report.steps_total += 1);
    wait_for_status(&cluster, 200).await;
    decode.report(|report| report.draining = true);
    let body = wait_for_status(&cluster, 503).await;
    assert_eq!(body["tiers"]["decode"]["draining"], json!(["decode-0"]), "{body}");
    decode.leave();
    while cluster.router.workers().len() > 2 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_restarted_worker_serves_again() {
    let (cluster, _prefill, mut decode) = Cluster::with_pair(Script::text("again")).await;
    cluster.complete("/v1/chat/completions", &chat("?")).await;
    decode.kill();
    let restarted = FakeWorker::decode(&cluster, "decode-0", Script::text("again")).await;
    let answer = cluster.complete("/v1/chat/completions", &chat("?")).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "again");
    assert_eq!((decode.requests_now(), restarted.requests_now()), (1, 1));
}

/// Asks until health has this status; the body then.
async fn wait_for_status(cluster: &Cluster, status: u16) -> Value {
    loop {
        let (found, body) = health(cluster).await;
        if found == status {
            return body;
        }
        tokio::task::yield_now().await;
    }
}
