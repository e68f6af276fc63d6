//! `trireme bench drafts`: what drafts cost on this machine with this model, and how often they must stand to pay.
//!
//! For each batch size a step without drafts, and drafting k tokens with the MTP module followed by a step that verifies them (1 + k
//! rows of each sequence), in turn at the same place of the same sequences. Tokens per second grow where a sequence gets more
//! tokens from such a round than the round costs plain steps. Nothing here depends on how well this checkpoint's module guesses: a
//! synthetic checkpoint's guesses nothing, and its costs are those of a trained one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use engine::{
    DraftInput, Drafter, Draw, Engine, EngineOptions, FollowedInput, LogitsWanted, SequenceInput,
    SequenceSampler, SyntheticWeights,
};
use model::{
    BlockId, Checkpoint, Device, KvFormat, KvLayout, ModelConfig, Numerics, SamplingParams, TokenId,
};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::demo;
use crate::engine::v3_config;
use crate::table::{aligned, number};

/// Rounds before anything is counted: memory is touched, buffers grow, steps are recorded.
const WARM_ROUNDS: usize = 3;

/// Flags of `trireme bench drafts`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A checkpoint folder in the Hugging Face layout, with an MTP module. Default: the demo model.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Where to run it: cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Not a checkpoint but DeepSeek-V3's dimensions cut to so many layers and the module, with weights made on the GPU.
    #[arg(long, value_name = "LAYERS", conflicts_with = "model", value_parser = clap::value_parser!(u16).range(2..=61))]
    pub synthetic: Option<u16>,
    /// Threads, this one included. Default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Sequences that generate at the same time; several, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: Vec<u16>,
    /// Tokens before each sequence's last one.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub context: u32,
    /// The most drafts a round.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub drafts: u8,
    /// How often each is done; medians are printed.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub rounds: u16,
    /// `fp8` as in serving, `reference` for the checkpoint's exact values.
    #[arg(long, default_value = "fp8")]
    pub numerics: Numerics,
    /// Seed of the prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What so many drafts cost, in plain steps and microseconds.
struct Cost {
    drafting_us: f64,
    step_us: f64,
}

/// Measures and prints the table.
///
/// # Errors
/// A file cannot be read, the checkpoint is not sound or has no MTP module, or a step fails.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut bench = Bench::load(args)?;
    println!(
        "{} layers of {} and the MTP module, {}, {}, context {}: medians of {} rounds in turn",
        bench.engine.config().num_hidden_layers,
        bench.engine.config().hidden_size,
        bench.engine.fingerprint().backend,
        args.numerics,
        args.context,
        args.rounds
    );
    let header =
        ["batch, drafts", "drafting µs", "step µs", "plain steps", "must stand", "gain at 80 %", "at 100 %"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for &batch in &args.batch {
        let costs = bench.measure(usize::from(batch), usize::from(args.drafts), usize::from(args.rounds))?;
        let plain = costs.first().map_or(f64::NAN, |cost| cost.step_us);
        for (drafts, cost) in costs.iter().enumerate() {
            let ratio = (cost.drafting_us + cost.step_us) / plain;
            let gain = |stand: f64| format!("{:+.0} %", (tokens(stand, drafts) / ratio - 1.0) * 100.0);
            let mut row = vec![
                format!("{batch:>4}, {drafts}"),
                number(cost.drafting_us),
                number(cost.step_us),
                format!("{ratio:.2}"),
            ];
            if drafts > 0 {
                let least = break_even(ratio, drafts);
                row.push(least.map_or("never pays".to_owned(), |least| format!("{:.0} %", least * 100.0)));
                row.extend([gain(0.8), gain(1.0)]);
            }
            rows.push(row);
        }
    }
    print!("{}", aligned(&rows));
    println!(
        "must stand: of the drafts at each place, so that a round gives as many tokens per second as plain steps"
    );
    Ok(())
}

/// Tokens that a sequence gets of a round, where each draft whose predecessors stood stands with `share`.
fn tokens(share: f64, drafts: usize) -> f64 {
    (0..=drafts as i32).map(|place| share.powi(place)).sum()
}

/// The share of drafts that must stand for a round that costs `ratio` plain steps. None where all of them do not suffice.
fn break_even(ratio: f64, drafts: usize) -> Option<f64> {
    if tokens(1.0, drafts) < ratio {
        return None;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        if tokens(middle, drafts) < ratio { low = middle } else { high = middle }
    }
    Some(high)
}

struct Sequence {
    blocks: Vec<BlockId>,
    /// The last one, then what was drafted behind it.
    rows: Vec<TokenId>,
    /// Before the last one.
    state: Vec<f32>,
}

/// Greedy guesses.
struct Guesses<'a> {
    sampler: &'a mut SequenceSampler,
    position: usize,
    drafted: Vec<Vec<TokenId>>,
}

impl Drafter for Guesses<'_> {
    fn draw(&self, index: usize) -> Option<Draw<'_>> {
        let ahead = &self.drafted[index][..];
        Some(Draw { sampler: &*self.sampler, position: self.position + ahead.len(), suppress: &[], ahead })
    }

    fn guess(&mut self, _: usize, logits: &mut [f32]) -> Option<TokenId> {
        Some(self.sampler.guess(logits, self.position, &[]))
    }

    fn take(&mut self, index: usize, token: TokenId) -> bool {
        self.drafted[index].push(token);
        true
    }
}

struct Bench {
    engine: Engine,
    sampler: SequenceSampler,
    /// One row of logits.
    scratch: Vec<f32>,
    context: usize,
    sequences: Vec<Sequence>,
    seed: u64,
}

