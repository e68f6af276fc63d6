//! The same question on a GPU: prompts per second, a generation step by batch size, and where the time of either goes.
//!
//! Generation steps choose their tokens on the device, as greedy serving does. Prompts run first and leave the cache that
//! the generation steps attend to. With `--synthetic` the weights are made on the device: DeepSeek-V3's dimensions cut to
//! some layers, so that a size is measured that nobody wants to store.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::ensure;
use engine::{
    Draw, Engine, EngineOptions, LogitsWanted, SequenceInput, SequenceSampler, Stage, StepObserver,
    SyntheticWeights, Watched,
};
use model::{BlockId, Checkpoint, KvFormat, KvLayout, ModelConfig, SamplingParams, TokenId};

use super::Args;
use crate::demo;
use crate::table::{aligned, number};

/// DeepSeek-V3's configuration, but for the number of layers.
const V3: &str = include_str!("v3.json");
/// Steps before a measurement: they record what is replayed afterwards.
const WARM_STEPS: usize = 3;

/// DeepSeek-V3's configuration with so many layers.
///
/// # Errors
/// Never: the file is part of the program.
pub(crate) fn v3_config(layers: u16) -> anyhow::Result<ModelConfig> {
    let text = V3.replace("\"num_hidden_layers\": 61", &format!("\"num_hidden_layers\": {layers}"));
    Ok(ModelConfig::from_json(&text)?)
}

/// Loads, measures and prints.
///
/// # Errors
/// The engine does not fit the device, or fails.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let (config, checkpoint) = match args.synthetic {
        Some(layers) => (v3_config(layers)?, None),
        None => {
            let checkpoint = Checkpoint::open(&demo::model_folder(args.model.as_deref())?)?;
            (checkpoint.config().clone(), Some(checkpoint))
        }
    };
    let batch_max = args.batch.iter().copied().max().map_or(1, usize::from);
    let (prompt, generate) = (args.prompt as usize, args.generate as usize);
    let context = prompt + (generate + WARM_STEPS) * args.batch.len();
    ensure!(
        context <= config.max_position_embeddings,
        "--prompt and --gen of every --batch are {context} tokens, the model's context is {}",
        config.max_position_embeddings
    );
    let layout = KvLayout::for_model(&config, args.kv_format.unwrap_or(KvFormat::Fp8), 0);
    let most = args.prefill.iter().map(|p| p.count * layout.blocks_for(p.tokens)).max().unwrap_or(0);
    let options = EngineOptions {
        device: args.device,
        numerics: args.numerics,
        kv_format: args.kv_format,
        kv_blocks_max: most.max(batch_max * layout.blocks_for(context)),
        threads: args.threads.map_or(2, usize::from),
        step_tokens_max: args.chunk as usize,
        mtp: false,
    };
    let engine = match &checkpoint {
        Some(checkpoint) => Engine::load_with_experts(checkpoint, &options, &mut |_, _| {})?,
        None => {
            let weights = SyntheticWeights { seed: args.seed, router_bias: args.router_bias };
            Engine::synthetic(&config, &options, weights)?
        }
    };
    let sampler = SequenceSampler::new(&SamplingParams::greedy(), 0, &[]);
    let mut bench = Bench { engine, sampler, vocab: config.vocab_size as u32, chunk: args.chunk as usize };
    println!(
        "{} layers of {}, {}, {}; ready in {:.1} s",
        config.num_hidden_layers,
        config.hidden_size,
        bench.engine.fingerprint().backend,
        args.numerics,
        started.elapsed().as_secs_f64()
    );
    let prompts = bench.prompts(args)?;
    print!("{}", aligned(&prompts));
    let mut sequences = bench.sequences(batch_max, prompt, context);
    bench.prefill(&mut sequences, &mut ())?;
    let header = ["batch", "context", "step ms (min–max)", "tok/s", "experts a layer"];
    let mut steps = vec![header.map(str::to_owned).to_vec()];
    let mut parts = Vec::new();
    for &batch in &args.batch {
        let batch = &mut sequences[..usize::from(batch)];
        let mut times = Vec::new();
        for step in 0..generate + WARM_STEPS {
            let begun = Instant::now();
            bench.generate(batch, &mut ())?;
            if step >= WARM_STEPS {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let spread = format!("{median:.3} ({:.3}–{:.3})", times[0], times[times.len() - 1]);
        let rate = number(batch.len() as f64 / median * 1e3);
        let context = batch[0].tokens.len().to_string();
        let mut clock = Clock::default();
        bench.generate(batch, &mut clock.start())?;
        parts.push((format!("batch {}", batch.len()), clock));
        batch.iter_mut().for_each(|sequence| sequence.tokens.truncate(sequence.tokens.len() - 1));
        let mut distinct = Distinct::default();
        bench.generate(batch, &mut distinct)?;
        batch.iter_mut().for_each(|sequence| sequence.tokens.truncate(sequence.tokens.len() - 1));
        steps.push(vec![batch.len().to_string(), context, spread, rate, distinct.text()]);
    }
    print!("{}", aligned(&steps));
    let mut chunk = bench.sequences(1, bench.chunk.min(prompt), context);
    let mut clock = Clock::default();
    bench.prefill(&mut chunk, &mut clock.start())?;
    parts.push((format!("{} rows of a prompt", chunk[0].tokens.len()), clock));
    print!("{}", render(&parts));
    Ok(())
}

/// Prompts of one length.
#[derive(Clone, Copy, Debug)]
pub struct Prompts {
    /// How many.
    pub count: usize,
    /// Tokens of each.
    pub tokens: usize,
}

impl std::str::FromStr for Prompts {
    type Err = String;

    /// `32x1024`
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(count, tokens)| {
            let (count, tokens) = (count.parse().ok()?, tokens.parse().ok()?);
            (count > 0 && tokens > 0).then_some(Self { count, tokens })
        });
        parsed.ok_or_else(|| format!("`{text}` is no COUNTxTOKENS"))
    }
}

