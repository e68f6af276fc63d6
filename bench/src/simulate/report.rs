//! A simulation's report as text.

use std::fmt::Write as _;

use super::Report;
use crate::serve;
use crate::table::aligned;

/// The load generator's tables, and what only a simulator can count.
pub(super) fn render(report: &Report) -> String {
    let mut text = String::from("\n");
    if let Some(peak) = &report.peak {
        text.push_str(&serve::table::ramp(&peak.search));
        let _ = writeln!(text, "over a whole load point: {:.2} requests/s within the goal\n", peak.goodput);
    }
    let summaries: Vec<_> = report.points.iter().map(|point| &point.summary).collect();
    text.push_str(&serve::table::points(&summaries));
    text.push_str("\nwhat the schedulers did\n\n");
    let header = [
        "load",
        "admitted",
        "by their rule",
        "otherwise",
        "refused",
        "router queue",
        "prefill",
        "decode",
        "batch",
        "on decode",
        "pauses",
        "events",
    ];
    let rows = report.points.iter().map(|point| {
        let counts = &point.counts;
        let mut row = vec![point.summary.load.to_string()];
        row.extend([counts.admitted, counts.ended_by_rule].map(|count| count.to_string()));
        row.extend([counts.ended_otherwise, counts.refused_by_workers].map(|count| count.to_string()));
        let seen = [counts.router_queue_max, counts.prefill_queue_max, counts.decode_queue_max];
        row.extend(seen.map(|count| count.to_string()));
        row.push(counts.decode_batch_max.to_string());
        row.extend(
            [counts.prefilled_on_decode, counts.memory_pauses, counts.events].map(|count| count.to_string()),
        );
        row
    });
    let header = vec![header.map(str::to_owned).to_vec()];
    text.push_str(&aligned(&header.into_iter().chain(rows).collect::<Vec<_>>()));
    for point in &report.points {
        if let Some(peak) = &report.peak {
            let (load, goodput) = (point.summary.load, point.summary.goodput());
            let _ = writeln!(text, "{load}: goodput {:.1} % of the peak", 100.0 * goodput / peak.goodput);
        }
        if let Some(reuse) = &point.summary.reuse {
            let share = 100.0 * reuse.found as f64 / reuse.reusable.max(1) as f64;
            let (load, tokens) = (point.summary.load, reuse.reusable);
            let _ = writeln!(
                text,
                "{load}: {share:.1} % of the {tokens} tokens of earlier prompts and answers found"
            );
        }
        if let Some((found, held)) = point.counts.decode_reuse {
            let share = 100.0 * found as f64 / held.max(1) as f64;
            let load = point.summary.load;
            let _ = writeln!(
                text,
                "{load}: decode found {share:.1} % of the {held} tokens that earlier turns left there"
            );
        }
    }
    text
}
