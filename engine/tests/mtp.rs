//! The MTP module's cache is a function of the tokens, as the main model's is, and its drafts are those of the module run
//! row by row.

mod support;

use engine::{
    DraftInput, FollowedInput, LogitsWanted, MtpInput, SequenceInput, SequenceSampler, StepObserver,
};
use model::{BlockId, Numerics, TokenId};
use support::{Bench, Golden, Recorder, Rows, Sequence, Setup, argmax, assert_same_bits, fixture, tiny};

const BOTH: [Numerics; 2] = [Numerics::Reference, Numerics::Fp8];

fn open(numerics: Numerics) -> Bench {
    Bench::open(&fixture("v3_fp8_mtp"), Setup::new(numerics))
}

/// `count` tokens that depend on `seed` from the first one on.
fn tokens(bench: &Bench, seed: usize, count: usize) -> Vec<TokenId> {
    (0..count).map(|at| TokenId(((seed * 389 + at * 7919 + at * at * 13) % bench.vocab()) as u32)).collect()
}

/// Runs a sequence from `start` on in chunks, keeping the module's cache. `before`: the state before `start`, if known.
fn fill(
    bench: &mut Bench,
    sequence: &Sequence,
    start: usize,
    chunk: usize,
    mut before: Vec<f32>,
    observer: &mut dyn StepObserver,
) -> Rows {
    let hidden_size = bench.engine.config().hidden_size;
    let mut rows = Rows::default();
    let mut position = start;
    for tokens in sequence.tokens[start..].chunks(chunk) {
        let block_table = &sequence.blocks;
        let input = SequenceInput { tokens, position, block_table, logits: LogitsWanted::All };
        let output = bench
            .engine
            .step_with_mtp(&[FollowedInput { sequence: input, before: &before }], observer)
            .expect("the step runs");
        rows.logits.extend_from_slice(output.logits);
        rows.hidden.extend_from_slice(output.hidden);
        before = output.hidden[output.hidden.len() - hidden_size..].to_vec();
        position += tokens.len();
    }
    rows
}

/// In any chunks a step gives what it gives without the module, and leaves the rows that the module itself would store.
#[test]
fn a_step_keeps_the_modules_cache() {
    for numerics in BOTH {
        let mut bench = open(numerics);
        let row_bytes = bench.engine.kv_layout().row_bytes();
        let prompt = tokens(&bench, 1, 150);
        let plain = bench.sequence(&prompt, 0);
        let expected = bench.prefill(&plain, 150, &mut ());
        let hidden_size = bench.engine.config().hidden_size;
        bench.mtp(&plain.blocks, 0, &prompt[1..], &expected.hidden[..149 * hidden_size], &mut ());
        let (main, module) = (bench.cache(&plain), bench.mtp_cache(&plain));
        for chunk in [150, 64, 7, 1] {
            let what = format!("{numerics}, chunks of {chunk}");
            let sequence = bench.sequence(&prompt, 0);
            let mut seen = Recorder::default();
            let rows = fill(&mut bench, &sequence, 0, chunk, Vec::new(), &mut seen);
            assert_same_bits(&what, &rows.logits, &expected.logits);
            assert_same_bits(&what, &rows.hidden, &expected.hidden);
            assert!(bench.cache(&sequence) == main, "{what}: the main model's cache");
            // Slot 0 has no row of the module's.
            assert!(
                bench.mtp_cache(&sequence)[row_bytes..] == module[row_bytes..],
                "{what}: the module's cache"
            );
            let layers = bench.engine.kv_layout().layers;
            let each_step: Vec<_> = (0..layers).cycle().take(layers * 150_usize.div_ceil(chunk)).collect();
            assert_eq!(seen.done, each_step, "{what}: layers as they are done");
            bench.release(sequence);
        }
        bench.release(plain);
    }
}

