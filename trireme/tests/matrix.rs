//! The invariance matrix: batch composition × chunk size × prefix hit or miss × MTP on or off × experts local or on one, two or
//! three workers × threads × prompts on prefill or on decode × numerics and KV format, on a fixture and on the demo model, on the
//! CPU or on what `TRIREME_TEST_DEVICE` names. All give the tokens and the
//! log-probabilities of one engine that runs each request alone, its prompt in one chunk, without drafts and cache.
//!
//! The full product has 2 × 4 × 3 × 4 × 2 × 2 × 3 = 1,152 clusters, each asked in three ways. Here a *covering* selection runs: every
//! pair of settings of any two factors occurs together in one of its clusters, and in every cluster all requests are
//! asked one by one (prefixes missed), one by one again (found), and all at once among others that share and
//! extend their prompts (found in part).

mod support;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use engine::{Draw, Engine, EngineOptions, LogitsWanted, SequenceInput, SequenceSampler};
use futures::future::join_all;
use model::{BlockId, Checkpoint, KvFormat, Numerics, SamplingParams, TokenId};
use proto::v1::{GeneratedToken, Sampling, TokenLogprob};
use router::PrefillOnDecode;
use support::{Ask, TokenBits, ask, bits, demo, device, fixture, grpc, in_process_with};
use trireme::cluster::{Carrier, Cluster};

/// Numerics, and what the cache stores.
const CACHES: [(Numerics, KvFormat); 4] = [
    (Numerics::Fp8, KvFormat::Fp8),
    (Numerics::Fp8, KvFormat::Bf16),
    (Numerics::Fp8, KvFormat::F32),
    (Numerics::Reference, KvFormat::F32),
];
/// Prompt tokens of a step: less than a block, a block, more than most prompts here.
const CHUNKS: [usize; 3] = [7, 64, 512];
const MODELS: [&str; 2] = ["demo", "v3_fp8_mtp"];
const EXPERTS: [usize; 4] = [0, 1, 2, 3];
const THREADS: [usize; 2] = [1, 2];
const MTP: [&str; 2] = ["off", "auto"];

/// Which prompts decode computes.
const PREFILL_ON_DECODE: [PrefillOnDecode; 3] =
    [PrefillOnDecode::Never, PrefillOnDecode::Always, PrefillOnDecode::Auto];

/// How many settings each factor has: model, cache, chunk, experts, threads, MTP, where prompts are computed.
const LEVELS: [usize; 7] = [
    MODELS.len(),
    CACHES.len(),
    CHUNKS.len(),
    EXPERTS.len(),
    THREADS.len(),
    MTP.len(),
    PREFILL_ON_DECODE.len(),
];

/// A setting of each factor.
type Case = [usize; LEVELS.len()];

/// Two factors with a setting of each.
type Pair = (usize, usize, usize, usize);

fn pairs(case: &Case) -> impl Iterator<Item = Pair> {
    let factors = 0..case.len();
    factors.flat_map(move |a| (a + 1..case.len()).map(move |b| (a, case[a], b, case[b])))
}

fn every_case() -> impl Iterator<Item = Case> {
    (0..LEVELS.iter().product::<usize>()).map(|number| {
        let mut rest = number;
        LEVELS.map(|levels| {
            let setting = rest % levels;
            rest /= levels;
            setting
        })
    })
}

/// Few cases in which every pair of settings occurs: always the case that adds most.
fn covering() -> Vec<Case> {
    let mut missing: BTreeSet<Pair> =
        every_case().flat_map(|case| pairs(&case).collect::<Vec<_>>()).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let adds = |case: &Case| pairs(case).filter(|pair| missing.contains(pair)).count();
        let best = every_case().max_by_key(adds).expect("there are cases");
        for pair in pairs(&best) {
            missing.remove(&pair);
        }
        chosen.push(best);
    }
    chosen
}

fn model(name: &str) -> PathBuf {
    if name == "demo" { demo() } else { fixture(name) }
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(model(name)).expect("the checkpoint lies in the repository")
}

