use clap::Parser;
use model::Tokenizer;
use serde_json::json;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn demo_folder() -> PathBuf {
    demo::model_folder(None).expect("the demo model")
}

/// As long as asked for, but for less than a turn; and the needle stands where its depth says.
#[test]
fn a_haystack_has_its_length_and_its_needle_at_its_depth() {
    let haystack = Haystack::open(&demo_folder()).expect("a template");
    let tokenizer = Tokenizer::open(demo_folder()).expect("a tokenizer");
    for needle in [Needle::Name, Needle::Number] {
        for length in [128, 700, 4000] {
            for depth in [0, 50, 100] {
                let prompt = haystack.prompt(needle, length, depth, 1, 2).expect("it fits");
                let about = format!("{needle:?}, {length} tokens, {depth} %");
                assert!(prompt.tokens.len() <= length && prompt.tokens.len() + 64 > length, "{about}");
                let text = tokenizer.decode(&prompt.tokens, true);
                assert_eq!(
                    text.matches(&prompt.expected).count(),
                    2,
                    "{about}: said once, repeated once: {text}"
                );
                let at = 100 * text.find(&prompt.expected).expect("there") / text.len();
                let slack = 100 * 160 / text.len() + 3;
                assert!(at.abs_diff(depth as usize) <= slack, "{about}: found at {at} %");
            }
        }
    }
}

#[test]
fn a_haystack_is_reproducible_and_no_two_samples_are_alike() {
    let haystack = Haystack::open(&demo_folder()).expect("a template");
    let prompt = |seed, sample| haystack.prompt(Needle::Number, 500, 50, seed, sample).expect("it fits");
    assert_eq!(prompt(3, 4), prompt(3, 4));
    assert_ne!(prompt(3, 4), prompt(3, 5));
    assert_ne!(prompt(3, 4), prompt(4, 4));
    let error = haystack.prompt(Needle::Number, 20, 50, 0, 0).expect_err("too short").to_string();
    assert!(error.contains("--lengths 20"), "{error}");
}

#[test]
fn a_needle_is_a_word_of_its_own() {
    let prompt = |expected: &str| Prompt { tokens: Vec::new(), expected: expected.to_owned() };
    for (expected, answer, found) in [
        ("Leo", "Your name is Leo.", true),
        ("Leo", "leo!", true),
        ("Leo", "Your name is Leonard.", false),
        ("4711", "The secret number is 4711.", true),
        ("4711", "It is 47115", false),
        ("4711", "", false),
    ] {
        assert_eq!(prompt(expected).found_in(answer), found, "{expected}: {answer}");
    }
}

#[test]
fn an_answer_is_what_its_chunks_say() {
    let mut answer = ask::Answer::default();
    for event in [
        json!({ "choices": [{ "text": "Your name", "logprobs": { "token_logprobs": [-0.5, -1.5] } }] }),
        json!({ "choices": [{ "text": " is Leo.", "logprobs": { "token_logprobs": [null, -1.0] } }] }),
        json!({ "choices": [] }),
    ] {
        answer.extend(&event);
    }
    assert_eq!(answer.text, "Your name is Leo.");
    assert_eq!(answer.logprobs, [-0.5, -1.5, -1.0]);
    let mut sum = Sum::default();
    sum.add(&Prompt { tokens: Vec::new(), expected: "Leo".to_owned() }, answer);
    let cell = sum.cell(256, 50);
    assert_eq!((cell.answered, cell.found, cell.share()), (1, 1, Some(1.0)));
    assert!((cell.confidence - (-1.0f64).exp()).abs() < 1e-12);
}

#[test]
fn the_table_has_a_cell_for_each_length_and_depth() {
    let cell = |length, depth, answered, found| Cell {
        length,
        depth,
        prompt_tokens: 1.0,
        answered,
        found,
        confidence: 0.5,
        missed: (found < answered).then(|| "no idea".to_owned()),
    };
    let cells = vec![cell(256, 0, 4, 4), cell(256, 100, 4, 1), cell(512, 0, 4, 0), cell(512, 100, 0, 0)];
    let report = Report { url: "u".to_owned(), model: "m".to_owned(), needle: Needle::Name, cells };
    let text = render(&report);
    for expected in
        ["100 % (0.500)", "25 % (0.500)", "0 % (0.500)", "██████······", "░░░░░░??????", "no idea"]
    {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    for flags in ["--lengths 10", "--depths 101", "--samples 0", "--concurrency 0", "--needle hay"] {
        assert!(Cli::try_parse_from(format!("niah {flags}").split_whitespace()).is_err(), "{flags}");
    }
}
