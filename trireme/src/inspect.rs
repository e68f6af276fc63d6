//! `trireme inspect`: what is in a checkpoint, and how much memory which worker needs for it.

use std::{collections::BTreeMap, path::PathBuf};

use model::{Checkpoint, Dtype, KvFormat, KvLayout, ModelConfig, Numerics, TensorInfo};

use crate::{config::Mtp, up};

/// Flags of `trireme inspect`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A checkpoint folder. Default: the demo model.
    pub model: Option<PathBuf>,
    /// Expert workers to divide the routed experts among; 0: they are inside prefill and decode.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(..=4096))]
    pub expert: u64,
    /// KV blocks of 64 tokens to plan for.
    #[arg(long, default_value_t = 2048)]
    pub kv_blocks_max: u64,
    /// Whether blocks hold the MTP module's rows as well, as the cluster's `engine.mtp` says.
    #[arg(long, value_enum, default_value_t = Mtp::Auto)]
    pub mtp: Mtp,
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
}

/// Where a tensor's bytes are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Embedding,
    Head,
    Attention,
    Feed,
    Router,
    Norms,
    Routed,
    Mtp,
}

impl Part {
    fn label(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Head => "head",
            Self::Attention => "attention",
            Self::Feed => "dense and shared experts",
            Self::Router => "routers",
            Self::Norms => "norms",
            Self::Routed => "routed experts",
            Self::Mtp => "MTP layers (drafts)",
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Size {
    parameters: u64,
    stored: u64,
}

/// Parameters of a checkpoint: scales are none, and an MTP layer's counts.
pub fn parameters(checkpoint: &Checkpoint) -> u64 {
    checkpoint.tensors().filter(|tensor| !is_scale(tensor.name)).map(|tensor| elements(&tensor)).sum()
}

/// Prints what there is to know.
pub fn run(args: Args) -> anyhow::Result<()> {
    let path = match args.model.clone() {
        Some(path) => path,
        None => up::demo_model()?,
    };
    let checkpoint = Checkpoint::open(&path)?;
    let config = checkpoint.config();
    println!("{}", path.display());
    describe(config);
    let parts = parts(&checkpoint);
    weights(&checkpoint, &parts);
    memory(config, &parts, &args);
    if args.tensors {
        println!("\ntensors");
        for tensor in checkpoint.tensors() {
            println!("  {:<64} {:>8} {:?}", tensor.name, dtype(tensor.dtype), tensor.shape);
        }
    }
    Ok(())
}

fn describe(config: &ModelConfig) {
    let moe = config.moe_layers().filter(|&layer| layer < config.num_hidden_layers).count();
    println!(
        "  {:<13} DeepSeek-{:?}, {} layers ({} dense, {moe} MoE), {} MTP, hidden {}, vocabulary {}",
        "architecture",
        config.architecture,
        config.num_hidden_layers,
        config.num_hidden_layers - moe,
        config.num_nextn_predict_layers,
        config.hidden_size,
        config.vocab_size
    );
    let query = match config.q_lora_rank {
        Some(rank) => format!("query rank {rank}"),
        None => "full query".to_owned(),
    };
    println!(
        "  {:<13} {} heads, {query}, latent {}, rope {}, nope {}, value {}",
        "attention",
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim
    );
    println!(
        "  {:<13} {} routed, {} per token, {} of {} groups kept, {} shared",
        "experts",
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.topk_group,
        config.n_group,
        config.n_shared_experts
    );
    println!("  {:<13} {} tokens", "context", config.max_position_embeddings);
}

fn weights(checkpoint: &Checkpoint, parts: &BTreeMap<Part, Size>) {
    let mut kinds = BTreeMap::<&str, Size>::new();
    for tensor in checkpoint.tensors() {
        add(kinds.entry(dtype(tensor.dtype)).or_default(), &tensor);
    }
    let kinds: Vec<_> = kinds.iter().map(|(kind, size)| format!("{} {kind}", bytes(size.stored))).collect();
    println!("  {:<13} {}, checksum {}", "weights", kinds.join(" + "), hex(&checkpoint.weights_hash()));
    println!("\n  {:<26} {:>16} {:>12}", "part", "parameters", "stored");
    for (part, size) in parts {
        println!("  {:<26} {:>16} {:>12}", part.label(), thousands(size.parameters), bytes(size.stored));
    }
}

fn memory(config: &ModelConfig, parts: &BTreeMap<Part, Size>, args: &Args) {
    println!("\n  {:<34} {:>12} {:>12}", "memory by worker", "fp8", "reference");
    let resident: Vec<Size> =
        parts.iter().filter(|(part, _)| **part != Part::Routed).map(|(_, size)| *size).collect();
    let resident = resident.iter().fold(Size::default(), |a, b| Size {
        parameters: a.parameters + b.parameters,
        stored: a.stored + b.stored,
    });
    let routed = parts.get(&Part::Routed).copied().unwrap_or_default();
    let row = |name: &str, serving: u64, reference: u64| {
        println!("  {name:<34} {:>12} {:>12}", bytes(serving), bytes(reference));
    };
    if args.expert == 0 {
        let (stored, parameters) = (resident.stored + routed.stored, resident.parameters + routed.parameters);
        row("prefill, decode: weights", stored, parameters * 4);
    } else {
        row("prefill, decode: weights", resident.stored, resident.parameters * 4);
        let share = |total: u64| total.div_ceil(args.expert);
        row(
            &format!("expert: 1/{} of the routed experts", args.expert),
            share(routed.stored),
            share(routed.parameters * 4),
        );
    }
    let mtp_layers = usize::from(args.mtp.applies_to(config));
    let layout = |format| KvLayout::for_model(config, format, mtp_layers);
    for (name, of) in [
        ("prefill, decode: KV of one token", 0),
        ("prefill, decode: one KV block", 1),
        ("prefill, decode: KV pool", args.kv_blocks_max),
    ] {
        let size = |format| {
            let layout = layout(format);
            let block = layout.block_bytes() as u64;
            if of == 0 { block / layout.block_tokens as u64 } else { block * of }
        };
        row(
            name,
            size(KvFormat::default_for(Numerics::Fp8)),
            size(KvFormat::default_for(Numerics::Reference)),
        );
    }
    let block_tokens = layout(KvFormat::Fp8).block_tokens as u64;
    println!(
        "  ({} blocks hold {} tokens: {} sequences of full context)",
        args.kv_blocks_max,
        thousands(args.kv_blocks_max * block_tokens),
        args.kv_blocks_max * block_tokens / (config.max_position_embeddings as u64).max(1)
    );
}

fn parts(checkpoint: &Checkpoint) -> BTreeMap<Part, Size> {
    let layers = checkpoint.config().num_hidden_layers;
    let mut parts = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        add(parts.entry(part(tensor.name, layers)).or_insert_with(Size::default), &tensor);
    }
    parts
}

/// Which part a tensor of the Hugging Face layout belongs to.
fn part(name: &str, layers: usize) -> Part {
    let layer =
        name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    match layer {
        Some(_) if name.contains(".mlp.experts.") => Part::Routed,
        Some(layer) if layer >= layers => Part::Mtp,
        Some(_) if name.contains("norm") => Part::Norms,
        Some(_) if name.contains(".self_attn.") => Part::Attention,
        Some(_) if name.contains(".mlp.gate.") => Part::Router,
        Some(_) => Part::Feed,
        None if name.contains("embed_tokens") => Part::Embedding,
        None if name.contains("lm_head") => Part::Head,
        None => Part::Norms,
    }
}

fn add(size: &mut Size, tensor: &TensorInfo<'_>) {
    let width = match tensor.dtype {
        Dtype::F8E4m3 => 1,
        Dtype::Bf16 => 2,
        Dtype::F32 => 4,
    };
    size.stored += elements(tensor) * width;
    if !is_scale(tensor.name) {
        size.parameters += elements(tensor);
    }
}

fn elements(tensor: &TensorInfo<'_>) -> u64 {
    tensor.shape.iter().map(|&n| n as u64).product()
}

fn is_scale(name: &str) -> bool {
    name.ends_with("_scale_inv")
}

fn dtype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F8E4m3 => "FP8",
        Dtype::Bf16 => "BF16",
        Dtype::F32 => "F32",
    }
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_counted_where_they_are_needed() {
        let check = |name: &str, expected: Part| assert_eq!(part(name, 5), expected, "{name}");
        check("model.embed_tokens.weight", Part::Embedding);
        check("lm_head.weight", Part::Head);
        check("model.norm.weight", Part::Norms);
        check("model.layers.0.self_attn.kv_a_layernorm.weight", Part::Norms);
        check("model.layers.0.self_attn.o_proj.weight", Part::Attention);
        check("model.layers.0.mlp.gate_proj.weight", Part::Feed);
        check("model.layers.1.mlp.gate.weight", Part::Router);
        check("model.layers.1.mlp.shared_experts.up_proj.weight", Part::Feed);
        check("model.layers.1.mlp.experts.7.up_proj.weight_scale_inv", Part::Routed);
        check("model.layers.5.mlp.experts.7.up_proj.weight", Part::Routed);
        check("model.layers.5.eh_proj.weight", Part::Mtp);
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(24_067_244), "24.07 MB");
    }
}
