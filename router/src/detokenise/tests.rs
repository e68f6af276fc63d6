use std::collections::HashSet;
use std::path::Path;

use model::{Detokenizer, TokenId, Tokenizer};

use super::{ChoiceText, TextOptions};
use crate::reasoning::{ReasoningSplitter, Split};
use crate::stop::StopMatcher;

const EOS: TokenId = TokenId(1);

fn tokenizer() -> Tokenizer {
    Tokenizer::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tiny"))
        .expect("demo model's tokenizer")
}

/// Content, reasoning, and what stopped the choice.
fn run(text: &str, stops: &[&str], min_tokens: u32, chat: bool) -> (String, String, Option<String>) {
    run_with(TextOptions::default(), text, stops, min_tokens, chat)
}

fn run_with(
    options: TextOptions,
    text: &str,
    stops: &[&str],
    min_tokens: u32,
    chat: bool,
) -> (String, String, Option<String>) {
    let tokenizer = tokenizer();
    let mut tokens = tokenizer.encode(text).expect("encodes");
    tokens.push(EOS);
    let reasoning = if chat { ReasoningSplitter::chat(false) } else { ReasoningSplitter::plain() };
    let stops = stops.iter().map(|stop| stop.to_string()).collect();
    let mut choice = ChoiceText::new(
        Detokenizer::new(&tokenizer, options.skip_special_tokens),
        StopMatcher::new(stops),
        reasoning,
        HashSet::from([EOS]),
        min_tokens,
        options.include_stop,
    );
    let mut all = Split::default();
    let mut stopped = None;
    for token in tokens {
        let piece = choice.push(token);
        all.content.push_str(&piece.split.content);
        all.reasoning.push_str(&piece.split.reasoning);
        stopped = piece.stopped;
        if stopped.is_some() {
            return (all.content, all.reasoning, stopped);
        }
    }
    let piece = choice.finish();
    all.content.push_str(&piece.split.content);
    all.reasoning.push_str(&piece.split.reasoning);
    (all.content, all.reasoning, stopped.or(piece.stopped))
}

#[test]
fn text_comes_back_whole() {
    for text in ["plain words", "Ünïcödé 漢字 🙂", "", "line\nbreaks\n\n"] {
        assert_eq!(run(text, &[], 0, false), (text.to_owned(), String::new(), None));
        assert_eq!(run(text, &["not in it"], 0, true).0, text);
    }
}

#[test]
fn stop_strings_end_the_answer_and_not_the_thinking() {
    let text = "<think>first STOP second</think>answer STOP more";
    let thought = "first STOP second".to_owned();
    assert_eq!(
        run(text, &[" STOP"], 0, true),
        ("answer".to_owned(), thought.clone(), Some(" STOP".to_owned()))
    );
    assert_eq!(run(text, &["</think>"], 0, true), ("answer STOP more".to_owned(), thought.clone(), None));
    assert_eq!(run(text, &[], 0, true), ("answer STOP more".to_owned(), thought, None));
    // Without a chat there is no thinking.
    assert_eq!(run(text, &[" STOP"], 0, false).0, "<think>first");
}

#[test]
fn what_ended_the_answer_is_given_out_where_it_is_asked_for() {
    let include = TextOptions { include_stop: true, ..TextOptions::default() };
    assert_eq!(run_with(include, "one STOP two", &["STOP"], 0, false).0, "one STOP");
    let marks = TextOptions { include_stop: true, skip_special_tokens: false };
    let whole = run_with(marks, "one", &[], 0, false).0;
    assert!(whole.starts_with("one") && whole.len() > 3, "{whole} has its end's mark");
    let marks = TextOptions { include_stop: false, skip_special_tokens: false };
    assert_eq!(run_with(marks, "one", &[], 0, false).0, "one");
}

#[test]
fn held_back_text_is_given_out_at_the_end() {
    assert_eq!(run("almost a ST", &["STOP"], 0, false).0, "almost a ST");
    assert_eq!(run("<think>never closed </thi", &[], 0, true).1, "never closed </thi");
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    assert_eq!(run("a a a a", &[" a"], 3, false).0, "a a");
    assert_eq!(run("a a a a", &[" a"], 0, false).0, "a");
}
