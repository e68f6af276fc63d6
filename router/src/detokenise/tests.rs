use std::collections::HashSet;
use std::path::Path;

use model::{Detokenizer, TokenId, Tokenizer};

use super::ChoiceText;
use crate::reasoning::{ReasoningSplitter, Split};
use crate::stop::StopMatcher;

const EOS: TokenId = TokenId(1);

fn tokenizer() -> Tokenizer {
    Tokenizer::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tiny"))
        .expect("demo model's tokenizer")
}

/// Content, reasoning, and what stopped the choice.
fn run(text: &str, stops: &[&str], min_tokens: u32, chat: bool) -> (String, String, Option<String>) {
    let tokenizer = tokenizer();
    let mut tokens = tokenizer.encode(text).expect("encodes");
    tokens.push(EOS);
    let reasoning = if chat { ReasoningSplitter::chat(false) } else { ReasoningSplitter::plain() };
    let stops = stops.iter().map(|stop| stop.to_string()).collect();
    let mut choice = ChoiceText::new(
        Detokenizer::new(&tokenizer, true),
        StopMatcher::new(stops),
        reasoning,
        HashSet::from([EOS]),
        min_tokens,
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
fn stop_strings_are_seen_before_thinking_is_split() {
    let text = "<think>first STOP second</think>answer";
    assert_eq!(run(text, &[" STOP"], 0, true), (String::new(), "first".to_owned(), Some(" STOP".to_owned())));
    // The closing mark itself may be one.
    assert_eq!(run(text, &["</think>"], 0, true).1, "first STOP second");
    assert_eq!(run(text, &[], 0, true), ("answer".to_owned(), "first STOP second".to_owned(), None));
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
