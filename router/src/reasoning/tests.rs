use proptest::prelude::*;

use super::{ReasoningSplitter, Split};

fn run(mut splitter: ReasoningSplitter, pieces: &[&str]) -> (String, String) {
    let mut all = Split::default();
    let mut add = |split: Split| {
        all.reasoning.push_str(&split.reasoning);
        all.content.push_str(&split.content);
    };
    for piece in pieces {
        add(splitter.push(piece));
    }
    add(splitter.finish());
    (all.reasoning, all.content)
}

#[track_caller]
fn check(opened: bool, pieces: &[&str], reasoning: &str, content: &str) {
    let split = run(ReasoningSplitter::chat(opened), pieces);
    assert_eq!(split, (reasoning.to_owned(), content.to_owned()), "{pieces:?}");
}

#[test]
fn table() {
    check(false, &["plain ", "answer"], "", "plain answer");
    check(false, &["<think>\nhm", "m</think>\n\nyes"], "hmm", "yes");
    check(false, &["\n<th", "ink>a", "</", "thi", "nk>", "\n", "b"], "a", "b");
    check(true, &["\nwhy</think>because"], "why", "because");
    check(true, &["never closed </thin"], "never closed </thin", "");
    check(true, &["</think>at once"], "", "at once");
    check(false, &["<thin air>"], "", "<thin air>");
    check(false, &["  indented"], "", "  indented");
    check(false, &["answer <think>late</think>"], "", "answer <think>late</think>");
    check(true, &["a</think>b</think>c"], "a", "b</think>c");
    check(false, &[], "", "");
}

#[test]
fn plain_text_passes_untouched() {
    let split = run(ReasoningSplitter::plain(), &[" <think>", "x</think> "]);
    assert_eq!(split, (String::new(), " <think>x</think> ".to_owned()));
}

proptest! {
    /// However the text is cut, the split is the same.
    #[test]
    fn does_not_depend_on_the_cuts(
        opened: bool,
        pieces in prop::collection::vec(
            prop::sample::select(vec!["<", "/", "think", ">", "<think>", "</think>", "a", " ", "\n", "é"]), 0..14),
    ) {
        let text = pieces.concat();
        let whole = run(ReasoningSplitter::chat(opened), &[&text]);
        prop_assert_eq!(run(ReasoningSplitter::chat(opened), &pieces), whole.clone());
        let characters: Vec<String> = text.chars().map(String::from).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        prop_assert_eq!(run(ReasoningSplitter::chat(opened), &characters), whole);
    }
}
