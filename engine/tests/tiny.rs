//! The demo model in `reference` numerics against `model/tiny/golden.json`.

mod support;

use model::{Numerics, TokenId};
use serde::Deserialize;
use support::{Bench, Recorder, Setup, argmax, tiny};

/// One prompt of golden.json; the keys are explained in `model/tiny/README.md`.
#[derive(Deserialize)]
struct Case {
    text: String,
    prompt_ids: Vec<u32>,
    /// `[MoE layer][prompt token]`, ascending.
    experts: Vec<Vec<Vec<u16>>>,
    top8_ids: Vec<usize>,
    top8_logits: Vec<f32>,
    greedy_ids: Vec<u32>,
    mtp_draft_ids: Vec<u32>,
}

#[test]
fn the_demo_model_gives_its_golden_numbers() {
    let text = std::fs::read_to_string(tiny().join("golden.json")).expect("golden.json is there");
    let cases: Vec<Case> = serde_json::from_str(&text).expect("golden.json is well formed");
    assert_eq!(cases.len(), 6);
    let mut bench = Bench::open(&tiny(), Setup::new(Numerics::Reference));
    for case in &cases {
        check(&mut bench, case);
    }
}

fn check(bench: &mut Bench, case: &Case) {
    let what = &case.text;
    let tokens = |ids: &[u32]| -> Vec<TokenId> { ids.iter().copied().map(TokenId).collect() };
    let (prompt, expect) = (tokens(&case.prompt_ids), tokens(&case.greedy_ids));
    let mut sequence = bench.sequence(&prompt, expect.len());
    let mut seen = Recorder::default();
    let rows = bench.prefill(&sequence, prompt.len(), &mut seen);

    assert_eq!(seen.routed.len(), case.experts.len(), "{what}: MoE layers");
    for ((layer, ids, _), golden) in seen.routed.iter().zip(&case.experts) {
        for (row, (ids, golden)) in ids.chunks_exact(golden[0].len()).zip(golden).enumerate() {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            assert_eq!(&ids, golden, "{what}: experts of layer {layer}, token {row}");
        }
    }

    let last = &rows.logits[rows.logits.len() - bench.vocab()..];
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|&a, &b| last[b].total_cmp(&last[a]));
    assert_eq!(order[..8], case.top8_ids, "{what}: best tokens");
    for (&token, &golden) in case.top8_ids.iter().zip(&case.top8_logits) {
        // The file has five decimals.
        assert!(
            (last[token] - golden).abs() < 2e-4,
            "{what}: logit of {token} is {}, not {golden}",
            last[token]
        );
    }

    let hidden_size = bench.engine.config().hidden_size;
    let greedy = bench.greedy(&mut sequence, last, expect.len());
    assert_eq!(greedy.ids, expect, "{what}: greedy ids");

    if bench.has_mtp {
        let mut shifted = prompt[1..].to_vec();
        shifted.push(expect[0]);
        let mtp = bench.mtp(&sequence.blocks, 0, &shifted, &rows.hidden, &mut ());
        let mut drafts = vec![argmax(&mtp.logits[mtp.logits.len() - bench.vocab()..]) as u32];
        for (index, hidden) in greedy.hidden.chunks_exact(hidden_size).enumerate() {
            let draft =
                bench.mtp(&sequence.blocks, prompt.len() + index, &[expect[index + 1]], hidden, &mut ());
            drafts.push(argmax(&draft.logits) as u32);
        }
        assert_eq!(drafts, case.mtp_draft_ids, "{what}: drafts");
    }
    bench.release(sequence);
}
