//! `reference` numerics against every golden fixture, within the tolerances of `fixtures/README.md`.

mod support;

use model::{Numerics, TokenId};
use support::{Bench, Golden, Recorder, Rows, Sequence, Setup, assert_close, fixture};

/// f32 arithmetic on the multiplied-out weights (fixtures/README.md).
const LOGITS: f32 = 2e-4;
/// The long prompt: angles in f32 or f64 alone make 2e-4.
const LONG_LOGITS: f32 = 1e-3;
/// Below this a router may choose otherwise.
const ROUTER_MARGIN: f32 = 1e-4;
const GREEDY_TOKENS: usize = 32;

#[test]
fn v3_bf16() {
    check_fixture("v3_bf16");
}

#[test]
fn v3_fp8_mtp() {
    check_fixture("v3_fp8_mtp");
}

#[test]
fn v3_fp8_aligned() {
    check_fixture("v3_fp8_aligned");
}

#[test]
fn v2_lite() {
    check_fixture("v2_lite");
}

#[test]
fn v2_group() {
    check_fixture("v2_group");
}

#[test]
fn v3_bf16_long() {
    check_long("v3_bf16");
}

#[test]
fn v3_fp8_aligned_long() {
    check_long("v3_fp8_aligned");
}

#[test]
fn v2_lite_long() {
    check_long("v2_lite");
}

fn check_fixture(name: &str) {
    let golden = Golden::open(&fixture(name).join("golden.safetensors"));
    let mut bench = Bench::open(&fixture(name), Setup::new(Numerics::Reference));
    for prompt in 0..5 {
        check_prompt(&mut bench, &golden, &format!("{name} p{prompt}"), &format!("p{prompt}"));
    }
}

fn check_prompt(bench: &mut Bench, golden: &Golden, what: &str, p: &str) {
    let mut sequence = bench.sequence(&golden.tokens(&format!("{p}.input_ids")), GREEDY_TOKENS);
    let mut seen = Recorder::default();
    let prompt_tokens = sequence.tokens.len();
    let rows = bench.prefill(&sequence, prompt_tokens, &mut seen);

    assert_close(&format!("{what} logits"), &rows.logits, &golden.f32(&format!("{p}.logits")), LOGITS);
    assert_close(&format!("{what} hidden"), &rows.hidden, &golden.f32(&format!("{p}.hidden")), LOGITS);
    let layers: Vec<usize> = (0..bench.engine.config().num_hidden_layers).collect();
    assert_eq!(seen.done, layers, "{what}: every layer is announced once, in order");
    for (layer, hidden) in &seen.hidden {
        let tensor = format!("{p}.layer{layer}.hidden");
        if p == "p0" {
            assert_close(&format!("{what} {tensor}"), hidden, &golden.f32(&tensor), LOGITS);
        }
    }
    assert!(!seen.routed.is_empty());
    for (layer, ids, weights) in &seen.routed {
        check_router(golden, what, &format!("{p}.layer{layer}.router"), ids, weights);
    }
    if p == "p0" {
        check_cache(bench, golden, what, &sequence);
    }

    let last = &rows.logits[rows.logits.len() - bench.vocab()..];
    let greedy = bench.greedy(&mut sequence, last, GREEDY_TOKENS);
    assert_eq!(greedy.ids, golden.tokens(&format!("{p}.greedy_ids")), "{what} greedy ids");
    if p == "p0" {
        assert_close(
            &format!("{what} greedy logits"),
            &greedy.logits,
            &golden.f32("p0.greedy_logits"),
            LOGITS,
        );
    }
    if bench.has_mtp {
        check_mtp(bench, golden, what, p, &sequence, prompt_tokens, &rows, &greedy);
    }
    bench.release(sequence);
}

/// Ids as sets (the files have them ascending), and the weight of each.
fn check_router(golden: &Golden, what: &str, tensor: &str, ids: &[u16], weights: &[f32]) {
    let margins = golden.f32(&format!("{tensor}_margin"));
    let golden_ids = golden.i32(&format!("{tensor}_ids"));
    let golden_weights = golden.f32(&format!("{tensor}_weights"));
    let topk = ids.len() / margins.len();
    assert_eq!(ids.len(), golden_ids.len(), "{what} {tensor}");
    for (row, &margin) in margins.iter().enumerate().filter(|(_, margin)| **margin > ROUTER_MARGIN) {
        let range = row * topk..(row + 1) * topk;
        let mut ours: Vec<_> = ids[range.clone()].iter().zip(&weights[range.clone()]).collect();
        ours.sort_by_key(|(id, _)| **id);
        let ours_ids: Vec<i32> = ours.iter().map(|(id, _)| i32::from(**id)).collect();
        let ours_weights: Vec<f32> = ours.iter().map(|(_, weight)| **weight).collect();
        assert_eq!(ours_ids, golden_ids[range.clone()], "{what} {tensor} row {row}, margin {margin}");
        assert_close(
            &format!("{what} {tensor} weights of row {row}"),
            &ours_weights,
            &golden_weights[range],
            1e-4,
        );
    }
}

