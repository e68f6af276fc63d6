//! What was computed once is not computed, and not sent, again; and nobody can tell from the answers.
//!
//! Every answer is held, bit by bit, against one engine that runs the request alone and has no cache.

mod support;

use std::time::Instant;

use engine::{Engine, EngineOptions, ExpertBank, LocalExperts, LogitsWanted, SequenceInput, SequenceSampler};
use futures::future::join_all;
use model::{BlockId, Checkpoint, Device, Numerics, SamplingParams, TokenId};
use proto::v1::generate_request::Prompt;
use proto::v1::{GenerateRequest, GeneratedToken, Sampling, Stopping, TokenIds, TokenLogprob, Usage};
use serde_json::{Value, json};
use support::{PATIENCE, TokenBits, bits, demo, grpc, in_process};
use trireme::cluster::{Carrier, Cluster};

const BLOCK: usize = 64;
/// Blocks of the oracle's pool, and so the longest sequence of these tests.
const ORACLE_BLOCKS: u32 = 16;

/// A request by token ids.
#[derive(Clone, Debug)]
struct Ask {
    prompt: Vec<u32>,
    max_tokens: u32,
    /// 0 is greedy.
    temperature: f32,
    seed: u64,
}

impl Ask {
    fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self { prompt, max_tokens, temperature: 0.0, seed: 0 }
    }
}

/// `length` tokens that depend on `seed` from the first one on.
fn tokens(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|at| 10 + (seed * 389 + at * 7919 + at * at * 13) % 1000).collect()
}

/// The plainest way to the answer.
struct Oracle(Engine);

impl Oracle {
    fn new() -> Self {
        let checkpoint = Checkpoint::open(demo()).expect("checkpoint");
        let bank = ExpertBank::load_all(&checkpoint, Numerics::Fp8, false, &mut |_, _| {}).expect("experts");
        let options = EngineOptions {
            device: Device::Cpu,
            numerics: Numerics::Fp8,
            kv_format: None,
            kv_blocks_max: ORACLE_BLOCKS as usize,
            threads: 2,
            step_tokens_max: 1024,
            mtp: false,
        };
        let experts = Box::new(LocalExperts::new(bank));
        Self(Engine::load(&checkpoint, &options, experts, &mut |_, _| {}).expect("engine"))
    }

    fn answer(&mut self, ask: &Ask) -> Vec<TokenBits> {
        let blocks: Vec<_> = (0..ORACLE_BLOCKS).map(BlockId).collect();
        let mut next: Vec<_> = ask.prompt.iter().map(|&token| TokenId(token)).collect();
        let params = SamplingParams {
            temperature: ask.temperature,
            seed: ask.seed,
            logprobs: Some(2),
            ..SamplingParams::greedy()
        };
        let mut sampler = SequenceSampler::new(&params, 0, &next);
        let (mut position, mut out) = (0, Vec::new());
        for _ in 0..ask.max_tokens {
            let input =
                SequenceInput { tokens: &next, position, block_table: &blocks, logits: LogitsWanted::Last };
            let mut logits = self.0.step(&[input], &mut ()).expect("a step").logits.to_vec();
            position += next.len();
            let sampled = sampler.sample(&mut logits, position, &[]);
            sampler.observe(sampled.token);
            next = vec![sampled.token];
            let top = sampled.top.iter();
            out.push(GeneratedToken {
                token_id: sampled.token.0,
                logprob: Some(sampled.logprob),
                top: top.map(|&(token, logprob)| TokenLogprob { token_id: token.0, logprob }).collect(),
            });
        }
        bits(&out)
    }
}

