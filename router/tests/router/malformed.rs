//! What clients get wrong: a clear 4xx that names the field, and the next request is served.

use proto::v1::inference_client::InferenceClient;

use crate::support::{Cluster, MODEL, Script, chat, config};
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

struct Case {
    path: &'static str,
    body: Vec<u8>,
    status: u16,
    code: &'static str,
    param: Option<&'static str>,
}

fn chat_with(field: &'static str, value: Value, code: &'static str) -> Case {
    case(CHAT, chat("?"), field, value, code)
}

fn completion_with(field: &'static str, value: Value, code: &'static str) -> Case {
    case(COMPLETIONS, json!({ "model": MODEL, "prompt": "go" }), field, value, code)
}

fn case(path: &'static str, mut body: Value, field: &'static str, value: Value, code: &'static str) -> Case {
    body[field] = value;
    Case { path, body: body.to_string().into_bytes(), status: 400, code, param: Some(field) }
}

fn raw(body: &[u8], code: &'static str) -> Case {
    Case { path: CHAT, body: body.to_vec(), status: 400, code, param: None }
}

fn cases() -> Vec<Case> {
    let nested = "[".repeat(100_000);
    let within = |param, case: Case| Case { param: Some(param), ..case };
    vec![
        raw(b"", "invalid_json"),
        raw(b"{", "invalid_json"),
        raw(b"[]", "invalid_json"),
        raw(b"\"text\"", "invalid_json"),
        raw(b"{\"model\": 1e999}", "invalid_json"),
        raw(nested.as_bytes(), "invalid_json"),
        raw(b"{\"model\": \"\xff\xfe\"}", "invalid_utf8"),
        chat_with("frobnicate", json!(1), "unknown_parameter"),
        chat_with("prompt", json!("x"), "unknown_parameter"),
        completion_with("messages", json!([]), "unknown_parameter"),
        chat_with("model", json!(null), "missing_required_parameter"),
        chat_with("model", json!(7), "invalid_type"),
        Case { status: 404, ..chat_with("model", json!("gpt-5"), "model_not_found") },
        chat_with("messages", json!(null), "missing_required_parameter"),
        chat_with("messages", json!([]), "missing_required_parameter"),
        chat_with("messages", json!("hi"), "invalid_type"),
        within("messages[0]", chat_with("messages", json!(["hi"]), "invalid_type")),
        within(
            "messages[0].role",
            chat_with("messages", json!([{ "content": "x" }]), "missing_required_parameter"),
        ),
        within(
            "messages[0].role",
            chat_with("messages", json!([{ "role": "king", "content": "x" }]), "invalid_value"),
        ),
        within(
            "messages[0].role",
            chat_with("messages", json!([{ "role": "tool", "content": "x" }]), "unsupported_parameter"),
        ),
        within(
            "messages[0].content",
            chat_with("messages", json!([{ "role": "user" }]), "missing_required_parameter"),
        ),
        within(
            "messages[0].content",
            chat_with("messages", json!([{ "role": "user", "content": 3 }]), "invalid_type"),
        ),
        within(
            "messages[0].colour",
            chat_with(
                "messages",
                json!([{ "role": "user", "content": "x", "colour": 1 }]),
                "unknown_parameter",
            ),
        ),
        within(
            "messages[0].content[0].type",
            chat_with(
                "messages",
                json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
                "unsupported_parameter",
            ),
        ),
        chat_with("max_tokens", json!(-5), "invalid_type"),
        chat_with("max_tokens", json!(0), "invalid_value"),
        chat_with("max_tokens", json!("many"), "invalid_type"),
        chat_with("max_tokens", json!(1.5), "invalid_type"),
        chat_with("max_completion_tokens", json!(-1), "invalid_type"),
        chat_with("min_tokens", json!(-1), "invalid_type"),
        chat_with("min_tokens", json!(5000), "invalid_value"),
        chat_with("n", json!(0), "invalid_value"),
        chat_with("n", json!(17), "invalid_value"),
        chat_with("n", json!(-1), "invalid_type"),
        chat_with("temperature", json!(2.5), "invalid_value"),
        chat_with("temperature", json!(-0.1), "invalid_value"),
        chat_with("temperature", json!(1e300), "invalid_value"),
        chat_with("top_p", json!(0), "invalid_value"),
        chat_with("top_k", json!(-2), "invalid_value"),
        chat_with("min_p", json!(1.5), "invalid_value"),
        chat_with("presence_penalty", json!(3), "invalid_value"),
        chat_with("frequency_penalty", json!(-3), "invalid_value"),
        chat_with("repetition_penalty", json!(0), "invalid_value"),
        chat_with("seed", json!(1.5), "invalid_type"),
        chat_with("logit_bias", json!({ "x": 1 }), "invalid_value"),
        chat_with("logit_bias", json!({ "4096": 1 }), "invalid_value"),
        chat_with("logit_bias", json!({ "1": 1000 }), "invalid_value"),
        chat_with("stop", json!(["a", ""]), "invalid_value"),
        chat_with("stop", json!(vec!["x"; 17]), "invalid_value"),
        chat_with("stop", json!(5), "invalid_type"),
        chat_with("stop_token_ids", json!([4096]), "invalid_value"),
        chat_with("stop_token_ids", json!([-1]), "invalid_type"),
        chat_with("stream", json!("yes"), "invalid_type"),
        chat_with("stream_options", json!({ "include_usage": true }), "unsupported_parameter"),
        chat_with("top_logprobs", json!(3), "unsupported_parameter"),
        chat_with("tools", json!([{ "type": "function" }]), "unsupported_parameter"),
        chat_with("response_format", json!({ "type": "json_object" }), "unsupported_parameter"),
        chat_with("modalities", json!(["audio"]), "unsupported_parameter"),
        within(
            "chat_template_kwargs.thinking",
            chat_with("chat_template_kwargs", json!({ "thinking": "deeply" }), "invalid_type"),
        ),
        completion_with("logprobs", json!(21), "invalid_value"),
        completion_with("logprobs", json!(true), "invalid_type"),
        completion_with("echo", json!("yes"), "invalid_type"),
        completion_with("max_tokens", json!(0), "invalid_value"),
        completion_with("suffix", json!("end"), "unsupported_parameter"),
        completion_with("best_of", json!(3), "unsupported_parameter"),
        completion_with("prompt", json!(null), "missing_required_parameter"),
        completion_with("prompt", json!([]), "missing_required_parameter"),
        completion_with("prompt", json!([[]]), "missing_required_parameter"),
        completion_with("prompt", json!({}), "invalid_type"),
        completion_with("prompt", json!([1, 4096]), "invalid_value"),
        within("prompt[1]", completion_with("prompt", json!([1, -4]), "invalid_type")),
        within("prompt[1]", completion_with("prompt", json!([1, "x"]), "invalid_type")),
        within("prompt[0][0]", completion_with("prompt", json!([["x"]]), "invalid_type")),
        completion_with("prompt", json!(vec!["x"; 65]), "invalid_value"),
        Case { param: None, ..completion_with("prompt", json!(vec![5; 4096]), "context_length_exceeded") },
        Case { param: None, ..completion_with("max_tokens", json!(4096), "context_length_exceeded") },
    ]
}

