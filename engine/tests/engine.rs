//! The engine's edges: what it refuses, what it survives, and a hand-off between two engines.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use compute::{Activations, Cpu};
use engine::{
    Engine, EngineError, EngineOptions, ExpertBank, ExpertBatch, ExpertGroup, ExpertJobs, ExpertScratch,
    Experts, ExpertsError, FollowedInput, InvalidBatch, KvPool, LocalExperts, LogitsWanted, MtpInput,
    SequenceInput, StepError, StepObserver,
};
use model::{BlockId, Checkpoint, Device, ExpertId, KvFormat, Numerics, TokenId};
use support::{Bench, Golden, Setup, assert_same_bits, fixture};

const OPTIONS: EngineOptions = EngineOptions {
    device: Device::Cpu,
    numerics: Numerics::Fp8,
    kv_format: None,
    kv_blocks_max: 8,
    threads: 1,
    step_tokens_max: 64,
    mtp: false,
};

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(fixture(name)).expect("the checkpoint is valid")
}

fn load(name: &str, options: &EngineOptions) -> Result<Engine, EngineError> {
    let checkpoint = checkpoint(name);
    let bank = ExpertBank::load_all(&checkpoint, options.numerics, options.mtp, &mut |_, _| {})?;
    Engine::load(&checkpoint, options, Box::new(LocalExperts::new(bank)), &mut |_, _| {})
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let check = |options: EngineOptions, expect: &str| {
        let error = load("v2_lite", &options).err().expect("the options are refused").to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(EngineOptions { kv_blocks_max: 0, ..OPTIONS }, "kv_blocks_max");
    check(EngineOptions { kv_blocks_max: usize::MAX, ..OPTIONS }, "kv_blocks_max");
    check(EngineOptions { threads: 0, ..OPTIONS }, "threads");
    check(EngineOptions { step_tokens_max: 0, ..OPTIONS }, "step_tokens_max");
    check(EngineOptions { mtp: true, ..OPTIONS }, "mtp");
    check(
        EngineOptions { numerics: Numerics::Reference, kv_format: Some(KvFormat::Fp8), ..OPTIONS },
        "kv_format fp8 does not go with reference numerics",
    );
}

/// Something that loads and tells how far it is.
type Load<'a> = &'a dyn Fn(&mut dyn FnMut(u64, u64));

#[test]
fn loading_tells_how_far_it_is() {
    let checkpoint = checkpoint("v3_fp8_mtp");
    let check = |load: Load<'_>| {
        let mut steps: Vec<(u64, u64)> = Vec::new();
        load(&mut |done, total| steps.push((done, total)));
        assert!(steps.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 == pair[1].1), "{steps:?}");
        assert_eq!(steps.first().map(|step| step.0), Some(0));
        let (done, total) = *steps.last().expect("progress is told");
        assert!(done == total && total > 0, "{done} of {total}");
    };
    check(&|progress| {
        let bank = ExpertBank::load_all(&checkpoint, Numerics::Fp8, true, progress).expect("experts load");
        assert!(bank.bytes() > 0);
    });
    check(&|progress| {
        let bank =
            ExpertBank::load(&checkpoint, &[], Numerics::Fp8, &mut |_, _| {}).expect("no expert loads");
        let options = EngineOptions { mtp: true, ..OPTIONS };
        Engine::load(&checkpoint, &options, Box::new(LocalExperts::new(bank)), progress)
            .expect("the engine loads");
    });
}

#[test]
fn the_fingerprint_tells_numerics_and_cache_apart() {
    let fingerprint =
        |options: &EngineOptions| load("v2_lite", options).expect("the engine loads").fingerprint().clone();
    let fp8 = fingerprint(&OPTIONS);
    assert_eq!(fp8.mismatch(&fingerprint(&EngineOptions { threads: 2, kv_blocks_max: 3, ..OPTIONS })), None);
    let bf16 = fingerprint(&EngineOptions { kv_format: Some(KvFormat::Bf16), ..OPTIONS });
    assert!(fp8.mismatch(&bf16).is_some());
    let reference = fingerprint(&EngineOptions { numerics: Numerics::Reference, ..OPTIONS });
    assert!(fp8.mismatch(&reference).is_some());
}

#[test]
fn a_bank_holds_what_it_was_told_to() {
    let checkpoint = checkpoint("v3_fp8_mtp");
    let config = checkpoint.config();
    let load =
        |held: &[(usize, Vec<ExpertId>)]| ExpertBank::load(&checkpoint, held, Numerics::Fp8, &mut |_, _| {});
    let moe = config.num_hidden_layers - 1;
    let bank = load(&[(moe, vec![ExpertId(3)]), (moe, vec![ExpertId(1)])]).expect("two experts load");
    assert!(bank.contains(moe, ExpertId(3)) && bank.contains(moe, ExpertId(1)));
    assert!(!bank.contains(moe, ExpertId(2)) && !bank.contains(0, ExpertId(3)));

    let refused = |layer: usize, expert: u16| {
        matches!(load(&[(layer, vec![ExpertId(expert)])]), Err(EngineError::NoSuchExpert { .. }))
    };
    assert!(refused(0, 0), "a dense layer");
    assert!(refused(config.layers_with_mtp(), 0), "a layer that does not exist");
    assert!(refused(moe, config.n_routed_experts as u16), "an expert that does not exist");
}

