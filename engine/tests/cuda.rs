//! DeepSeek-V3's widths on a GPU, with weights made there: the kernels of the matrix unit, whose shapes no fixture has.
//!
//! A position's bits depend on its own sequence alone: not on chunks, company, block numbers, or whether its step was
//! recorded and replayed.

mod support;

use engine::{
    DraftInput, Draw, Engine, EngineOptions, FollowedInput, LogitsWanted, Sampled, SequenceInput,
    SequenceSampler, SyntheticWeights,
};
use model::{BlockId, Device, ModelConfig, Numerics, SamplingParams, TokenId};
use support::{argmax, assert_same_bits, device};

/// V3's configuration with fewer layers, experts and tokens.
const CONFIG: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1, "vocab_size": 4096, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "hidden_act": "silu", "attention_bias": false, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]}
}"#;

const BLOCKS: usize = 400;

fn engine() -> Engine {
    let device = device();
    assert_ne!(device, Device::Cpu, "TRIREME_TEST_DEVICE names no GPU");
    let config = ModelConfig::from_json(CONFIG).expect("a configuration");
    let options = EngineOptions {
        device,
        numerics: Numerics::Fp8,
        kv_format: None,
        kv_blocks_max: BLOCKS,
        threads: 2,
        step_tokens_max: 1024,
        mtp: true,
    };
    Engine::synthetic(&config, &options, SyntheticWeights::from_seed(7)).expect("an engine")
}

fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    (0..count as u32).map(|i| TokenId((i * 2654 + seed * 977 + i * i % 31) % 4096)).collect()
}

/// Logits of the last token of a prompt, which lies in blocks from `first` on, run in chunks.
fn prefill(engine: &mut Engine, prompt: &[TokenId], chunk: usize, first: u32) -> Vec<f32> {
    let blocks: Vec<BlockId> =
        (0..prompt.len().div_ceil(64) as u32 + 1).map(|i| BlockId(first + i)).collect();
    let mut logits = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        let input = SequenceInput {
            tokens,
            position: index * chunk,
            block_table: &blocks,
            logits: LogitsWanted::Last,
        };
        logits = engine.step(&[input], &mut ()).expect("a step").logits.to_vec();
    }
    logits
}

#[test]
#[ignore = "needs a GPU: TRIREME_TEST_DEVICE=cuda:0"]
fn chunks_blocks_and_recording_do_not_matter() {
    let mut engine = engine();
    let prompt = tokens(1, 1500);
    let whole = prefill(&mut engine, &prompt, 1000, 3);
    assert!(whole.iter().all(|x| x.is_finite()), "logits are numbers");
    assert!(whole.iter().any(|x| x.abs() > 1e-3), "logits are not all zero");
    for (chunk, first) in [(1024, 30), (511, 60), (64, 90), (17, 120)] {
        assert_same_bits(&format!("chunks of {chunk}"), &prefill(&mut engine, &prompt, chunk, first), &whole);
    }
    // A token at a time, recorded steps: from position 0, and the last ones after a chunk.
    let short = &prompt[..130];
    let expected = prefill(&mut engine, short, 130, 3);
    assert_same_bits("single tokens", &prefill(&mut engine, short, 1, 200), &expected);
}

/// Sequences of several lengths, one token each in one step of many, have the bits that they have alone.
#[test]
#[ignore = "needs a GPU: TRIREME_TEST_DEVICE=cuda:0"]
fn company_does_not_matter() {
    let mut engine = engine();
    let lengths = [5, 64, 65, 300, 1023, 1024, 1025, 1100, 7, 1];
    let mut first = 0;
    let sequences: Vec<(Vec<TokenId>, Vec<BlockId>)> = lengths
        .iter()
        .enumerate()
        .map(|(index, &length)| {
            let blocks = (length as u32).div_ceil(64) + 1;
            let table = (first..first + blocks).map(BlockId).collect();
            first += blocks;
            (tokens(index as u32, length + 1), table)
        })
        .collect();
    assert!(first as usize <= BLOCKS);
    for (tokens, blocks) in &sequences {
        let prompt = &tokens[..tokens.len() - 1];
        for (index, chunk) in prompt.chunks(1000).enumerate() {
            let position = index * 1000;
            let input =
                SequenceInput { tokens: chunk, position, block_table: blocks, logits: LogitsWanted::None };
            engine.step(&[input], &mut ()).expect("a step");
        }
    }
    let inputs: Vec<SequenceInput<'_>> = sequences
        .iter()
        .map(|(tokens, blocks)| SequenceInput {
            tokens: &tokens[tokens.len() - 1..],
            position: tokens.len() - 1,
            block_table: blocks,
            logits: LogitsWanted::Last,
        })
        .collect();
    let vocab = engine.config().vocab_size;
    let together = engine.step(&inputs, &mut ()).expect("a step").logits.to_vec();
    let again = engine.step(&inputs, &mut ()).expect("a step").logits.to_vec();
    assert_same_bits("recorded and replayed", &together, &again);
    for (index, input) in inputs.iter().enumerate() {
        let alone = engine.step(&[*input], &mut ()).expect("a step").logits.to_vec();
        let what = format!("length {}", lengths[index]);
        assert_same_bits(&what, &alone, &together[index * vocab..(index + 1) * vocab]);
    }
    for count in [2, 3, 7] {
        let some = engine.step(&inputs[..count], &mut ()).expect("a step").logits.to_vec();
        assert_same_bits(&format!("{count} together"), &some, &together[..count * vocab]);
    }
    let mut sampler = SequenceSampler::new(&SamplingParams::greedy(), 0, &[]);
    let draws = {
        let draw = Draw { sampler: &sampler, position: 9, suppress: &[], ahead: &[] };
        engine.step_drawing(&inputs, &mut std::iter::repeat(Some(draw)), &mut ()).expect("a step")
    };
    let drawn: Vec<Sampled> =
        (0..inputs.len()).map(|row| draws.token(row, &mut sampler, (9, &[]), &mut Vec::new())).collect();
    for (row, drawn) in drawn.iter().enumerate() {
        let logits = &together[row * vocab..(row + 1) * vocab];
        assert_eq!(drawn.token.0 as usize, support::argmax(logits));
        assert!(drawn.logprob <= 0.0 && drawn.logprob.is_finite());
    }
}

