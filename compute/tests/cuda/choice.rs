//! Choosing experts and tokens.

use compute::cuda::{Device, ExpertMatrices, Groups, Routing};
use compute::{RoutingRule, Scoring, Selection, WeightFormat, reference};
use rand::RngExt;

use super::support::{assert_close, bits, device, floats, fresh, output, poisoned, read};

fn route(
    device: &Device,
    logits: &[f32],
    experts: usize,
    bias: Option<&[f32]>,
    rule: &RoutingRule,
) -> (Vec<u16>, Vec<f32>) {
    let chosen = logits.len() / experts * rule.top_k;
    let logits = device.upload(logits).expect("logits");
    let bias = bias.map(|bias| device.upload(bias).expect("bias"));
    let mut weights = poisoned(device, chosen);
    let ids = output(device, chosen, |ids| {
        let bias = bias.as_ref().map(|bias| bias.view());
        let routing = Routing { logits: logits.view(), slices: 1, experts, row_count: None, bias, rule };
        device.route(routing, &mut ids.view_mut(), &mut weights.view_mut())
    });
    (ids, read(device, weights.view()))
}

const V3: RoutingRule = RoutingRule {
    scoring: Scoring::Sigmoid,
    selection: Selection::NoauxTc,
    top_k: 8,
    groups: 8,
    groups_kept: 4,
    normalise: true,
    scale: 2.5,
};

#[test]
#[ignore = "needs a CUDA device"]
fn routes_agree_with_the_reference() {
    let device = device();
    let mut rng = fresh();
    let v2 = RoutingRule {
        scoring: Scoring::Softmax,
        selection: Selection::GroupLimitedGreedy,
        normalise: false,
        scale: 16.0,
        top_k: 6,
        groups_kept: 3,
        ..V3
    };
    let lite = RoutingRule { selection: Selection::Greedy, groups: 1, groups_kept: 1, scale: 1.0, ..v2 };
    let toy = RoutingRule { top_k: 3, groups: 4, groups_kept: 2, ..V3 };
    for (rule, experts) in [(V3, 256), (v2, 160), (lite, 64), (toy, 8), (lite, 7)] {
        for m in [0, 1, 33] {
            // Apart by more than an exponential's error, so that the order is the reference's.
            let mut logits: Vec<f32> = Vec::new();
            for _ in 0..m {
                let mut ranks: Vec<u32> = (0..experts as u32).collect();
                rand::seq::SliceRandom::shuffle(&mut ranks[..], &mut rng);
                logits.extend(ranks.iter().map(|&r| r as f32 / experts as f32 * 6.0 - 3.0));
            }
            // Negative enough that masking with zero instead of minus infinity would show.
            let bias: Vec<f32> = (0..experts).map(|_| rng.random_range(-2.1f32..-1.9)).collect();
            let (ids, weights) = route(device, &logits, experts, Some(&bias), &rule);
            let (mut ids_expected, mut expected) = (vec![0; ids.len()], vec![f32::NAN; ids.len()]);
            reference::route(&logits, experts, Some(&bias), &rule, &mut ids_expected, &mut expected);
            assert_eq!(ids, ids_expected, "{rule:?}");
            assert_close("weights", &weights, &expected, 2e-6);
            for row in 0..m {
                let alone = route(device, &logits[row * experts..][..experts], experts, Some(&bias), &rule);
                let range = row * rule.top_k..(row + 1) * rule.top_k;
                assert_eq!(
                    (alone.0.as_slice(), bits(&alone.1)),
                    (&ids[range.clone()], bits(&weights[range]))
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn ties_go_to_the_lowest_expert_and_nan_is_chosen_last() {
    let device = device();
    let (ids, _) = route(device, &[0.0; 256], 256, None, &V3);
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7]);
    let greedy = RoutingRule { selection: Selection::Greedy, groups: 1, groups_kept: 1, top_k: 3, ..V3 };
    let (ids, _) = route(device, &[f32::NAN, 1.0, f32::NAN, 2.0, 1.0], 5, None, &greedy);
    assert_eq!(ids, [3, 1, 4]);
    let (ids, _) = route(device, &[f32::NAN; 40], 40, None, &greedy);
    assert!(ids.iter().all(|&id| id < 40), "{ids:?}");
}

/// A single row's experts are sorted by the kernel that chooses them; products see the same tiles.
#[test]
#[ignore = "needs a CUDA device"]
fn a_row_is_grouped_as_it_is_routed() {
    let device = device();
    let mut rng = fresh();
    let w = ExpertMatrices::alloc(device, 256, (64, 128), WeightFormat::Bf16).expect("room");
    let kernel = device.expert_kernel(&w);
    for (rows, padding) in [(1, 0), (1, 1), (5, 2)] {
        let logits = floats(&mut rng, rows * 256);
        let there = device.upload(&logits).expect("logits");
        let count = device.upload(&[(rows - padding) as u32]).expect("count");
        let mut weights = poisoned(device, rows * V3.top_k);
        let mut groups = Groups::new(device, rows * V3.top_k, 256).expect("groups");
        let ids: Vec<u16> = output(device, rows * V3.top_k, |ids| {
            let (ids, weights, row_count) =
                (&mut ids.view_mut(), &mut weights.view_mut(), Some(count.view()));
            let logits = there.view();
            let routing = Routing { logits, slices: 1, experts: 256, row_count, bias: None, rule: &V3 };
            device.route_and_group(routing, ids, weights, kernel, &mut groups)
        });
        let (alone, alone_weights) = route(device, &logits, 256, None, &V3);
        let kept = (rows - padding) * V3.top_k;
        assert_eq!(ids[..kept], alone[..kept]);
        assert_eq!(bits(&read(device, weights.view())[..kept]), bits(&alone_weights[..kept]));
        assert!(ids[kept..].iter().all(|&id| id == u16::MAX), "{ids:?}");
        assert_eq!(read(device, groups.row_count()), [kept as u32]);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn logprobs() {
    let device = device();
    let mut rng = fresh();
    for (m, vocab) in [(0, 5), (1, 1), (3, 31), (5, 1000), (4, 1025), (2, 129_280)] {
        let mut logits = floats(&mut rng, m * vocab);
        if m > 0 && vocab > 20 {
            // A tie for the first place.
            logits[13] = 1000.0;
            logits[7] = 1000.0;
        }
        let there = device.upload(&logits).expect("logits");
        let given: Vec<u32> = (0..m).map(|_| rng.random_range(0..vocab as u32)).collect();
        let given_there = device.upload(&given).expect("given");
        for choose in [true, false] {
            let mut logprobs = poisoned(device, m);
            let tokens = output(device, m, |tokens| {
                let given = (!choose).then(|| given_there.view());
                device.logprob(there.view(), vocab, given, &mut tokens.view_mut(), &mut logprobs.view_mut())
            });
            let logprobs = read(device, logprobs.view());
            for row in 0..m {
                let x = &logits[row * vocab..][..vocab];
                let best = (0..vocab).rev().max_by(|&a, &b| x[a].total_cmp(&x[b])).expect("a token");
                let token = if choose { best } else { given[row] as usize };
                assert_eq!(tokens[row] as usize, token, "[{m}, {vocab}]");
                let sum: f64 = x.iter().map(|&x1| f64::from(x1 - x[best]).exp()).sum();
                let expected = f64::from(x[token]) - f64::from(x[best]) - sum.ln();
                let error = (f64::from(logprobs[row]) - expected).abs();
                assert!(error <= 1e-5 * expected.abs().max(1.0), "{} for {expected}", logprobs[row]);
            }
        }
    }
}
