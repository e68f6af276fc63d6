//! The golden fixtures through a running cluster: router, prefill, hand-off, decode and expert workers.

mod support;

use proto::v1::Sampling;
use safetensors::{SafeTensors, tensor::TensorView};
use support::{Ask, FIXTURES, ask, fixture, grpc, in_process};
use trireme::cluster::Carrier;

fn i32s(view: &TensorView) -> Vec<u32> {
    view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four")) as u32).collect()
}

fn f32s(view: &TensorView) -> Vec<f32> {
    view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    logits.iter().map(|&l| (f64::from(l - max) - sum.ln()) as f32).collect()
}

/// 32 greedy tokens of each prompt, and for p0 the log-probabilities of every position.
#[tokio::test(flavor = "multi_thread")]
async fn fixtures_hold_through_the_cluster() {
    for name in FIXTURES {
        let bytes = std::fs::read(fixture(name).join("golden.safetensors")).expect("golden");
        let golden = SafeTensors::deserialize(&bytes).expect("safetensors");
        let cluster =
            in_process(&fixture(name), "--numerics reference --kv-blocks-max 256", Carrier::Quic).await;
        let client = grpc(cluster.grpc_address()).await;
        for k in 0..5 {
            let tensor = |what: &str| golden.tensor(&format!("p{k}.{what}")).expect(what);
            let request = Ask {
                prompt: i32s(&tensor("input_ids")),
                max_tokens: 32,
                ignore_eos: true,
                sampling: Sampling { temperature: Some(0.0), logprobs: Some(5), ..Default::default() },
            };
            let tokens = ask(client.clone(), &request).await.expect("an answer");
            let ids: Vec<u32> = tokens.iter().map(|t| t.token_id).collect();
            assert_eq!(ids, i32s(&tensor("greedy_ids")), "{name}, prompt {k}");
            if k > 0 {
                continue;
            }
            let logits = tensor("greedy_logits");
            let vocabulary = logits.shape()[1];
            for (j, row) in f32s(&logits).chunks_exact(vocabulary).enumerate() {
                let expected = log_softmax(row);
                assert_eq!(tokens[j].top.len(), 5);
                for seen in &tokens[j].top {
                    let error = (seen.logprob - expected[seen.token_id as usize]).abs();
                    // Logits hold to 2e-4, their logarithmic sum as well.
                    assert!(error <= 4e-4, "{name}, position {j}, token {}: off by {error}", seen.token_id);
                }
            }
        }
        cluster.shutdown().await;
    }
}

/// 1,500 tokens: many chunks, many blocks, a partial last one.
#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_hold_through_the_cluster() {
    for name in ["v3_bf16", "v3_fp8_aligned", "v2_lite"] {
        let bytes = std::fs::read(fixture(name).join("golden_long.safetensors")).expect("golden");
        let golden = SafeTensors::deserialize(&bytes).expect("safetensors");
        let cluster =
            in_process(&fixture(name), "--numerics reference --kv-blocks-max 256", Carrier::InProcess).await;
        let expected = i32s(&golden.tensor("long.greedy_ids").expect("greedy"));
        let request = Ask {
            prompt: i32s(&golden.tensor("long.input_ids").expect("ids")),
            max_tokens: expected.len() as u32,
            ignore_eos: true,
            sampling: Sampling { temperature: Some(0.0), ..Default::default() },
        };
        let tokens = ask(grpc(cluster.grpc_address()).await, &request).await.expect("an answer");
        let ids: Vec<u32> = tokens.iter().map(|t| t.token_id).collect();
        assert_eq!(ids, expected, "{name}");
        cluster.shutdown().await;
    }
}

/// The demo model's own reference texts.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_model_holds_through_the_cluster() {
    let text = std::fs::read_to_string(support::demo().join("golden.json")).expect("golden.json");
    let golden: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("ids") };
    let cluster =
        in_process(&support::demo(), "--numerics reference --kv-blocks-max 256", Carrier::InProcess).await;
    let client = grpc(cluster.grpc_address()).await;
    for case in &golden {
        let expected = ids(&case["greedy_ids"]);
        let request = Ask {
            prompt: ids(&case["prompt_ids"]),
            max_tokens: 64,
            ignore_eos: false,
            sampling: Sampling { temperature: Some(0.0), ..Default::default() },
        };
        let tokens = ask(client.clone(), &request).await.expect("an answer");
        let seen: Vec<u32> = tokens.iter().map(|t| t.token_id).collect();
        assert_eq!(seen, expected, "{}", case["text"]);
    }
    cluster.shutdown().await;
}