#[tokio::test]
async fn every_mistake_is_named_and_the_next_request_is_served() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("fine")).await;
    for case in cases() {
        let shown = String::from_utf8_lossy(&case.body[..case.body.len().min(120)]).into_owned();
        let request = cluster.http.post(cluster.url(case.path)).header(CONTENT_TYPE, "application/json");
        let response = request.body(case.body).send().await.expect("an answer");
        let status = response.status().as_u16();
        let answer: Value = response.json().await.expect("a JSON error");
        let error = &answer["error"];
        assert_eq!((status, &error["code"]), (case.status, &json!(case.code)), "{shown}: {answer}");
        assert_eq!(error["type"], "invalid_request_error", "{shown}");
        assert_eq!(error["param"], json!(case.param), "{shown}: {answer}");
        assert!(!error["message"].as_str().expect("message").is_empty());
    }
    assert_eq!(prefill.requests_now(), 0, "none of these reached a worker");
    let answer = cluster.complete(CHAT, &chat("?")).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "fine");
}

#[tokio::test]
async fn harmless_fields_of_openai_are_accepted() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("fine")).await;
    let mut body = chat("?");
    for (field, value) in [
        ("user", json!("ada")),
        ("metadata", json!({ "a": "b" })),
        ("store", json!(false)),
        ("parallel_tool_calls", json!(true)),
        ("service_tier", json!("auto")),
        ("skip_special_tokens", json!(true)),
        ("include_stop_str_in_output", json!(false)),
        ("some_extension", json!(null)),
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("response_format", json!({ "type": "text" })),
        ("modalities", json!(["text"])),
        ("stop", json!(null)),
        ("temperature", json!(null)),
        ("top_k", json!(-1)),
    ] {
        body[field] = value;
    }
    cluster.complete(CHAT, &body).await;
}

