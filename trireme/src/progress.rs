//! Progress bars where somebody looks at a terminal, log lines where nobody does.

use std::{
    cell::Cell,
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// A load that takes longer than this is worth a line in the log.
const LOG_EVERY: Duration = Duration::from_secs(5);
/// What a supervisor shows moves this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);

const WEIGHTS: &str = "{prefix} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
const PROMPTS: &str = "generating {bar:30} {pos}/{len} {eta}";

fn bar(total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    // A test parses the templates; a broken one would fall back to the library's own.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸ "));
    }
    bar
}

/// Prompts of a file.
pub fn prompts(total: u64) -> ProgressBar {
    bar(total, PROMPTS)
}

/// Bytes of weights on their way into memory.
pub struct Weights {
    worker: String,
    what: &'static str,
    to: Audience,
    logged: Cell<Instant>,
}

/// Who is told.
enum Audience {
    /// Somebody at this process' terminal.
    Terminal(ProgressBar),
    /// The supervisor, through standard output: see [`report_line`].
    Supervisor,
    /// The log.
    Log,
}

/// What a supervised process writes to its standard output while it loads.
pub fn report_line(done: u64, total: u64) -> String {
    format!("loading {done} {total}")
}

/// Reads a [`report_line`]: bytes done, bytes in all.
pub fn parse_report(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix("loading ")?.split_once(' ')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The bar of a whole cluster's weights.
pub fn cluster_weights() -> ProgressBar {
    let bar = bar(0, WEIGHTS);
    bar.set_prefix("loading");
    bar
}

impl Weights {
    /// For `worker`, loading `what`.
    pub fn new(worker: &str, what: &'static str, supervised: bool) -> Self {
        let to = match (supervised, std::io::stderr().is_terminal()) {
            (true, _) => Audience::Supervisor,
            (false, true) => {
                let bar = bar(0, WEIGHTS);
                bar.set_prefix(format!("{worker} {what}"));
                Audience::Terminal(bar)
            }
            (false, false) => Audience::Log,
        };
        Self { worker: worker.to_owned(), what, to, logged: Cell::new(Instant::now()) }
    }

    /// `done` of `total` bytes are there.
    pub fn at(&self, done: u64, total: u64) {
        let pause = match self.to {
            Audience::Terminal(_) => Duration::ZERO,
            Audience::Supervisor => REPORT_EVERY,
            Audience::Log => LOG_EVERY,
        };
        if self.logged.get().elapsed() < pause {
            return;
        }
        self.logged.set(Instant::now());
        match &self.to {
            Audience::Terminal(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            // A supervisor that is gone ends this process by its standard input; nothing to do about it here.
            Audience::Supervisor => drop(writeln!(std::io::stdout(), "{}", report_line(done, total))),
            Audience::Log => {
                tracing::info!(worker = self.worker, what = self.what, done, total, "loading");
            }
        }
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        if let Audience::Terminal(bar) = &self.to {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back() {
        assert_eq!(parse_report(&report_line(3, 70)), Some((3, 70)));
        for line in ["", "loading", "loading 1", "loading a b", "something else"] {
            assert_eq!(parse_report(line), None, "{line}");
        }
    }

    #[test]
    fn templates_are_well_formed() {
        for template in [WEIGHTS, PROMPTS] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
