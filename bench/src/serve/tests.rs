use clap::Parser;

use super::load::Load;
use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn parse(flags: &[&str]) -> Result<Args, clap::Error> {
    Cli::try_parse_from([&["serve"], flags].concat()).map(|cli| cli.args)
}

#[test]
fn loads_follow_the_flags() {
    let of = |flags: &[&str]| parse(flags).expect("valid flags").loads();
    let closed = |clients| Load::Closed { clients };
    assert_eq!(of(&[]), [closed(1), closed(8), closed(64)]);
    assert_eq!(of(&["--concurrency", "2,4"]), [closed(2), closed(4)]);
    assert_eq!(of(&["--rate", "0.5,3"]), [0.5, 3.0].map(|requests_per_s| Load::Open { requests_per_s }));
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    for flags in [
        ["--concurrency", "0"],
        ["--rate", "0"],
        ["--rate", "-1"],
        ["--rate", "NaN"],
        ["--rate", "inf"],
        ["--requests", "0"],
        ["--duration-s-max", "1e300"],
        ["--token-id-max", "100"],
        ["--load", "0"],
        ["--peak", "3"],
        ["--turns", "0"],
        ["--lengths", "azure"],
    ] {
        assert!(parse(&flags).is_err(), "{flags:?}");
    }
    assert!(parse(&["--rate", "1", "--concurrency", "1"]).is_err(), "closed or open, not both");
    assert!(parse(&["--requests", "1", "--duration-s", "1"]).is_err(), "by number or by time, not both");
    assert!(parse(&["--lengths", "mooncake", "--prompt-tokens", "1"]).is_err(), "drawn or fixed, not both");
}