/// An answer's tokens and its usage.
async fn ask(cluster: &Cluster, ask: &Ask) -> (Vec<GeneratedToken>, Usage) {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: ask.prompt.clone() })),
        sampling: Some(Sampling {
            temperature: Some(ask.temperature),
            top_p: Some(1.0),
            top_k: Some(0),
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            seed: Some(ask.seed),
            logprobs: Some(2),
            ..Default::default()
        }),
        stopping: Some(Stopping { max_tokens: Some(ask.max_tokens), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let run = async {
        let mut stream = grpc(cluster.grpc_address()).await.generate(request).await?.into_inner();
        let (mut tokens, mut usage) = (Vec::new(), None);
        while let Some(message) = stream.message().await? {
            tokens.extend(message.tokens);
            usage = message.usage.or(usage);
        }
        Ok::<_, tonic::Status>((tokens, usage.expect("the last message carries it")))
    };
    tokio::time::timeout(PATIENCE, run).await.expect("an answer in time").expect("an answer")
}

/// Sum of a metric over all workers that have it.
fn metric(cluster: &Cluster, name: &str) -> u64 {
    let texts = cluster.worker_metrics().map(|(_, text)| text).collect::<Vec<_>>();
    let lines = texts.iter().flat_map(|text| text.lines());
    let values: Vec<u64> = lines
        .filter_map(|line| line.split_once(' ').filter(|(found, _)| *found == name))
        .map(|(_, value)| value.parse().expect("a number"))
        .collect();
    assert!(!values.is_empty(), "nobody reports {name}");
    values.iter().sum()
}

/// KV bytes that have landed on decode. A sequence of a few tokens has long published its hand-off when it ends.
fn pushed(cluster: &Cluster) -> u64 {
    metric(cluster, "decode_handoff_bytes_total")
}

/// Waits until no sequence holds a block, cached or not.
async fn nothing_is_held(cluster: &Cluster) {
    let begin = Instant::now();
    for role in ["prefill", "decode"] {
        let held = || {
            metric(cluster, &format!("{role}_kv_blocks")) - metric(cluster, &format!("{role}_kv_blocks_free"))
        };
        while held() != 0 {
            assert!(begin.elapsed() < PATIENCE, "{role} holds {} blocks", held());
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_time_only_the_rest_is_computed_and_pushed() {
    let mut oracle = Oracle::new();
    let cluster = in_process(&demo(), "--expert 0", Carrier::InProcess).await;
    // Less than a block, one token beyond it, whole blocks only, whole blocks and a rest, many chunks' worth.
    for (seed, length) in (1..).zip([40, 65, 64, 128, 200, 700]) {
        let request = Ask::greedy(tokens(seed, length), 6);
        let expected = oracle.answer(&request);
        let mut seen = Vec::new();
        for turn in 0..3 {
            let before = pushed(&cluster);
            let (tokens, usage) = ask(&cluster, &request).await;
            assert_eq!(bits(&tokens), expected, "{length} tokens, turn {turn}");
            seen.push((usage.cached_tokens as usize, pushed(&cluster) - before));
        }
        let row_bytes = seen[0].1 / length as u64;
        assert_eq!(seen[0], (0, row_bytes * length as u64), "{length} tokens: nothing is known of them");
        // The last token is always computed; decode needs only what is behind the last full block.
        let hit = ((length - 1) / BLOCK * BLOCK, row_bytes * (length % BLOCK) as u64);
        assert_eq!(seen[1..], [hit, hit], "{length} tokens");
    }
    nothing_is_held(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_turn_of_a_chat_sends_only_what_is_missing() {
    let mut oracle = Oracle::new();
    let cluster = in_process(&demo(), "--expert 1", Carrier::Quic).await;
    let mut prompt = tokens(7, 150);
    let (mut on_prefill, mut on_decode, mut row_bytes) = (0, 0, None);
    for turn in 0..5 {
        let request = Ask::greedy(prompt.clone(), 50 + turn);
        let before = pushed(&cluster);
        let (answer, usage) = ask(&cluster, &request).await;
        assert_eq!(bits(&answer), oracle.answer(&request), "turn {turn}");
        assert_eq!(
            usage.cached_tokens as usize, on_prefill,
            "turn {turn}: prefill knows the prompt of the last"
        );
        let bytes = pushed(&cluster) - before;
        let row_bytes = *row_bytes.get_or_insert(bytes / prompt.len() as u64);
        let missing = prompt.len() - on_decode;
        assert_eq!(
            bytes,
            row_bytes * missing as u64,
            "turn {turn}: decode knows prompt and answer of the last"
        );
        // The answer's last token was never computed.
        on_prefill = prompt.len() / BLOCK * BLOCK;
        prompt.extend(answer.iter().map(|token| token.token_id));
        on_decode = (prompt.len() - 1) / BLOCK * BLOCK;
        prompt.extend(tokens(100 + turn, 20));
    }
    nothing_is_held(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_share_prefixes_answer_as_if_alone() {
    let mut oracle = Oracle::new();
    let (system, story) = (tokens(1, 130), tokens(2, 320));
    let requests: Vec<_> = (0..16_u32)
        .map(|i| {
            let mut prompt =
                if i % 2 == 0 { system.clone() } else { story[..64 * (1 + i as usize % 5)].to_vec() };
            prompt.extend(tokens(50 + i % 6, 7 * i as usize));
            Ask { prompt, max_tokens: 5 + i, temperature: 0.3 * (i % 3) as f32, seed: u64::from(i) }
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|request| oracle.answer(request)).collect();
    for flags in ["--prefill 1 --decode 1 --expert 0", "--prefill 2 --decode 2 --expert 2"] {
        let cluster = in_process(&demo(), flags, Carrier::InProcess).await;
        for round in 0..3 {
            let answers = join_all(requests.iter().map(|request| ask(&cluster, request))).await;
            for (i, ((tokens, _), expected)) in answers.iter().zip(&expected).enumerate() {
                assert_eq!(&bits(tokens), expected, "{flags}: request {i}, round {round}");
            }
        }
        for role in ["prefill", "decode"] {
            assert!(
                metric(&cluster, &format!("{role}_prefix_hit_tokens_total")) > 0,
                "{flags}: {role} found nothing"
            );
        }
        nothing_is_held(&cluster).await;
        cluster.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_too_small_for_its_cache_evicts_and_nothing_else() {
    let mut oracle = Oracle::new();
    let requests: Vec<_> = (0..12_u32)
        .map(|i| {
            let mut prompt = tokens(i % 4, 140);
            prompt.extend(tokens(20 + i, 40));
            Ask::greedy(prompt, 12)
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|request| oracle.answer(request)).collect();
    // A sequence takes three blocks on prefill and on decode: three of them fit at once, with one block to spare.
    let cluster = in_process(&demo(), "--expert 0 --kv-blocks-max 10", Carrier::InProcess).await;
    for round in 0..3 {
        let answers = join_all(requests.iter().map(|request| ask(&cluster, request))).await;
        for (i, ((tokens, _), expected)) in answers.iter().zip(&expected).enumerate() {
            assert_eq!(&bits(tokens), expected, "request {i}, round {round}");
        }
    }
    for role in ["prefill", "decode"] {
        assert!(metric(&cluster, &format!("{role}_kv_evictions_total")) > 0, "{role} evicted nothing");
    }
    nothing_is_held(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_says_over_http_what_was_found() {
    let cluster = in_process(&demo(), "--expert 0", Carrier::InProcess).await;
    let url = format!("http://{}/v1/completions", cluster.http_address());
    let story = "Once upon a time, there was a little fox who lived in a deep green forest. ".repeat(8);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let body = json!({ "model": "tiny", "prompt": story, "max_tokens": 4, "temperature": 0, "ignore_eos": true });
        let request = reqwest::Client::new().post(&url).body(body.to_string());
        let answer = request.header("content-type", "application/json").send().await.expect("an answer");
        let answer: Value = serde_json::from_str(&answer.text().await.expect("text")).expect("JSON");
        let usage = &answer["usage"];
        assert!(usage.is_object(), "{answer}");
        let count = |value: &Value| value.as_u64().expect("a count") as usize;
        seen.push((count(&usage["prompt_tokens"]), count(&usage["prompt_tokens_details"]["cached_tokens"])));
    }
    let prompt = seen[0].0;
    assert!(prompt > 2 * BLOCK, "{prompt} tokens are too few for this test");
    assert_eq!(seen, [(prompt, 0), (prompt, (prompt - 1) / BLOCK * BLOCK)]);
    cluster.shutdown().await;
}