struct Bench {
    engine: Engine,
    sampler: SequenceSampler,
    vocab: u32,
    chunk: usize,
}

struct Sequence {
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

impl Bench {
    /// Prompt rates, the better of two runs.
    fn prompts(&mut self, args: &Args) -> anyhow::Result<Vec<Vec<String>>> {
        let mut rows = vec![["prompts", "s", "tok/s"].map(str::to_owned).to_vec()];
        for prompts in &args.prefill {
            let mut best = f64::MAX;
            for _ in 0..2 {
                let mut sequences = self.sequences(prompts.count, prompts.tokens, prompts.tokens);
                let begun = Instant::now();
                self.prefill(&mut sequences, &mut ())?;
                best = best.min(begun.elapsed().as_secs_f64());
            }
            let rate = number((prompts.count * prompts.tokens) as f64 / best);
            rows.push(vec![format!("{} x {}", prompts.count, prompts.tokens), format!("{best:.3}"), rate]);
        }
        Ok(rows)
    }

    fn sequences(&self, count: usize, prompt: usize, context: usize) -> Vec<Sequence> {
        let blocks = self.engine.kv_layout().blocks_for(context) as u32;
        (0..count as u32)
            .map(|index| Sequence {
                tokens: (0..prompt as u32).map(|i| TokenId(mixed(index << 20 | i) % self.vocab)).collect(),
                blocks: (index * blocks..(index + 1) * blocks).map(BlockId).collect(),
            })
            .collect()
    }

    /// Runs whole prompts in steps of at most a chunk's rows, several in a step where they are short.
    fn prefill(&mut self, sequences: &mut [Sequence], observer: &mut dyn StepObserver) -> anyhow::Result<()> {
        let mut done = vec![0; sequences.len()];
        loop {
            let mut room = self.chunk;
            let mut step = Vec::new();
            for (sequence, done) in sequences.iter().zip(&mut done) {
                let from = *done;
                let rows = (sequence.tokens.len() - from).min(room);
                if rows == 0 {
                    continue;
                }
                room -= rows;
                *done += rows;
                let last = *done == sequence.tokens.len();
                step.push(SequenceInput {
                    tokens: &sequence.tokens[from..*done],
                    position: from,
                    block_table: &sequence.blocks,
                    logits: if last { LogitsWanted::Last } else { LogitsWanted::None },
                });
            }
            if step.is_empty() {
                return Ok(());
            }
            let draw = Draw { sampler: &self.sampler, position: 0, suppress: &[], ahead: &[] };
            self.engine.step_drawing(&step, &mut std::iter::repeat(Some(draw)), observer)?;
        }
    }

