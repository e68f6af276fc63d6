//! Progress bars where somebody looks at a terminal, log lines where nobody does.

use std::{
    cell::Cell,
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// A load that takes longer than this is worth a line in the log.
const LOG_EVERY: Duration = Duration::from_secs(5);

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
    bar: Option<ProgressBar>,
    logged: Cell<Instant>,
}

impl Weights {
    /// For `worker`, loading `what`.
    pub fn new(worker: &str, what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = bar(0, WEIGHTS);
            bar.set_prefix(format!("{worker} {what}"));
            bar
        });
        Self { worker: worker.to_owned(), what, bar, logged: Cell::new(Instant::now()) }
    }

    /// `done` of `total` bytes are there.
    pub fn at(&self, done: u64, total: u64) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            None if self.logged.get().elapsed() >= LOG_EVERY => {
                self.logged.set(Instant::now());
                tracing::info!(worker = self.worker, what = self.what, done, total, "loading");
            }
            None => {}
        }
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_well_formed() {
        for template in [WEIGHTS, PROMPTS] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
