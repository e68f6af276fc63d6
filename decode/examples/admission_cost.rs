//! What an admission decision costs with 1,024 sequences in the pool: the forecast of the worst moment and the banker's
//! proof, both of which it needs when not everybody's worst case fits. Prints; asserts nothing about time.
//!
//!     cargo run --release -p decode --example admission_cost

use std::sync::Arc;
use std::time::{Duration, Instant};

use decode::Failure;
use decode::finish::FinishRule;
use decode::scheduler::{Admission, Event, Limits, Scheduler, SequenceId};
use model::{Stopping, TokenId};
use proto::share::Share;

const SEQUENCES: usize = 1024;
const ROUNDS: u32 = 2000;
const END: TokenId = TokenId(1);
const WORD: TokenId = TokenId(2);

fn admit(scheduler: &mut Scheduler, first: u32) -> Option<(SequenceId, Duration)> {
    let stopping = Stopping { max_tokens: 512, min_tokens: 0, ignore_eos: false, stop_token_ids: Vec::new() };
    let prompt: Arc<[TokenId]> = (0..64).map(|at| TokenId(100 + first.wrapping_mul(64) + at)).collect();
    let rule = FinishRule::new(&stopping, &[END]);
    let share = Share::default();
    let admission = Admission { prompt, cache_salt: 0, share, rule, deadline: None, prefill_here: false };
    let now = Instant::now();
    scheduler.submit(admission, now).ok()?;
    let begin = Instant::now();
    let (id, _) = scheduler.admit_next(&mut (), now)?;
    Some((id, begin.elapsed()))
}

fn release(scheduler: &mut Scheduler) {
    while let Some(id) = scheduler.next_finished() {
        scheduler.release(id);
    }
}

fn main() {
    let mut scheduler = Scheduler::new(Limits {
        sequences_max: 2 * SEQUENCES,
        queue_max: 16,
        batch_max: 512,
        step_rows_max: 1,
        // Less than prompts and max_tokens of all, more than what is expected of them.
        kv_blocks: 6000,
        block_tokens: 64,
        reader_stall_max: Duration::from_secs(3600),
        rerun_tokens: 0,
    });
    let now = Instant::now();
    // Answers have some 40 tokens: what admission plans with.
    for first in 0..300 {
        let Some((id, _)) = admit(&mut scheduler, first) else { break };
        scheduler.apply(id, Event::HandedOff(WORD), now);
        (0..40).for_each(|_| scheduler.apply(id, Event::Sampled(WORD), now));
        scheduler.apply(id, Event::Sampled(END), now);
        release(&mut scheduler);
    }
    let mut running = 0;
    while running < SEQUENCES {
        let Some((id, _)) = admit(&mut scheduler, 1000 + running as u32) else { break };
        scheduler.apply(id, Event::HandedOff(WORD), now);
        running += 1;
    }
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let Some((id, took)) = admit(&mut scheduler, 10_000 + round) else { break };
        times.push(took);
        scheduler.apply(id, Event::Failed(Failure::Cancelled), now);
        release(&mut scheduler);
    }
    times.sort();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).map_or(0, |time| time.as_nanos());
    println!(
        "{running} sequences, {} decisions: median {} ns, 99th percentile {} ns",
        times.len(),
        at(0.5),
        at(0.99)
    );
}
