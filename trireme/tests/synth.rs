//! `trireme synth` from the command to an answer: what it writes is opened, inspected and served like any checkpoint.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Parser as _;
use engine::{Engine, EngineOptions, ExpertBank, LocalExperts, LogitsWanted, SequenceInput, StepObserver};
use model::{BlockId, Checkpoint, Device, Dtype, Numerics, TokenId};
use proto::v1::Sampling;
use support::{Ask, ask, bits, grpc, in_process};
use trireme::{
    cli::{Cli, Command},
    cluster::Carrier,
    config::Mtp,
    inspect, synth,
};

/// Odd widths on purpose: partial FP8 blocks, a vocabulary beyond the tokenizer's.
const SMALL: &str = "--layers 3 --dense-layers 1 --hidden 256 --intermediate 320 --moe-intermediate 96 --heads 2 \
                     --kv-lora-rank 128 --nope-dim 48 --rope-dim 32 --v-dim 40 --vocab 4200 --context 4096";
const V3: &str = "--like deepseek-v3 --experts 16 --topk 4 --groups 4 --topk-groups 2";
const V2: &str = "--like deepseek-v2-lite --experts 16 --topk 4";

fn write(out: &Path, flags: &str) -> anyhow::Result<()> {
    let line = format!("trireme synth {SMALL} {flags} --out {}", out.display());
    match Cli::parse_from(line.split_whitespace()).command {
        Command::Synth(args) => synth::run(args),
        other => panic!("{other:?}"),
    }
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).expect("a file"))).collect();
    files.sort();
    files.iter_mut().for_each(|(path, _)| *path = path.file_name().expect("a name").into());
    files
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, flags: &str| {
        let out = dir.path().join(name);
        write(&out, &format!("{V3} --q-lora-rank 96 --mtp 1 --router-zipf 1 --shard-mb 1 {flags}"))
            .expect("written");
        files(&out)
    };
    let first = write("a", "--seed 5");
    assert!(first.len() > 6, "several shards, an index, two configurations, a tokenizer: {}", first.len());
    assert!(first == write("b", "--seed 5"), "equal seeds, equal bytes");
    assert!(first != write("c", "--seed 6"), "another seed, other bytes");
}

#[test]
fn a_folder_with_files_in_it_is_left_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    fs::write(dir.path().join("model.safetensors"), "precious").expect("written");
    let error = write(dir.path(), V3).expect_err("refused").to_string();
    assert!(error.contains("--out") && error.contains("not empty"), "{error}");
    assert_eq!(files(dir.path()).len(), 1);
}

/// Every combination opens, can be inspected, and answers through a cluster with experts of its own, the same each time.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_served() {
    for flags in [
        format!("{V3} --q-lora-rank 96 --mtp 1 --router-zipf 0.8"),
        format!("{V3} --weights bf16 --q-lora-rank 0"),
        format!("{V2} --router-zipf 1"),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let out = dir.path().join("synth");
        write(&out, &flags).expect("written");
        let checkpoint = Checkpoint::open(&out).expect("a checkpoint");
        let projection = checkpoint.tensor("model.layers.1.self_attn.o_proj.weight").expect("a projection");
        let expected = if flags.contains("bf16") { Dtype::Bf16 } else { Dtype::F8E4m3 };
        assert_eq!(projection.dtype, expected, "{flags}");
        let args = inspect::Args {
            model: Some(out.clone()),
            expert: 2,
            kv_blocks_max: 8,
            mtp: Mtp::Auto,
            tensors: false,
        };
        inspect::run(args).expect("inspected");

        let cluster = in_process(&out, "--kv-blocks-max 16", Carrier::InProcess).await;
        let client = grpc(cluster.grpc_address()).await;
        let request = Ask {
            prompt: (3..80).map(|i| i * 37 % 4200).collect(),
            max_tokens: 12,
            ignore_eos: true,
            sampling: Sampling { temperature: Some(0.0), logprobs: Some(2), ..Default::default() },
        };
        let first = ask(client.clone(), &request).await.expect("an answer");
        assert_eq!(first.len(), 12, "{flags}");
        assert!(first.iter().all(|t| t.logprob.is_some_and(f32::is_finite)), "{flags}: {first:?}");
        assert_eq!(bits(&first), bits(&ask(client, &request).await.expect("an answer")), "{flags}");
        cluster.shutdown().await;
    }
}

/// Loads by layer, and the largest magnitude of the residual stream.
#[derive(Default)]
struct Watch {
    loads: std::collections::BTreeMap<usize, Vec<f64>>,
    largest: f32,
}

impl StepObserver for Watch {
    fn routed(&mut self, layer: usize, ids: &[u16], _: &[f32]) {
        let loads = self.loads.entry(layer).or_insert_with(|| vec![0.0; 16]);
        ids.iter().for_each(|&id| loads[usize::from(id)] += 1.0);
    }

    fn layer_hidden(&mut self, _: usize, hidden: &[f32]) {
        self.largest = hidden.iter().fold(self.largest, |largest, value| largest.max(value.abs()));
    }
}

fn watch(dir: &Path) -> Watch {
    const TOKENS: usize = 1024;
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint");
    let numerics = Numerics::Fp8;
    let bank = ExpertBank::load_all(&checkpoint, numerics, false, &mut |_, _| {}).expect("experts");
    let options = EngineOptions {
        device: Device::Cpu,
        numerics,
        kv_format: None,
        kv_blocks_max: 16,
        threads: 1,
        step_tokens_max: TOKENS,
        mtp: false,
    };
    let experts = Box::new(LocalExperts::new(bank));
    let mut engine = Engine::load(&checkpoint, &options, experts, &mut |_, _| {}).expect("an engine");
    let blocks: Vec<BlockId> = (0..16).map(BlockId).collect();
    let tokens: Vec<TokenId> = (0..TOKENS as u32).map(|i| TokenId(i * 2_654_435 % 4200)).collect();
    let input =
        SequenceInput { tokens: &tokens, position: 0, block_table: &blocks, logits: LogitsWanted::None };
    let mut watch = Watch::default();
    engine.step(&[input], &mut watch).expect("a step");
    watch
}

/// The share of the hottest quarter, and of the single hottest expert, in each MoE layer.
#[test]
fn router_loads_follow_the_zipf_parameter() {
    for family in [V3, V2] {
        for (exponent, quarter, hottest) in [(0.0, 0.25..0.5, 0.06..0.16), (1.0, 0.5..0.8, 0.14..0.25)] {
            let dir = tempfile::tempdir().expect("a folder");
            let out = dir.path().join("synth");
            write(&out, &format!("{family} --router-zipf {exponent}")).expect("written");
            let watch = watch(&out);
            assert_eq!(watch.loads.len(), 2, "two MoE layers");
            assert!(watch.largest < 30.0, "{family}: activations reach {}", watch.largest);
            for (layer, mut loads) in watch.loads {
                loads.sort_by(|a, b| b.total_cmp(a));
                let total: f64 = loads.iter().sum();
                let of_quarter = loads[..4].iter().sum::<f64>() / total;
                let of_hottest = loads[0] / total;
                let about =
                    format!("{family}, zipf {exponent}, layer {layer}: {of_quarter:.3}, {of_hottest:.3}");
                assert!(quarter.contains(&of_quarter) && hottest.contains(&of_hottest), "{about}");
            }
        }
    }
}
