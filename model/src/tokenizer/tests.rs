use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_bf16");

/// Opened once: property tests ask for it in every case.
fn tokenizer_of_fixture() -> &'static Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::open(FIXTURE).expect("a sound fixture"));
    &TOKENIZER
}

/// A directory with the fixture's tokenizer, changed by `change(tokenizer.json, tokenizer_config.json)`.
fn changed(change: impl FnOnce(&mut Value, &mut Value)) -> Result<Tokenizer, ModelError> {
    let dir = tempfile::tempdir().expect("a directory");
    let read = |name: &str| -> Value {
        let text = std::fs::read_to_string(format!("{FIXTURE}/{name}")).expect("a fixture file");
        serde_json::from_str(&text).expect("JSON")
    };
    let (mut tokenizer, mut config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    change(&mut tokenizer, &mut config);
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("writes");
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).expect("writes");
    Tokenizer::open(dir.path())
}

#[test]
fn begin_of_sequence_goes_before_a_plain_prompt_once() {
    let tokenizer = tokenizer_of_fixture();
    let plain = tokenizer.encode("hello").expect("encodes");
    let prompt = tokenizer.encode_prompt("hello").expect("encodes");
    assert_eq!(prompt, [&[TokenId(0)], plain.as_slice()].concat());
    let already = tokenizer.encode_prompt("<｜begin▁of▁sentence｜>hello").expect("encodes");
    assert_eq!(already, prompt);
    assert_eq!(tokenizer.encode_prompt("").expect("encodes"), [TokenId(0)]);
}

#[test]
fn a_model_that_wants_no_begin_of_sequence_gets_none() {
    let tokenizer = changed(|_, config| config["add_bos_token"] = json!(false)).expect("sound");
    assert_eq!(
        tokenizer.encode_prompt("hello").expect("encodes"),
        tokenizer.encode("hello").expect("encodes")
    );
}

#[test]
fn a_begin_of_sequence_that_is_no_token_is_refused() {
    let error = changed(|_, config| config["bos_token"] = json!("<s>")).expect_err("no such token");
    assert!(error.to_string().contains("`<s>`"), "{error}");
}

#[test]
fn marks_are_special_as_the_file_says() {
    let tokenizer = tokenizer_of_fixture();
    let id = |token| tokenizer.id_of(token).expect(token);
    assert!(tokenizer.is_special(id("<｜end▁of▁sentence｜>")));
    assert!(!tokenizer.is_special(id("<｜User｜>")) && !tokenizer.is_special(id("</think>")));
    assert!(!tokenizer.is_special(TokenId(u32::MAX)));
    assert_eq!(tokenizer.token_text(id("</think>")), "</think>");
    assert_eq!(tokenizer.id_of("no such token"), None);
}

#[test]
fn ids_without_a_token_are_nothing() {
    let tokenizer = tokenizer_of_fixture();
    assert_eq!(tokenizer.vocab_size(), 441);
    assert_eq!(tokenizer.token_bytes(TokenId(441)), b"");
    assert_eq!(tokenizer.token_bytes(TokenId(u32::MAX)), b"");
    assert_eq!(tokenizer.decode(&[TokenId(441), TokenId(447), TokenId(u32::MAX)], false), "");
}

#[test]
fn a_gap_in_the_ids_is_nothing_too() {
    let tokenizer = changed(|tokenizer, _| {
        tokenizer["model"]["vocab"]["gap"] = json!(500);
        // The library numbers marks that are not in the vocabulary itself, from the vocabulary's size.
        tokenizer["added_tokens"].as_array_mut().expect("a list").retain(|t| t["id"] == json!(0));
    });
    let tokenizer = tokenizer.expect("sound");
    assert_eq!(tokenizer.vocab_size(), 501);
    assert_eq!(tokenizer.token_text(TokenId(431)), tokenizer_of_fixture().token_text(TokenId(431)));
    assert_eq!(tokenizer.token_text(TokenId(470)), "");
    assert_eq!(tokenizer.token_text(TokenId(500)), "gap");
}

#[test]
fn truncation_and_padding_of_the_file_are_not_ours() {
    let tokenizer = changed(|tokenizer, _| {
        tokenizer["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    });
    let ids = tokenizer.expect("sound").encode("one two three four five").expect("encodes");
    assert!(ids.len() > 3, "{ids:?}");
}

#[test]
fn hostile_files_are_refused_with_their_name() {
    let refused = |change: fn(&mut Value)| {
        let error = changed(|tokenizer, _| change(tokenizer)).expect_err("hostile").to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    };
    refused(|t| t["model"]["vocab"]["<far>"] = json!(4_000_000_000u32));
    refused(|t| t["decoder"] = json!({"type": "Fuse"}));
    refused(|t| t["decoder"] = Value::Null);
    refused(|t| t["model"] = json!({"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}));
    refused(|t| *t = json!(17));
}

proptest! {
    /// The byte table against the library's own decoder.
    #[test]
    fn decode_is_the_library_s(ids in prop::collection::vec(0u32..460, 0..100), skip_special: bool) {
        let tokenizer = tokenizer_of_fixture();
        let theirs = tokenizer.shared.encoder.decode(&ids, skip_special).expect("decodes");
        let ids: Vec<_> = ids.into_iter().map(TokenId).collect();
        prop_assert_eq!(tokenizer.decode(&ids, skip_special), theirs);
    }

    #[test]
    fn text_survives_the_round_trip(text: String) {
        let tokenizer = tokenizer_of_fixture();
        let ids = tokenizer.encode(&text).expect("encodes");
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }
}
