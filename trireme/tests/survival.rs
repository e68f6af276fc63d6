//! A worker dies. While idle: the supervisor starts it again and nobody notices. While serving: its requests get a
//! clear error, and no block stays behind.

mod support;

use std::time::Instant;

use bench::client::ClientError;
use serde_json::{Value, json};
use support::{PATIENCE, Up, http};

async fn start(flags: &'static str) -> Up {
    tokio::task::spawn_blocking(move || Up::start(flags)).await.expect("up")
}

fn chat(max_tokens: u32) -> Value {
    json!({
        "model": "trireme-tiny", "stream": true, "stream_options": { "include_usage": true }, "temperature": 0,
        "max_tokens": max_tokens, "ignore_eos": true,
        "messages": [{ "role": "user", "content": "Tell me a story about a fox." }],
    })
}

async fn healthy(url: &str) {
    let client = http(url);
    let begin = Instant::now();
    loop {
        match client.get("/health").await {
            Ok((200, _)) => return,
            other => assert!(begin.elapsed() < PATIENCE, "still not healthy: {other:?}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Waits until the dead worker's successor has taken its place.
async fn replaced(up: &Up, id: &str) {
    let log = up.state.join(format!("{id}.log"));
    let begin = Instant::now();
    loop {
        let text = std::fs::read_to_string(&log).expect("the worker's log");
        if text.matches("is up").count() >= 2 {
            return healthy(&up.url).await;
        }
        assert!(begin.elapsed() < PATIENCE, "{id} was not started again: {text}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// KV blocks in use as the decode and prefill workers count them, from their own metrics pages.
async fn blocks_in_use(up: &Up) -> Vec<(String, u64)> {
    let config = std::fs::read_to_string(up.state.join("cluster.toml")).expect("the configuration");
    let config: toml::Table = config.parse().expect("TOML");
    let mut seen = Vec::new();
    for worker in config["worker"].as_array().expect("workers") {
        let (id, admin) = (worker["id"].as_str().expect("id"), worker["admin"].as_str().expect("admin"));
        if id.starts_with("expert") {
            continue;
        }
        let text = reqwest::get(format!("http://{admin}/metrics"))
            .await
            .expect("metrics")
            .text()
            .await
            .expect("text");
        let gauge = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.split(' ').next().is_some_and(|n| n.ends_with(name)));
            let line = line.unwrap_or_else(|| panic!("{id} reports {name}: {text}"));
            line.rsplit(' ').next().expect("a value").parse().expect("a number")
        };
        seen.push((id.to_owned(), gauge("_kv_blocks") - gauge("_kv_blocks_free")));
    }
    seen
}

async fn nothing_leaked(up: &Up) {
    let begin = Instant::now();
    loop {
        let used = blocks_in_use(up).await;
        if used.iter().all(|(_, blocks)| *blocks == 0) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "blocks are still in use: {used:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_while_idle_is_repaired() {
    let up = start("--quiet").await;
    let client = http(&up.url);
    for id in ["router", "prefill-0", "decode-0", "expert-1"] {
        client.stream("/v1/chat/completions", &chat(8), |_| {}).await.expect("before");
        up.kill_worker(id);
        replaced(&up, id).await;
        let again = client.stream("/v1/chat/completions", &chat(8), |_| {}).await;
        assert_eq!(again.map(|s| s.completion_tokens()).ok(), Some(Some(8)), "after {id} was killed");
    }
    nothing_leaked(&up).await;
    assert_eq!(up.stop(), Some(0));
}

/// How a stream of 600 tokens ends when `id` is killed at its twentieth.
async fn interrupted(up: &Up, id: &str) -> Result<Option<u64>, ClientError> {
    let mut seen = 0;
    let outcome = http(&up.url)
        .stream("/v1/chat/completions", &chat(600), |_| {
            seen += 1;
            if seen == 20 {
                up.kill_worker(id);
            }
        })
        .await;
    assert!(seen >= 20, "the stream was long enough to be interrupted: {seen} events");
    outcome.map(|streamed| streamed.completion_tokens())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_while_serving_is_a_clear_error_and_leaks_nothing() {
    let up = start("--quiet").await;
    for id in ["expert-0", "prefill-0", "decode-0", "router"] {
        match interrupted(&up, id).await {
            Err(ClientError::InStream(message)) if id != "router" => assert!(!message.is_empty(), "{id}"),
            // The connection itself is gone.
            Err(ClientError::Http(_) | ClientError::Truncated) if id == "router" => {}
            // Prefill has done its part by then. An expert worker holds no state of a request: one that is back in
            // time is dispatched to again.
            Ok(tokens) if id.starts_with("expert") || id.starts_with("prefill") => {
                assert_eq!(tokens, Some(600))
            }
            other => panic!("{id}: a clear error in the stream, not {other:?}"),
        }
        replaced(&up, id).await;
        nothing_leaked(&up).await;
        let after = http(&up.url).stream("/v1/chat/completions", &chat(8), |_| {}).await;
        assert_eq!(after.map(|streamed| streamed.completion_tokens()).ok(), Some(Some(8)), "after {id}");
    }
    assert_eq!(up.stop(), Some(0));
}

/// A client that hangs up frees both tiers.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_frees_everything() {
    let up = start("--quiet").await;
    let body = chat(2000);
    let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", up.url)).json(&body);
    let mut response = request.send().await.expect("a response");
    response.chunk().await.expect("a first chunk");
    assert!(blocks_in_use(&up).await.iter().any(|(_, blocks)| *blocks > 0), "decode holds the sequence");
    drop(response);
    nothing_leaked(&up).await;
    assert_eq!(up.stop(), Some(0));
}

/// Ctrl-C takes the router down first: what runs may end, and the workers stay until it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_running_streams_end() {
    let up = start("--quiet").await;
    let mut asked = false;
    let outcome = http(&up.url)
        .stream("/v1/chat/completions", &chat(100), |_| {
            if !std::mem::replace(&mut asked, true) {
                up.interrupt();
            }
        })
        .await;
    assert_eq!(outcome.map(|streamed| streamed.completion_tokens()).ok(), Some(Some(100)));
    assert_eq!(up.stop(), Some(0));
}
