use clap::Parser;

use super::*;

const SEED: u64 = 1;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn report(flags: &str) -> Report {
    let args = Cli::parse_from(["simulate"].into_iter().chain(flags.split_whitespace())).args;
    simulate(&args).expect("valid flags")
}

/// The short form of what `trireme bench simulate` shows for ten minutes.
#[test]
fn twice_the_peak_costs_no_goodput_and_no_running_sequence() {
    for lengths in ["azure-conv", "azure-code", "mooncake"] {
        let report = report(&format!(
            "--lengths {lengths} --duration-s 60 --check-every 1997 --declare-max-tokens 512 \
             --slo-ttft-ms 6000 --slo-itl-ms 150 --load 200 --seed {SEED}"
        ));
        let peak = report.peak.as_ref().expect("a ramp").goodput;
        let Point { summary, counts } = &report.points[0];
        assert_eq!(counts.ended_otherwise, 0, "{lengths}: every sequence ends by its own rule");
        assert_eq!(counts.admitted, counts.ended_by_rule, "{lengths}: and none is left behind");
        assert_eq!(counts.refused_by_workers, 0, "{lengths}: overload is turned away at the door");
        assert!(counts.router_queue_max <= 1024 && counts.prefill_queue_max <= 1024, "{lengths}: {counts:?}");
        assert!(counts.decode_batch_max <= 64, "{lengths}: {counts:?}");
        assert!(summary.errors.keys().eq(["http_429"]), "{lengths}: {:?}", summary.errors);
        let goodput = summary.goodput();
        assert!(goodput >= 0.95 * peak, "{lengths}: {goodput} of {peak} requests/s, seed {SEED}");
    }
}

#[test]
fn a_seed_gives_one_run() {
    let flags = "--lengths azure-code --duration-s 20 --rate 10 --turns 2";
    let json = |report: &Report| serde_json::to_string(report).expect("JSON");
    assert_eq!(json(&report(flags)), json(&report(flags)));
    assert_ne!(json(&report(flags)), json(&report(&format!("{flags} --seed 9"))));
}

#[test]
fn turns_find_what_earlier_turns_left() {
    let report =
        report("--lengths azure-conv --turns 6 --max-output 128 --duration-s 60 --rate 1 --check-every 7");
    let Point { summary, counts } = &report.points[0];
    assert!(summary.errors.is_empty() && summary.completed > 200, "{:?}", summary.errors);
    let (found, held) = counts.decode_reuse.expect("turns");
    assert!(found * 100 >= held * 97, "decode found {found} of {held} tokens");
    let reuse = summary.reuse.expect("turns");
    assert!(reuse.found * 100 >= reuse.reusable * 97, "prompts and answers: {reuse:?}");
}

#[test]
fn what_never_fits_is_refused_and_holds_nobody_up() {
    let report = report(
        "--prompt-tokens 700 --output-tokens 4 --kv-blocks-max 8 --rate 5 --duration-s 10 --check-every 1",
    );
    let Point { summary, counts } = &report.points[0];
    assert_eq!((summary.completed, counts.admitted), (0, 0));
    assert_eq!(counts.refused_by_workers, summary.failed());
}
