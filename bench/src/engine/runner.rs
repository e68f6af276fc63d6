//! One engine and its rounds: all prompts in chunks, then one token of every sequence a step.

use std::time::Instant;

use anyhow::Context as _;
use engine::{Engine, EngineOptions, LogitsWanted, SequenceInput, SequenceSampler};
use model::{BlockId, Checkpoint, KvFormat, KvLayout, SamplingParams, TokenId};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Args;
use super::stages::{Times, Watch};
use super::traffic::Traffic;

/// What a round measured.
pub(super) struct Round {
    /// All prompts, their first tokens sampled.
    pub prompt: Times,
    /// All generation steps.
    pub generation: Times,
    /// Bytes of weights that the generation steps had to read.
    pub weight_bytes: u64,
    /// Seconds of the generation step in the middle.
    pub step_s: f64,
    /// What memory gave to plain reads just before and after the generation steps, the mean.
    pub read_gb_per_s: f64,
}

/// A sequence of the batch.
struct Sequence {
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
    sampler: SequenceSampler,
}

/// Rows `from..to` of a sequence's prompt.
#[derive(Clone, Copy)]
struct Chunk {
    sequence: usize,
    from: usize,
    to: usize,
}

/// The engine and what its rounds need.
pub(super) struct Runner {
    engine: Engine,
    traffic: Traffic,
    logits: Vec<f32>,
    prompt: usize,
    generate: usize,
    chunk: usize,
    seed: u64,
}

impl Runner {
    /// Loads the checkpoint onto the device of `args`, with room for `batch_max` sequences.
    pub fn load(
        args: &Args,
        checkpoint: &Checkpoint,
        threads: usize,
        batch_max: usize,
    ) -> anyhow::Result<Self> {
        let (prompt, generate) = (args.prompt as usize, args.generate as usize);
        let layout = KvLayout::for_model(checkpoint.config(), KvFormat::Fp8, 0);
        let options = EngineOptions {
            device: model::Device::Cpu,
            numerics: args.numerics,
            kv_format: args.kv_format,
            kv_blocks_max: batch_max * layout.blocks_for(prompt + generate),
            threads,
            step_tokens_max: args.chunk as usize,
            mtp: false,
        };
        let engine = Engine::load_with_experts(checkpoint, &options, &mut |_, _| {})?;
        Ok(Self {
            engine,
            traffic: Traffic::new(checkpoint)?,
            logits: Vec::new(),
            prompt,
            generate,
            chunk: args.chunk as usize,
            seed: args.seed,
        })
    }

    /// What the engine runs on.
    pub fn backend(&self) -> &str {
        &self.engine.fingerprint().backend
    }

    /// Everything once with `batch` sequences; `bandwidth` probes memory.
    pub fn round(&mut self, batch: usize, bandwidth: &dyn Fn() -> f64) -> anyhow::Result<Round> {
        let mut sequences = self.sequences(batch);
        let mut prompt = Times::start();
        for step in chunks(batch, self.prompt, self.chunk) {
            self.run(&mut sequences, &step, &mut prompt)?;
        }
        self.traffic.take();
        let before = bandwidth();
        let mut generation = Times::start();
        let mut steps = Vec::with_capacity(self.generate);
        for token in 0..self.generate {
            let started = Instant::now();
            let from = self.prompt + token;
            let step: Vec<Chunk> =
                (0..batch).map(|sequence| Chunk { sequence, from, to: from + 1 }).collect();
            self.run(&mut sequences, &step, &mut generation)?;
            steps.push(started.elapsed().as_secs_f64());
        }
        steps.sort_by(f64::total_cmp);
        let step_s = steps.get(steps.len() / 2).copied().unwrap_or(f64::NAN);
        let read_gb_per_s = f64::midpoint(before, bandwidth());
        Ok(Round { prompt, generation, weight_bytes: self.traffic.take(), step_s, read_gb_per_s })
    }

    /// Prompts drawn from the seed, each sequence with blocks of its own.
    fn sequences(&self, batch: usize) -> Vec<Sequence> {
        let blocks = self.engine.kv_layout().blocks_for(self.prompt + self.generate);
        let vocab = self.engine.config().vocab_size as u32;
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let sequence = |index: usize| {
            let mut rng = StdRng::seed_from_u64(self.seed.wrapping_add(index as u64));
            Sequence {
                tokens: (0..self.prompt).map(|_| TokenId(rng.random_range(0..vocab))).collect(),
                blocks: (index * blocks..(index + 1) * blocks).map(|block| BlockId(block as u32)).collect(),
                sampler: SequenceSampler::new(&params, 0, &[]),
            }
        };
        (0..batch).map(sequence).collect()
    }

    /// One step, and a token sampled for every sequence whose last token it ran.
    fn run(&mut self, sequences: &mut [Sequence], step: &[Chunk], times: &mut Times) -> anyhow::Result<()> {
        let inputs: Vec<SequenceInput<'_>> = step
            .iter()
            .map(|chunk| {
                let sequence = &sequences[chunk.sequence];
                let last = chunk.to == sequence.tokens.len();
                SequenceInput {
                    tokens: &sequence.tokens[chunk.from..chunk.to],
                    position: chunk.from,
                    block_table: &sequence.blocks,
                    logits: if last { LogitsWanted::Last } else { LogitsWanted::None },
                }
            })
            .collect();
        self.traffic.step();
        let mut watch = Watch { times, traffic: &mut self.traffic };
        let output = self.engine.step(&inputs, &mut watch).context("the step failed")?;
        let vocab =
            output.logits.len() / inputs.iter().filter(|i| i.logits == LogitsWanted::Last).count().max(1);
        let ended = step.iter().filter(|chunk| chunk.to == sequences[chunk.sequence].tokens.len());
        let ended: Vec<usize> = ended.map(|chunk| chunk.sequence).collect();
        for (sequence, logits) in ended.into_iter().zip(output.logits.chunks_exact(vocab.max(1))) {
            let sequence = &mut sequences[sequence];
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            let sampled = sequence.sampler.sample(&mut self.logits, sequence.tokens.len(), &[]);
            sequence.tokens.push(sampled.token);
        }
        times.sampled();
        Ok(())
    }
}

/// Prompts of `batch` sequences, cut and packed into steps of at most `rows_max` rows.
fn chunks(batch: usize, prompt: usize, rows_max: usize) -> Vec<Vec<Chunk>> {
    let mut steps: Vec<Vec<Chunk>> = vec![Vec::new()];
    let mut room = rows_max;
    for sequence in 0..batch {
        let mut from = 0;
        while from < prompt {
            if room == 0 {
                steps.push(Vec::new());
                room = rows_max;
            }
            let to = prompt.min(from + room);
            if let Some(step) = steps.last_mut() {
                step.push(Chunk { sequence, from, to });
            }
            room -= to - from;
            from = to;
        }
    }
    steps
}
