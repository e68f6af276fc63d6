//! A report as text for a terminal.

use std::fmt::Write as _;

use super::Report;
use super::load::Load;
use super::request::PromptKind;
use super::summary::{Percentiles, Summary};
use crate::table::{aligned, number};

/// The whole report: latencies, errors, and the time by hop where the server told it.
pub(super) fn render(report: &Report) -> String {
    let request = &report.request;
    let about = if request.prompt_kind == PromptKind::Text { "about " } else { "" };
    let mut text = format!(
        "\n{} at {}: {about}{} prompt tokens, {} output tokens\n\n",
        report.model, report.url, request.prompt_tokens, request.output_tokens
    );
    text.push_str(&latencies(report));
    for point in report.points.iter().filter(|point| point.failed() > 0) {
        let kinds: Vec<_> = point.errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let _ = writeln!(text, "{}: errors: {}", point.load, kinds.join(", "));
    }
    if report.points.iter().any(|point| !point.hops.is_empty()) {
        text.push_str("\nwhere a request's time goes, mean / p99 in ms\n\n");
        text.push_str(&hops(&report.points));
    }
    text
}

fn latencies(report: &Report) -> String {
    let first = match report.points.first().map(|point| point.load) {
        Some(Load::Open { .. }) => "requests/s",
        _ => "concurrency",
    };
    let goodput = report.points.iter().any(|point| point.goodput_per_s.is_some());
    let mut header = vec![first, "done", "failed", "req/s", "in tok/s", "out tok/s"];
    header.extend(["TTFT p50", "p99", "ITL p50", "p99", "TPOT p50", "p99", "latency p50", "p99 ms"]);
    if goodput {
        header.push("goodput/s");
    }
    let mut rows = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for point in &report.points {
        let label = match point.load {
            Load::Closed { clients } => clients.to_string(),
            Load::Open { requests_per_s } => requests_per_s.to_string(),
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

fn hops(points: &[Summary]) -> String {
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
