//! What a cluster tells of a prompt's own tokens is what one engine computes, bit by bit; and a text's perplexity with it.

mod support;

use clap::Parser;
use engine::{Engine, EngineOptions, ExpertBank, LocalExperts, LogitsWanted, Sampled, SequenceInput};
use model::{BlockId, Checkpoint, Device, Numerics, TokenId, Tokenizer};
use serde_json::{Value, json};
use support::{demo, http, shape};
use trireme::cluster::{self, Options};

/// Prompt tokens: some blocks and a bit.
const TOKENS: usize = 300;

fn prompt() -> Vec<u32> {
    (0..TOKENS as u32).map(|at| 10 + (at * 7919 + at * at * 13) % 1000).collect()
}

/// The bits of each log-probability, and of the two best tokens' beside it.
fn oracle(prompt: &[u32]) -> Vec<(u32, Vec<u32>)> {
    let checkpoint = Checkpoint::open(demo()).expect("checkpoint");
    let bank = ExpertBank::load_all(&checkpoint, Numerics::Fp8, false, &mut |_, _| {}).expect("experts");
    let options = EngineOptions {
        device: Device::Cpu,
        numerics: Numerics::Fp8,
        kv_format: None,
        kv_blocks_max: TOKENS.div_ceil(64),
        threads: 1,
        step_tokens_max: TOKENS,
        mtp: false,
    };
    let experts = Box::new(LocalExperts::new(bank));
    let mut engine = Engine::load(&checkpoint, &options, experts, &mut |_, _| {}).expect("engine");
    let blocks: Vec<_> = (0..TOKENS.div_ceil(64) as u32).map(BlockId).collect();
    let tokens: Vec<_> = prompt.iter().map(|&token| TokenId(token)).collect();
    let vocab_size = engine.config().vocab_size;
    let input =
        SequenceInput { tokens: &tokens, position: 0, block_table: &blocks, logits: LogitsWanted::All };
    let logits = engine.step(&[input], &mut ()).expect("a step").logits;
    let rows = logits.chunks_exact(vocab_size).zip(&tokens[1..]);
    rows.map(|(row, &token)| {
        let given = Sampled::given(token, row, 2);
        (given.logprob.to_bits(), given.top.iter().map(|top| top.1.to_bits()).collect())
    })
    .collect()
}

/// The same, as the cluster tells it.
fn told(answer: &Value) -> Vec<(u32, Vec<u32>)> {
    let logprobs = &answer["choices"][0]["logprobs"];
    let bits = |value: &Value| (value.as_f64().expect("a log-probability") as f32).to_bits();
    let own = logprobs["token_logprobs"].as_array().expect("a list");
    assert!(own[0].is_null(), "nothing stands before the first token");
    let top = logprobs["top_logprobs"].as_array().expect("a list");
    let each = own.iter().zip(top).skip(1).take(TOKENS - 1);
    each.map(|(own, top)| {
        // The best first; the token itself comes last where it is none of them.
        (bits(own), top.as_object().expect("alternatives").values().take(2).map(bits).collect())
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_has_the_log_probabilities_that_one_engine_gives_it() {
    let expected = oracle(&prompt());
    let mut config = shape("--expert 1 --threads 1").in_process_config().expect("a configuration");
    // Chunks that end at no block's end, shared with other prompts.
    config.prefill.step_tokens_max = 77;
    let cluster = cluster::start(config, Options::default()).await.expect("a cluster");
    let url = format!("http://{}", cluster.http_address());
    let client = http(&url);
    let ask = |max_tokens: u32| {
        let body = json!({
            "model": "trireme-tiny", "prompt": prompt(), "max_tokens": max_tokens, "temperature": 0,
            "echo": true, "logprobs": 2, "stream": true,
        });
        let client = &client;
        async move {
            let mut answer = Value::Null;
            let keep = |chunk: &Value| {
                if answer.is_null() && !chunk["choices"][0]["logprobs"].is_null() {
                    answer = chunk.clone();
                }
            };
            client.stream("/v1/completions", &body, keep).await.expect("an answer");
            answer
        }
    };
    // Again with the prompt in the cache, from which nothing may be missing; and two at a time.
    for round in 0..2 {
        let (only, continued) = tokio::join!(ask(0), ask(3));
        assert!(told(&only) == expected, "round {round}: the prompt alone");
        assert!(told(&continued) == expected, "round {round}: the prompt and what follows");
    }

    let text = tempfile::NamedTempFile::new().expect("a file");
    let tokenizer = Tokenizer::open(demo()).expect("a tokenizer");
    let story: Vec<_> = prompt().into_iter().map(TokenId).collect();
    std::fs::write(text.path(), tokenizer.decode(&story, true)).expect("written");
    let line = format!("perplexity --window 128 --text {}", text.path().display());
    let flags = |more: &str| Cli::parse_from(format!("{line} {more}").split_whitespace()).args;
    let served = bench::perplexity::measure(&flags(&format!("--url {url}"))).await.expect("a figure");
    let computed = bench::perplexity::measure(&flags("--threads 1")).await.expect("a figure");
    assert_eq!(served.tokens, computed.tokens);
    assert!((served.loss - computed.loss).abs() < 1e-5, "{} {}", served.loss, computed.loss);
    cluster.shutdown().await;
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: bench::perplexity::Args,
}
