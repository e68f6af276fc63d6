//! Blocks that a pool had no room for come back from host memory or from a disk, are counted as found, and nobody can tell
//! from the answers: not when the disk is damaged either.

mod support;

use std::path::Path;
use std::time::Instant;

use proto::v1::generate_request::Prompt;
use proto::v1::{GenerateRequest, Sampling, Stopping, TokenIds};
use support::{PATIENCE, TokenBits, bits, demo, grpc, in_process_with};
use trireme::cluster::{Carrier, Cluster};

/// Blocks of each pool: two sequences of these tests.
const POOL: &str = "--expert 0 --kv-blocks-max 8";
const PROMPT_TOKENS: usize = 200;
/// Full blocks of a prompt, but for its last token's.
const FOUND_TOKENS: u32 = 192;
const CONVERSATIONS: u32 = 5;

/// A prompt of its own from the first token on.
fn prompt(seed: u32) -> Vec<u32> {
    (0..PROMPT_TOKENS as u32).map(|at| 10 + (seed * 389 + at * 7919 + at * at * 13) % 1000).collect()
}

async fn cluster(host_bytes: usize, disk: Option<&Path>) -> Cluster {
    in_process_with(&demo(), POOL, Carrier::InProcess, |config| {
        config.cache.host_bytes = host_bytes;
        config.cache.disk_bytes = if disk.is_some() { 256 << 20 } else { 0 };
        config.cache.disk_path = disk.map(Path::to_owned);
    })
    .await
}

/// The answer's bits, and how many tokens of the prompt were found.
async fn ask(cluster: &Cluster, seed: u32) -> (Vec<TokenBits>, u32) {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt(seed) })),
        sampling: Some(Sampling {
            temperature: Some(0.8),
            seed: Some(u64::from(seed)),
            logprobs: Some(2),
            ..Default::default()
        }),
        stopping: Some(Stopping { max_tokens: Some(8), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let run = async {
        let mut stream = grpc(cluster.grpc_address()).await.generate(request).await?.into_inner();
        let (mut tokens, mut usage) = (Vec::new(), None);
        while let Some(message) = stream.message().await? {
            tokens.extend(message.tokens);
            usage = message.usage.or(usage);
        }
        Ok::<_, tonic::Status>((bits(&tokens), usage.expect("the last message carries it").cached_tokens))
    };
    tokio::time::timeout(PATIENCE, run).await.expect("an answer in time").expect("an answer")
}

async fn ask_all(cluster: &Cluster) -> Vec<(Vec<TokenBits>, u32)> {
    let mut answers = Vec::new();
    for seed in 0..CONVERSATIONS {
        answers.push(ask(cluster, seed).await);
    }
    answers
}

fn metric(cluster: &Cluster, name: &str) -> u64 {
    let texts: Vec<_> = cluster.worker_metrics().map(|(_, text)| text).collect();
    let lines = texts.iter().flat_map(|text| text.lines());
    let found = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
    let values: Vec<_> = found.collect();
    assert!(!values.is_empty(), "nobody reports {name}");
    values.iter().sum()
}

/// Waits until a count has appeared: a worker publishes it within a round of its loop.
async fn reaches(cluster: &Cluster, name: &str, least: u64) {
    let begin = Instant::now();
    while metric(cluster, name) < least {
        assert!(begin.elapsed() < PATIENCE, "{name} is {} and not {least}", metric(cluster, name));
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_blocks_come_back_from_host_memory() {
    let without = cluster(0, None).await;
    let expected = ask_all(&without).await;
    let again = ask_all(&without).await;
    assert!(again.iter().all(|(_, found)| *found < FOUND_TOKENS), "the pools are too small for this");
    without.shutdown().await;

    let cluster = cluster(64 << 20, None).await;
    for round in 0..3 {
        for (seed, ((answer, found), (expected, _))) in
            ask_all(&cluster).await.iter().zip(&expected).enumerate()
        {
            assert_eq!(answer, expected, "{seed}, round {round}");
            assert_eq!(*found, if round == 0 { 0 } else { FOUND_TOKENS }, "{seed}, round {round}");
        }
    }
    for role in ["prefill", "decode"] {
        reaches(&cluster, &format!("{role}_prefix_host_hit_tokens_total"), 1).await;
        assert_eq!(metric(&cluster, &format!("{role}_prefix_disk_hit_tokens_total")), 0);
        assert_eq!(metric(&cluster, &format!("{role}_kv_tier_corrupt_total")), 0);
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_finds_its_blocks_on_disk_and_survives_their_damage() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = cluster(64 << 20, Some(folder.path())).await;
    let expected = ask_all(&first).await;
    assert!(expected.iter().all(|(_, found)| *found == 0));
    first.shutdown().await;

    let second = cluster(64 << 20, Some(folder.path())).await;
    for ((answer, found), (expected, _)) in ask_all(&second).await.iter().zip(&expected) {
        assert_eq!((answer, *found), (expected, FOUND_TOKENS));
    }
    for role in ["prefill", "decode"] {
        reaches(&second, &format!("{role}_prefix_disk_hit_tokens_total"), u64::from(FOUND_TOKENS)).await;
    }
    second.shutdown().await;

    let third = cluster(64 << 20, Some(folder.path())).await;
    let mut damaged = 0;
    for worker in ["prefill-0", "decode-0"] {
        for file in std::fs::read_dir(folder.path().join(worker)).expect("its folder").flatten() {
            let mut bytes = std::fs::read(file.path()).expect("a file");
            bytes.iter_mut().skip(5000).step_by(4001).for_each(|byte| *byte ^= 0x10);
            std::fs::write(file.path(), bytes).expect("written");
            damaged += 1;
        }
    }
    assert!(damaged >= 2);
    for ((answer, found), (expected, _)) in ask_all(&third).await.iter().zip(&expected) {
        assert_eq!((answer, *found), (expected, 0), "a miss, and the same answer");
    }
    for role in ["prefill", "decode"] {
        let misses = format!("{role}_kv_tier_disk_misses_total");
        let begin = Instant::now();
        while metric(&third, &misses) + metric(&third, &format!("{role}_kv_tier_corrupt_total")) == 0 {
            assert!(begin.elapsed() < PATIENCE, "{role} has not noticed");
            tokio::task::yield_now().await;
        }
    }
    third.shutdown().await;
}