/// Rows stored later, many sequences' at once, are those that the steps would have stored.
#[test]
fn rows_may_be_stored_later() {
    for numerics in BOTH {
        let mut bench = open(numerics);
        let hidden_size = bench.engine.config().hidden_size;
        let prompts = [tokens(&bench, 8, 70), tokens(&bench, 9, 12)];
        let kept: Vec<_> = prompts.iter().map(|prompt| bench.sequence(prompt, 0)).collect();
        let late: Vec<_> = prompts.iter().map(|prompt| bench.sequence(prompt, 0)).collect();
        let states: Vec<_> = kept
            .iter()
            .zip(&late)
            .map(|(kept, late)| {
                fill(&mut bench, kept, 0, 5, Vec::new(), &mut ());
                bench.prefill(late, 9, &mut ()).hidden
            })
            .collect();
        let inputs: Vec<_> = late
            .iter()
            .zip(&states)
            .map(|(sequence, states)| {
                let (tokens, block_table) = (&sequence.tokens[1..], sequence.blocks.as_slice());
                let sequence = SequenceInput { tokens, position: 1, block_table, logits: LogitsWanted::None };
                MtpInput { sequence, hidden: &states[..tokens.len() * hidden_size] }
            })
            .collect();
        bench.engine.mtp_store(&inputs).expect("they are stored");
        let row_bytes = bench.engine.kv_layout().row_bytes();
        for (kept, late) in kept.iter().zip(&late) {
            // Slot 0 has no row of the module's.
            assert!(bench.mtp_cache(late)[row_bytes..] == bench.mtp_cache(kept)[row_bytes..], "{numerics}");
            assert!(bench.cache(late) == bench.cache(kept), "{numerics}: the main model's cache");
        }
    }
}

/// A block's bytes follow from the tokens up to its end, in the module's layer too: whoever shares it may go on as it
/// likes. Running its last token once more gives the state that the next block begins with, and changes no byte.
#[test]
fn a_block_does_not_depend_on_what_comes_behind_it() {
    for numerics in BOTH {
        let mut bench = open(numerics);
        let prompt = tokens(&bench, 2, 64);
        let go_on = |seed| [prompt.clone(), tokens(&bench, seed, 80)].concat();
        let (left, right) = (go_on(3), go_on(4));
        let whole = bench.sequence(&left, 0);
        fill(&mut bench, &whole, 0, 144, Vec::new(), &mut ());
        let block = |bench: &Bench, block: BlockId| -> Vec<u8> {
            let layers = 0..bench.engine.kv_layout().layers;
            layers.flat_map(|layer| bench.engine.kv().block_layer(block, layer).to_vec()).collect()
        };
        let first = block(&bench, whole.blocks[0]);

        let alone = bench.sequence(&right, 0);
        let expected = fill(&mut bench, &alone, 0, 7, Vec::new(), &mut ());
        assert!(block(&bench, alone.blocks[0]) == first, "{numerics}: the first block of two sequences");

        let mut sharing = bench.sequence(&right, 0);
        sharing.blocks[0] = whole.blocks[0];
        let rows = fill(&mut bench, &sharing, 63, 20, Vec::new(), &mut ());
        assert!(block(&bench, whole.blocks[0]) == first, "{numerics}: the shared block has not changed");
        let (vocab, hidden_size) = (bench.vocab(), bench.engine.config().hidden_size);
        assert_same_bits("logits", &rows.logits, &expected.logits[63 * vocab..]);
        assert_same_bits("hidden", &rows.hidden, &expected.hidden[63 * hidden_size..]);
        assert!(bench.mtp_cache(&sharing) == bench.mtp_cache(&alone), "{numerics}: the module's cache");
    }
}

/// What the module gives when its own states are fed back by hand.
fn by_hand(
    bench: &mut Bench,
    blocks: &[BlockId],
    position: usize,
    token: TokenId,
    state: &[f32],
    count: usize,
) -> Vec<TokenId> {
    let (mut token, mut state, mut drafts) = (token, state.to_vec(), Vec::new());
    for round in 0..count {
        let rows = bench.mtp(blocks, position - 1 + round, &[token], &state, &mut ());
        token = TokenId(argmax(&rows.logits) as u32);
        drafts.push(token);
        state = rows.hidden;
    }
    drafts
}