    /// One token of every sequence, chosen on the device.
    fn generate(
        &mut self,
        sequences: &mut [Sequence],
        observer: &mut dyn StepObserver,
    ) -> anyhow::Result<()> {
        let step: Vec<SequenceInput<'_>> = sequences
            .iter()
            .map(|sequence| SequenceInput {
                tokens: &sequence.tokens[sequence.tokens.len() - 1..],
                position: sequence.tokens.len() - 1,
                block_table: &sequence.blocks,
                logits: LogitsWanted::Last,
            })
            .collect();
        let Self { engine, sampler, .. } = self;
        let position = |sequence: &Sequence| sequence.tokens.len();
        let drawn = {
            let draw = |sequence: &Sequence| {
                Some(Draw { sampler, position: position(sequence), suppress: &[], ahead: &[] })
            };
            engine.step_drawing(&step, &mut sequences.iter().map(draw), observer)?
        };
        let mut scratch = Vec::new();
        for (row, sequence) in sequences.iter_mut().enumerate() {
            let token = drawn.token(row, sampler, (position(sequence), &[]), &mut scratch).token;
            sequence.tokens.push(token);
        }
        Ok(())
    }
}

/// How many experts of each layer a step goes to, which is what it reads of them.
#[derive(Default)]
struct Distinct(Vec<usize>);

impl Distinct {
    fn text(&self) -> String {
        let (least, most) = (self.0.iter().min(), self.0.iter().max());
        let mean = self.0.iter().sum::<usize>() as f64 / self.0.len().max(1) as f64;
        match (least, most) {
            (Some(least), Some(most)) => format!("{mean:.1} ({least}–{most})"),
            _ => "-".to_owned(),
        }
    }
}

impl StepObserver for Distinct {
    fn watched(&self) -> Watched {
        Watched { layers_done: false, values: true, stages: false }
    }

    fn routed(&mut self, _: usize, ids: &[u16], _: &[f32]) {
        let ids: std::collections::BTreeSet<u16> = ids.iter().copied().collect();
        self.0.push(ids.len());
    }
}

/// Time by part of one step, which waits for the device after each of them.
#[derive(Default)]
struct Clock {
    last: Option<Instant>,
    spent: Vec<(Stage, f64)>,
}

impl Clock {
    fn start(&mut self) -> &mut Self {
        self.last = Some(Instant::now());
        self
    }

    fn of(&self, stage: Stage) -> f64 {
        self.spent.iter().filter(|(spent, _)| *spent == stage).map(|(_, us)| us).sum()
    }
}

impl StepObserver for &mut Clock {
    fn watched(&self) -> Watched {
        Watched { layers_done: false, values: false, stages: true }
    }

    fn stage(&mut self, ended: Stage) {
        let now = Instant::now();
        let us = self.last.map_or(0.0, |last| (now - last).as_secs_f64() * 1e6);
        self.last = Some(now);
        self.spent.push((ended, us));
    }
}

fn render(columns: &[(String, Clock)]) -> String {
    let mut rows = vec![vec!["µs of a step".to_owned()]];
    rows[0].extend(columns.iter().map(|(name, _)| name.clone()));
    for stage in Stage::ALL {
        let mut row = vec![stage.name().to_owned()];
        row.extend(columns.iter().map(|(_, clock)| number(clock.of(stage))));
        rows.push(row);
    }
    let mut text = aligned(&rows);
    let _ = writeln!(text, "(each part waited for; layers added up)");
    text
}

fn mixed(x: u32) -> u32 {
    let x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    let x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    x ^ x >> 16
}
