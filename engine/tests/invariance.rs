//! A position's bits depend on its own sequence and on nothing else: not on chunks, company, threads or block numbers.
//!
//! Compared are logits and hidden states of every row and the cache's bytes, in both numerics.

mod support;

use engine::{LogitsWanted, SequenceInput};
use model::{BlockId, Numerics, TokenId, Tokenizer};
use support::{Bench, Golden, Rows, Sequence, Setup, assert_same_bits, fixture, tiny};

const BOTH: [Numerics; 2] = [Numerics::Reference, Numerics::Fp8];

fn long_prompt(name: &str) -> Vec<TokenId> {
    Golden::open(&fixture(name).join("golden_long.safetensors")).tokens("long.input_ids")
}

#[track_caller]
fn assert_same_rows(what: &str, a: &Rows, b: &Rows) {
    assert_same_bits(&format!("{what}: logits"), &a.logits, &b.logits);
    assert_same_bits(&format!("{what}: hidden"), &a.hidden, &b.hidden);
}

/// A prompt whole and in chunks.
fn check_chunks(what: &str, bench: &mut Bench, prompt: &[TokenId], chunks: &[usize]) {
    let sequence = bench.sequence(prompt, 0);
    let whole = bench.prefill(&sequence, prompt.len(), &mut ());
    let cache = bench.cache(&sequence);
    bench.release(sequence);
    for &chunk in chunks {
        let what = format!("{what}: {} tokens in chunks of {chunk}", prompt.len());
        let sequence = bench.sequence(prompt, 0);
        let chunked = bench.prefill(&sequence, chunk, &mut ());
        assert_same_rows(&what, &whole, &chunked);
        assert!(bench.cache(&sequence) == cache, "{what}: the cache differs");
        bench.release(sequence);
    }
}

/// The long prompt of a fixture in every chunk size, in both numerics. Single rows only over the first five blocks:
/// each is a step of its own.
fn check_long_prompt(name: &str) {
    let prompt = long_prompt(name);
    for numerics in BOTH {
        let mut bench = Bench::open(&fixture(name), Setup::new(numerics));
        let what = format!("{name} {numerics}");
        check_chunks(&what, &mut bench, &prompt, &[7, 64, 512]);
        check_chunks(&what, &mut bench, &prompt[..320], &[1]);
    }
}

#[test]
fn chunks_do_not_matter_to_v3_fp8() {
    check_long_prompt("v3_fp8_aligned");
}

#[test]
fn chunks_do_not_matter_to_v3_bf16() {
    check_long_prompt("v3_bf16");
}

#[test]
fn chunks_do_not_matter_to_v2_lite() {
    check_long_prompt("v2_lite");
}

#[test]
fn chunks_do_not_matter_to_the_demo_model() {
    let text = include_str!("data/demo_conversation.txt");
    let prompt = Tokenizer::open(tiny()).and_then(|t| t.encode(text)).expect("the demo tokenizer works");
    let mut bench = Bench::open(&tiny(), Setup::new(Numerics::Fp8));
    check_chunks("demo fp8", &mut bench, &prompt[..600], &[7, 512]);
}

/// One sequence in chunks of 1..9 rows among 15 others of other lengths, phases and chunk sizes, and once more alone.
#[test]
fn company_does_not_matter() {
    for (name, numerics) in
        [("v3_fp8_mtp", Numerics::Fp8), ("v3_fp8_aligned", Numerics::Reference), ("v2_group", Numerics::Fp8)]
    {
        let golden = Golden::open(&fixture(name).join("golden.safetensors"));
        let mut bench = Bench::open(&fixture(name), Setup::new(numerics));
        let prompts: Vec<Vec<TokenId>> = (0..16)
            .map(|index| {
                let mut tokens = golden.tokens(&format!("p{}.input_ids", index % 4));
                let by = index * 3 % tokens.len();
                tokens.rotate_left(by);
                tokens
            })
            .collect();
        let alone: Vec<Rows> = prompts
            .iter()
            .map(|prompt| {
                let sequence = bench.sequence(prompt, 0);
                let rows = bench.prefill(&sequence, prompt.len(), &mut ());
                bench.release(sequence);
                rows
            })
            .collect();
        let together = run_together(&mut bench, &prompts);
        for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert_same_rows(&format!("{name} {numerics}: sequence {index}"), alone, together);
        }
    }
}