/// Sequences of several lengths draft together, each as many tokens as it wants; what they leave in the cache is
/// overwritten by the next step, whichever tokens that runs.
#[test]
fn drafts_are_the_modules_own_and_leave_nothing_behind() {
    for numerics in BOTH {
        let mut bench = open(numerics);
        let hidden_size = bench.engine.config().hidden_size;
        let wants = [3, 1, 4, 2];
        let prompts: Vec<_> =
            [63, 64, 20, 130].iter().zip(5..).map(|(&count, seed)| tokens(&bench, seed, count)).collect();
        let sequences: Vec<_> = prompts.iter().map(|prompt| bench.sequence(prompt, 8)).collect();
        let states: Vec<Vec<f32>> = sequences
            .iter()
            .map(|sequence| {
                let rows = fill(&mut bench, sequence, 0, 50, Vec::new(), &mut ());
                rows.hidden[rows.hidden.len() - hidden_size..].to_vec()
            })
            .collect();
        let next = TokenId(9);
        let expected: Vec<Vec<TokenId>> = (0..4)
            .map(|i| by_hand(&mut bench, &sequences[i].blocks, prompts[i].len(), next, &states[i], wants[i]))
            .collect();

        let inputs: Vec<DraftInput<'_>> = (0..4)
            .map(|i| DraftInput {
                token: next,
                position: prompts[i].len(),
                block_table: &sequences[i].blocks,
                hidden: &states[i],
                drafts_max: wants[i],
            })
            .collect();
        let mut drafts = vec![Vec::new(); 4];
        bench
            .engine
            .draft(&inputs, &mut |index, logits| {
                let token = TokenId(argmax(logits) as u32);
                drafts[index].push(token);
                Some(token)
            })
            .expect("the module runs");
        assert_eq!(drafts, expected, "{numerics}");
        // One that has seen enough does not hold up the others.
        let mut seen = vec![0; 4];
        let stop = &mut |index: usize, logits: &mut [f32]| {
            seen[index] += 1;
            (index != 2 || seen[2] < 2).then(|| TokenId(argmax(logits) as u32))
        };
        bench.engine.draft(&inputs, stop).expect("the module runs");
        assert_eq!(seen, [3, 1, 2, 2], "{numerics}");

        // All of them wrong: the sequences go on with other tokens.
        for (i, mut sequence) in sequences.into_iter().enumerate() {
            let start = sequence.tokens.len();
            sequence.tokens.push(next);
            sequence.tokens.extend(tokens(&bench, 20 + i, 4));
            fill(&mut bench, &sequence, start, 2, states[i].clone(), &mut ());
            let fresh = bench.sequence(&sequence.tokens, 0);
            fill(&mut bench, &fresh, 0, 1000, Vec::new(), &mut ());
            assert!(bench.mtp_cache(&sequence) == bench.mtp_cache(&fresh), "{numerics}: the module's cache");
            assert!(bench.cache(&sequence) == bench.cache(&fresh), "{numerics}: the main model's cache");
            bench.release(sequence);
            bench.release(fresh);
        }
    }
}

/// The golden drafts, made as serving makes them: one step, one draft, and so on.
#[test]
fn drafting_gives_the_golden_drafts() {
    let golden = Golden::open(&fixture("v3_fp8_mtp").join("golden.safetensors"));
    let mut bench = open(Numerics::Reference);
    for p in ["p0", "p1", "p2"] {
        let prompt = golden.tokens(&format!("{p}.input_ids"));
        let ids = golden.tokens(&format!("{p}.greedy_ids"));
        let mut sequence = bench.sequence(&prompt, ids.len());
        let mut drafts = Vec::new();
        let mut start = 0;
        let mut state = Vec::new();
        for &token in &ids[..ids.len() - 1] {
            let rows = fill(&mut bench, &sequence, start, 1000, state, &mut ());
            state = rows.hidden[rows.hidden.len() - bench.engine.config().hidden_size..].to_vec();
            start = sequence.tokens.len();
            let input = DraftInput {
                token,
                position: start,
                block_table: &sequence.blocks,
                hidden: &state,
                drafts_max: 1,
            };
            let choose = &mut |_, logits: &mut [f32]| {
                drafts.push(TokenId(argmax(logits) as u32));
                None
            };
            bench.engine.draft(&[input], choose).expect("the module runs");
            sequence.tokens.push(token);
        }
        assert_eq!(drafts, golden.tokens(&format!("{p}.mtp.draft_ids")), "{p}");
        bench.release(sequence);
    }
}

