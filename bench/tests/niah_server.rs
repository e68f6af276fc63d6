//! `bench niah` against a server that remembers only the first part of what it was told.

use axum::extract::State;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use bench::niah::{Args, measure};
use clap::Parser;
use model::{TokenId, Tokenizer};
use serde_json::{Value, json};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// Knows the name if it was said in the first half of the conversation.
async fn complete(State(tokenizer): State<Tokenizer>, Json(body): Json<Value>) -> impl IntoResponse {
    let ids: Vec<TokenId> = body["prompt"]
        .as_array()
        .expect("token ids")
        .iter()
        .map(|id| TokenId(id.as_u64().expect("an id") as u32))
        .collect();
    let text = tokenizer.decode(&ids[..ids.len() / 2], true);
    let name =
        text.split_once("My name is ").and_then(|(_, rest)| rest.split_once('.')).map(|(name, _)| name);
    let logprobs = json!({ "token_logprobs": [-0.5] });
    let chunk = json!({ "choices": [{ "text": format!("It is {}.", name.unwrap_or("late")), "logprobs": logprobs }] });
    format!("data: {chunk}\n\ndata: [DONE]\n\n")
}

#[tokio::test]
async fn what_is_deep_in_the_haystack_is_found_only_where_the_server_looks() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tiny");
    let app = Router::new()
        .route("/v1/models", get(async || Json(json!({ "data": [{ "id": "mock" }] }))))
        .route("/v1/completions", post(complete))
        .with_state(Tokenizer::open(folder).expect("a tokenizer"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    tokio::spawn(async move { axum::serve(listener, app).await });

    let line = format!(
        "niah --url http://{address} --model {folder} --lengths 512,1024 --depths 0,100 --samples 3 --needle name"
    );
    let args = Cli::parse_from(line.split_whitespace()).args;
    let report = measure(&args).await.expect("a report");
    let cells: Vec<_> = report.cells.iter().map(|c| (c.length, c.depth, c.answered, c.found)).collect();
    assert_eq!(cells, [(512, 0, 3, 3), (512, 100, 3, 0), (1024, 0, 3, 3), (1024, 100, 3, 0)]);
    assert_eq!(report.cells[1].missed.as_deref(), Some("It is late."));
    assert!((report.cells[0].confidence - (-0.5f64).exp()).abs() < 1e-9);
    assert!(report.cells.iter().all(|cell| cell.prompt_tokens <= f64::from(cell.length)));

    let too_long = Args { lengths: vec![5000], ..args.clone() };
    let error = measure(&too_long).await.expect_err("beyond the context").to_string();
    assert!(error.contains("--lengths 5000"), "{error}");
    let nobody = Args { url: "http://127.0.0.1:1".to_owned(), ..args };
    let error = format!("{:#}", measure(&nobody).await.expect_err("nobody there"));
    assert!(error.contains("http://127.0.0.1:1"), "{error}");
}
