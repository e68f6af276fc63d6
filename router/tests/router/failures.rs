//! What goes wrong behind the router, and what a client sees of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use proto::control::Consequence;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::support::{Cluster, End, FakeWorker, PrefillBehaviour, Script, chat, config, events, tokens};

const CHAT: &str = "/v1/chat/completions";

fn streaming(question: &str) -> Value {
    let mut body = chat(question);
    body["stream"] = json!(true);
    body
}

/// Reads a stream up to and with the first piece that holds `text`.
async fn read_until(response: &mut reqwest::Response, text: &str) -> String {
    let mut read = String::new();
    while !read.contains(text) {
        let chunk = response.chunk().await.expect("readable").expect("more");
        read.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }
    read
}

/// The error object of an answer with this status.
async fn error_of(response: reqwest::Response, status: u16) -> Value {
    let found = response.status().as_u16();
    let answer: Value = response.json().await.expect("JSON");
    assert_eq!(found, status, "{answer}");
    answer["error"].clone()
}

#[tokio::test]
async fn a_client_that_leaves_cancels_on_both_tiers() {
    // Prefill never answers: both streams are open when the client goes.
    let script = Script { prefill: PrefillBehaviour::Hang, ..Script::text("x") };
    let (cluster, prefill, decode) = Cluster::with_pair(script).await;
    for body in [chat("?"), streaming("?")] {
        let before = prefill.requests_now();
        let request = tokio::spawn(cluster.http.post(cluster.url(CHAT)).json(&body).send());
        prefill.requests(before + 1).await;
        request.abort();
        prefill.cancelled(before + 1).await;
        decode.cancelled(before + 1).await;
    }
    // The places came back: nothing is counted as running.
    wait_for_metric(&cluster, "router_sequences 0").await;
    wait_for_metric(&cluster, "router_requests_total{door=\"http\",outcome=\"cancelled\"} 2").await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_stream_cancels_decode() {
    let script = Script { end: End::Hang, ..Script::text("some words") };
    let (cluster, _prefill, decode) = Cluster::with_pair(script).await;
    let mut response = cluster.post(CHAT, &streaming("?")).await;
    read_until(&mut response, "words").await;
    drop(response);
    decode.cancelled(1).await;
}

#[tokio::test]
async fn the_first_token_is_prefills_and_waits_for_no_step_of_decode() {
    let gate = Arc::new(Semaphore::new(0));
    let script = Script { gate: Some(Arc::clone(&gate)), ..Script::text("to the very end") };
    let (cluster, _prefill, _decode) = Cluster::with_pair(script).await;
    let mut response = cluster.post(CHAT, &streaming("?")).await;
    // Decode cannot have given a token yet: it has no permit for one.
    let first = read_until(&mut response, "\"content\":\"t").await;
    assert!(!first.contains("end"), "{first}");
    gate.add_permits(100);
    read_until(&mut response, "[DONE]").await;
}

#[tokio::test]
async fn overload_answers_429_at_once() {
    let script = Script { end: End::Hang, ..Script::text("x") };
    let config = router::Config { sequences_max: 64, queue_max: 1, ..config() };
    let (cluster, _prefill, decode) = Cluster::with_pair_and(config, script).await;
    // Four times sixteen sequences take every place, one more request waits.
    let mut running = Vec::new();
    for _ in 0..4 {
        let mut body = streaming("?");
        body["n"] = json!(16);
        let mut response = cluster.post(CHAT, &body).await;
        read_until(&mut response, "x").await;
        running.push(response);
    }
    decode.requests(64).await;
    let waiting = tokio::spawn(cluster.http.post(cluster.url(CHAT)).json(&streaming("?")).send());
    wait_for_metric(&cluster, "router_queue_depth{class=\"interactive\"} 1").await;

    let asked = Instant::now();
    let response = cluster.post(CHAT, &chat("?")).await;
    println!("429 after {:?}", asked.elapsed());
    let retry_after = response.headers()["retry-after"].to_str().expect("text").parse::<u64>();
    assert!(retry_after.is_ok_and(|seconds| seconds >= 1));
    assert_eq!(error_of(response, 429).await["code"], "server_overloaded");

    // A place that comes back goes to who waits.
    drop(running.pop());
    let mut response = waiting.await.expect("runs").expect("answer");
    read_until(&mut response, "x").await;
}

#[tokio::test]
async fn a_request_that_waits_too_long_gets_429() {
    let script = Script { end: End::Hang, ..Script::text("x") };
    let config =
        router::Config { sequences_max: 16, sequences_per_request_max: 16, ttft_ms_max: 20, ..config() };
    let (cluster, _prefill, decode) = Cluster::with_pair_and(config, script).await;
    let mut body = streaming("?");
    body["n"] = json!(16);
    let _running = cluster.post(CHAT, &body).await;
    decode.requests(16).await;
    assert_eq!(error_of(cluster.post(CHAT, &chat("?")).await, 429).await["code"], "server_overloaded");
}

#[tokio::test]
async fn decode_that_has_no_room_is_waited_for_and_then_given_up() {
    let no_room = Consequence::Unavailable.status_with_code(tonic::Code::ResourceExhausted, "no room");
    let script = Script { reserve: Err(no_room), ..Script::text("x") };
    let config = router::Config { ttft_ms_max: 600, ..config() };
    let (cluster, _prefill, decode) = Cluster::with_pair_and(config, script).await;
    let response = cluster.post(CHAT, &chat("?")).await;
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(error_of(response, 429).await["code"], "server_overloaded");
    assert!(decode.requests_now() >= 2, "each of its reports is a reason to try again");
}

#[tokio::test]
async fn a_stop_string_is_a_finish_and_no_cancel() {
    let script = Script { end: End::Hang, ..Script::text("one two three") };
    let (cluster, _prefill, decode) = Cluster::with_pair(script).await;
    let mut body = chat("?");
    body["stop"] = json!("three");
    let answer = cluster.complete(CHAT, &body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "one two ");
    decode.finished(1).await;
}

#[tokio::test]
async fn no_worker_is_503_and_says_which() {
    let cluster = Cluster::start(config()).await;
    let error = error_of(cluster.post(CHAT, &chat("?")).await, 503).await;
    assert_eq!((&error["code"], &error["type"]), (&json!("no_worker"), &json!("server_error")));
    assert!(error["message"].as_str().expect("message").contains("prefill"), "{error}");

    let _prefill = FakeWorker::prefill(&cluster, "prefill-0", Script::text("x")).await;
    let response = cluster.post(CHAT, &streaming("?")).await;
    assert!(response.headers().contains_key("retry-after"));
    let error = error_of(response, 503).await;
    assert!(error["message"].as_str().expect("message").contains("decode"), "{error}");

    let options = crate::support::WorkerOptions { backend: "cpu/other".to_owned(), ..Default::default() };
    let _decode =
        FakeWorker::start(&cluster, "decode-0", proto::v1::Role::Decode, Script::text("x"), options).await;
    let error = error_of(cluster.post(CHAT, &chat("?")).await, 503).await;
    let message = error["message"].as_str().expect("message");
    assert!(message.contains("backend") && message.contains("cpu/other"), "{message}");
}

#[tokio::test]
async fn a_failure_before_the_first_token_is_retried_on_another_pair() {
    let unavailable = || Consequence::Unavailable.status("going down");
    for failing in ["prefill", "decode"] {
        let cluster = Cluster::start(config()).await;
        let good = Script::text("saved");
        let bad = match failing {
            "prefill" => Script { prefill: PrefillBehaviour::Fail(unavailable()), ..good.clone() },
            _ => Script { reserve: Err(unavailable()), ..good.clone() },
        };
        // Ties go to the smaller id: the failing one is tried first.
        let (bad_prefill, bad_decode) =
            if failing == "prefill" { (bad, good.clone()) } else { (good.clone(), bad) };
        let _p0 = FakeWorker::prefill(&cluster, "prefill-0", bad_prefill).await;
        let p1 = FakeWorker::prefill(&cluster, "prefill-1", good.clone()).await;
        let _d0 = FakeWorker::decode(&cluster, "decode-0", bad_decode).await;
        let d1 = FakeWorker::decode(&cluster, "decode-1", good).await;
        let answer = cluster.complete(CHAT, &chat("?")).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "saved");
        let other = if failing == "prefill" { &p1 } else { &d1 };
        assert_eq!(other.requests_now(), 1, "{failing}");
        let retried = format!("router_retries_total{{tier=\"{failing}\"}} 1");
        assert!(cluster.router.metrics_text().contains(&retried));
    }
}

