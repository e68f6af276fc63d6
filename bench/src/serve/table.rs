//! A report as text for a terminal.

use std::fmt::Write as _;

use super::Report;
use super::load::Load;
use super::summary::{Percentiles, Summary};
use crate::peak::PeakSearch;
use crate::plot;
use crate::table::{aligned, number};

/// Share of prompt tokens out of a cache from which on the rates are not those of fresh prompts.
const CACHED_SHARE_NOTED: f64 = 0.05;

/// The whole report: latencies, errors, the time by hop where the server told it, and what else was asked for.
pub(super) fn render(report: &Report) -> String {
    let mut text = format!("\n{} at {}: {}\n\n", report.model, report.url, report.asked);
    if let Some(search) = &report.peak {
        text.push_str(&ramp(search));
    }
    text.push_str(&points(&report.points.iter().collect::<Vec<_>>()));
    text
}

/// Everything about the load points.
pub(crate) fn points(points: &[&Summary]) -> String {
    let mut text = latencies(points);
    for point in points {
        if point.failed() > 0 {
            let kinds: Vec<_> = point.errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
            let _ = writeln!(text, "{}: errors: {}", point.load, kinds.join(", "));
        }
        if point.refused > 0 {
            let _ = writeln!(text, "{}: {} answers of 429", point.load, point.refused);
        }
        if point.reuse.is_none() && point.cached_share > CACHED_SHARE_NOTED {
            let percent = 100.0 * point.cached_share;
            let _ = writeln!(
                text,
                "{}: {percent:.0} % of the prompt tokens came out of a cache; another --seed has other prompts",
                point.load
            );
        }
        if let Some(reuse) = &point.reuse {
            let share = |of: u64| 100.0 * reuse.found as f64 / of.max(1) as f64;
            let _ = writeln!(
                text,
                "{}: later turns found {} tokens in a cache: {:.1} % of the {} that earlier turns left in the \
                 cluster, {:.1} % of the {} of their prompts",
                point.load,
                reuse.found,
                share(reuse.reusable),
                reuse.reusable,
                share(reuse.of_prompts),
                reuse.of_prompts
            );
        }
    }
    if points.iter().any(|point| !point.hops.is_empty()) {
        text.push_str("\nwhere a request's time goes, mean / p99 in ms\n\n");
        text.push_str(&hops(points));
    }
    for point in points.iter().filter(|point| matches!(point.load, Load::Open { .. })) {
        let good: Vec<_> = point.timeline.iter().map(|s| (number(s.from_s), s.good_per_s)).collect();
        let _ =
            write!(text, "\n{}: goodput per second from second … on\n\n{}", point.load, plot::bars(&good));
    }
    for point in points.iter().filter(|point| !point.memory.is_empty()) {
        let _ =
            write!(text, "\n{}: resident memory in MiB, mapped files aside\n\n{}", point.load, memory(point));
    }
    text
}

/// The search for the peak.
pub(crate) fn ramp(search: &PeakSearch) -> String {
    let mut probes = search.probes.clone();
    probes.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let bars: Vec<_> = probes.iter().map(|p| (format!("{} requests/s", number(p.rate)), p.goodput)).collect();
    format!("peak: {} requests/s within the goal\n\n{}\n", number(search.peak()), plot::bars(&bars))
}

fn memory(point: &Summary) -> String {
    let header = ["process", "pid", "first", "middle", "last", "max"].map(str::to_owned).to_vec();
    let rows = point.memory.iter().map(|process| {
        let mib = [process.first_mib, process.middle_mib, process.last_mib, process.max_mib];
        let mut row = vec![process.command.clone(), process.pid.to_string()];
        row.extend(mib.map(|mib| format!("{mib:.1}")));
        row
    });
    aligned(&[header].into_iter().chain(rows).collect::<Vec<_>>())
}

fn latencies(points: &[&Summary]) -> String {
    let first = match points.first().map(|point| point.load) {
        Some(Load::Open { .. }) => "requests/s",
        _ => "concurrency",
    };
    let goodput = points.iter().any(|point| point.goodput_per_s.is_some());
    let mut header = vec![first, "done", "failed", "req/s", "in tok/s", "out tok/s"];
    header.extend(["TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "p99", "latency p50", "p99 ms"]);
    if goodput {
        header.push("goodput/s");
    }
    let mut rows = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for point in points {
        let label = match point.load {
            Load::Closed { clients } => clients.to_string(),
            Load::Open { requests_per_s } => number(requests_per_s),
        };
        let mut row = vec![label, point.completed.to_string(), point.failed().to_string()];
        row.push(number(point.requests_per_s));
        row.push(number(point.prompt_tokens_per_s));
        row.push(number(point.output_tokens_per_s));
        for times in [point.ttft_ms, point.itl_ms, point.tpot_ms, point.latency_ms] {
            row.push(time(times, |p| p.p50));
            row.push(time(times, |p| p.p99));
        }
        if goodput {
            row.push(point.goodput_per_s.map_or_else(|| "-".to_owned(), number));
        }
        rows.push(row);
    }
    aligned(&rows)
}

fn hops(points: &[&Summary]) -> String {
    let mut header = vec!["hop".to_owned()];
    header.extend(points.iter().map(|point| point.load.to_string()));
    let mut rows = vec![header];
    // Hops come in one order everywhere; a point without answers has none.
    let names = points.iter().map(|point| &point.hops).max_by_key(|hops| hops.len());
    for hop in names.into_iter().flatten().map(|hop| hop.hop) {
        let mut row = vec![hop.to_owned()];
        for point in points {
            let found = point.hops.iter().find(|other| other.hop == hop);
            row.push(found.map_or_else(
                || "-".to_owned(),
                |found| format!("{} / {}", number(found.ms.mean), number(found.ms.p99)),
            ));
        }
        rows.push(row);
    }
    aligned(&rows)
}

fn time(times: Option<Percentiles>, of: fn(&Percentiles) -> f64) -> String {
    times.map_or_else(|| "-".to_owned(), |times| number(of(&times)))
}
