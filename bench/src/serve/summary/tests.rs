use serde_json::json;

use super::super::load::Outcome;
use super::*;

const CLOSED: Load = Load::Closed { clients: 2 };

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// An answer whose chunks arrived at these milliseconds.
fn answer(arrivals: &[u64], total: u64) -> Streamed {
    Streamed {
        ttft: arrivals.first().copied().map(ms),
        total: ms(total),
        arrivals: arrivals.iter().copied().map(ms).collect(),
        usage: Some(json!({ "prompt_tokens": 10, "completion_tokens": arrivals.len() })),
        timings: None,
    }
}

/// A load point of `wall` in which every answer ended at its middle.
fn measured(answers: Vec<Result<Streamed, std::borrow::Cow<'static, str>>>, wall: u64) -> Measured {
    let start = tokio::time::Instant::now();
    let (due, ended) = (start, start + ms(wall / 2));
    let outcome = |answer| Outcome { due, ended, refused: 0, reuse: None, answer };
    Measured { outcomes: answers.into_iter().map(outcome).collect(), start, window: start..start + ms(wall) }
}

fn close(got: f64, expected: f64) -> bool {
    (got - expected).abs() <= 2e-3 * expected.abs().max(1.0)
}

#[test]
fn percentiles_of_a_known_distribution() {
    let mut times = Distribution::new();
    assert_eq!(times.percentiles(), None);
    (1..=1000).for_each(|value| times.record(ms(value)));
    let p = times.percentiles().expect("values");
    for (got, expected) in
        [(p.mean, 500.5), (p.p50, 500.0), (p.p90, 900.0), (p.p95, 950.0), (p.p99, 990.0), (p.max, 1000.0)]
    {
        assert!(close(got, expected), "{got}, expected {expected}");
    }
    times.record(Duration::MAX);
    times.record(Duration::ZERO);
    assert!(times.percentiles().is_some_and(|p| p.max >= 3.5e6), "out of bounds counts as the bound");
}

#[test]
fn each_latency_is_what_its_name_says() {
    let measured = measured(vec![Ok(answer(&[100, 110, 140], 150))], 500);
    let summary = Summary::of(CLOSED, &measured, &Slo::default());
    let mean = |percentiles: Option<Percentiles>| percentiles.expect("values").mean;
    assert!(close(mean(summary.ttft_ms), 100.0));
    assert!(close(mean(summary.itl_ms), 20.0), "gaps of 10 and 30");
    assert!(close(summary.itl_ms.expect("values").max, 30.0));
    assert!(close(mean(summary.tpot_ms), 20.0), "40 ms for two tokens after the first");
    assert!(close(mean(summary.latency_ms), 150.0));
    assert!(close(summary.requests_per_s, 2.0));
    assert!(close(summary.output_tokens_per_s, 6.0));
    assert!(close(summary.prompt_tokens_per_s, 20.0));
    assert_eq!(summary.goodput_per_s, None);
}

#[test]
fn several_tokens_in_a_chunk_are_counted_by_usage() {
    let mut bundled = answer(&[100, 200], 210);
    bundled.usage = Some(json!({ "completion_tokens": 11 }));
    let measured = measured(vec![Ok(bundled)], 1000);
    let summary = Summary::of(CLOSED, &measured, &Slo::default());
    assert!(close(summary.tpot_ms.expect("values").mean, 10.0), "100 ms for ten tokens");
    assert!(close(summary.output_tokens_per_s, 11.0));
}

#[test]
fn failures_are_counted_by_kind_and_measure_nothing() {
    let outcomes =
        vec![Err("http_429".into()), Ok(answer(&[5], 6)), Err("timeout".into()), Err("http_429".into())];
    let summary = Summary::of(CLOSED, &measured(outcomes, 1000), &Slo::default());
    assert_eq!((summary.completed, summary.failed()), (1, 3));
    assert_eq!(summary.errors["http_429"], 2);
    assert_eq!(summary.errors["timeout"], 1);
    assert!(summary.itl_ms.is_none() && summary.tpot_ms.is_none(), "one token has no gap");
}

#[test]
fn goodput_counts_requests_that_meet_every_goal() {
    let outcomes = vec![
        Ok(answer(&[50, 60, 70], 70)),
        Ok(answer(&[150, 160, 170], 170)),
        Ok(answer(&[50, 100, 150], 150)),
        Ok(answer(&[50], 50)),
        Ok(answer(&[], 50)),
        Err("timeout".into()),
    ];
    let measured = measured(outcomes, 1000);
    let goodput = |ttft_ms, itl_ms| Summary::of(CLOSED, &measured, &Slo { ttft_ms, itl_ms }).goodput_per_s;
    assert_eq!(goodput(Some(100.0), Some(20.0)), Some(2.0), "the first, and the one of a single token");
    assert_eq!(goodput(Some(100.0), None), Some(3.0));
    assert_eq!(goodput(None, Some(20.0)), Some(4.0));
    assert_eq!(goodput(None, None), None);
}

#[test]
fn rates_are_of_what_ended_inside_the_window() {
    let mut point = measured(vec![Ok(answer(&[5], 6)), Ok(answer(&[5], 6)), Ok(answer(&[5], 6))], 2000);
    point.outcomes[0].ended = point.window.end;
    point.outcomes[1].refused = 3;
    let summary = Summary::of(CLOSED, &point, &Slo { ttft_ms: Some(5.0), itl_ms: None });
    assert_eq!((summary.completed, summary.refused), (3, 3));
    assert!(
        close(summary.requests_per_s, 1.0) && close(summary.goodput(), 1.0),
        "one came too late to count"
    );
}

#[test]
fn what_a_cache_gave_is_a_share_of_prompt_tokens() {
    let mut cached = answer(&[5], 6);
    cached.usage.as_mut().expect("usage")["prompt_tokens_details"] = json!({ "cached_tokens": 8 });
    let point = measured(vec![Ok(cached), Ok(answer(&[5], 6))], 1000);
    assert!(close(Summary::of(CLOSED, &point, &Slo::default()).cached_share, 0.4), "8 of twice 10");
}

#[test]
fn turns_add_up() {
    let mut point = measured(vec![Ok(answer(&[5], 6)), Ok(answer(&[5], 6)), Ok(answer(&[5], 6))], 1000);
    assert_eq!(Summary::of(CLOSED, &point, &Slo::default()).reuse, None);
    for (outcome, found) in point.outcomes.iter_mut().zip([64, 128]) {
        outcome.reuse = Some(Reuse { reusable: 128, of_prompts: 64, found });
    }
    let reuse = Summary::of(CLOSED, &point, &Slo::default()).reuse;
    assert_eq!(reuse, Some(Reuse { reusable: 256, of_prompts: 128, found: 192 }));
}
