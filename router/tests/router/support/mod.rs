//! A router with scripted workers behind it: real HTTP, real gRPC, real mutual TLS, no model.

pub mod certificates;
pub mod workers;

use std::path::Path;

use model::{ChatTemplate, GenerationDefaults, ModelConfig, Tokenizer};
use router::{Config, Handle, Node, ServedModel};
use serde_json::{Value, json};

pub use workers::{End, FakeWorker, PrefillBehaviour, Script, TINY_EOS, WorkerOptions};

/// The name the tests serve the demo model's tokenizer under.
pub const MODEL: &str = "tiny";

/// A router and a client of it.
pub struct Cluster {
    pub router: Handle,
    pub http: reqwest::Client,
    pub authority: certificates::Authority,
}

/// The demo model without its weights.
pub fn served_model() -> ServedModel {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tiny");
    let text = std::fs::read_to_string(dir.join("config.json")).expect("demo model's config.json");
    let config = ModelConfig::from_json(&text).expect("demo model's config.json is understood");
    ServedModel {
        id: MODEL.to_owned(),
        tokenizer: Tokenizer::open(&dir).expect("demo model's tokenizer"),
        template: ChatTemplate::open(&dir).expect("demo model's template"),
        defaults: GenerationDefaults::open(&dir, &config).expect("demo model's generation_config.json"),
        config,
    }
}

/// A configuration on free ports.
pub fn config() -> Config {
    let any = ([127, 0, 0, 1], 0).into();
    Config { http_listen: any, grpc_listen: any, control_listen: any, ..Config::default() }
}

impl Cluster {
    /// A router alone.
    pub async fn start(config: Config) -> Self {
        let authority = certificates::Authority::new();
        let node = Node { identity: authority.identity(), model: served_model() };
        let router = router::start(config, node).await.expect("router starts");
        Self { router, http: reqwest::Client::new(), authority }
    }

    /// A router with one prefill and one decode worker that answer as `script` says.
    pub async fn with_pair(script: Script) -> (Self, FakeWorker, FakeWorker) {
        Self::with_pair_and(config(), script).await
    }

    /// The same with another configuration.
    pub async fn with_pair_and(config: Config, script: Script) -> (Self, FakeWorker, FakeWorker) {
        let cluster = Self::start(config).await;
        let prefill = FakeWorker::prefill(&cluster, "prefill-0", script.clone()).await;
        let decode = FakeWorker::decode(&cluster, "decode-0", script).await;
        (cluster, prefill, decode)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.router.http_address())
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.http.post(self.url(path)).json(body).send().await.expect("the router answers")
    }

    /// Posts, demands 200 and returns the JSON.
    pub async fn complete(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let answer: Value = response.json().await.expect("JSON");
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Posts with `stream: true`, demands `[DONE]` and returns the chunks before it.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let response = self.post(path, &body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let mut events = events(&response.text().await.expect("a whole stream"));
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("JSON in every event")).collect()
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(self.url(path)).send().await.expect("the router answers");
        (response.status().as_u16(), response.json().await.expect("JSON"))
    }
}

/// The payloads of a stream of server-sent events.
pub fn events(text: &str) -> Vec<String> {
    assert!(text.ends_with("\n\n"), "every event ends with an empty line: {text:?}");
    text.split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").expect("data lines only").to_owned())
        .collect()
}

/// The tokens of `text`, without begin-of-sequence.
pub fn tokens(text: &str) -> Vec<u32> {
    let model = served_model();
    model.tokenizer.encode(text).expect("encodes").into_iter().map(|token| token.0).collect()
}

/// A chat with one question.
pub fn chat(question: &str) -> Value {
    json!({ "model": MODEL, "messages": [{ "role": "user", "content": question }] })
}