/// What an expert hands back has passed through the wire's type, wherever the expert is.
#[test]
fn experts_round_their_results_to_the_wire() {
    let cpu = Cpu::new(1);
    for (name, numerics, bf16) in [
        ("v3_fp8_mtp", Numerics::Fp8, true),
        ("v3_bf16", Numerics::Fp8, true),
        ("v3_fp8_mtp", Numerics::Reference, false),
    ] {
        let checkpoint = checkpoint(name);
        let layer = checkpoint.config().num_hidden_layers - 1;
        let held = [(layer, vec![ExpertId(2)])];
        let bank = ExpertBank::load(&checkpoint, &held, numerics, &mut |_, _| {}).expect("the expert loads");
        let width = bank.hidden_size();
        let x: Vec<f32> = (0..3 * width).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut activations = Activations::new();
        activations.prepare(&cpu, &x, 3, width, bank.activation_format());
        let forward = |rows: &[u32]| {
            let mut out = vec![0.0; rows.len() * width];
            let groups = &[ExpertGroup { expert: ExpertId(2), rows: rows.len() }];
            let jobs = ExpertJobs { layer, activations: &activations, rows, groups };
            bank.forward(&cpu, &mut ExpertScratch::default(), jobs, &mut out).expect("the expert is held");
            out
        };
        let all = forward(&[0, 1, 2]);
        assert_eq!(all.iter().all(|value| value.to_bits() & 0xFFFF == 0), bf16, "{name} {numerics}");
        let some = forward(&[2, 0]);
        assert_same_bits("row 2 of others", &some[..width], &all[2 * width..]);
        assert_same_bits("row 0 of others", &some[width..], &all[..width]);
    }
}

#[test]
fn a_missing_expert_fails_the_step() {
    let checkpoint = checkpoint("v2_lite");
    let bank = ExpertBank::load(&checkpoint, &[], Numerics::Fp8, &mut |_, _| {}).expect("no expert loads");
    let mut engine = Engine::load(&checkpoint, &OPTIONS, Box::new(LocalExperts::new(bank)), &mut |_, _| {})
        .expect("the engine loads");
    let input = SequenceInput {
        tokens: &[TokenId(5)],
        position: 0,
        block_table: &[BlockId(0)],
        logits: LogitsWanted::Last,
    };
    let error = engine.step(&[input], &mut ()).expect_err("no expert is held");
    assert!(matches!(error, StepError::Experts(ExpertsError::NotHeld { .. })), "{error}");
}

/// Experts that can be taken away.
struct Flaky {
    inner: LocalExperts,
    down: Arc<AtomicBool>,
}

impl Experts for Flaky {
    fn dispatch(&mut self, cpu: &Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        self.inner.dispatch(cpu, batch)
    }

    fn combine(&mut self, cpu: &Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        if self.down.load(Ordering::Relaxed) {
            return Err(ExpertsError::Unavailable {
                worker: "expert-0".into(),
                detail: "connection lost".into(),
            });
        }
        self.inner.combine(cpu, out)
    }
}

/// A step that failed may be run again, on the same engine and blocks, with the same result.
#[test]
fn the_engine_survives_failing_experts() {
    let checkpoint = checkpoint("v3_fp8_aligned");
    let bank = ExpertBank::load_all(&checkpoint, Numerics::Fp8, false, &mut |_, _| {}).expect("experts load");
    let down = Arc::new(AtomicBool::new(false));
    let experts = Flaky { inner: LocalExperts::new(bank), down: Arc::clone(&down) };
    let mut engine =
        Engine::load(&checkpoint, &OPTIONS, Box::new(experts), &mut |_, _| {}).expect("the engine loads");
    let tokens: Vec<TokenId> = (10..30).map(TokenId).collect();
    let input =
        SequenceInput { tokens: &tokens, position: 0, block_table: &[BlockId(2)], logits: LogitsWanted::All };
    let expect = engine.step(&[input], &mut ()).expect("the step runs").logits.to_vec();
    down.store(true, Ordering::Relaxed);
    let error = engine.step(&[input], &mut ()).expect_err("the experts are down");
    assert!(error.to_string().contains("expert-0"), "{error}");
    down.store(false, Ordering::Relaxed);
    let again = engine.step(&[input], &mut ()).expect("the step runs").logits;
    assert_same_bits("after the failure", again, &expect);
}

/// Whoever waited goes away during a layer.
struct Leaving {
    after: usize,
    layers: usize,
}

