//! How much a run moves, and what it reports.

use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::{Mode, Shape, pool};

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Blocks of a message.
    pub per_message: usize,
    /// Messages that are timed.
    pub messages: usize,
    /// Messages before them.
    pub warm: usize,
    /// Messages on their way at once.
    pub inflight: usize,
}

impl Plan {
    pub fn new(shape: &Shape) -> anyhow::Result<Self> {
        ensure!((64..=pool::POOL_BYTES / 16).contains(&shape.block), "--block must be 64 bytes to 16 MiB");
        ensure!(shape.inflight > 0, "--inflight must be at least 1");
        let per_message = (shape.msg_kib * 1024 / shape.block).max(1);
        let message_bytes = per_message * shape.block;
        let messages = |mib: usize| mib * (1 << 20) / message_bytes;
        Ok(Self {
            block_bytes: shape.block,
            per_message,
            messages: shape.count.unwrap_or_else(|| messages(shape.total_mib)).max(1),
            warm: messages(shape.warm_mib).max(2),
            inflight: shape.inflight,
        })
    }

    pub fn message_bytes(&self) -> usize {
        self.per_message * self.block_bytes
    }

    /// Messages in all.
    pub fn total(&self) -> usize {
        self.warm + self.messages
    }
}

/// What a run has measured, the warm-up left out.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub messages: usize,
    pub message_bytes: usize,
    pub elapsed: Duration,
    /// From a message's first call to the answer that all of its blocks are in place.
    pub latencies: Vec<Duration>,
    pub cpu_send: Duration,
    pub cpu_recv: Duration,
    /// Datagrams that were sent again.
    pub lost: u64,
    /// Datagram size that the connection has settled on; 0 where there are none.
    pub mtu: u64,
    /// Blocks that are right and wrong in the end.
    pub verified: (usize, usize),
}

impl Outcome {
    pub fn to_json(&self, mode: Mode, shape: &Shape) -> String {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = |share: f64| {
            let index = (sorted.len().saturating_sub(1) as f64 * share) as usize;
            sorted.get(index).map_or(0.0, |time| (time.as_secs_f64() * 1e7).round() / 10.0)
        };
        let gb = (self.messages * self.message_bytes) as f64 / 1e9;
        let thousandths = |value: f64| (value * 1e3).round() / 1e3;
        let (right, wrong) = self.verified;
        serde_json::json!({
            "mode": mode.name(),
            "gbps": thousandths(gb / self.elapsed.as_secs_f64()),
            "p50_us": at(0.5),
            "p90_us": at(0.9),
            "p99_us": at(0.99),
            "max_us": at(1.0),
            "cpu_send_s_per_gb": thousandths(self.cpu_send.as_secs_f64() / gb),
            "cpu_recv_s_per_gb": thousandths(self.cpu_recv.as_secs_f64() / gb),
            "msg": self.message_bytes,
            "block": shape.block,
            "msgs": self.messages,
            "inflight": shape.inflight,
            "lost": self.lost,
            "mtu": self.mtu,
            "verify": format!("ok={right} bad={wrong}"),
        })
        .to_string()
    }
}

/// Keeps this process, and every thread that it will start, on one core.
pub(crate) fn pin(core: i64) -> anyhow::Result<()> {
    let Ok(core) = usize::try_from(core) else { return Ok(()) };
    ensure!(core < CpuSet::MAX_CPU, "there is no core {core}");
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on core {core}"))
}

/// Processor time of this process so far.
pub(crate) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}