/// Drafts made together are those made alone, and a step that verifies them gives each row the bits of a step of its own.
#[test]
#[ignore = "needs a GPU: TRIREME_TEST_DEVICE=cuda:0"]
fn drafts_and_their_rows_have_the_bits_of_single_ones() {
    let mut engine = engine();
    const DRAFTS: usize = 3;
    let lengths = [70, 64, 300];
    let table = |first: u32| -> Vec<BlockId> { (first..first + 8).map(BlockId).collect() };
    let mut states = Vec::new();
    for (index, &length) in lengths.iter().enumerate() {
        let prompt = tokens(index as u32, length);
        let mut before = Vec::new();
        for (chunk, part) in prompt.chunks(100).enumerate() {
            let (position, block_table) = (chunk * 100, &table(8 * index as u32)[..]);
            let sequence = SequenceInput { tokens: part, position, block_table, logits: LogitsWanted::Last };
            let step = engine.step_with_mtp(&[FollowedInput { sequence, before: &before }], &mut ());
            before = step.expect("a step").last.to_vec();
        }
        states.push(before);
    }
    let tables: Vec<_> = (0..3).map(|index| table(8 * index)).collect();
    let input = |index: usize| DraftInput {
        token: TokenId(77 + index as u32),
        position: lengths[index],
        block_table: &tables[index],
        hidden: &states[index],
        drafts_max: DRAFTS,
    };
    let mut draft = |inputs: &[DraftInput<'_>]| -> Vec<Vec<(TokenId, Vec<f32>)>> {
        let mut drafts = vec![Vec::new(); inputs.len()];
        let choose = &mut |index: usize, logits: &mut [f32]| {
            let token = TokenId(argmax(logits) as u32);
            drafts[index].push((token, logits.to_vec()));
            Some(token)
        };
        engine.draft(inputs, choose).expect("drafts");
        drafts
    };
    let together = draft(&[input(0), input(1), input(2)]);
    for round in 0..2 {
        for (index, expected) in together.iter().enumerate() {
            let alone = &draft(&[input(index)])[0];
            assert_eq!(alone.len(), DRAFTS);
            for ((token, logits), (_, expected)) in alone.iter().zip(expected) {
                assert_same_bits(&format!("draft {token:?} of {index}, round {round}"), logits, expected);
            }
        }
    }
    let rows: Vec<Vec<TokenId>> = (0..3)
        .map(|index| {
            let drafts = together[index].iter().map(|(token, _)| *token);
            std::iter::once(TokenId(77 + index as u32)).chain(drafts).collect()
        })
        .collect();
    let step = |index: usize, from: usize, to: usize| SequenceInput {
        tokens: &rows[index][from..to],
        position: lengths[index] + from,
        block_table: &tables[index],
        logits: LogitsWanted::All,
    };
    let batch = [0, 1, 2].map(|index| step(index, 0, 1 + DRAFTS));
    let mut verified = Vec::new();
    for _ in 0..2 {
        verified = engine.step(&batch, &mut ()).expect("a step").logits.to_vec();
    }
    for (row, expected) in verified.chunks_exact(4096).enumerate() {
        let (index, at) = (row / (1 + DRAFTS), row % (1 + DRAFTS));
        let alone = engine.step(&[step(index, at, at + 1)], &mut ()).expect("a step");
        assert_same_bits(&format!("row {at} of {index}"), alone.logits, expected);
    }
}

/// What arrives from another worker is written in place, and the step behind it may be one that is replayed.
#[test]
#[ignore = "needs a GPU: TRIREME_TEST_DEVICE=cuda:0"]
fn rows_written_in_place_are_there_for_a_replayed_step() {
    let mut engine = engine();
    let sequence = tokens(5, 101);
    let (prompt, last) = sequence.split_at(100);
    prefill(&mut engine, prompt, 100, 3);
    let blocks = [BlockId(3), BlockId(4)];
    let input = SequenceInput {
        tokens: last,
        position: prompt.len(),
        block_table: &blocks,
        logits: LogitsWanted::Last,
    };
    let expected = engine.step(&[input], &mut ()).expect("a step").logits.to_vec();
    let layer = engine.config().num_hidden_layers - 1;
    for block in blocks {
        let rows = engine.kv().block_layer(block, layer).to_vec();
        let mut write = |rows: &[u8]| {
            let place = engine.kv_mut().block_layer_mut(block, layer, rows.len()).expect("a block's layer");
            place.copy_from_slice(rows);
        };
        write(&vec![0; rows.len()]);
        write(&rows);
        let found = engine.step(&[input], &mut ()).expect("a step").logits.to_vec();
        assert_same_bits(&format!("{block:?} written again"), &found, &expected);
    }
}