#[tokio::test]
async fn there_is_one_retry_and_none_without_another_pair() {
    let lost = Consequence::Unavailable.status("always down");
    let script = Script { prefill: PrefillBehaviour::Fail(lost), ..Script::text("x") };
    let (cluster, p0, decode) = Cluster::with_pair(script.clone()).await;
    let error = error_of(cluster.post(CHAT, &chat("?")).await, 503).await;
    assert_eq!(error["code"], "worker_unavailable");
    assert_eq!(p0.requests_now(), 1);
    decode.cancelled(1).await;

    let p1 = FakeWorker::prefill(&cluster, "prefill-1", script.clone()).await;
    let p2 = FakeWorker::prefill(&cluster, "prefill-2", script).await;
    error_of(cluster.post(CHAT, &chat("?")).await, 503).await;
    assert_eq!(p0.requests_now() + p1.requests_now() + p2.requests_now(), 3);
}

#[tokio::test]
async fn what_a_worker_rejects_is_not_retried() {
    let rejected = Consequence::Rejected.status("sampling.top_k: no");
    let script = Script { reserve: Err(rejected), ..Script::text("x") };
    let (cluster, _prefill, d0) = Cluster::with_pair(script.clone()).await;
    let d1 = FakeWorker::decode(&cluster, "decode-1", script).await;
    let error = error_of(cluster.post(CHAT, &chat("?")).await, 400).await;
    assert!(error["message"].as_str().expect("message").contains("sampling.top_k: no"));
    assert_eq!(d0.requests_now() + d1.requests_now(), 1);
}

