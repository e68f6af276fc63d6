//! `bench serve` against a small server whose answers are known.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bench::serve::load::Load;
use bench::serve::{Args, Report, measure};
use clap::Parser;
use serde_json::{Value, json};

/// What the server does with the requests it is sent, in turn.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Answers,
    /// Every second request is refused.
    Busy,
    /// The stream ends without its last mark.
    Truncates,
    /// Reports an error after two tokens.
    Breaks,
    /// Sends headers and nothing more.
    Stalls,
}

struct Mock {
    manner: Manner,
    /// Requests answered before the manner sets in: the warm-up's.
    civil: usize,
    requests: AtomicUsize,
    bodies: Mutex<Vec<Value>>,
    in_flight: AtomicUsize,
    in_flight_max: AtomicUsize,
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

async fn serve(manner: Manner, civil: usize) -> (SocketAddr, Arc<Mock>) {
    let mock = Arc::new(Mock {
        manner,
        civil,
        requests: AtomicUsize::new(0),
        bodies: Mutex::default(),
        in_flight: AtomicUsize::new(0),
        in_flight_max: AtomicUsize::new(0),
    });
    let app = Router::new()
        .route("/v1/models", get(async || Json(json!({ "data": [{ "id": "mock" }] }))))
        .route("/v1/completions", post(complete))
        .with_state(Arc::clone(&mock));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, mock)
}

async fn complete(State(mock): State<Arc<Mock>>, Json(body): Json<Value>) -> Response {
    let number = mock.requests.fetch_add(1, SeqCst);
    let now = mock.in_flight.fetch_add(1, SeqCst) + 1;
    mock.in_flight_max.fetch_max(now, SeqCst);
    // Lets other requests in, so that concurrency can be seen.
    tokio::task::yield_now().await;
    let manner = if number < mock.civil { Manner::Answers } else { mock.manner };
    let tokens = body["max_tokens"].as_u64().expect("a bound");
    let prompt_tokens = body["prompt"].as_array().map_or(0, Vec::len);
    mock.bodies.lock().expect("not poisoned").push(body);
    let response = match manner {
        Manner::Busy if number % 2 == 1 => {
            let error = json!({ "error": { "message": "busy", "type": "overloaded" } });
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "0")], Json(error)).into_response()
        }
        Manner::Stalls => {
            Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>()).into_response()
        }
        manner => stream(manner, tokens, prompt_tokens).into_response(),
    };
    mock.in_flight.fetch_sub(1, SeqCst);
    response
}

fn stream(manner: Manner, tokens: u64, prompt_tokens: usize) -> Body {
    let mut text = String::new();
    let mut event = |value: Value| text.push_str(&format!("data: {value}\n\n"));
    for index in 0..tokens {
        if manner == Manner::Breaks && index == 2 {
            event(json!({ "error": { "message": "a worker died" } }));
            break;
        }
        // The second token has no text of its own yet, only an id.
        let piece = if index == 1 { "" } else { "x" };
        event(json!({ "choices": [{ "index": 0, "text": piece, "token_ids": [7] }] }));
    }
    event(json!({
        "choices": [],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "prompt_tokens_details": { "cached_tokens": prompt_tokens / 2 },
        },
        "trireme_timings": { "admission_us": 1000, "prefill_us": 20_000, "ttft_us": 24_000 },
    }));
    if manner != Manner::Truncates {
        text.push_str("data: [DONE]\n\n");
    }
    Body::from(text)
}

async fn measure_with(address: SocketAddr, flags: &[&str]) -> Report {
    let url = format!("http://{address}");
    let args = Cli::try_parse_from([&["serve", "--url", &url], flags].concat()).expect("valid flags").args;
    measure(&args).await.expect("a report")
}

#[tokio::test]
async fn a_closed_loop_measures_every_request() {
    let (address, mock) = serve(Manner::Answers, 0).await;
    let flags = ["--concurrency", "1,4", "--requests", "20", "--output-tokens", "5", "--prompt-tokens", "9"];
    let report = measure_with(address, &flags).await;
    assert_eq!((report.model.as_str(), report.points.len()), ("mock", 2));
    for point in &report.points {
        assert_eq!((point.completed, point.failed()), (20, 0));
        let (tokens, prompts) =
            (point.output_tokens_per_s * point.window_s, point.prompt_tokens_per_s * point.window_s);
        assert_eq!((tokens.round(), prompts.round()), (100.0, 180.0));
        assert!(point.ttft_ms.is_some() && point.itl_ms.is_some() && point.tpot_ms.is_some());
        let hop = |name: &str| point.hops.iter().find(|hop| hop.hop == name).expect("a hop").ms.mean.round();
        assert_eq!((hop("admission"), hop("prefill"), hop("before first token, other")), (1.0, 20.0, 3.0));
    }
    let bodies = mock.bodies.lock().expect("not poisoned");
    assert_eq!(bodies.len(), 2 * 20 + 2, "two points and the warm-up");
    let prompts: HashSet<_> = bodies.iter().map(|body| body["prompt"].to_string()).collect();
    assert_eq!(prompts.len(), bodies.len(), "no prompt twice");
    assert!(bodies.iter().all(|body| body["ignore_eos"] == true && body["trireme_timings"] == true));
    assert!(mock.in_flight_max.load(SeqCst) <= 4, "never more than the clients there are");
}

