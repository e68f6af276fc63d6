//! The simulated cluster: events in order of time, each told to the router or a worker, which schedule others.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::TokenId;
use router::PrefillOnDecode;
use router::disaggregation::{Remote, decide};
use router::door::{Limits, PrefillPace};
use serde::Serialize;

use super::decode_worker::{DecodeWorker, Wanted};
use super::door::{Fate, Router};
use super::prefill_worker::PrefillWorker;
use super::request::Request;
use super::step_time::{HandoffTime, StepTime};
use crate::serve::conversation::Outcome;
use crate::serve::load::{Measured, settled};
use crate::workload::{Arrivals, RequestId, Workload};

/// Tokens in a KV block, as everywhere.
pub(super) const BLOCK_TOKENS: usize = 64;

/// What is simulated.
#[derive(Debug, Clone, Serialize)]
pub struct Shape {
    /// Prefill workers.
    pub prefill_workers: usize,
    /// Decode workers.
    pub decode_workers: usize,
    /// Blocks in each pool.
    pub kv_blocks: usize,
    /// Sequences in a decode step.
    pub batch_max: usize,
    /// `max_tokens` of every request, where it is not the answer's length.
    pub declare_max_tokens: Option<u32>,
    /// Sequences that the router lets in.
    pub sequences_max: usize,
    /// Requests that wait there.
    pub queue_max: usize,
    /// Its objective.
    pub ttft_ms_max: u64,
    /// A prefill step's time.
    pub prefill_step: StepTime,
    /// A decode step's time.
    pub decode_step: StepTime,
    /// A hand-off's time.
    pub handoff: HandoffTime,
    /// Which prompts decode computes.
    pub prefill_on_decode: PrefillOnDecode,
}

/// What only a simulator can count. The first four are what the design promises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Sequences that got blocks.
    pub admitted: u64,
    /// Those that ended by their own rule.
    pub ended_by_rule: u64,
    /// Those that ended in any other way: evicted, out of blocks, failed.
    pub ended_otherwise: u64,
    /// Requests that workers refused for good.
    pub refused_by_workers: u64,
    /// Longest queues: at the router, in front of a prefill and of a decode worker.
    pub router_queue_max: usize,
    /// See there.
    pub prefill_queue_max: usize,
    /// See there.
    pub decode_queue_max: usize,
    /// Most sequences in a decode step.
    pub decode_batch_max: usize,
    /// Turns for which no block was safe to give: the sequence keeps what it has and waits for a step.
    pub memory_pauses: u64,
    /// Prompts that decode computed.
    pub prefilled_on_decode: u64,
    /// Later turns: tokens that decode found, of those that an ideal cache of earlier turns holds.
    pub decode_reuse: Option<(u64, u64)>,
    /// Events in all.
    pub events: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Arrival(usize),
    Impatient(usize),
    PrefillStep(usize),
    HandedOff(usize),
    DecodeStep(usize),
}

/// A cluster at a moment.
pub struct World<'a> {
    shape: &'a Shape,
    workload: &'a Workload,
    point: u32,
    /// Where the simulated clock begins; only differences count.
    epoch: Instant,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, What)>>,
    /// Events planned so far.
    planned: u64,
    requests: Vec<Request>,
    router: Router,
    prefills: Vec<PrefillWorker>,
    decodes: Vec<DecodeWorker>,
    outcomes: Vec<Outcome>,
    counts: Counts,
}

impl Shape {
    fn door(&self) -> Limits {
        let ttft_max = [Duration::from_millis(self.ttft_ms_max); 2];
        Limits { sequences_max: self.sequences_max, queue_max: self.queue_max, ttft_max }
    }
}

