//! The oracle: a request's tokens and log-probabilities are the same bits whatever cluster answers, and whoever
//! else is being answered.

mod support;

use std::net::SocketAddr;

use engine::{Engine, EngineOptions, ExpertBank, LocalExperts, LogitsWanted, SequenceInput, SequenceSampler};
use futures::future::join_all;
use model::{BlockId, Checkpoint, Device, Numerics, SamplingParams, TokenId, Tokenizer};
use proto::v1::{GeneratedToken, Sampling};
use support::{Ask, TokenBits, Up, ask, bits, demo, grpc, in_process};
use trireme::cluster::Carrier;

type Bits = Vec<TokenBits>;

/// Sixteen requests that differ in everything: length (one token to many chunks), sampling, penalties, seeds.
fn mixed() -> Vec<Ask> {
    let tokenizer = Tokenizer::open(demo()).expect("tokenizer");
    let story = "Once upon a time, there was a little fox who lived in a deep green forest. One day he found an old \
                 map under a bush, and he ran to his friend the bear cub to show it to him. ";
    (0..16_u32)
        .map(|i| {
            let text = match i % 4 {
                0 => "Once upon a time".to_owned(),
                1 => story.to_owned(),
                2 => story.repeat(1 + i as usize),
                _ => "<｜User｜>What is the capital of France?<｜Assistant｜>".to_owned(),
            };
            let prompt = tokenizer.encode_prompt(&text).expect("ids").iter().map(|t| t.0).collect();
            let sampled = i % 2 == 1;
            let sampling = Sampling {
                temperature: Some(if sampled { 0.5 + 0.05 * i as f32 } else { 0.0 }),
                top_p: Some(if i % 3 == 1 { 0.9 } else { 1.0 }),
                top_k: Some(if i % 5 == 1 { 20 } else { 0 }),
                min_p: Some(if i % 7 == 3 { 0.02 } else { 0.0 }),
                repetition_penalty: Some(if i % 4 == 3 { 1.1 } else { 1.0 }),
                presence_penalty: Some(if i % 8 == 5 { 0.4 } else { 0.0 }),
                frequency_penalty: Some(if i % 8 == 6 { 0.2 } else { 0.0 }),
                seed: Some(1000 + u64::from(i)),
                logprobs: Some(i % 6),
                ..Default::default()
            };
            Ask { prompt, max_tokens: 8 + i, ignore_eos: true, sampling }
        })
        .collect()
}

/// One engine, one sequence at a time, the prompt in one chunk: the plainest way to the answer.
fn alone(requests: &[Ask], numerics: Numerics) -> Vec<Bits> {
    let checkpoint = Checkpoint::open(demo()).expect("checkpoint");
    let bank = ExpertBank::load_all(&checkpoint, numerics, false, &mut |_, _| {}).expect("experts");
    let options = EngineOptions {
        device: Device::Cpu,
        numerics,
        kv_format: None,
        kv_blocks_max: 64,
        threads: 2,
        step_tokens_max: 2048,
        mtp: false,
    };
    let mut engine = Engine::load(&checkpoint, &options, Box::new(LocalExperts::new(bank)), &mut |_, _| {})
        .expect("engine");
    let blocks: Vec<_> = (0..64).map(BlockId).collect();
    requests.iter().map(|request| answer(&mut engine, &blocks, request)).collect()
}

fn answer(engine: &mut Engine, blocks: &[BlockId], request: &Ask) -> Bits {
    let prompt: Vec<_> = request.prompt.iter().map(|&t| TokenId(t)).collect();
    let s = &request.sampling;
    let params = SamplingParams {
        temperature: s.temperature.expect("set"),
        top_p: s.top_p.expect("set"),
        top_k: s.top_k.expect("set"),
        min_p: s.min_p.expect("set"),
        repetition_penalty: s.repetition_penalty.expect("set"),
        presence_penalty: s.presence_penalty.expect("set"),
        frequency_penalty: s.frequency_penalty.expect("set"),
        logit_bias: Vec::new(),
        seed: s.seed.expect("set"),
        logprobs: s.logprobs,
    };
    let mut sampler = SequenceSampler::new(&params, 0, &prompt);
    let (mut next, mut position, mut out) = (prompt, 0, Vec::new());
    for _ in 0..request.max_tokens {
        let input =
            SequenceInput { tokens: &next, position, block_table: blocks, logits: LogitsWanted::Last };
        let mut logits = engine.step(&[input], &mut ()).expect("a step").logits.to_vec();
        position += next.len();
        let sampled = sampler.sample(&mut logits, position, &[]);
        sampler.observe(sampled.token);
        next = vec![sampled.token];
        out.push(GeneratedToken {
            token_id: sampled.token.0,
            logprob: Some(sampled.logprob),
            top: sampled
                .top
                .iter()
                .map(|&(token, logprob)| proto::v1::TokenLogprob { token_id: token.0, logprob })
                .collect(),
        });
    }
    bits(&out)
}

async fn together(address: SocketAddr, requests: &[Ask]) -> Vec<Bits> {
    let client = grpc(address).await;
    let answers = join_all(requests.iter().map(|request| ask(client.clone(), request))).await;
    answers.into_iter().map(|answer| bits(&answer.expect("an answer"))).collect()
}

fn assert_same(expected: &[Bits], seen: &[Bits], what: &str) {
    for (i, (expected, seen)) in expected.iter().zip(seen).enumerate() {
        assert_eq!(seen, expected, "{what}: request {i}");
    }
    assert_eq!(seen.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_engine_and_every_cluster_agree() {
    let requests = mixed();
    let expected = alone(&requests, Numerics::Fp8);
    for (flags, carrier) in [
        ("--prefill 1 --decode 1 --expert 2", Carrier::Quic),
        ("--prefill 2 --decode 2 --expert 3", Carrier::InProcess),
        ("--prefill 1 --decode 1 --expert 0", Carrier::InProcess),
    ] {
        let cluster = in_process(&demo(), flags, carrier).await;
        let seen = together(cluster.grpc_address(), &requests).await;
        cluster.shutdown().await;
        assert_same(&expected, &seen, &format!("{flags}, {carrier:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_numerics_agree_as_well() {
    let requests = mixed();
    let expected = alone(&requests, Numerics::Reference);
    let cluster = in_process(&demo(), "--numerics reference --expert 3", Carrier::InProcess).await;
    let seen = together(cluster.grpc_address(), &requests).await;
    cluster.shutdown().await;
    assert_same(&expected, &seen, "reference, three expert workers");
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_agree_with_one_engine() {
    let requests = mixed();
    let expected = alone(&requests, Numerics::Fp8);
    let up = tokio::task::spawn_blocking(|| Up::start("--quiet --prefill 2 --decode 2 --expert 3"))
        .await
        .expect("up");
    let address = up.grpc.trim_start_matches("http://").parse().expect("an address");
    let seen = together(address, &requests).await;
    assert_eq!(up.stop(), Some(0));
    assert_same(&expected, &seen, "2+2+3 processes");
}
