//! What a copy costs on this machine: the same blocks from pool to pool inside one process.

use std::time::Instant;

use super::plan::{Outcome, Plan, cpu_time};
use super::pool::{Pool, destination, message};

/// Copies message after message; with `sum`, takes each copy's checksum while it is in cache.
pub(crate) fn run(plan: &Plan, sum: bool) -> anyhow::Result<Outcome> {
    let (source, mut pool) = (Pool::filled(plan.block_bytes)?, Pool::empty(plan.block_bytes)?);
    let blocks = source.blocks();
    let mut outcome =
        Outcome { messages: plan.messages, message_bytes: plan.message_bytes(), ..Outcome::default() };
    let (mut start, mut cpu_before, mut sums) = (Instant::now(), cpu_time(), 0_u64);
    for number in 0..plan.total() {
        if number == plan.warm {
            (start, cpu_before) = (Instant::now(), cpu_time());
            outcome.latencies.clear();
        }
        let message_start = Instant::now();
        for block in message(number, plan.per_message, blocks) {
            let into = pool.get_mut(destination(block, blocks));
            into.copy_from_slice(source.get(block));
            if sum {
                sums ^= fabric::checksum(into);
            }
        }
        outcome.latencies.push(message_start.elapsed());
    }
    std::hint::black_box(sums);
    outcome.elapsed = start.elapsed();
    outcome.cpu_send = cpu_time() - cpu_before;
    outcome.verified = pool.verify();
    Ok(outcome)
}
