//! Text to tokens and back, and rendered chats, against what `transformers` gave for every fixture and the demo model.

use std::fs;
use std::path::{Path, PathBuf};

use model::{ChatMessage, ChatTemplate, Detokenizer, TokenId, Tokenizer};
use serde::Deserialize;
use serde_json::Map;

const FIXTURES: [&str; 5] = ["v2_group", "v2_lite", "v3_bf16", "v3_fp8_aligned", "v3_fp8_mtp"];

#[derive(Deserialize)]
struct Cases {
    encode: Vec<Encoded>,
    chat: Vec<Chat>,
    completions: Vec<Completion>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<TokenId>,
    /// Special tokens kept.
    decoded: String,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<ChatMessage>,
    rendered: String,
    rendered_no_generation_prompt: String,
    prompt_ids: Vec<TokenId>,
    greedy_ids: Vec<TokenId>,
    greedy_text: String,
}

#[derive(Deserialize)]
struct Completion {
    prompt: Option<String>,
    prompt_ids: Vec<TokenId>,
    greedy_ids: Vec<TokenId>,
    greedy_text: String,
    greedy_text_skip_special: String,
}

/// An entry of the demo model's golden.json.
#[derive(Deserialize)]
struct Golden {
    text: String,
    prompt_ids: Vec<TokenId>,
    greedy_ids: Vec<TokenId>,
    greedy_text: String,
}

fn fixtures() -> impl Iterator<Item = (PathBuf, Tokenizer, Cases)> {
    FIXTURES.into_iter().map(|name| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
        let tokenizer = Tokenizer::open(&dir).expect("a sound fixture");
        let cases = serde_json::from_slice(&fs::read(dir.join("cases.json")).expect("reads")).expect("cases");
        (dir, tokenizer, cases)
    })
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tiny")
}

fn streamed(tokenizer: &Tokenizer, ids: &[TokenId], skip_special: bool) -> String {
    let mut stream = Detokenizer::new(tokenizer, skip_special);
    let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
    text += &stream.finish();
    text
}

#[test]
fn encodes_and_decodes() {
    for (dir, tokenizer, cases) in fixtures() {
        assert!(cases.encode.len() > 20, "{}", dir.display());
        for Encoded { text, ids, decoded } in cases.encode {
            assert_eq!(tokenizer.encode(&text).expect("encodes"), ids, "{} {text:?}", dir.display());
            assert_eq!(tokenizer.decode(&ids, false), decoded, "{} {text:?}", dir.display());
            assert_eq!(streamed(&tokenizer, &ids, false), decoded, "{} {text:?}", dir.display());
        }
    }
}

#[test]
fn renders_chats() {
    for (dir, tokenizer, cases) in fixtures() {
        let template = ChatTemplate::open(&dir).expect("compiles").expect("is there");
        assert!(!cases.chat.is_empty(), "{}", dir.display());
        for chat in cases.chat {
            let render = |add_generation_prompt| {
                template.render(&chat.messages, false, add_generation_prompt, &Map::new()).expect("renders")
            };
            assert_eq!(render(true), chat.rendered);
            assert_eq!(render(false), chat.rendered_no_generation_prompt);
            assert!(!ChatTemplate::opens_thinking(&chat.rendered));
            // A rendered chat brings its begin-of-sequence mark: both ways of encoding agree.
            assert_eq!(tokenizer.encode(&chat.rendered).expect("encodes"), chat.prompt_ids);
            assert_eq!(tokenizer.encode_prompt(&chat.rendered).expect("encodes"), chat.prompt_ids);
            // Whether the golden text keeps special tokens shows where there are any.
            let kept = tokenizer.decode(&chat.greedy_ids, false);
            let skipped = tokenizer.decode(&chat.greedy_ids, true);
            assert!(chat.greedy_text == kept || chat.greedy_text == skipped, "{:?}", chat.greedy_text);
            assert_eq!(streamed(&tokenizer, &chat.greedy_ids, false), kept);
        }
    }
}

#[test]
fn encodes_prompts_and_decodes_completions() {
    for (dir, tokenizer, cases) in fixtures() {
        assert!(!cases.completions.is_empty(), "{}", dir.display());
        for case in cases.completions {
            if let Some(prompt) = &case.prompt {
                assert_eq!(tokenizer.encode_prompt(prompt).expect("encodes"), case.prompt_ids, "{prompt:?}");
            }
            for (skip_special, text) in [(false, &case.greedy_text), (true, &case.greedy_text_skip_special)] {
                assert_eq!(&tokenizer.decode(&case.greedy_ids, skip_special), text, "{:?}", case.prompt);
                assert_eq!(&streamed(&tokenizer, &case.greedy_ids, skip_special), text, "{:?}", case.prompt);
            }
        }
    }
}

#[test]
fn the_demo_model_s_golden_prompts() {
    let tokenizer = Tokenizer::open(tiny()).expect("opens");
    let goldens: Vec<Golden> =
        serde_json::from_slice(&fs::read(tiny().join("golden.json")).expect("reads")).expect("goldens");
    assert_eq!(goldens.len(), 6);
    for golden in goldens {
        assert_eq!(tokenizer.encode(&golden.text).expect("encodes"), golden.prompt_ids, "{:?}", golden.text);
        assert_eq!(tokenizer.encode_prompt(&golden.text).expect("encodes"), golden.prompt_ids);
        let kept = tokenizer.decode(&golden.greedy_ids, false);
        let skipped = tokenizer.decode(&golden.greedy_ids, true);
        assert!(golden.greedy_text == kept || golden.greedy_text == skipped, "{kept:?}");
        assert_eq!(streamed(&tokenizer, &golden.greedy_ids, false), kept);
    }
}

#[test]
fn the_demo_model_thinks_when_asked_to() {
    let template = ChatTemplate::open(tiny()).expect("compiles").expect("is there");
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let messages = [
        message("system", "Be kind. "),
        message("user", "Hi"),
        message("assistant", "<think>\nA greeting.\n</think>\nHello"),
        message("user", "Bye"),
    ];
    let render = |thinking| template.render(&messages, thinking, true, &Map::new()).expect("renders");
    let plain = "<｜begin▁of▁sentence｜>Be kind. <｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>\
                 <｜User｜>Bye<｜Assistant｜>";
    assert_eq!(render(false), plain);
    assert_eq!(render(true), format!("{plain}<think>\n"));
    assert!(ChatTemplate::opens_thinking(&render(true)) && !ChatTemplate::opens_thinking(&render(false)));
}
