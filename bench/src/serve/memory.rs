//! Memory of the server's processes over time, from `/proc`: does it stay flat?
//!
//! Counted is resident memory of which no file is the origin (`RssAnon`): mapped weights come and go as the kernel likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinHandle;

const INTERVAL: Duration = Duration::from_secs(1);
/// An hour and more of samples; older ones are kept.
const SAMPLES_MAX: usize = 10_000;

/// One process over a load point.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessMemory {
    /// The process.
    pub pid: u32,
    /// Its command line, shortened.
    pub command: String,
    /// MiB at the first sample.
    pub first_mib: f64,
    /// MiB at half of the time.
    pub middle_mib: f64,
    /// MiB at the last sample.
    pub last_mib: f64,
    /// The most.
    pub max_mib: f64,
}

type Samples = BTreeMap<u32, Vec<f64>>;

/// Samples a process and its descendants until it is stopped or dropped.
#[derive(Debug)]
pub struct Sampler {
    samples: Arc<Mutex<Samples>>,
    task: JoinHandle<()>,
}

impl Sampler {
    /// Begins with a first sample.
    pub fn start(root: u32) -> Self {
        let samples = Arc::new(Mutex::new(Samples::new()));
        let into = Arc::clone(&samples);
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(INTERVAL);
            loop {
                ticks.tick().await;
                sample(root, &mut into.lock().unwrap_or_else(PoisonError::into_inner));
            }
        });
        Self { samples, task }
    }

    /// What was seen since the last call, the biggest process first.
    pub fn take(&self) -> Vec<ProcessMemory> {
        let samples = std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner));
        let mut processes: Vec<_> =
            samples.into_iter().filter_map(|(pid, samples)| ProcessMemory::of(pid, &samples)).collect();
        processes.sort_by(|a, b| b.max_mib.total_cmp(&a.max_mib));
        processes
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ProcessMemory {
    fn of(pid: u32, samples: &[f64]) -> Option<Self> {
        Some(Self {
            pid,
            command: command(pid),
            first_mib: *samples.first()?,
            middle_mib: samples[samples.len() / 2],
            last_mib: *samples.last()?,
            max_mib: samples.iter().copied().fold(0.0, f64::max),
        })
    }
}

fn sample(root: u32, into: &mut Samples) {
    for pid in family(root) {
        if let Some(mib) =
            anonymous_mib(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default())
        {
            let samples = into.entry(pid).or_default();
            if samples.len() < SAMPLES_MAX {
                samples.push(mib);
            }
        }
    }
}

/// A process and all its descendants, as far as they can be seen.
fn family(root: u32) -> BTreeSet<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if let Some(parent) = parent(&stat) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut family = BTreeSet::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        if family.insert(pid) {
            next.extend(children.get(&pid).into_iter().flatten());
        }
    }
    family
}

/// The fourth field of `/proc/PID/stat`; the second is a name in parentheses that may hold anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn anonymous_mib(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// The command line without its path, at most 40 characters.
fn command(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = String::from_utf8_lossy(&line).split('\0').map(str::to_owned).collect();
    let program = words.first().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    // Flags that all processes of a cluster share tell nothing.
    let rest = words.iter().skip(1).filter(|word| !word.contains('/') && !word.starts_with("--"));
    rest.fold(program.to_owned(), |line, word| format!("{line} {word}")).trim().chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn proc_is_read_as_it_is_written() {
        assert_eq!(parent("42 (a) b (c)) S 7 42 42 0"), Some(7));
        assert_eq!(parent(""), None);
        assert_eq!(anonymous_mib("VmRSS:\t 9 kB\nRssAnon:\t    2048 kB\nRssFile:\t 1 kB\n"), Some(2.0));
        assert_eq!(anonymous_mib(""), None);
    }

    #[tokio::test]
    async fn this_process_is_seen() {
        let sampler = Sampler::start(std::process::id());
        let until = Instant::now() + 30 * INTERVAL;
        let processes = loop {
            let processes = sampler.take();
            if !processes.is_empty() || Instant::now() > until {
                break processes;
            }
            tokio::task::yield_now().await;
        };
        let own = processes.iter().find(|process| process.pid == std::process::id()).expect("this process");
        assert!(own.first_mib > 0.1 && own.max_mib >= own.last_mib, "{own:?}");
    }
}
