//! What the engine's tests share: fixtures, engines over them, sequences, and what a step lets one see.
#![allow(dead_code)] // Every test binary uses its own part.

use std::path::{Path, PathBuf};

use engine::{
    BlockPool, BlockTable, Engine, EngineOptions, LogitsWanted, MtpInput, Reservation, SequenceInput,
    StepObserver,
};
use model::{BlockId, Checkpoint, Device, KvFormat, Numerics, TokenId};
use safetensors::SafeTensors;

/// All golden fixtures.
pub const FIXTURES: [&str; 5] = ["v3_bf16", "v3_fp8_mtp", "v3_fp8_aligned", "v2_lite", "v2_group"];

/// Rows of a test engine's largest step: the longest prompt whole.
pub const STEP_TOKENS_MAX: usize = 1600;

/// The repository's root, which a machine that has only the built tests names in `TRIREME_ROOT`.
fn root() -> PathBuf {
    std::env::var_os("TRIREME_ROOT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

/// What engines are tested on: the CPU, or what `TRIREME_TEST_DEVICE` names.
pub fn device() -> Device {
    match std::env::var("TRIREME_TEST_DEVICE") {
        Ok(name) => name.parse().expect("TRIREME_TEST_DEVICE is a device"),
        Err(_) => Device::Cpu,
    }
}

/// A fixture's folder.
pub fn fixture(name: &str) -> PathBuf {
    root().join("fixtures").join(name)
}

/// The demo model's folder.
pub fn tiny() -> PathBuf {
    root().join("model/tiny")
}

/// A file of golden tensors.
pub struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    pub fn open(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("golden files are well formed")
    }

    pub fn contains(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        tensor.data().chunks_exact(4).map(|word| word.try_into().expect("four bytes")).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.words(name).into_iter().map(f32::from_le_bytes).collect()
    }

    pub fn i32(&self, name: &str) -> Vec<i32> {
        self.words(name).into_iter().map(i32::from_le_bytes).collect()
    }

    pub fn tokens(&self, name: &str) -> Vec<TokenId> {
        self.i32(name).into_iter().map(|id| TokenId(id as u32)).collect()
    }
}

/// How a test wants its engine.
#[derive(Clone, Copy)]
pub struct Setup {
    pub numerics: Numerics,
    pub kv_format: Option<KvFormat>,
    pub threads: usize,
}

impl Setup {
    pub fn new(numerics: Numerics) -> Self {
        Self { numerics, kv_format: None, threads: 1 }
    }
}

/// An engine with its experts in process, and who holds its blocks.
pub struct Bench {
    pub engine: Engine,
    pub pool: BlockPool,
    pub has_mtp: bool,
}

/// A sequence with its blocks.
pub struct Sequence {
    pub tokens: Vec<TokenId>,
    pub blocks: Vec<BlockId>,
    table: BlockTable,
}

/// What a run gave, for every row.
#[derive(Default)]
pub struct Rows {
    pub logits: Vec<f32>,
    pub hidden: Vec<f32>,
}

impl Bench {
    pub fn open(dir: &Path, setup: Setup) -> Self {
        let checkpoint = Checkpoint::open(dir).expect("the checkpoint is valid");
        let device = device();
        let has_mtp = checkpoint.config().num_nextn_predict_layers > 0;
        let options = EngineOptions {
            device,
            numerics: setup.numerics,
            kv_format: setup.kv_format,
            kv_blocks_max: 96,
            threads: setup.threads,
            step_tokens_max: STEP_TOKENS_MAX,
            mtp: has_mtp,
        };
        let engine =
            Engine::load_with_experts(&checkpoint, &options, &mut |_, _| {}).expect("the engine loads");
        let pool = BlockPool::new(options.kv_blocks_max, engine.kv_layout().block_tokens);
        Self { engine, pool, has_mtp }
    }

    pub fn vocab(&self) -> usize {
        self.engine.config().vocab_size
    }

    /// A sequence that has room for `extra` tokens more.
    pub fn sequence(&mut self, tokens: &[TokenId], extra: usize) -> Sequence {
        let blocks = self.engine.kv_layout().blocks_for(tokens.len() + extra);
        let reservation = Reservation { salt: 0, prompt: &[], shared_max: 0, blocks, blocks_max: blocks };
        let table = self.pool.reserve(reservation, &mut ()).expect("the test pool is large enough");
        Sequence { tokens: tokens.to_vec(), blocks: table.blocks().to_vec(), table }
    }

    pub fn release(&mut self, sequence: Sequence) {
        self.pool.release(sequence.table);
    }

    /// Runs all tokens of a sequence in chunks, logits for every row.
    pub fn prefill(&mut self, sequence: &Sequence, chunk: usize, observer: &mut dyn StepObserver) -> Rows {
        let mut rows = Rows::default();
        for (index, tokens) in sequence.tokens.chunks(chunk).enumerate() {
            let input = SequenceInput {
                tokens,
                position: index * chunk,
                block_table: &sequence.blocks,
                logits: LogitsWanted::All,
            };
            let output = self.engine.step(&[input], observer).expect("the step runs");
            rows.logits.extend_from_slice(output.logits);
            rows.hidden.extend_from_slice(output.hidden);
        }
        rows
    }

    /// Appends a token and runs it.
    pub fn decode(&mut self, sequence: &mut Sequence, token: TokenId) -> Rows {
        let position = sequence.tokens.len();
        sequence.tokens.push(token);
        let input = SequenceInput {
            tokens: &[token],
            position,
            block_table: &sequence.blocks,
            logits: LogitsWanted::Last,
        };
        let output = self.engine.step(&[input], &mut ()).expect("the step runs");
        Rows { logits: output.logits.to_vec(), hidden: output.hidden.to_vec() }
    }

    /// `count` greedy tokens after `first_logits`, with the logits that gave each and the hidden state that it made.
    pub fn greedy(&mut self, sequence: &mut Sequence, first_logits: &[f32], count: usize) -> Greedy {
        let mut greedy = Greedy::default();
        let mut logits = first_logits.to_vec();
        for index in 0..count {
            let token = TokenId(argmax(&logits) as u32);
            greedy.ids.push(token);
            greedy.logits.extend_from_slice(&logits);
            if index + 1 < count {
                let rows = self.decode(sequence, token);
                greedy.hidden.extend_from_slice(&rows.hidden);
                logits = rows.logits;
            }
        }
        greedy
    }

    /// Runs the MTP module on hidden states from `position` on and the tokens behind them, logits for every row.
    pub fn mtp(
        &mut self,
        blocks: &[BlockId],
        position: usize,
        tokens: &[TokenId],
        hidden: &[f32],
        observer: &mut dyn StepObserver,
    ) -> Rows {
        let sequence =
            SequenceInput { tokens, position: position + 1, block_table: blocks, logits: LogitsWanted::All };
        let output = self.engine.mtp_step(&[MtpInput { sequence, hidden }], observer).expect("the step runs");
        Rows { logits: output.logits.to_vec(), hidden: output.hidden.to_vec() }
    }

    /// All cache rows of a sequence in the main model's layers, bytes as stored.
    pub fn cache(&self, sequence: &Sequence) -> Vec<u8> {
        self.layers(sequence, 0..self.engine.config().num_hidden_layers)
    }

    /// All cache rows of a sequence in the MTP module's layer, bytes as stored.
    pub fn mtp_cache(&self, sequence: &Sequence) -> Vec<u8> {
        let layer = self.engine.config().num_hidden_layers;
        self.layers(sequence, layer..layer + 1)
    }

    fn layers(&self, sequence: &Sequence, layers: std::ops::Range<usize>) -> Vec<u8> {
        let layout = self.engine.kv_layout();
        let mut bytes = Vec::new();
        for layer in layers {
            let mut rows = sequence.tokens.len();
            for &block in &sequence.blocks {
                let here = rows.min(layout.block_tokens);
                bytes.extend_from_slice(
                    &self.engine.kv().block_layer(block, layer)[..here * layout.row_bytes()],
                );
                rows -= here;
            }
        }
        bytes
    }
}

/// A greedy continuation.
#[derive(Default)]
pub struct Greedy {
    pub ids: Vec<TokenId>,
    /// Row j gave `ids[j]`.
    pub logits: Vec<f32>,
    /// Row j is what `ids[j]` made; none for the last.
    pub hidden: Vec<f32>,
}

/// Keeps what the observer is shown, by layer.
#[derive(Default)]
pub struct Recorder {
    pub hidden: Vec<(usize, Vec<f32>)>,
    pub routed: Vec<(usize, Vec<u16>, Vec<f32>)>,
    pub done: Vec<usize>,
}

impl StepObserver for Recorder {
    fn layer_done(&mut self, layer: usize, _: &engine::KvPool) {
        self.done.push(layer);
    }

    fn routed(&mut self, layer: usize, ids: &[u16], weights: &[f32]) {
        self.routed.push((layer, ids.to_vec(), weights.to_vec()));
    }

    fn layer_hidden(&mut self, layer: usize, hidden: &[f32]) {
        self.hidden.push((layer, hidden.to_vec()));
    }
}

/// Index of the largest, the first among equals.
pub fn argmax(values: &[f32]) -> usize {
    (0..values.len()).rev().max_by(|&a, &b| values[a].total_cmp(&values[b])).expect("a row is not empty")
}

/// Largest absolute difference.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) })
}

/// Fails where two arrays are further apart than `tolerance`, NaN included.
#[track_caller]
pub fn assert_close(what: &str, ours: &[f32], golden: &[f32], tolerance: f32) {
    let difference = max_difference(ours, golden);
    assert!(difference <= tolerance, "{what}: {difference} apart, at most {tolerance} allowed");
}

/// Fails where two arrays differ in a bit.
#[track_caller]
pub fn assert_same_bits(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let first = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(index) = first {
        panic!("{what}: value {index} is {} and {}", a[index], b[index]);
    }
}