/// Steps over all sequences until each is through, sequence i with `1 + (i + step) % 9` rows at a time.
fn run_together(bench: &mut Bench, prompts: &[Vec<TokenId>]) -> Vec<Rows> {
    let vocab = bench.vocab();
    let hidden_size = bench.engine.config().hidden_size;
    let sequences: Vec<Sequence> = prompts.iter().map(|prompt| bench.sequence(prompt, 0)).collect();
    let mut rows: Vec<Rows> = prompts.iter().map(|_| Rows::default()).collect();
    let mut positions = vec![0; prompts.len()];
    for step in 0.. {
        let batch: Vec<(usize, SequenceInput<'_>)> = sequences
            .iter()
            .enumerate()
            .filter(|(index, sequence)| positions[*index] < sequence.tokens.len())
            .map(|(index, sequence)| {
                let position = positions[index];
                let end = sequence.tokens.len().min(position + 1 + (index + step) % 9);
                let tokens = &sequence.tokens[position..end];
                let block_table = &sequence.blocks;
                (index, SequenceInput { tokens, position, block_table, logits: LogitsWanted::All })
            })
            .collect();
        if batch.is_empty() {
            break;
        }
        let inputs: Vec<SequenceInput<'_>> = batch.iter().map(|(_, input)| *input).collect();
        let output = bench.engine.step(&inputs, &mut ()).expect("the step runs");
        let mut first = 0;
        for (index, input) in &batch {
            let end = first + input.tokens.len();
            rows[*index].logits.extend_from_slice(&output.logits[first * vocab..end * vocab]);
            rows[*index].hidden.extend_from_slice(&output.hidden[first * hidden_size..end * hidden_size]);
            positions[*index] += input.tokens.len();
            first = end;
        }
    }
    rows
}

#[test]
fn threads_and_block_numbers_do_not_matter() {
    let name = "v3_fp8_aligned";
    let prompt = &long_prompt(name)[..300];
    for numerics in BOTH {
        let mut one = Bench::open(&fixture(name), Setup::new(numerics));
        let mut three = Bench::open(&fixture(name), Setup { threads: 3, ..Setup::new(numerics) });
        let sequence = one.sequence(prompt, 0);
        let mut scattered = three.sequence(prompt, 0);
        scattered.blocks = [71u32, 3, 95, 0, 40].into_iter().map(BlockId).collect();
        let a = one.prefill(&sequence, 300, &mut ());
        let b = three.prefill(&scattered, 64, &mut ());
        assert_same_rows(&format!("{name} {numerics}"), &a, &b);
        assert!(one.cache(&sequence) == three.cache(&scattered), "{name} {numerics}: the cache differs");
    }
}

/// The MTP module whole and row by row.
#[test]
fn chunks_do_not_matter_to_the_mtp_module() {
    let name = "v3_fp8_mtp";
    let golden = Golden::open(&fixture(name).join("golden.safetensors"));
    for numerics in BOTH {
        let mut bench = Bench::open(&fixture(name), Setup::new(numerics));
        assert!(bench.has_mtp, "{name} has an MTP module");
        let sequence = bench.sequence(&golden.tokens("p0.input_ids"), 1);
        let rows = bench.prefill(&sequence, sequence.tokens.len(), &mut ());
        let shifted = golden.tokens("p0.mtp.input_ids");
        let whole = bench.mtp(&sequence.blocks, 0, &shifted, &rows.hidden, &mut ());
        let mut single = Rows::default();
        let hidden_size = bench.engine.config().hidden_size;
        for (position, hidden) in rows.hidden.chunks_exact(hidden_size).enumerate() {
            let row = bench.mtp(&sequence.blocks, position, &shifted[position..=position], hidden, &mut ());
            single.logits.extend(row.logits);
            single.hidden.extend(row.hidden);
        }
        assert_same_rows(&format!("{name} {numerics} MTP"), &whole, &single);
    }
}

/// Which rows want logits changes nothing but which are handed back.
#[test]
fn wanted_rows_do_not_matter() {
    let name = "v2_group";
    let golden = Golden::open(&fixture(name).join("golden.safetensors"));
    let mut bench = Bench::open(&fixture(name), Setup::new(Numerics::Fp8));
    let sequence = bench.sequence(&golden.tokens("p0.input_ids"), 0);
    let all = bench.prefill(&sequence, sequence.tokens.len(), &mut ());
    let vocab = bench.vocab();
    for (logits, expect) in
        [(LogitsWanted::Last, &all.logits[all.logits.len() - vocab..]), (LogitsWanted::None, &[][..])]
    {
        let input =
            SequenceInput { tokens: &sequence.tokens, position: 0, block_table: &sequence.blocks, logits };
        let output = bench.engine.step(&[input], &mut ()).expect("the step runs");
        assert_same_bits("wanted", output.logits, expect);
    }
}