#[tokio::test]
async fn a_death_in_mid_stream_is_an_error_event_and_the_end() {
    let broken =
        Script { end: End::Fail(Consequence::Lost.status("device fault")), ..Script::text("some words") };
    let (cluster, prefill, _decode) = Cluster::with_pair(broken).await;
    let _other = FakeWorker::decode(&cluster, "decode-1", Script::text("other words")).await;
    let response = cluster.post(CHAT, &streaming("?")).await;
    assert_eq!(response.status(), 200, "the stream had begun");
    let events = events(&response.text().await.expect("ends in order"));
    let last: Value = serde_json::from_str(events.last().expect("events")).expect("no [DONE]");
    assert_eq!(last["error"]["code"], "worker_lost");
    assert!(last["error"]["message"].as_str().expect("message").contains("device fault"));
    assert_eq!(prefill.requests_now(), 1, "what the client has seen is not begun anew");
}

#[tokio::test]
async fn a_worker_that_falls_silent_ends_its_sequences() {
    let script = Script { end: End::Hang, ..Script::text("some words") };
    let (cluster, _prefill, mut decode) = Cluster::with_pair(script).await;
    let mut response = cluster.post(CHAT, &streaming("?")).await;
    read_until(&mut response, "words").await;
    // Its server still holds the stream open, as a stopped process would.
    decode.leave();
    let rest = read_until(&mut response, "error").await;
    assert!(rest.contains("worker_lost"), "{rest}");
    error_of(cluster.post(CHAT, &chat("?")).await, 503).await;
}

#[tokio::test]
async fn a_deadline_ends_the_request_on_both_tiers() {
    let script = Script { prefill: PrefillBehaviour::Hang, ..Script::text("x") };
    let (cluster, prefill, decode) = Cluster::with_pair(script).await;
    let mut body = chat("?");
    body["deadline_ms"] = json!(300);
    let error = error_of(cluster.post(CHAT, &body).await, 504).await;
    assert_eq!(error["code"], "deadline_exceeded");
    let sent = decode.requests(1).await[0].deadline_ms;
    assert!((1..=300).contains(&sent), "{sent} ms are left when decode hears of it");
    prefill.cancelled(1).await;
    decode.cancelled(1).await;
}

#[tokio::test]
async fn a_slow_reader_gets_everything() {
    // Far more messages than the session's queue holds.
    let words = "word ".repeat(300);
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text(words.trim_end())).await;
    let response = cluster.post(CHAT, &streaming("?")).await;
    let mut chunks = response.bytes_stream();
    let mut text = String::new();
    while let Some(chunk) = chunks.next().await {
        text.push_str(std::str::from_utf8(&chunk.expect("readable")).expect("UTF-8"));
        tokio::task::yield_now().await;
    }
    let events = events(&text);
    assert!(events.len() >= tokens(words.trim_end()).len());
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
}

#[tokio::test]
async fn shutdown_drains() {
    let gate = Arc::new(Semaphore::new(0));
    let script = Script { gate: Some(Arc::clone(&gate)), ..Script::text("to the very end") };
    let (cluster, _prefill, decode) = Cluster::with_pair(script).await;
    let mut response = cluster.post(CHAT, &streaming("?")).await;
    decode.requests(1).await;
    let Cluster { router, .. } = cluster;
    let shutdown = tokio::spawn(router.shutdown());
    gate.add_permits(100);
    let text = read_until(&mut response, "[DONE]").await;
    assert!(text.contains("end"));
    drop(response);
    shutdown.await.expect("ends");
}

#[tokio::test]
async fn shutdown_ends_what_does_not() {
    let script = Script { end: End::Hang, ..Script::text("for ever") };
    let config = router::Config { drain_ms_max: 50, ..config() };
    let (cluster, _prefill, decode) = Cluster::with_pair_and(config, script).await;
    let mut response = cluster.post(CHAT, &streaming("?")).await;
    read_until(&mut response, "ever").await;
    let Cluster { router, .. } = cluster;
    router.shutdown().await;
    read_until(&mut response, "error").await;
    decode.cancelled(1).await;
}

/// Returns once the metrics have `line`; the test's own time limit is the bound.
async fn wait_for_metric(cluster: &Cluster, line: &str) {
    let has_line = || cluster.router.metrics_text().contains(line);
    let wait = async {
        while !has_line() {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(waited.is_ok(), "{line} in\n{}", cluster.router.metrics_text());
}