impl StepObserver for Leaving {
    fn layer_done(&mut self, _: usize, _: &KvPool) {
        self.layers += 1;
    }

    fn is_wanted(&self) -> bool {
        self.layers < self.after
    }
}

/// A step ends before the next layer once nobody wants it, and may be run again with the same result.
#[test]
fn a_step_that_nobody_wants_ends_between_layers() {
    let mut engine = load("v3_fp8_mtp", &EngineOptions { mtp: true, ..OPTIONS }).expect("the engine loads");
    let layers = engine.config().num_hidden_layers;
    let tokens: Vec<TokenId> = (10..30).map(TokenId).collect();
    let sequence =
        SequenceInput { tokens: &tokens, position: 0, block_table: &[BlockId(2)], logits: LogitsWanted::All };
    let input = [FollowedInput { sequence, before: &[] }];
    let expect = engine.step_with_mtp(&input, &mut ()).expect("the step runs").logits.to_vec();
    for after in 0..layers {
        let mut observer = Leaving { after, layers: 0 };
        let error = engine.step_with_mtp(&input, &mut observer).expect_err("nobody wants it");
        assert!(matches!(error, StepError::Unwanted), "{error}");
        assert_eq!(observer.layers, after);
        let again = engine.step_with_mtp(&input, &mut ()).expect("the step runs").logits;
        assert_same_bits(&format!("left after {after} layers"), again, &expect);
    }
}

#[test]
fn invalid_batches_leave_the_engine_alone() {
    let mut engine = load("v3_fp8_mtp", &OPTIONS).expect("the engine loads");
    let vocab = engine.config().vocab_size as u32;
    let blocks = [BlockId(0), BlockId(1)];
    let valid = SequenceInput {
        tokens: &[TokenId(5)],
        position: 0,
        block_table: &blocks,
        logits: LogitsWanted::Last,
    };
    let error = engine.step(&[SequenceInput { tokens: &[TokenId(vocab)], ..valid }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::Token { .. }))));
    let error = engine.step(&[SequenceInput { block_table: &[BlockId(8)], ..valid }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::Block { block: 8, blocks_max: 8, .. }))));
    let error = engine.mtp_step(&[MtpInput { sequence: valid, hidden: &[] }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::NoMtp))));
    engine.step(&[valid], &mut ()).expect("a valid step still runs");

    let mut engine = load("v3_fp8_mtp", &EngineOptions { mtp: true, ..OPTIONS }).expect("the engine loads");
    let error = engine.mtp_step(&[MtpInput { sequence: valid, hidden: &[0.0; 3] }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::MtpPosition { sequence: 0 }))));
    let second = SequenceInput { position: 1, ..valid };
    let error = engine.mtp_step(&[MtpInput { sequence: second, hidden: &[0.0; 3] }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::Hidden { values: 3, .. }))));
    let error = engine.step_with_mtp(&[FollowedInput { sequence: second, before: &[0.0; 3] }], &mut ());
    assert!(matches!(error, Err(StepError::Invalid(InvalidBatch::Hidden { values: 3, .. }))));
}

/// Prefill on one engine, its cache moved block by block, the completion on another: the same bits as on one.
#[test]
fn a_cache_moves_between_engines() {
    for (name, kv_format) in
        [("v3_fp8_mtp", KvFormat::Fp8), ("v3_bf16", KvFormat::Bf16), ("v3_fp8_aligned", KvFormat::F32)]
    {
        let setup = Setup { kv_format: Some(kv_format), ..Setup::new(Numerics::Fp8) };
        let golden = Golden::open(&fixture(name).join("golden.safetensors"));
        let mut prefill = Bench::open(&fixture(name), setup);
        let mut decode = Bench::open(&fixture(name), setup);
        let prompt: Vec<TokenId> = (0..3).flat_map(|_| golden.tokens("p1.input_ids")).collect();
        let mut ours = prefill.sequence(&prompt, 16);
        // Other block numbers on the other side.
        let other = decode.sequence(&prompt, 0);
        let mut theirs = decode.sequence(&prompt, 16);
        let rows = prefill.prefill(&ours, 64, &mut ());

        let layout = prefill.engine.kv_layout().clone();
        for (index, (&from, &to)) in ours.blocks.iter().zip(&theirs.blocks).enumerate() {
            let rows = prompt.len().saturating_sub(index * layout.block_tokens).min(layout.block_tokens);
            for layer in 0..layout.layers {
                let bytes = &prefill.engine.kv().block_layer(from, layer)[..rows * layout.row_bytes()];
                decode.engine.kv_mut().write_block_layer(to, layer, bytes);
            }
        }
        let last = &rows.logits[rows.logits.len() - prefill.vocab()..];
        let here = prefill.greedy(&mut ours, last, 16);
        let there = decode.greedy(&mut theirs, last, 16);
        assert_same_bits(&format!("{name}: logits after the hand-off"), &here.logits, &there.logits);
        decode.release(other);
    }
}
