use compute::ScaleFormat;
use proptest::prelude::*;

use super::*;

const HIDDEN: usize = 200;

fn share() -> Share {
    Share {
        // Rank 1 of 2 holds experts 4..8 of layers 1 and 2.
        placement: Placement::contiguous(1..3, 8, 2).expect("valid"),
        rank: 1,
        wire: WireFormats {
            hidden: HIDDEN,
            activation: ActivationFormat::Fp8(ScaleFormat::F32),
            result: ResultFormat::Bf16,
        },
        tokens_max: 4,
        vectors_max: 6,
    }
}

fn good() -> (DispatchHead, usize) {
    let head = DispatchHead {
        source_incarnation: 7,
        sequence: 1,
        layer: 2,
        placement_version: share().placement.version(),
        tokens: 2,
        hidden: HIDDEN as u32,
        experts: vec![4, 7, 5],
        experts_per_token: vec![2, 1],
    };
    // 200 codes and two scales a row.
    (head, 2 * (HIDDEN + 8))
}

#[test]
fn a_good_dispatch_passes() {
    let (head, body) = good();
    assert_eq!(check_dispatch(&head, body, &share()), Ok(()));
}

#[test]
fn each_wrong_field_is_named() {
    let check = |change: fn(&mut DispatchHead, &mut usize), expect: &str| {
        let (mut head, mut body) = good();
        change(&mut head, &mut body);
        let refusal = check_dispatch(&head, body, &share()).expect_err(expect).to_string();
        assert!(refusal.contains(expect), "{refusal:?} does not name {expect:?}");
    };
    check(|head, _| head.placement_version += 1, "placement_version");
    check(|head, _| head.layer = 0, "layer 0");
    check(|head, _| head.layer = u32::MAX, "layer 4294967295");
    check(|head, _| head.hidden = 0, "hidden is 0");
    check(|head, _| head.tokens = 0, "tokens is 0");
    check(|head, _| head.tokens = 5, "tokens is 5");
    check(|head, _| head.tokens = 3, "experts_per_token has 2 entries");
    check(|head, _| head.experts.clear(), "experts has 0");
    check(|head, _| head.experts = vec![4; 7], "experts has 7");
    check(|head, _| head.experts_per_token = vec![2, 2], "with sum 4");
    check(|head, _| head.experts_per_token = vec![u32::MAX, u32::MAX], "with sum 8589934590");
    check(|head, _| head.experts[1] = 3, "expert 3 of layer 2");
    check(|head, _| head.experts[1] = 8, "expert 8 of layer 2");
    check(|head, _| head.experts[1] = 65_536 + 4, "expert 65540 of layer 2");
    check(|_, body| *body -= 1, "body has 415 bytes, expected 416");
    check(|_, body| *body = 0, "body has 0 bytes");
}

#[test]
fn a_reply_must_be_what_was_asked_for() {
    let wire = share().wire;
    let head = |vectors, refused: &str| CombineHead {
        source_incarnation: 7,
        sequence: 1,
        vectors,
        refused: refused.to_owned(),
    };
    let check = |head: CombineHead, body| check_combine(&head, body, 3, &wire);
    assert_eq!(check(head(3, ""), 3 * 2 * HIDDEN), Ok(()));
    assert!(matches!(check(head(2, ""), 3 * 2 * HIDDEN), Err(CombineFault::Size { vectors: 2, .. })));
    assert!(matches!(check(head(3, ""), 3 * 2 * HIDDEN - 1), Err(CombineFault::Size { .. })));
    let Err(CombineFault::Refused { reason }) = check(head(3, &"x".repeat(10_000)), 3 * 2 * HIDDEN) else {
        panic!("a refusal is an answer");
    };
    assert_eq!(reason.len(), 256, "a peer's words are cut to a line");
}

#[test]
fn row_sizes_follow_the_formats() {
    let sizes = |activation, result| {
        let wire = WireFormats { hidden: HIDDEN, activation, result };
        (wire.activation_row_bytes(), wire.result_row_bytes())
    };
    assert_eq!(sizes(ActivationFormat::Fp8(ScaleFormat::Ue8m0), ResultFormat::Bf16), (208, 400));
    assert_eq!(sizes(ActivationFormat::Bf16, ResultFormat::Bf16), (400, 400));
    assert_eq!(sizes(ActivationFormat::F32, ResultFormat::F32), (800, 800));
}

proptest! {
    #[test]
    fn results_survive_the_wire_bit_by_bit(
        bits in prop::collection::vec(any::<u32>(), 1..50), bf16 in any::<bool>(),
    ) {
        let (result, mask) = if bf16 { (ResultFormat::Bf16, 0xffff_0000) } else { (ResultFormat::F32, u32::MAX) };
        let wire = WireFormats { hidden: bits.len(), activation: ActivationFormat::F32, result };
        let vector: Vec<f32> = bits.iter().map(|bits| f32::from_bits(bits & mask)).collect();
        let mut bytes = vec![0; wire.result_row_bytes()];
        wire.write_result(&vector, &mut bytes);
        let mut back = vec![0.0; bits.len()];
        wire.read_result(&bytes, &mut back);
        let bits_of = |vector: &[f32]| vector.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits_of(&back), bits_of(&vector));
    }

    #[test]
    fn no_head_gets_past_the_checks_with_a_bad_index(
        layer in 0u32..4, tokens in 0u32..6,
        experts in prop::collection::vec(0u32..10, 0..8),
        counts in prop::collection::vec(0u32..4, 0..6), rows in 0usize..6,
    ) {
        let share = share();
        let (mut head, _) = good();
        (head.layer, head.tokens, head.experts, head.experts_per_token) = (layer, tokens, experts, counts);
        let body = rows * share.wire.activation_row_bytes();
        if check_dispatch(&head, body, &share).is_ok() {
            prop_assert!((1..3).contains(&head.layer));
            prop_assert!(head.experts.iter().all(|expert| (4..8).contains(expert)));
            prop_assert_eq!(head.experts_per_token.iter().sum::<u32>() as usize, head.experts.len());
            prop_assert_eq!(head.experts_per_token.len(), rows);
        }
    }
}