impl Bench {
    fn load(args: &Args) -> anyhow::Result<Self> {
        let (config, checkpoint) = match args.synthetic {
            Some(layers) => (ModelConfig { num_nextn_predict_layers: 1, ..v3_config(layers)? }, None),
            None => {
                let checkpoint = Checkpoint::open(&demo::model_folder(args.model.as_deref())?)?;
                (checkpoint.config().clone(), Some(checkpoint))
            }
        };
        ensure!(config.num_nextn_predict_layers > 0, "this checkpoint has no MTP module");
        let (context, drafts) = (args.context as usize, usize::from(args.drafts));
        let batch_max = args.batch.iter().copied().max().map_or(1, usize::from);
        let blocks = KvLayout::for_model(&config, KvFormat::Fp8, 1).blocks_for(context + 1 + drafts);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let options = EngineOptions {
            device: args.device,
            numerics: args.numerics,
            kv_format: None,
            kv_blocks_max: batch_max * blocks,
            threads: args.threads.map_or(cores, usize::from),
            step_tokens_max: (batch_max * (1 + drafts)).max(512),
            mtp: true,
        };
        let engine = match &checkpoint {
            Some(checkpoint) => Engine::load_with_experts(checkpoint, &options, &mut |_, _| {})?,
            None => Engine::synthetic(&config, &options, SyntheticWeights::from_seed(args.seed))?,
        };
        let sampler = SequenceSampler::new(&SamplingParams::greedy(), 0, &[]);
        let mut bench =
            Self { engine, sampler, scratch: Vec::new(), context, sequences: Vec::new(), seed: args.seed };
        for index in 0..batch_max {
            let first = (index * blocks) as u32;
            let sequence = bench.prefill(index, (first..first + blocks as u32).map(BlockId).collect())?;
            bench.sequences.push(sequence);
        }
        Ok(bench)
    }

    /// A sequence of random tokens, all but the last one of which are in the cache.
    fn prefill(&mut self, index: usize, blocks: Vec<BlockId>) -> anyhow::Result<Sequence> {
        let vocab = self.engine.config().vocab_size as u32;
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_add(index as u64));
        let prompt: Vec<TokenId> = (0..self.context).map(|_| TokenId(rng.random_range(0..vocab))).collect();
        let mut state = Vec::new();
        for (chunk, tokens) in prompt.chunks(512).enumerate() {
            let (position, block_table) = (chunk * 512, &blocks[..]);
            let sequence = SequenceInput { tokens, position, block_table, logits: LogitsWanted::Last };
            let step = self.engine.step_with_mtp(&[FollowedInput { sequence, before: &state }], &mut ());
            state = step.context("a prompt's step failed")?.last.to_vec();
        }
        Ok(Sequence { blocks, rows: vec![TokenId(rng.random_range(0..vocab))], state })
    }

    /// Costs of 0..=`drafts_max` drafts in a batch of `batch`.
    fn measure(&mut self, batch: usize, drafts_max: usize, rounds: usize) -> anyhow::Result<Vec<Cost>> {
        let mut times = vec![(Vec::new(), Vec::new()); drafts_max + 1];
        for round in 0..WARM_ROUNDS + rounds {
            for (drafts, (drafting, steps)) in times.iter_mut().enumerate() {
                let began = Instant::now();
                self.draft(batch, drafts)?;
                let drafted = Instant::now();
                self.verify(batch, drafts)?;
                if round >= WARM_ROUNDS {
                    drafting.push((drafted - began).as_secs_f64() * 1e6);
                    steps.push(drafted.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        let median = |values: &mut Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        Ok(times
            .iter_mut()
            .map(|(drafting, steps)| Cost { drafting_us: median(drafting), step_us: median(steps) })
            .collect())
    }

    fn draft(&mut self, batch: usize, drafts: usize) -> anyhow::Result<()> {
        let Self { engine, sequences, context, sampler, .. } = self;
        let drafted = vec![Vec::with_capacity(drafts); batch];
        let mut guesses = Guesses { sampler, position: *context + 1, drafted };
        if drafts > 0 {
            let input =
                |sequence: &Sequence| (sequence.rows[0], sequence.blocks.clone(), sequence.state.clone());
            let owned: Vec<_> = sequences[..batch].iter().map(input).collect();
            let inputs: Vec<DraftInput<'_>> = owned
                .iter()
                .map(|(token, blocks, state)| DraftInput {
                    token: *token,
                    position: *context,
                    block_table: blocks,
                    hidden: state,
                    drafts_max: drafts,
                })
                .collect();
            engine.draft_drawing(&inputs, &mut guesses)?;
        }
        for (sequence, drafted) in sequences.iter_mut().zip(guesses.drafted) {
            sequence.rows.truncate(1);
            sequence.rows.extend(drafted);
        }
        Ok(())
    }

    fn verify(&mut self, batch: usize, drafts: usize) -> anyhow::Result<()> {
        let Self { engine, sequences, context, sampler, scratch, .. } = self;
        let inputs: Vec<SequenceInput<'_>> = sequences[..batch]
            .iter()
            .map(|sequence| SequenceInput {
                tokens: &sequence.rows,
                position: *context,
                block_table: &sequence.blocks,
                logits: LogitsWanted::All,
            })
            .collect();
        // Each row's token is drawn, as a server does.
        let draw = Draw { sampler: &*sampler, position: *context, suppress: &[], ahead: &[] };
        let drawn = engine.step_drawing(&inputs, &mut std::iter::repeat(Some(draw)), &mut ())?;
        let mut sampler = SequenceSampler::new(&SamplingParams::greedy(), 0, &[]);
        for row in 0..batch * (1 + drafts) {
            std::hint::black_box(drawn.token(row, &mut sampler, (*context, &[]), scratch));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