impl<'a> World<'a> {
    /// An idle cluster. `point` tells its requests from other points'.
    pub fn new(shape: &'a Shape, workload: &'a Workload, point: u32) -> Self {
        let prefill = |_| PrefillWorker::new(shape.kv_blocks, BLOCK_TOKENS, shape.prefill_step);
        let times = [shape.decode_step, shape.prefill_step];
        let decode = |_| DecodeWorker::new(shape.kv_blocks, BLOCK_TOKENS, shape.batch_max, times);
        Self {
            shape,
            workload,
            point,
            epoch: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            planned: 0,
            requests: Vec::new(),
            router: Router::new(shape.door()),
            prefills: (0..shape.prefill_workers).map(prefill).collect(),
            decodes: (0..shape.decode_workers).map(decode).collect(),
            outcomes: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Lets requests arrive for `time` and runs until the last has ended.
    ///
    /// # Panics
    /// Where a scheduler's books do not balance; looked at after each `check_every` events, never where that is 0.
    pub fn run(&mut self, arrivals: Arrivals<'_>, time: Duration, check_every: u64) -> Measured {
        let mut arrivals = (0u32..).zip(arrivals.take_while(|at| *at < time));
        let mut next = |world: &mut Self| {
            if let Some((index, at)) = arrivals.next() {
                let id = RequestId { point: world.point, index };
                world.expect(id, 0, at, Vec::new(), None);
            }
        };
        next(self);
        while let Some(Reverse((at, _, what))) = self.events.pop() {
            self.now = at;
            self.counts.events += 1;
            if let What::Arrival(request) = what
                && self.requests[request].turn == 0
            {
                next(self);
            }
            self.happen(what);
            if check_every > 0 && self.counts.events.is_multiple_of(check_every) {
                self.prefills.iter().for_each(PrefillWorker::check);
                self.decodes.iter().for_each(DecodeWorker::check);
                self.router.check();
            }
        }
        let start = self.epoch.into();
        Measured { outcomes: std::mem::take(&mut self.outcomes), start, window: settled(start, time) }
    }

    /// What was counted.
    pub fn counts(&self) -> Counts {
        let longest = |queues: &mut dyn Iterator<Item = usize>| queues.max().unwrap_or(0);
        Counts {
            router_queue_max: self.router.queue_seen_max(),
            prefill_queue_max: longest(&mut self.prefills.iter().map(PrefillWorker::waiting_max)),
            decode_queue_max: longest(&mut self.decodes.iter().map(DecodeWorker::queue_seen_max)),
            decode_batch_max: longest(&mut self.decodes.iter().map(DecodeWorker::batch_seen_max)),
            memory_pauses: self.decodes.iter().map(DecodeWorker::memory_pauses).sum(),
            ..self.counts
        }
    }

    /// Plans turn `turn` of conversation `id` behind what was `said`.
    fn expect(
        &mut self,
        id: RequestId,
        turn: u32,
        due: Duration,
        said: Vec<TokenId>,
        earlier: Option<(u64, u64)>,
    ) {
        let plan = self.workload.plan(id, turn);
        let mut prompt = said;
        prompt.extend(self.workload.tokens(&plan.input).into_iter().map(TokenId));
        let number = self.requests.len();
        self.requests.push(Request {
            id,
            turn,
            due,
            prompt: prompt.into(),
            output_tokens: plan.output_tokens,
            prefilled: 0,
            earlier,
            prefill: 0,
            decode: 0,
            prefill_here: false,
            shared_blocks: 0,
            cached_tokens: 0,
            answer: Vec::new(),
            arrivals: Vec::new(),
        });
        self.at(due, What::Arrival(number));
    }

    fn at(&mut self, at: Duration, what: What) {
        // Numbered, so that what falls on one moment happens in the order in which it was planned.
        self.planned += 1;
        self.events.push(Reverse((at, self.planned, what)));
    }

    fn clock(&self) -> Instant {
        self.epoch + self.now
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Arrival(request) => {
                self.router.set_pace(self.pace());
                let tokens = self.requests[request].prompt.len();
                match self.router.arrive(request, tokens, self.clock()) {
                    Fate::In => self.place(request),
                    Fate::Waits(until) => {
                        let until = until.saturating_duration_since(self.epoch);
                        self.at(until.max(self.now), What::Impatient(request));
                    }
                    Fate::Refused => self.lose(request, "http_429"),
                }
                self.let_in();
            }
            What::Impatient(request) => {
                if self.router.give_up(request, self.clock()) {
                    self.lose(request, "http_429");
                }
                self.let_in();
            }
            What::PrefillStep(worker) => {
                for (request, cached_tokens) in self.prefills[worker].end_step() {
                    self.first_token(request, cached_tokens);
                }
                self.start_prefill(worker);
            }
            What::HandedOff(request) => {
                let Request { prefill, decode, .. } = self.requests[request];
                self.prefills[prefill].release(request);
                self.start_prefill(prefill);
                let (now, first) = (self.clock(), self.requests[request].answer[0]);
                self.decodes[decode].hand_off(request, first, now);
                self.go_round(decode);
            }
            What::DecodeStep(worker) => {
                let (now, clock) = (self.now, self.clock());
                let requests = &mut self.requests;
                let prompts = self.decodes[worker].end_step(clock, |request| requests[request].sample(now));
                for (request, cached_tokens) in prompts {
                    self.first_token_on_decode(request, cached_tokens);
                }
                self.go_round(worker);
            }
        }
    }

    /// What prefill workers report; the simulated router hears it at once.
    fn pace(&self) -> PrefillPace {
        let known: Vec<f64> = self.prefills.iter().filter_map(PrefillWorker::tokens_per_s).collect();
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let workers = self.prefills.len();
        PrefillPace { tokens_per_s: mean * workers as f64, workers }
    }

    fn let_in(&mut self) {
        while let Some((request, in_time)) = self.router.next(self.clock()) {
            if in_time {
                self.place(request);
            } else {
                self.lose(request, "http_429");
            }
        }
    }

    /// Placement's two keys, each tier's least loaded worker.
    fn place(&mut self, request: usize) {
        let prefill =
            (0..self.prefills.len()).min_by_key(|&worker| self.prefills[worker].load()).unwrap_or(0);
        let decode = (0..self.decodes.len()).min_by_key(|&worker| self.decodes[worker].load()).unwrap_or(0);
        let tokens_max = self.requests[request].output_tokens.max(self.shape.declare_max_tokens.unwrap_or(0));
        let now = self.clock();
        let prompt = Arc::clone(&self.requests[request].prompt);
        let (on_prefill, on_decode) = self.missing(request);
        let remote = Remote {
            waiting_tokens: self.prefills[prefill].load() as u64,
            missing_tokens: on_prefill,
            tokens_per_s: self.prefills[prefill].tokens_per_s().map_or(0, |rate| rate as u64),
            handover: self.shape.handoff.of(on_decode.div_ceil(BLOCK_TOKENS as u64) as usize),
        };
        let local = self.decodes[decode].local(on_decode);
        let prefill_here = decide(self.shape.prefill_on_decode, &local, &remote, false).on_decode;
        let computed = if prefill_here { on_decode } else { on_prefill };
        self.router.placed(request, prompt.len(), computed as usize);
        self.requests[request].prefill_here = prefill_here;
        let wanted = Wanted { request, prefill_here, prompt, tokens_max };
        (self.requests[request].prefill, self.requests[request].decode) = (prefill, decode);
        if self.decodes[decode].submit(wanted, now) {
            self.go_round(decode);
        } else {
            self.counts.refused_by_workers += 1;
            self.lose(request, "http_429");
            self.leave(request);
        }
    }

    /// Tokens of a prompt that are thought to be missing on prefill and on decode: prefill computed earlier turns, unless decode did,
    /// and answers are decode's alone.
    fn missing(&self, request: usize) -> (u64, u64) {
        let Request { prompt, earlier, prefilled, .. } = &self.requests[request];
        let whole = |tokens: u64| tokens / BLOCK_TOKENS as u64 * BLOCK_TOKENS as u64;
        let on_decode = earlier.map_or(0, |(prompt, answer)| whole(prompt + answer - 1));
        let prompt = prompt.len() as u64;
        (prompt - whole(*prefilled).min(prompt - 1), prompt - on_decode.min(prompt - 1))
    }

    /// A round of a decode worker between two steps: ends, admissions, the next step.
    fn go_round(&mut self, worker: usize) {
        let now = self.clock();
        while let Some(ended) = self.decodes[worker].reap() {
            if ended.by_itself {
                self.counts.ended_by_rule += 1;
            } else {
                self.counts.ended_otherwise += 1;
            }
            self.finish(ended.request, ended.by_itself);
        }
        while let Some((request, shared_blocks)) = self.decodes[worker].admit(now) {
            self.counts.admitted += 1;
            self.note_decode_reuse(request, shared_blocks);
            let Request { prefill, prompt, prefill_here, .. } = &self.requests[request];
            let (prefill, prompt) = (*prefill, Arc::clone(prompt));
            if *prefill_here {
                self.counts.prefilled_on_decode += 1;
                continue;
            }
            if self.prefills[prefill].submit(request, prompt, now).is_err() {
                self.counts.refused_by_workers += 1;
                self.decodes[worker].fail(request, now);
            }
            self.start_prefill(prefill);
        }
        if let Some(took) = self.decodes[worker].start() {
            self.at(self.now + took, What::DecodeStep(worker));
        }
    }

    fn start_prefill(&mut self, worker: usize) {
        let now = self.clock();
        if let Some(took) = self.prefills[worker].start(now) {
            self.at(self.now + took, What::PrefillStep(worker));
        }
    }

    /// Decode has computed the prompt itself.
    fn first_token_on_decode(&mut self, number: usize, cached_tokens: usize) {
        let (now, clock) = (self.now, self.clock());
        let request = &mut self.requests[number];
        request.cached_tokens = cached_tokens;
        let (first, decode) = (request.sample(now), request.decode);
        self.router.answered(number, clock);
        self.decodes[decode].hand_off(number, first, clock);
        self.let_in();
    }

    fn first_token(&mut self, number: usize, cached_tokens: usize) {
        let now = self.now;
        let request = &mut self.requests[number];
        request.cached_tokens = cached_tokens;
        request.sample(now);
        self.router.answered(number, self.epoch + now);
        let request = &self.requests[number];
        let blocks = request.prompt.len().div_ceil(BLOCK_TOKENS) - request.shared_blocks;
        self.at(now + self.shape.handoff.of(blocks), What::HandedOff(number));
        self.let_in();
    }

    /// Tells the client, starts the next turn, and lets the next request in.
    fn finish(&mut self, number: usize, by_itself: bool) {
        if by_itself {
            let outcome = self.requests[number].outcome(self.epoch, self.now);
            self.outcomes.push(outcome);
            let request = &mut self.requests[number];
            let (id, turn) = (request.id, request.turn + 1);
            let earlier = Some((request.prompt.len() as u64, request.answer.len() as u64));
            let mut said = request.prompt.to_vec();
            request.prompt = Arc::from([]);
            said.append(&mut request.answer);
            let prefilled = if request.prefill_here {
                request.prefilled
            } else {
                earlier.map_or(0, |(prompt, _)| prompt)
            };
            if turn < self.workload.turns {
                self.expect(id, turn, self.now, said, earlier);
                if let Some(next) = self.requests.last_mut() {
                    next.prefilled = prefilled;
                }
            }
        } else {
            self.lose(number, "failed");
        }
        self.leave(number);
    }

    fn leave(&mut self, request: usize) {
        self.router.leave(request, self.clock());
        self.let_in();
    }

    fn lose(&mut self, request: usize, kind: &'static str) {
        let due = self.epoch + self.requests[request].due;
        let refused = u32::from(kind == "http_429");
        let ended = self.clock().into();
        self.outcomes.push(Outcome {
            due: due.into(),
            ended,
            refused,
            reuse: None,
            answer: Err(kind.into()),
        });
    }

    fn note_decode_reuse(&mut self, number: usize, shared_blocks: usize) {
        let request = &mut self.requests[number];
        request.shared_blocks = shared_blocks;
        if let Some((prompt, answer)) = request.earlier {
            // Decode computes no row of the prompt: a block that ends with it can be found, too.
            let (found, held) = self.counts.decode_reuse.get_or_insert_default();
            let computed = (prompt + answer - 1).min(request.prompt.len() as u64);
            *found += (shared_blocks * BLOCK_TOKENS) as u64;
            *held += computed / BLOCK_TOKENS as u64 * BLOCK_TOKENS as u64;
        }
    }
}
