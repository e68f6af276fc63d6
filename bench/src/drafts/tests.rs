use super::*;

#[test]
fn break_even_is_where_tokens_make_up_for_the_cost() {
    assert_eq!(tokens(0.5, 2), 1.75);
    assert!((break_even(1.3, 1).expect("it can pay") - 0.3).abs() < 1e-9);
    assert!((break_even(1.75, 2).expect("it can pay") - 0.5).abs() < 1e-9);
    assert_eq!(break_even(2.1, 1), None);
    assert!(break_even(0.9, 1).is_some_and(|least| least < 1e-9), "drafts that cost nothing");
}

/// The demo model, few rounds: every figure of the table is a time.
#[test]
fn every_number_of_drafts_is_timed() {
    let args = Args {
        model: None,
        device: Device::Cpu,
        synthetic: None,
        threads: Some(1),
        batch: vec![1, 2],
        context: 70,
        drafts: 2,
        rounds: 1,
        numerics: Numerics::Fp8,
        seed: 1,
    };
    let mut bench = Bench::load(&args).expect("the demo model");
    for batch in [1, 2] {
        let costs = bench.measure(batch, 2, 1).expect("steps");
        assert_eq!(costs.len(), 3);
        assert!(costs.iter().all(|cost| cost.step_us > 0.0 && cost.drafting_us >= 0.0));
        assert!(costs[2].drafting_us > 0.0, "drafting takes time");
        assert!(bench.sequences[..batch].iter().all(|sequence| sequence.rows.len() == 3), "two drafts each");
    }
}
