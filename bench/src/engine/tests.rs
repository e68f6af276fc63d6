use clap::Parser;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn args(flags: &[&str]) -> Args {
    Command::parse_from(["engine"].iter().chain(flags)).args
}

#[test]
fn the_demo_model_is_measured_at_every_batch_size() {
    let args = args(&[
        "--threads",
        "1",
        "--batch",
        "1,3",
        "--prompt",
        "5",
        "--gen",
        "2",
        "--rounds",
        "2",
        "--chunk",
        "4",
    ]);
    let report = measure(&args).expect("the demo model runs");
    let batches: Vec<usize> = report.batches.iter().map(|figures| figures.batch).collect();
    assert_eq!(batches, [1, 3]);
    let [one, three] = &report.batches[..] else { panic!("two batch sizes") };
    // Three tokens activate no fewer experts than one, and everything else is read once.
    assert!(one.weight_bytes_per_step > 0.0 && three.weight_bytes_per_step >= one.weight_bytes_per_step);
    for figures in &report.batches {
        let Spread { min, median, max } = figures.generation_tok_per_s;
        assert!(0.0 < min && min <= median && median <= max);
        let table = render(&report);
        assert!(table.contains("experts") && table.contains("sampling"), "{table}");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_its_flag() {
    for (flags, expect) in [
        (&["--prompt", "999999"][..], "--prompt and --gen"),
        (&["--batch", "16", "--chunk", "8"][..], "--batch 16"),
    ] {
        let error = measure(&args(flags)).expect_err("refused").to_string();
        assert!(error.contains(expect), "{error}");
    }
}

#[test]
fn a_spread_has_the_middle_of_its_rounds() {
    assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { min: 1.0, median: 2.0, max: 3.0 });
}