/// The first layer's cache rows, as they are stored.
fn check_cache(bench: &Bench, golden: &Golden, what: &str, sequence: &Sequence) {
    let layout = bench.engine.kv_layout();
    let (mut latents, mut keys) = (Vec::new(), Vec::new());
    for position in 0..sequence.tokens.len() {
        let block = sequence.blocks[position / layout.block_tokens];
        let start = position % layout.block_tokens * layout.row_bytes();
        let row = &bench.engine.kv().block_layer(block, 0)[start..start + layout.row_bytes()];
        let values: Vec<f32> = row
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        latents.extend_from_slice(&values[..layout.latent]);
        keys.extend_from_slice(&values[layout.latent..layout.latent + layout.rope]);
    }
    assert_close(&format!("{what} kv_c"), &latents, &golden.f32("p0.layer0.kv_c"), LOGITS);
    assert_close(&format!("{what} k_pe"), &keys, &golden.f32("p0.layer0.k_pe"), LOGITS);
}

#[allow(clippy::too_many_arguments)] // A test's own plumbing.
fn check_mtp(
    bench: &mut Bench,
    golden: &Golden,
    what: &str,
    p: &str,
    sequence: &Sequence,
    prompt_tokens: usize,
    rows: &Rows,
    greedy: &support::Greedy,
) {
    let mut seen = Recorder::default();
    let shifted = golden.tokens(&format!("{p}.mtp.input_ids"));
    assert_eq!(shifted.last(), greedy.ids.first(), "{what}: the last MTP row sees the first greedy token");
    let mtp = bench.mtp(&sequence.blocks, 0, &shifted, &rows.hidden, &mut seen);
    assert_close(&format!("{what} mtp logits"), &mtp.logits, &golden.f32(&format!("{p}.mtp.logits")), LOGITS);
    assert_close(&format!("{what} mtp hidden"), &mtp.hidden, &golden.f32(&format!("{p}.mtp.hidden")), LOGITS);
    let (layer, ids, weights) = &seen.routed[0];
    assert_eq!(*layer, bench.engine.config().num_hidden_layers);
    check_router(golden, what, &format!("{p}.mtp.router"), ids, weights);

    let vocab = bench.vocab();
    let hidden_size = bench.engine.config().hidden_size;
    let mut drafts = vec![TokenId(support::argmax(&mtp.logits[mtp.logits.len() - vocab..]) as u32)];
    for (index, hidden) in greedy.hidden.chunks_exact(hidden_size).enumerate().take(GREEDY_TOKENS - 2) {
        let token = greedy.ids[index + 1];
        let draft = bench.mtp(&sequence.blocks, prompt_tokens + index, &[token], hidden, &mut ());
        drafts.push(TokenId(support::argmax(&draft.logits) as u32));
    }
    assert_eq!(drafts, golden.tokens(&format!("{p}.mtp.draft_ids")), "{what} drafts");
}

fn check_long(name: &str) {
    let golden = Golden::open(&fixture(name).join("golden_long.safetensors"));
    let mut bench = Bench::open(&fixture(name), Setup::new(Numerics::Reference));
    let mut sequence = bench.sequence(&golden.tokens("long.input_ids"), GREEDY_TOKENS);
    let mut seen = Recorder::default();
    let rows = bench.prefill(&sequence, sequence.tokens.len(), &mut seen);
    let vocab = bench.vocab();
    let hidden_size = bench.engine.config().hidden_size;

    let positions: Vec<usize> = golden.i32("long.positions").into_iter().map(|p| p as usize).collect();
    let at = |values: &[f32], width: usize| -> Vec<f32> {
        positions.iter().flat_map(|p| values[p * width..(p + 1) * width].to_vec()).collect()
    };
    assert_close(
        &format!("{name} logits"),
        &at(&rows.logits, vocab),
        &golden.f32("long.logits"),
        LONG_LOGITS,
    );
    assert_close(
        &format!("{name} hidden"),
        &at(&rows.hidden, hidden_size),
        &golden.f32("long.hidden"),
        LONG_LOGITS,
    );
    let best = golden.tokens("long.argmax");
    for (row, (logits, margin)) in
        rows.logits.chunks_exact(vocab).zip(golden.f32("long.top_margin")).enumerate()
    {
        if margin > 2.0 * LONG_LOGITS {
            assert_eq!(support::argmax(logits), best[row].0 as usize, "{name} argmax of row {row}");
        }
    }
    for (layer, ids, _) in &seen.routed {
        check_long_router(&golden, name, &format!("long.layer{layer}.router"), ids);
    }
    let last = &rows.logits[rows.logits.len() - vocab..];
    let greedy = bench.greedy(&mut sequence, last, GREEDY_TOKENS);
    assert_eq!(greedy.ids, golden.tokens("long.greedy_ids"), "{name} greedy ids");
}

fn check_long_router(golden: &Golden, name: &str, tensor: &str, ids: &[u16]) {
    let margins = golden.f32(&format!("{tensor}_margin"));
    let golden_ids = golden.i32(&format!("{tensor}_ids"));
    let topk = ids.len() / margins.len();
    for (row, &margin) in margins.iter().enumerate().filter(|(_, margin)| **margin > ROUTER_MARGIN) {
        let mut ours: Vec<i32> = ids[row * topk..(row + 1) * topk].iter().map(|id| i32::from(*id)).collect();
        ours.sort_unstable();
        assert_eq!(
            ours,
            golden_ids[row * topk..(row + 1) * topk],
            "{name} {tensor} row {row}, margin {margin}"
        );
    }
}
