use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

/// Opened once: property tests ask for it in every case.
fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        Tokenizer::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_bf16")).expect("a sound fixture")
    });
    &TOKENIZER
}

#[test]
fn at_most_three_bytes_wait() {
    let smile = "😀".as_bytes();
    for (bytes, tail) in [
        (&b""[..], 0),
        (b"abc", 0),
        (&smile[..1], 1),
        (&smile[..3], 3),
        (smile, 0),
        (&[b'a', 0xE2, 0x82], 2),
        // Broken, not incomplete: no continuation can save it.
        (&[0xFF], 0),
        (&[0xE2, b'a'], 0),
        (&[0x80, 0x80], 0),
        (&[0xED, 0xA0], 0),
        (&[0xE2, 0x82, 0xE2], 1),
    ] {
        assert_eq!(incomplete_tail(bytes), tail, "{bytes:x?}");
    }
}

#[test]
fn a_character_over_several_tokens_comes_out_whole() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("a😀b").expect("encodes");
    let mut stream = Detokenizer::new(tokenizer, false);
    let pieces: Vec<_> = ids.iter().map(|id| stream.push(*id)).collect();
    assert!(ids.len() > 3, "the fixture's vocabulary is too small for an emoji");
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
    assert_eq!(pieces.concat() + &stream.finish(), "a😀b");
}

#[test]
fn a_character_never_completed_is_replaced_at_the_end() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("😀").expect("encodes");
    let mut stream = Detokenizer::new(tokenizer, false);
    assert_eq!(stream.push(ids[0]), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
}

proptest! {
    /// The pieces make the whole, for any ids: broken UTF-8, marks, and ids beyond the vocabulary.
    #[test]
    fn pieces_concatenate_to_decode(ids in prop::collection::vec(0u32..460, 0..200), skip_special: bool) {
        let tokenizer = tokenizer();
        let ids: Vec<_> = ids.into_iter().map(TokenId).collect();
        let mut stream = Detokenizer::new(tokenizer, skip_special);
        let mut text = String::new();
        for id in &ids {
            text += &stream.push(*id);
            prop_assert!(stream.pending.len() <= 3);
        }
        text += &stream.finish();
        prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
    }
}
