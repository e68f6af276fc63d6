use proptest::prelude::*;

use super::{Certain, StopMatcher};

/// Feeds `pieces` and returns the whole answer and which stop string ended it.
fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
    let mut answer = String::new();
    for piece in pieces {
        let Certain { text, stopped } = matcher.push(piece);
        answer.push_str(&text);
        if stopped.is_some() {
            return (answer, stopped);
        }
    }
    answer.push_str(&matcher.finish());
    (answer, None)
}

#[track_caller]
fn check(stops: &[&str], pieces: &[&str], answer: &str, stopped: Option<usize>) {
    assert_eq!(run(stops, pieces), (answer.to_owned(), stopped), "{stops:?} on {pieces:?}");
}

#[test]
fn table() {
    check(&[], &["any", "thing"], "anything", None);
    check(&["END"], &["a E", "N", "D b"], "a ", Some(0));
    check(&["END"], &["a E", "N", "d"], "a ENd", None);
    check(&["END"], &["a EN"], "a EN", None);
    check(&["\n\n"], &["one\n", "two\n", "\nthree"], "one\ntwo", Some(0));
    check(&["aab"], &["aa", "ab"], "a", Some(0));
    // The match that ends first wins, whatever the order of the list.
    check(&["abcd", "bc"], &["abcd"], "a", Some(1));
    // Both end together: the one that starts first wins.
    check(&["bc", "abc"], &["xabc"], "x", Some(1));
    check(&["né"], &["an", "ée"], "a", Some(0));
    check(&["<｜"], &["x<", "｜y"], "x", Some(0));
}

#[test]
fn holds_back_only_what_may_begin_a_stop_string() {
    let mut matcher = StopMatcher::new(vec!["STOP".to_owned()]);
    assert_eq!(matcher.push("go on S").text, "go on ");
    assert_eq!(matcher.push("T").text, "");
    assert_eq!(matcher.push("ART").text, "START");
    assert_eq!(matcher.pass("STOP"), "STOP");
    assert_eq!(matcher.finish(), "");
}

/// The definition, without streaming: the smallest end, then the smallest start.
fn whole(stops: &[String], text: &str) -> (String, Option<usize>) {
    let ends = (0..=text.len()).filter(|&end| text.is_char_boundary(end));
    for end in ends {
        let ending = |(index, stop): (usize, &String)| {
            text[..end].ends_with(stop.as_str()).then(|| (end - stop.len(), index))
        };
        if let Some((start, index)) = stops.iter().enumerate().filter_map(ending).min() {
            return (text[..start].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    /// However the text is cut, the answer is the definition's.
    #[test]
    fn does_not_depend_on_the_cuts(
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
        pieces in prop::collection::vec("[abé]{0,3}", 0..12),
    ) {
        let text = pieces.concat();
        let stop_refs: Vec<&str> = stops.iter().map(String::as_str).collect();
        let piece_refs: Vec<&str> = pieces.iter().map(String::as_str).collect();
        prop_assert_eq!(run(&stop_refs, &piece_refs), whole(&stops, &text));
    }

    /// What is held back is always shorter than the longest stop string.
    #[test]
    fn holds_back_a_bounded_tail(
        stops in prop::collection::vec("[ab]{1,6}", 1..4),
        text in "[abc]{0,40}",
    ) {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut matcher = StopMatcher::new(stops);
        let mut given = 0;
        for (at, character) in text.char_indices() {
            let certain = matcher.push(&character.to_string());
            given += certain.text.len();
            if certain.stopped.is_some() {
                break;
            }
            prop_assert!(at + 1 - given < longest);
        }
    }
}
