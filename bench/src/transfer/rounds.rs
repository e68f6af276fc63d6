//! The table: every path in turns, each run in processes of its own.

use std::process::Command;

use anyhow::{Context, ensure};
use serde::Deserialize;

use super::{Args, Mode};
use crate::table;

/// What a run has printed.
#[derive(Debug, Clone, Deserialize)]
struct Line {
    gbps: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_send_s_per_gb: f64,
    cpu_recv_s_per_gb: f64,
    lost: u64,
    mtu: u64,
}

/// One row of the table: a path and its datagram size, where it has one.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Case {
    mode: Mode,
    mtu: Option<u16>,
}

impl Case {
    fn name(self) -> String {
        let Self { mode, mtu } = self;
        mtu.map_or_else(|| mode.name(), |mtu| format!("{} {mtu}", mode.name()))
    }
}

/// Runs every case `rounds` times, in turns, and prints medians.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    let cases = cases(args);
    for &block in &args.blocks {
        let mut runs: Vec<Vec<(Line, Line)>> = vec![Vec::new(); cases.len()];
        for _ in 0..args.rounds {
            for (case, runs) in cases.iter().zip(&mut runs) {
                let many = line(args, *case, block, args.shape.inflight, None)?;
                let single = line(args, *case, block, 1, Some(300))?;
                runs.push((many, single));
            }
        }
        print(args, block, &cases, &runs);
    }
    Ok(())
}

fn cases(args: &Args) -> Vec<Case> {
    let all = [Mode::Memcpy, Mode::MemcpySum, Mode::Shm, Mode::ShmBare, Mode::Tcp, Mode::Quic, Mode::Quinn];
    let mut all = all.to_vec();
    all.extend(args.shape.nixl_library.is_some().then_some(Mode::Rdma));
    let modes = if args.modes.is_empty() { all } else { args.modes.clone() };
    let mut cases = Vec::new();
    for mode in modes {
        cases.push(Case { mode, mtu: args.shape.mtu });
        // The datagrams of 9,000-byte Ethernet, beside those of loopback.
        if matches!(mode, Mode::Quic | Mode::Quinn) && args.shape.mtu.is_none() {
            cases.push(Case { mode, mtu: Some(8972) });
        }
    }
    cases
}

fn line(
    args: &Args,
    case: Case,
    block: usize,
    inflight: usize,
    count: Option<usize>,
) -> anyhow::Result<Line> {
    let mut command = Command::new(std::env::current_exe()?);
    let shape = &args.shape;
    command.args(["bench", "transfer", "--mode", &case.mode.name()]);
    let flags = [
        ("--block", block.to_string()),
        ("--inflight", inflight.to_string()),
        ("--msg-kib", shape.msg_kib.to_string()),
        ("--total-mib", shape.total_mib.to_string()),
        ("--warm-mib", shape.warm_mib.to_string()),
        ("--pin-send", shape.pin_send.to_string()),
        ("--pin-recv", shape.pin_recv.to_string()),
    ];
    for (flag, value) in flags {
        command.arg(flag).arg(value);
    }
    if let Some(mtu) = case.mtu {
        command.args(["--mtu", &mtu.to_string()]);
    }
    if let Some(count) = count {
        command.args(["--count", &count.to_string()]);
    }
    if let Some(library) = &shape.nixl_library {
        command.arg("--nixl-library").arg(library);
    }
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{} failed", case.name());
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.trim()).with_context(|| format!("{}: `{text}`", case.name()))
}

fn print(args: &Args, block: usize, cases: &[Case], runs: &[Vec<(Line, Line)>]) {
    let message = (args.shape.msg_kib * 1024 / block).max(1) * block;
    println!(
        "blocks of {block} B, messages of {message} B, {} at once; medians of {} rounds",
        args.shape.inflight, args.rounds
    );
    let header = [
        "path",
        "GB/s",
        "min-max",
        "CPU s/GB",
        "send",
        "receive",
        "p50 µs",
        "one at a time: p50",
        "p99",
        "lost",
        "datagram",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (case, runs) in cases.iter().zip(runs) {
        let many = |value: fn(&Line) -> f64| median(runs.iter().map(|(many, _)| value(many)));
        let single = |value: fn(&Line) -> f64| median(runs.iter().map(|(_, single)| value(single)));
        let least = runs.iter().map(|(many, _)| many.gbps).fold(f64::INFINITY, f64::min);
        let most = runs.iter().map(|(many, _)| many.gbps).fold(0.0, f64::max);
        rows.push(vec![
            case.name(),
            table::number(many(|line| line.gbps)),
            format!("{}-{}", table::number(least), table::number(most)),
            table::number(many(|line| line.cpu_send_s_per_gb + line.cpu_recv_s_per_gb)),
            table::number(many(|line| line.cpu_send_s_per_gb)),
            table::number(many(|line| line.cpu_recv_s_per_gb)),
            table::number(many(|line| line.p50_us)),
            table::number(single(|line| line.p50_us)),
            table::number(single(|line| line.p99_us)),
            runs.iter().map(|(many, _)| many.lost).max().unwrap_or(0).to_string(),
            runs.iter().map(|(many, _)| many.mtu).min().unwrap_or(0).to_string(),
        ]);
    }
    println!("{}", table::aligned(&rows));
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
