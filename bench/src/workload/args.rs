//! The flags that say what a load is made of.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use super::{Pattern, Published, Scale, Source, TOKEN_ID_MIN, Trace, Workload};

/// Longest prompt of a distribution or trace where nothing is said: with [`OUTPUT_MAX_DEFAULT`] it fits the demo model's
/// context of 4,096.
const INPUT_MAX_DEFAULT: u32 = 3072;
const OUTPUT_MAX_DEFAULT: u32 = 512;

/// Flags about requests and their order.
#[derive(Debug, Clone, clap::Args)]
// Flattened into the flags of others, whose group has the name that this one would take.
#[group(id = "workload")]
pub struct Args {
    /// Tokens of each prompt; every prompt is another one, so that none is served from a prefix cache.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub output_tokens: u32,
    /// Lengths of prompts and answers as published, instead of all alike.
    #[arg(long, value_enum, conflicts_with_all = ["prompt_tokens", "output_tokens", "trace"])]
    pub lengths: Option<Published>,
    /// Lengths from a trace: AzurePublicDataset's CSV of 2023, or Mooncake's JSON lines, whose block hashes become
    /// prefixes that prompts share.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "output_tokens"])]
    pub trace: Option<PathBuf>,
    /// With --lengths or --trace: tokens of the longest prompt, several turns' together; where longer ones occur, all are
    /// scaled down alike. Default: 3072.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_input: Option<u32>,
    /// With --lengths or --trace: tokens of the longest answer, likewise. Default: 512.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_output: Option<u32>,
    /// Turns of a conversation: each sends everything that was said before, answers included.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub turns: u32,
    /// How open-loop arrivals are spread.
    #[arg(long, value_enum, default_value_t = Pattern::Poisson)]
    pub arrivals: Pattern,
    /// Prompt token ids are drawn from 100 up to this; keep it inside the model's vocabulary.
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(i64::from(TOKEN_ID_MIN) + 1..))]
    pub token_id_max: u32,
    /// Seed of lengths, prompts and arrivals.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Args {
    /// The load they describe.
    ///
    /// # Errors
    /// The trace cannot be read, or the bounds leave a turn no room.
    pub fn workload(&self) -> anyhow::Result<Workload> {
        let (source, longest) = match (&self.lengths, &self.trace) {
            (Some(published), _) => {
                (Source::Published(*published), (published.input().longest(), published.output().longest()))
            }
            (None, Some(path)) => {
                let trace = Trace::read(path).with_context(|| format!("--trace {}", path.display()))?;
                let longest = trace.longest();
                (Source::Trace(trace), longest)
            }
            (None, None) => {
                let Self { prompt_tokens: input_tokens, output_tokens, .. } = *self;
                (Source::Fixed { input_tokens, output_tokens }, (input_tokens, output_tokens))
            }
        };
        ensure!(
            self.arrivals == Pattern::Poisson || self.trace.is_some(),
            "--arrivals trace needs --trace FILE"
        );
        let fixed = matches!(source, Source::Fixed { .. });
        ensure!(
            !fixed || (self.max_input.is_none() && self.max_output.is_none()),
            "--max-input and --max-output scale --lengths or --trace"
        );
        let output_max = self.max_output.unwrap_or(OUTPUT_MAX_DEFAULT);
        let input_max = self.max_input.unwrap_or(INPUT_MAX_DEFAULT);
        // The last turn's prompt holds every input and all answers but its own.
        let answers = u64::from(self.turns - 1) * u64::from(output_max);
        let turn_max = u64::from(input_max).saturating_sub(answers) / u64::from(self.turns);
        ensure!(
            fixed || turn_max > 0,
            "--max-input {input_max} leaves nothing to say in {} turns with answers of up to {output_max}",
            self.turns
        );
        let scale = |max: f64, longest: u32| if fixed { 1.0 } else { (max / f64::from(longest)).min(1.0) };
        Ok(Workload {
            seed: self.seed,
            source,
            scale: Scale {
                input: scale(turn_max as f64, longest.0),
                output: scale(f64::from(output_max), longest.1),
            },
            turns: self.turns,
            token_ids: TOKEN_ID_MIN..=self.token_id_max,
        })
    }
}