/// Prompts of less than a block, whole blocks, blocks and a rest; greedy, sampled, penalised; and prompts that begin
/// like others and go on otherwise.
fn requests(name: &str) -> Vec<Ask> {
    let vocabulary = checkpoint(name).config().vocab_size as u32;
    let token = |seed: u32, at: u32| 10 + (seed * 389 + at * 7919 + at * at * 13) % (vocabulary - 20);
    let prompt = |seed: u32, length: u32| (0..length).map(|at| token(seed, at)).collect::<Vec<u32>>();
    let alone = [1, 40, 64, 129, 200].into_iter().zip(1..).map(|(length, seed)| prompt(seed, length));
    let extended = [(64, 70), (128, 10), (150, 1)].into_iter().zip(20..).map(|((shared, more), seed)| {
        let mut tokens = prompt(5, 200);
        tokens.truncate(shared);
        tokens.extend(prompt(seed, more));
        tokens
    });
    let prompts: Vec<_> = alone.chain(extended).collect();
    let with_sampling = |(at, prompt): (usize, Vec<u32>)| {
        let sampled = at % 2 == 1;
        let sampling = Sampling {
            temperature: Some(if sampled { 0.8 } else { 0.0 }),
            top_p: Some(if at % 4 == 1 { 0.9 } else { 1.0 }),
            top_k: Some(if at % 4 == 3 { 40 } else { 0 }),
            min_p: Some(0.0),
            repetition_penalty: Some(if at % 3 == 2 { 1.1 } else { 1.0 }),
            presence_penalty: Some(if at == 3 { 0.3 } else { 0.0 }),
            frequency_penalty: Some(if at == 4 { 0.2 } else { 0.0 }),
            logit_bias: [(11, 0.5)].into(),
            seed: Some(70 + at as u64),
            logprobs: Some(at as u32 % 3),
        };
        Ask { prompt, max_tokens: 9 + 2 * at as u32, ignore_eos: true, sampling }
    };
    prompts.into_iter().enumerate().map(with_sampling).collect()
}

/// One engine, one request at a time, each prompt in one step.
fn alone(name: &str, (numerics, kv_format): (Numerics, KvFormat), requests: &[Ask]) -> Vec<Vec<TokenBits>> {
    const BLOCKS: usize = 8;
    let checkpoint = checkpoint(name);
    let options = EngineOptions {
        device: device(),
        numerics,
        kv_format: Some(kv_format),
        kv_blocks_max: BLOCKS,
        threads: 2,
        step_tokens_max: 512,
        mtp: false,
    };
    let mut engine = Engine::load_with_experts(&checkpoint, &options, &mut |_, _| {}).expect("engine");
    let blocks: Vec<_> = (0..BLOCKS as u32).map(BlockId).collect();
    requests.iter().map(|request| answer(&mut engine, &blocks, request)).collect()
}

fn answer(engine: &mut Engine, block_table: &[BlockId], request: &Ask) -> Vec<TokenBits> {
    let s = &request.sampling;
    let params = SamplingParams {
        temperature: s.temperature.expect("set"),
        top_p: s.top_p.expect("set"),
        top_k: s.top_k.expect("set"),
        min_p: s.min_p.expect("set"),
        repetition_penalty: s.repetition_penalty.expect("set"),
        presence_penalty: s.presence_penalty.expect("set"),
        frequency_penalty: s.frequency_penalty.expect("set"),
        logit_bias: s.logit_bias.iter().map(|(&token, &bias)| (TokenId(token), bias)).collect(),
        seed: s.seed.expect("set"),
        logprobs: s.logprobs,
    };
    let mut next: Vec<_> = request.prompt.iter().map(|&token| TokenId(token)).collect();
    let mut sampler = SequenceSampler::new(&params, 0, &next);
    let (mut position, mut out) = (0, Vec::new());
    for _ in 0..request.max_tokens {
        let input = SequenceInput { tokens: &next, position, block_table, logits: LogitsWanted::Last };
        position += next.len();
        let draw = Some(Draw { sampler: &sampler, position, suppress: &[], ahead: &[] });
        let drawn = engine.step_drawing(&[input], &mut std::iter::once(draw), &mut ()).expect("a step");
        let sampled = drawn.token(0, &mut sampler, (position, &[]), &mut Vec::new());
        sampler.observe(sampled.token);
        next = vec![sampled.token];
        let top = sampled.top.iter().map(|&(token, logprob)| TokenLogprob { token_id: token.0, logprob });
        let logprob = Some(sampled.logprob);
        out.push(GeneratedToken { token_id: sampled.token.0, logprob, top: top.collect() });
    }
    bits(&out)
}