#[tokio::test]
async fn a_service_tier_is_a_class_and_an_unknown_one_is_named() {
    let (cluster, prefill, decode) = Cluster::with_pair(Script::text("fine")).await;
    let mut body = chat("?");
    body["service_tier"] = json!("flex");
    cluster.complete(CHAT, &body).await;
    for worker in [&prefill, &decode] {
        let share = worker.requests(1).await[0].share.expect("a share");
        assert_eq!((share.weight, share.priority()), (1, proto::v1::Priority::Batch));
    }
    body["service_tier"] = json!("gold");
    let answer: Value = cluster.post(CHAT, &body).await.json().await.expect("JSON");
    assert_eq!(answer["error"]["param"], "service_tier", "{answer}");
}

#[tokio::test]
async fn a_body_of_50_mb_gets_a_clean_413() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("fine")).await;
    let body = vec![b' '; 50 << 20];
    let response = cluster.http.post(cluster.url(CHAT)).body(body).send().await.expect("an answer, no reset");
    assert_eq!(response.status(), 413);
    let answer: Value = response.json().await.expect("JSON");
    assert_eq!(answer["error"]["code"], "request_too_large");
    cluster.complete(CHAT, &chat("?")).await;
}

#[tokio::test]
async fn paths_and_methods_that_do_not_exist() {
    let cluster = Cluster::start(config()).await;
    let (status, answer) = cluster.get("/v1/embeddings").await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("unknown_url")));
    let (status, answer) = cluster.get(CHAT).await;
    assert_eq!((status, &answer["error"]["code"]), (405, &json!("method_not_allowed")));
}

#[tokio::test]
async fn api_keys_are_asked_for_when_configured() {
    // SHA-256 of "secret".
    let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b".to_owned();
    let config = crate::support::config();
    let config = router::Config { api_keys_sha256: vec!["0".repeat(64), hash], ..config };
    let (cluster, prefill, decode) = Cluster::with_pair_and(config, Script::text("fine")).await;
    for key in [None, Some(""), Some("wrong")] {
        let mut request = cluster.http.post(cluster.url(CHAT)).json(&chat("?"));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.expect("answer");
        assert_eq!(response.status(), 401, "{key:?}");
        let answer: Value = response.json().await.expect("JSON");
        assert_eq!(answer["error"]["code"], "invalid_api_key");
    }
    let allowed = cluster
        .http
        .post(cluster.url(CHAT))
        .bearer_auth("secret")
        .json(&chat("?"))
        .send()
        .await
        .expect("answer");
    assert_eq!(allowed.status(), 200);
    let salt = decode.requests(1).await[0].cache_salt;
    assert_ne!(salt, 0, "a key's prefixes are not everybody's");
    assert_eq!(prefill.requests(1).await[0].cache_salt, salt);
    // The other door knows the tenant too.
    let mut request = tonic::Request::new(crate::grpc::text("go"));
    request.metadata_mut().insert("authorization", "Bearer secret".parse().expect("a value"));
    let mut client = InferenceClient::new(crate::grpc::channel(&cluster).await);
    let mut answer = client.generate(request).await.expect("accepted").into_inner();
    while answer.message().await.expect("streams").is_some() {}
    assert_eq!(decode.requests(2).await[1].cache_salt, salt);
    assert_eq!(cluster.get("/health").await.0, 200, "probes have no key");
}

#[tokio::test]
async fn garbage_on_every_port_hurts_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("fine")).await;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut state = seed | 1;
    let garbage: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(8192)
    .collect();
    for address in
        [cluster.router.http_address(), cluster.router.grpc_address(), cluster.router.control_address()]
    {
        let mut connection = tokio::net::TcpStream::connect(address).await.expect("connects");
        // The peer may hang up at the first byte; both ways are fine.
        let _ = connection.write_all(&garbage).await;
        let _ = connection.shutdown().await;
        let _ = connection.read_to_end(&mut Vec::new()).await;
    }
    cluster.complete(CHAT, &chat("?")).await;
}

/// A connection that sends half a head, or nothing, is hung up on; one that asks is answered.
#[tokio::test]
async fn a_silent_connection_is_closed() {
    let config = router::Config { head_wait_ms_max: 100, ..config() };
    let cluster = Cluster::start(config).await;
    let address = cluster.url("").trim_start_matches("http://").to_owned();
    for begin in ["", "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"] {
        let mut connection = tokio::net::TcpStream::connect(&address).await.expect("connects");
        connection.write_all(begin.as_bytes()).await.expect("writes");
        let mut answer = Vec::new();
        // Returns when the other end closes; a server that waits for ever would hang the test.
        connection.read_to_end(&mut answer).await.expect("reads to the end");
    }
    assert_eq!(cluster.get("/v1/models").await.0, 200);
}
