//! Prefill's device thread: the serving scheduler and hand-off over a pool whose layers are done when the clock says so.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use crossbeam_channel::Select;
use engine::{KvPool, StepObserver};
use fabric::Fabric;
use kvtransfer::Sender;
use model::{BlockId, KvLayout, TokenId};
use prefill::handoff::{Handoff, Outcome};
use prefill::scheduler::{Arrival, Chunk, Limits, Scheduler, SequenceId};

use super::decode::Decode;
use super::{Args, Sample};

/// With blocks that had no room: as prefill's own device thread.
const BACKLOG: Duration = Duration::from_micros(500);

pub(super) struct Prefill {
    scheduler: Scheduler,
    handoff: Handoff,
    kv: KvPool,
    layers: usize,
    row_bytes: usize,
    layer_time: Duration,
    next: u64,
}

impl Prefill {
    pub(super) fn new(fabric: Fabric, layout: &KvLayout, blocks: usize, args: &Args) -> anyhow::Result<Self> {
        let mut kv = KvPool::new(layout.clone(), blocks)?;
        // Pages that were never written are one page of zeroes, and cost nothing to read.
        for block in 0..blocks {
            for layer in 0..layout.layers {
                let bytes = layout.layer_stride();
                let place = kv.block_layer_mut(BlockId(block as u32), layer, bytes).context("a block")?;
                place.fill((block + layer) as u8);
            }
        }
        let limits = Limits {
            queue_requests_max: 1,
            queue_tokens_max: blocks * layout.block_tokens,
            active_max: 1,
            step_tokens_max: args.chunk,
            block_tokens: layout.block_tokens,
            kv_blocks: blocks,
            rerun_tokens: 0,
        };
        Ok(Self {
            scheduler: Scheduler::new(limits),
            handoff: Handoff::new(Sender::new(fabric), layout),
            kv,
            layers: layout.layers,
            row_bytes: layout.row_bytes(),
            layer_time: Duration::from_secs_f64(args.token_us / 1e6 / layout.layers as f64),
            next: 0,
        })
    }

    /// Computes and hands over one prompt.
    pub(super) fn hand_over(&mut self, tokens: usize, decode: &Decode) -> anyhow::Result<Sample> {
        let ticket = decode.ticket(tokens)?;
        let (id, landed_before) = (SequenceId(self.next), decode.landed());
        self.next += 1;
        let arrival = Arrival {
            id,
            request_id: "handover".into(),
            // Each prompt is one that nobody has seen.
            cache_salt: self.next,
            share: proto::share::Share::default(),
            prompt: (0..tokens as u32).map(TokenId).collect(),
            recompute: true,
            deadline: None,
        };
        self.scheduler.submit(arrival, Instant::now())?;
        self.handoff.begin(id, "handover", &ticket, Instant::now())?;
        let began = Instant::now();
        let (ended, landed) = self.compute(decode)?;
        self.handoff.finish(id, TokenId(1), Instant::now());
        self.until_committed(id)?;
        let (committed, report) = decode.committed()?;
        self.scheduler.remove(id);
        decode.revoke(ticket.ticket_id)?;
        let bytes = (tokens * self.row_bytes * self.layers) as u64;
        ensure!(report.bytes == bytes, "{} of {bytes} bytes have landed", report.bytes);
        Ok(Sample {
            after: committed.saturating_duration_since(ended),
            landed: (landed - landed_before) as f64 / bytes as f64,
            whole: committed.saturating_duration_since(began),
        })
    }

    /// Runs all chunks; when the last layer ended, and what had landed by then.
    fn compute(&mut self, decode: &Decode) -> anyhow::Result<(Instant, u64)> {
        let mut step: Vec<Chunk> = Vec::new();
        // A layer begins when the one before it ends, whatever the pushes take meanwhile: a device computes by itself.
        let mut clock = Instant::now();
        loop {
            self.scheduler.schedule(&mut step, &mut (), Instant::now());
            let Some(chunk) = step.first().copied() else { bail!("a prompt without a last chunk") };
            for layer in 0..self.layers {
                clock += self.layer_time * chunk.tokens as u32;
                std::thread::sleep(clock.saturating_duration_since(Instant::now()));
                if chunk.last && layer + 1 == self.layers {
                    let at_the_end = (Instant::now(), decode.landed());
                    self.handoff.during(&self.scheduler, &step).layer_done(layer, &self.kv);
                    self.scheduler.complete(&step);
                    return Ok(at_the_end);
                }
                self.handoff.during(&self.scheduler, &step).layer_done(layer, &self.kv);
            }
            self.scheduler.complete(&step);
            self.poll()?;
            // Late is late: the device waits for its thread between steps.
            clock = clock.max(Instant::now());
        }
    }

    fn until_committed(&mut self, id: SequenceId) -> anyhow::Result<()> {
        loop {
            if let Some(outcome) = self.poll()? {
                ensure!(outcome == id, "another hand-over has ended");
                return Ok(());
            }
            let mut select = Select::new();
            self.handoff.wait_on(&mut select);
            let backlog = self.handoff.has_backlog();
            let _ = select.ready_timeout(if backlog { BACKLOG } else { Duration::from_millis(20) });
        }
    }

    fn poll(&mut self) -> anyhow::Result<Option<SequenceId>> {
        let ended = self.handoff.poll(&self.scheduler, &self.kv, Instant::now());
        match ended.into_iter().next() {
            None => Ok(None),
            Some((id, Outcome::Committed { .. })) => Ok(Some(id)),
            Some((_, other)) => bail!("the hand-over failed: {other:?}"),
        }
    }
}