#[tokio::test]
async fn an_open_loop_sends_what_its_schedule_says() {
    let (address, mock) = serve(Manner::Answers, 0).await;
    let flags = ["--rate", "2000", "--requests", "50", "--warm-up", "0", "--output-tokens", "1"];
    let report = measure_with(address, &flags).await;
    assert_eq!(report.points[0].completed, 50);
    assert!(report.points[0].itl_ms.is_none(), "one token has no gap");
    assert_eq!(mock.requests.load(SeqCst), 50);
}

#[tokio::test]
async fn failures_are_told_apart() {
    for (manner, kind, failed) in [
        (Manner::Busy, "http_429", 5),
        (Manner::Truncates, "truncated", 10),
        (Manner::Breaks, "in_stream", 10),
    ] {
        let (address, _mock) = serve(manner, 2).await;
        let flags = ["--concurrency", "2", "--requests", "10", "--output-tokens", "4"];
        let report = measure_with(address, &flags).await;
        let point = &report.points[0];
        assert_eq!((point.completed, point.failed()), (10 - failed, failed), "{kind}");
        assert_eq!(point.errors.get(kind), Some(&failed), "{:?}", point.errors);
    }
}

#[tokio::test]
async fn a_refused_request_is_sent_again_where_that_is_wanted() {
    let (address, mock) = serve(Manner::Busy, 0).await;
    let flags = ["--concurrency", "1", "--requests", "10", "--output-tokens", "4", "--warm-up", "0"];
    let report = measure_with(address, &[&flags[..], &["--retries", "1"]].concat()).await;
    let point = &report.points[0];
    assert_eq!((point.completed, point.failed(), point.refused), (10, 0, 9));
    assert_eq!(mock.requests.load(SeqCst), 19);
}

#[tokio::test]
async fn a_turn_sends_all_that_was_said_before() {
    let (address, mock) = serve(Manner::Answers, 0).await;
    let flags = "--turns 3 --prompt-tokens 100 --output-tokens 4 --concurrency 1 --requests 2 --warm-up 0 --kv-block-tokens 10";
    let report = measure_with(address, &flags.split(' ').collect::<Vec<_>>()).await;
    let bodies = mock.bodies.lock().expect("not poisoned");
    let prompts: Vec<Vec<u64>> = bodies
        .iter()
        .map(|body| body["prompt"].as_array().expect("ids").iter().filter_map(Value::as_u64).collect())
        .collect();
    assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [100, 204, 308, 100, 204, 308]);
    for pair in [&prompts[0..2], &prompts[1..3], &prompts[4..6]] {
        let earlier = pair[0].len();
        assert_eq!(pair[1][..earlier], pair[0]);
        assert_eq!(pair[1][earlier..earlier + 4], [7, 7, 7, 7], "the answer");
    }
    // 103 and 207 tokens were computed before the second and third turn, of them prompts 100 and 204. Found were half of 204 and
    // of 308, two of them more than this conversation had left.
    let reuse = report.points[0].reuse.expect("turns");
    assert_eq!((reuse.reusable, reuse.of_prompts, reuse.found), (2 * 300, 2 * 300, 2 * (100 + 154)));
}

#[tokio::test]
async fn a_share_of_the_peak_is_a_rate() {
    let (address, _mock) = serve(Manner::Answers, 0).await;
    let flags = ["--load", "100,200", "--peak", "100", "--requests", "20", "--output-tokens", "1"];
    let report = measure_with(address, &flags).await;
    let rates: Vec<_> = report.points.iter().map(|point| point.load).collect();
    assert_eq!(rates, [100.0, 200.0].map(|requests_per_s| Load::Open { requests_per_s }));
    assert!(report.points.iter().all(|point| point.completed == 20 && point.timeline.len() == 20));
}

#[tokio::test]
async fn a_server_that_stalls_bounds_neither_loop() {
    for load in [["--concurrency", "3"], ["--rate", "1000"]] {
        let (address, _mock) = serve(Manner::Stalls, 0).await;
        let bounds = ["--requests", "3", "--warm-up", "0", "--duration-s-max", "0.5"];
        let report = measure_with(address, &[&load[..], &bounds].concat()).await;
        assert_eq!(report.points[0].errors.get("cut_off"), Some(&3), "{load:?}");

        let (address, _mock) = serve(Manner::Stalls, 0).await;
        let bounds = ["--requests", "3", "--warm-up", "0", "--request-timeout-s", "0.1"];
        let report = measure_with(address, &[&load[..], &bounds].concat()).await;
        assert_eq!(report.points[0].errors.get("timeout"), Some(&3), "{load:?}");
    }
}

#[tokio::test]
async fn an_open_loop_holds_back_beyond_its_bound() {
    let (address, mock) = serve(Manner::Stalls, 0).await;
    let flags = ["--rate", "1000", "--requests", "10", "--in-flight-max", "4"];
    let bounds = ["--warm-up", "0", "--duration-s-max", "1"];
    let report = measure_with(address, &[&flags[..], &bounds].concat()).await;
    assert_eq!(report.points[0].errors.get("not_sent"), Some(&6));
    assert_eq!(report.points[0].errors.get("cut_off"), Some(&4));
    assert!(mock.requests.load(SeqCst) <= 4);
}

#[tokio::test]
async fn nobody_there_is_an_error_that_names_the_server() {
    let args = Cli::try_parse_from(["serve", "--url", "http://127.0.0.1:1"]).expect("valid flags").args;
    let error = measure(&args).await.expect_err("nobody listens on port 1");
    assert!(format!("{error:#}").contains("http://127.0.0.1:1"), "{error:#}");
}
