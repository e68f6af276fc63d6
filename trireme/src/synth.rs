//! `trireme synth`: a checkpoint of random weights in the shape of a released model, for sizes that nobody can download
//! and for figures that must not depend on anybody's weights.
//!
//! What it writes is what a Hugging Face folder holds, asked for by [`model::schema`] and opened by everything that opens
//! a real one. The same flags give the same bytes on every machine. Weights go to disk as they are drawn: memory stays
//! at some tens of megabytes at any size.

mod calibration;
mod plan;
mod shape;
mod shards;
mod values;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use model::{Checkpoint, ModelConfig, Tokenizer};
use serde_json::json;

pub use shape::{Like, Shape, WeightKind};

use crate::{progress, up};

/// The files of the demo model's tokenizer.
const TOKENIZER_FILES: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

const EXAMPLES: &str = "\
Examples:
  The 701 M parameters that the CPU figures are measured with:
    trireme synth --like deepseek-v3 --layers 12 --dense-layers 1 --hidden 1024 --intermediate 2816 \\
      --moe-intermediate 512 --heads 8 --q-lora-rank 768 --experts 32 --topk 4 --vocab 32000 --out /tmp/synth

  V3's own dimensions, six layers:
    trireme synth --like deepseek-v3 --layers 6 --dense-layers 1 --out /tmp/v3-6";

/// Flags of `trireme synth`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The model's dimensions.
    #[command(flatten)]
    pub shape: Shape,
    /// Another seed, other weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How unevenly routers choose: the expert of rank r is chosen about as often as r^-A. 0: all alike.
    #[arg(long, value_name = "A", default_value_t = 0.0, value_parser = zipf)]
    pub router_zipf: f64,
    /// Megabytes of a weights file at most; one tensor that is larger has a file to itself.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub shard_mb: u64,
    /// The folder to write; must be empty or not there yet.
    #[arg(long)]
    pub out: PathBuf,
}

/// Writes the checkpoint and opens it.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config_json = args.shape.config_json()?;
    let config = args.shape.check(&config_json)?;
    prepare_folder(&args.out)?;

    let skew = calibration::Skew::solve(&config, args.router_zipf, args.seed);
    let tensors = plan::tensors(&config, args.shape.weights);
    let shards = shards::divide(&tensors, args.shard_mb << 20);
    let bytes: u64 = tensors.iter().map(plan::Planned::bytes).sum();
    println!(
        "{}: {} tensors, {:.2} GB, weights files: {}",
        args.out.display(),
        tensors.len(),
        bytes as f64 / 1e9,
        shards.len()
    );

    write_json(&args.out, "config.json", &config_json)?;
    let generation = json!({ "bos_token_id": shape::BOS, "eos_token_id": shape::EOS, "do_sample": false });
    write_json(&args.out, "generation_config.json", &generation)?;
    let note = tokenizer(&args.out, &config)?;
    let bar = progress::Weights::new("synth", "weights", false);
    let draw = values::Draw { seed: args.seed, skew: &skew };
    let mut done = 0;
    for (number, shard) in shards.iter().enumerate() {
        let path = args.out.join(shards::file_name(number, shards.len()));
        shards::write(&path, &tensors[shard.clone()], &draw, &mut |written| {
            done += written;
            bar.at(done, bytes);
        })
        .with_context(|| format!("--out: {}", path.display()))?;
    }
    // Last: a folder that was left half-written has no index, and nobody mistakes it for a checkpoint.
    write_json(&args.out, "model.safetensors.index.json", &shards::index(&tensors, &shards))?;
    drop(bar);

    let checkpoint = Checkpoint::open(&args.out)?;
    println!("{:.1} M parameters; {note}", crate::inspect::parameters(&checkpoint) as f64 / 1e6);
    Ok(())
}

/// Never writes among other files: a stray `model.safetensors` would win over the shards.
fn prepare_folder(out: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    let mut entries = fs::read_dir(out).with_context(|| format!("--out {}", out.display()))?;
    ensure!(entries.next().is_none(), "--out {} is not empty", out.display());
    Ok(())
}

fn write_json(out: &Path, name: &str, value: &serde_json::Value) -> anyhow::Result<()> {
    let path = out.join(name);
    fs::write(&path, serde_json::to_string_pretty(value)?)
        .with_context(|| format!("--out: {}", path.display()))
}

/// Copies the demo model's tokenizer where its ids fit, and says what the folder can be used for.
fn tokenizer(out: &Path, config: &ModelConfig) -> anyhow::Result<String> {
    let demo = match up::demo_model() {
        Ok(demo) => demo,
        Err(_) => {
            return Ok("no tokenizer: the demo model's is not here; put one in before serving".to_owned());
        }
    };
    let ids = Tokenizer::open(&demo)?.vocab_size();
    if ids > config.vocab_size {
        let vocab = config.vocab_size;
        return Ok(format!(
            "no tokenizer: the demo model's has {ids} ids, --vocab is {vocab}; put one in before serving"
        ));
    }
    for name in TOKENIZER_FILES {
        let target = out.join(name);
        fs::copy(demo.join(name), &target).with_context(|| format!("--out: {}", target.display()))?;
    }
    match config.vocab_size - ids {
        0 => Ok("the demo model's tokenizer".to_owned()),
        more => Ok(format!("the demo model's tokenizer ({ids} ids: {more} of the vocabulary have no text)")),
    }
}

fn zipf(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=4.0).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 4".to_owned()),
    }
}

#[cfg(test)]
mod tests;