/// The demo model's first drafts are nearly always right. Its module was trained for those alone: fed with its own
/// states it is right one time in five.
#[test]
fn drafts_of_the_demo_model_are_worth_having() {
    let mut bench = Bench::open(&tiny(), Setup::new(Numerics::Fp8));
    let text = include_str!("data/demo_conversation.txt");
    let prompt = model::Tokenizer::open(tiny()).and_then(|t| t.encode(text)).expect("the tokenizer works");
    let (vocab, hidden_size) = (bench.vocab(), bench.engine.config().hidden_size);
    let sequence = bench.sequence(&prompt[..400], 8);
    let rows = fill(&mut bench, &sequence, 0, 400, Vec::new(), &mut ());
    let best: Vec<_> = rows.logits.chunks_exact(vocab).map(|row| TokenId(argmax(row) as u32)).collect();
    let (mut right, mut tried) = ([0; 4], [0; 4]);
    for position in (100..390).step_by(3) {
        // Where the text goes on as the model would, its next tokens are the model's.
        let as_expected = (0..4).take_while(|&i| prompt[position + i] == best[position - 1 + i]).count();
        let state = &rows.hidden[(position - 1) * hidden_size..position * hidden_size];
        let drafts = by_hand(&mut bench, &sequence.blocks, position, prompt[position], state, 4);
        // The rows that the guesses have overwritten, as a step would put them back.
        let end = position + 5;
        let tail = &rows.hidden[(position - 1) * hidden_size..(end - 1) * hidden_size];
        bench.mtp(&sequence.blocks, position - 1, &prompt[position..end], tail, &mut ());
        for i in 0..as_expected {
            tried[i] += 1;
            if drafts[i] != best[position + i] {
                break;
            }
            right[i] += 1;
        }
    }
    println!("right {right:?} of {tried:?}");
    assert!(right[0] * 10 > tried[0] * 8, "first drafts: {right:?} of {tried:?}");
    assert!(right[1] * 10 > tried[1], "second drafts: {right:?} of {tried:?}");
}

/// How often a draft stands where tokens are sampled, over many seeds, in texts that the demo model has sampled itself. Each token
/// has its own noise, so the two draws are equal nearly as often as they could be, which is one less the distributions' total
/// variation; a draw of its own would be equal with the sum of products.
#[test]
fn sampled_drafts_stand_nearly_as_often_as_they_could() {
    const PROMPT: usize = 60;
    const TEXT: usize = 300;
    let mut bench = Bench::open(&tiny(), Setup::new(Numerics::Fp8));
    let text = include_str!("data/demo_conversation.txt");
    let prompt = model::Tokenizer::open(tiny()).and_then(|t| t.encode(text)).expect("the tokenizer works");
    let (vocab, hidden_size) = (bench.vocab(), bench.engine.config().hidden_size);
    for temperature in [0.7f32, 1.0] {
        let sampler = |seed| {
            let params = model::SamplingParams { temperature, seed, ..model::SamplingParams::greedy() };
            SequenceSampler::new(&params, 0, &[])
        };
        let softmax = |logits: &[f32]| -> Vec<f64> {
            let peak = logits[argmax(logits)];
            let weights: Vec<f64> =
                logits.iter().map(|&x| f64::from((x - peak) / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            weights.into_iter().map(|weight| weight / total).collect()
        };
        let (mut stood, mut draws, mut most, mut independent) = (0.0, 0.0, 0.0, 0.0);
        for start in [0, 200, 400] {
            let mut sequence = bench.sequence(&prompt[start..start + PROMPT], TEXT);
            let mut rows = fill(&mut bench, &sequence, 0, PROMPT, Vec::new(), &mut ());
            while sequence.tokens.len() < TEXT {
                let length = sequence.tokens.len();
                let last = &mut rows.logits[(length - 1) * vocab..].to_vec();
                sequence.tokens.push(sampler(start as u64).sample(last, length, &[]).token);
                let more = fill(&mut bench, &sequence, length, 1, Vec::new(), &mut ());
                rows.logits.extend(more.logits);
                rows.hidden.extend(more.hidden);
            }
            let states = &rows.hidden[..(TEXT - 1) * hidden_size];
            let module = bench.mtp(&sequence.blocks, 0, &sequence.tokens[1..], states, &mut ());
            for position in PROMPT..TEXT {
                // The module's row made with token `position` guesses the token that the main model's row of it draws.
                let mut main = rows.logits[position * vocab..][..vocab].to_vec();
                let mut guess = module.logits[(position - 1) * vocab..][..vocab].to_vec();
                let (p, q) = (softmax(&main), softmax(&guess));
                most += p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum::<f64>();
                independent += p.iter().zip(&q).map(|(p, q)| p * q).sum::<f64>();
                for seed in 100..120 {
                    let drawn = sampler(seed).sample(&mut main, position + 1, &[]).token;
                    stood += f64::from(drawn == sampler(seed).guess(&mut guess, position + 1, &[]));
                    draws += 1.0;
                }
            }
            bench.release(sequence);
        }
        let rows = 3.0 * (TEXT - PROMPT) as f64;
        let (stood, most, independent) = (stood / draws, most / rows, independent / rows);
        println!(
            "temperature {temperature}: {stood:.3} stood, {most:.3} at best, {independent:.3} if independent"
        );
        assert!(stood > 0.95 * most && stood > independent, "{stood} of {most}");
    }
}