async fn check(case: &Case, requests: &[Ask], expected: &[Vec<TokenBits>]) {
    let [name, cache, chunk, experts, threads, mtp, place] = *case;
    let policy = PREFILL_ON_DECODE[place];
    let (numerics, kv_format) = CACHES[cache];
    let flags = format!(
        "--device {} --numerics {numerics} --kv-format {kv_format} --expert {} --threads {} --mtp {} --kv-blocks-max 256",
        device(),
        EXPERTS[experts],
        THREADS[threads],
        MTP[mtp]
    );
    let what = format!("{} {flags}, chunks of {}, prompts on decode {policy:?}", MODELS[name], CHUNKS[chunk]);
    let cluster = in_process_with(&model(MODELS[name]), &flags, Carrier::InProcess, |config| {
        config.prefill.step_tokens_max = CHUNKS[chunk];
        config.decode.prefill_tokens_max = CHUNKS[chunk];
        config.router.prefill_on_decode = policy;
    })
    .await;
    let client = grpc(cluster.grpc_address()).await;
    for turn in ["first", "again"] {
        for (at, (request, expected)) in requests.iter().zip(expected).enumerate() {
            let seen = ask(client.clone(), request).await.expect("an answer");
            assert_eq!(&bits(&seen), expected, "{what}: request {at}, {turn}");
        }
    }
    let together = join_all(requests.iter().map(|request| ask(client.clone(), request))).await;
    for (at, (seen, expected)) in together.into_iter().zip(expected).enumerate() {
        assert_eq!(&bits(&seen.expect("an answer")), expected, "{what}: request {at} among the others");
    }
    let accepted = metric(&cluster, "decode_accepted_tokens_total{position=\"1\"}");
    let drafted = metric(&cluster, "decode_drafted_tokens_total{position=\"1\"}");
    let hits = metric(&cluster, "decode_prefix_hit_tokens_total")
        + metric(&cluster, "prefill_prefix_hit_tokens_total");
    let here = metric(&cluster, "decode_prompt_tokens_total");
    assert_eq!(here > 0, policy != PrefillOnDecode::Never, "{what}: prompt tokens on decode");
    let there = metric(&cluster, "prefill_tokens_total");
    assert_eq!(there > 0, policy != PrefillOnDecode::Always, "{what}: prompt tokens on prefill");
    println!("{what}: {here} prompt tokens on decode, {there} on prefill");
    println!("{what}: {accepted} of {drafted} first drafts accepted, {hits} prefix tokens found");
    assert_eq!(drafted > 0, MTP[mtp] == "auto", "{what}: drafts");
    // The fixture's weights are random, and so is what its module drafts.
    assert!(accepted > 0 || MTP[mtp] == "off" || MODELS[name] != "demo", "{what}: no draft stood");
    assert!(hits > 0, "{what}: no prefix was found");
    cluster.shutdown().await;
}

/// Sum of a metric over the workers that have it.
fn metric(cluster: &Cluster, name: &str) -> u64 {
    let texts: Vec<_> = cluster.worker_metrics().map(|(_, text)| text).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    let values =
        lines.filter_map(|line| line.strip_prefix(name)).filter_map(|rest| rest.trim().parse::<u64>().ok());
    values.sum()
}

#[test]
fn the_selection_covers_every_pair() {
    let chosen = covering();
    let covered: BTreeSet<Pair> = chosen.iter().flat_map(|case| pairs(case).collect::<Vec<_>>()).collect();
    let all: BTreeSet<Pair> = every_case().flat_map(|case| pairs(&case).collect::<Vec<_>>()).collect();
    assert_eq!(covered, all);
    // Two factors have four settings: no selection has fewer.
    assert!((16..=24).contains(&chosen.len()), "{} cases", chosen.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cluster_gives_the_bits_of_one_engine() {
    let asked = MODELS.map(requests);
    let mut expected: HashMap<(usize, usize), Vec<Vec<TokenBits>>> = HashMap::new();
    for case in covering() {
        let [model, cache, ..] = case;
        let expected = expected
            .entry((model, cache))
            .or_insert_with(|| alone(MODELS[model], CACHES[cache], &asked[model]));
        check(&case, &asked[model], expected).await;
    }
}
