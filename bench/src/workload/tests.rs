use clap::Parser;

use super::*;

const SEED: u64 = 3;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn workload(flags: &[&str]) -> anyhow::Result<Workload> {
    let seed = SEED.to_string();
    Cli::try_parse_from([&["load", "--seed", &seed], flags].concat())?.args.workload()
}

fn id(point: u32, index: u32) -> RequestId {
    RequestId { point, index }
}

fn trace_file(lines: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), lines).expect("written");
    file
}

#[test]
fn a_request_is_a_function_of_its_name_and_the_seed() {
    let load = workload(&["--lengths", "azure-conv"]).expect("flags");
    let tokens = |id, turn| load.tokens(&load.plan(id, turn).input);
    assert_eq!(tokens(id(1, 2), 0), tokens(id(1, 2), 0));
    for other in [(id(1, 3), 0), (id(2, 2), 0), (id(1, 2), 1)] {
        assert_ne!(tokens(id(1, 2), 0), tokens(other.0, other.1), "{other:?}");
    }
    let reseeded = Workload { seed: SEED + 1, ..load.clone() };
    assert_ne!(reseeded.plan(id(1, 2), 0), load.plan(id(1, 2), 0));
}

#[test]
fn any_stretch_of_requests_has_the_distribution() {
    let load = workload(&["--lengths", "mooncake"]).expect("flags");
    let mean = |range: std::ops::Range<u32>| {
        let count = f64::from(range.end - range.start);
        range.map(|index| f64::from(load.plan(id(0, index), 0).input_tokens())).sum::<f64>() / count
    };
    let all = mean(0..6400);
    for start in (0..6400).step_by(640) {
        let stretch = mean(start..start + 640);
        assert!((stretch / all - 1.0).abs() < 0.03, "{stretch} from {start} on, {all} of all, seed {SEED}");
    }
}

#[test]
fn lengths_are_scaled_into_their_bounds_and_keep_their_distribution() {
    for published in ["azure-conv", "azure-code", "mooncake"] {
        let flags = ["--lengths", published, "--max-input", "2000", "--max-output", "300"];
        let load = workload(&flags).expect("flags");
        let plans: Vec<Plan> = (0..5000).map(|index| load.plan(id(0, index), 0)).collect();
        let mut inputs: Vec<u32> = plans.iter().map(Plan::input_tokens).collect();
        inputs.sort_unstable();
        assert!(inputs[0] >= 1 && inputs[4999] <= 2000, "{published}");
        assert!(plans.iter().all(|plan| (1..=300).contains(&plan.output_tokens)), "{published}");
        let Source::Published(table) = load.source else { panic!("published lengths") };
        let (median, expected) = (f64::from(inputs[2500]), table.input().at(0.5) * load.scale.input);
        assert!((median / expected - 1.0).abs() < 0.1, "{published}: median {median}, {expected} expected");
    }
}

#[test]
fn equal_hashes_are_equal_tokens_at_equal_places() {
    let file = trace_file(
        "{\"timestamp\": 0, \"input_length\": 1500, \"output_length\": 5, \"hash_ids\": [0, 1, 2]}\n\
         {\"timestamp\": 9, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [0, 1, 3]}\n\
         {\"timestamp\": 19, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [4, 5]}\n",
    );
    let path = file.path().to_str().expect("a path");
    let load = workload(&["--trace", path, "--max-input", "1000"]).expect("flags");
    let tokens = |point, index| load.tokens(&load.plan(id(point, index), 0).input);
    let (first, second, third) = (tokens(0, 0), tokens(0, 1), tokens(0, 2));
    assert_eq!((first.len(), second.len(), third.len()), (1000, 733, 400));
    let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    // Two blocks of 512 tokens at two thirds of their length.
    assert_eq!(common(&first, &second), 683);
    assert_eq!(common(&first, &third), 0);
    assert_eq!(common(&first, &tokens(0, 3)), 0, "the trace's second round shares nothing with the first");
    assert_eq!(common(&first, &tokens(1, 0)), 0, "nor does another load point");
}

#[test]
fn conversations_fit_their_bound() {
    let flags = ["--lengths", "azure-conv", "--turns", "5", "--max-input", "3000", "--max-output", "100"];
    let load = workload(&flags).expect("flags");
    for index in 0..2000 {
        let plans: Vec<Plan> = (0..5).map(|turn| load.plan(id(0, index), turn)).collect();
        let inputs: u32 = plans.iter().map(Plan::input_tokens).sum();
        let answers: u32 = plans[..4].iter().map(|plan| plan.output_tokens).sum();
        assert!(inputs + answers <= 3000, "conversation {index}, seed {SEED}");
    }
    let refused = workload(&["--lengths", "mooncake", "--turns", "9", "--max-input", "4000"]);
    assert!(refused.is_err_and(|error| error.to_string().contains("--max-input 4000")));
}

#[test]
fn arrivals_of_a_trace_keep_its_bursts_at_the_rate_asked_for() {
    let file = trace_file(
        "2023-11-16 18:17:00.0,10,1\n2023-11-16 18:17:00.1,10,1\n2023-11-16 18:17:00.2,10,1\n2023-11-16 18:17:03.0,10,1\n",
    );
    let path = file.path().to_str().expect("a path");
    let load = workload(&["--trace", path, "--arrivals", "trace"]).expect("flags");
    let times: Vec<f64> =
        load.arrivals(Pattern::Trace, 2.0, 0).take(4001).map(|at| at.as_secs_f64()).collect();
    assert!(times.is_sorted());
    assert!((times[4000] / 2000.0 - 1.0).abs() < 1e-9, "4,000 requests at 2/s");
    assert!((times[1] - times[0]) * 20.0 < times[3] - times[2], "{:?}", &times[..4]);
    assert!(workload(&["--arrivals", "trace"]).is_err());
}
