use clap::Parser as _;
use model::schema;

use super::*;

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(flags: &str) -> Args {
    Cli::parse_from(format!("synth --out unused {flags}").split_whitespace()).args
}

fn config(flags: &str) -> anyhow::Result<ModelConfig> {
    let shape = args(flags).shape;
    shape.check(&shape.config_json()?)
}

fn parameters(config: &ModelConfig) -> usize {
    schema::all(config).filter(|spec| !spec.optional).map(|spec| spec.elements()).sum()
}

/// Published totals: 671 B for V3, 15.7 B for V2-Lite.
#[test]
fn the_defaults_are_the_released_models() {
    let v3 = config("--like deepseek-v3 --layers 61").expect("V3");
    assert_eq!(parameters(&v3) / 1_000_000_000, 671);
    let lite = config("--like deepseek-v2-lite --layers 27 --weights bf16").expect("V2-Lite");
    assert_eq!(parameters(&lite) / 100_000_000, 157);
    assert!(lite.quantization.is_none());
    let cut = config("--like deepseek-v3 --layers 2").expect("two layers");
    assert_eq!((cut.first_k_dense_replace, cut.num_hidden_layers), (1, 2));
}

/// The command in the help is the checkpoint of the CPU figures: 701 M parameters.
#[test]
fn the_documented_command_has_the_documented_size() {
    let command = EXAMPLES.split_once("trireme synth").expect("a command").1;
    let command = command.split_once("\n\n").expect("an end").0.replace('\\', " ");
    let args = Cli::parse_from(format!("synth {command}").split_whitespace()).args;
    let config = args.shape.check(&args.shape.config_json().expect("JSON")).expect("a configuration");
    assert_eq!(parameters(&config) / 1_000_000, 701);
    assert_eq!((config.n_group, config.num_experts_per_tok, config.kv_lora_rank), (8, 4, 512));
}

#[test]
fn nonsense_is_refused_by_the_flag_s_name() {
    for (flags, expected) in [
        ("--layers 0", "--layers"),
        ("--layers 2000", "--layers"),
        ("--layers 4 --dense-layers 5", "--dense-layers"),
        ("--layers 4 --hidden 0", "--hidden"),
        ("--layers 4 --experts 30", "--groups"),
        ("--layers 4 --topk 200", "--topk"),
        ("--layers 4 --groups 4 --topk-groups 5", "--topk-groups"),
        ("--layers 4 --rope-dim 63", "--rope-dim"),
        ("--layers 4 --kv-lora-rank 5000", "--kv-lora-rank"),
        ("--layers 4 --vocab 1", "--vocab"),
        ("--layers 4 --vocab 2", "--vocab"),
        ("--layers 4 --context 0", "--context"),
    ] {
        let error = config(&format!("--like deepseek-v3 {flags}")).expect_err(flags).to_string();
        assert!(error.starts_with(expected), "{flags}: {error}");
    }
    for flags in ["--like gpt --layers 4", "--layers 4", "--like deepseek-v3 --layers 4 --router-zipf nan"] {
        assert!(Cli::try_parse_from(format!("synth --out x {flags}").split_whitespace()).is_err(), "{flags}");
    }
}

/// Names, shapes and order of the bytes are the schema's; what it calls optional is left out.
#[test]
fn the_plan_is_the_schema() {
    for flags in [
        "--like deepseek-v3 --layers 4 --mtp 1 --hidden 64",
        "--like deepseek-v3 --layers 3 --q-lora-rank 0 --weights bf16 --shared-experts 0",
        "--like deepseek-v2-lite --layers 3",
    ] {
        let config = config(flags).expect("a configuration");
        let weights = args(flags).shape.weights;
        let plan = plan::tensors(&config, weights);
        let planned: Vec<_> = plan.iter().filter(|t| !matches!(t.fill, plan::Fill::Scales(_))).collect();
        let asked: std::collections::BTreeMap<_, _> =
            schema::all(&config).filter(|spec| !spec.optional).map(|spec| (spec.name, spec.shape)).collect();
        assert_eq!(planned.len(), asked.len(), "{flags}");
        for tensor in planned {
            assert_eq!(asked.get(&tensor.name), Some(&tensor.shape), "{flags}: {}", tensor.name);
        }
    }
}

#[test]
fn files_hold_what_fits_and_lose_nothing() {
    let config =
        config("--like deepseek-v3 --layers 3 --hidden 64 --vocab 1000 --experts 16").expect("small");
    let tensors = plan::tensors(&config, WeightKind::Fp8);
    for bytes_max in [1, 100_000, 1 << 20, u64::MAX] {
        let shards = shards::divide(&tensors, bytes_max);
        let joined: Vec<usize> = shards.iter().cloned().flatten().collect();
        assert_eq!(joined, (0..tensors.len()).collect::<Vec<_>>(), "{bytes_max}");
        for shard in shards.iter().filter(|shard| shard.len() > 1) {
            let bytes: u64 = tensors[shard.clone()].iter().map(plan::Planned::bytes).sum();
            assert!(bytes <= bytes_max, "{bytes_max}: {bytes}");
        }
    }
}
