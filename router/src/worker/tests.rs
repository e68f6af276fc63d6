use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;

use super::{Worker, WorkerKey};
use crate::placement::Tier;

const STALL: Duration = Duration::from_secs(10);

fn worker(now: Instant) -> Arc<Worker> {
    let key = WorkerKey { id: Arc::from("decode-0"), incarnation: 1 };
    let info = v1::WorkerInfo { kv_blocks_max: 100, kv_block_tokens: 64, ..Default::default() };
    Arc::new(Worker::new(key, Tier::Decode, None, None, info, report(0, 0, 100), now))
}

fn report(steps_total: u64, running: u32, kv_blocks_free: u32) -> v1::WorkerReport {
    v1::WorkerReport { steps_total, running, runnable: running, kv_blocks_free, ..Default::default() }
}

#[test]
fn work_without_steps_is_a_stall() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let worker = worker(start);
    assert!(!worker.stalled(at(100), STALL), "idle is healthy for ever");
    worker.report(report(0, 2, 100), at(100));
    assert!(!worker.stalled(at(109), STALL));
    worker.report(report(0, 2, 100), at(109));
    assert!(worker.stalled(at(111), STALL));
    worker.report(report(1, 2, 100), at(112));
    assert!(!worker.stalled(at(120), STALL), "a step is progress");
    worker.report(report(1, 0, 100), at(130));
    assert!(!worker.stalled(at(1000), STALL));
}

#[test]
fn our_own_sequences_count_before_the_worker_reports_them() {
    let now = Instant::now();
    let worker = worker(now);
    let first = worker.assign(500, 640);
    let second = worker.assign(0, 65);
    let load = worker.load();
    assert_eq!((load.sequences, load.waiting_tokens, load.kv_blocks_free), (2, 500, 88));

    // The worker reports both, and twenty blocks of somebody else's.
    worker.report(report(1, 5, 68), now);
    let load = worker.load();
    assert_eq!((load.sequences, load.kv_blocks_free), (5, 68));
    // What comes back is free at once, without waiting for the next report.
    drop(first);
    assert_eq!(worker.load().kv_blocks_free, 78);
    drop(second);
    assert_eq!(worker.load().kv_blocks_free, 80);
    assert_eq!(worker.load().waiting_tokens, 0);
}

#[test]
fn never_more_is_free_than_we_know_of() {
    let now = Instant::now();
    let worker = worker(now);
    let _held = worker.assign(0, 6400);
    // Made before the reservation arrived there.
    worker.report(report(1, 0, 100), now);
    assert_eq!(worker.load().kv_blocks_free, 0);
}
