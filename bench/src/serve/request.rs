//! The body of a request.

use rand::RngExt;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::{Value, json};

/// Words of one token in most vocabularies.
const WORDS: [&str; 16] = [
    "time", "water", "house", "world", "light", "music", "river", "table", "paper", "green", "north",
    "horse", "stone", "summer", "garden", "window",
];
/// OpenAI's largest bias: the token comes.
const CERTAIN: i32 = 100;

/// How a prompt is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PromptKind {
    /// Random token ids: the prompt has exactly the length asked for.
    TokenIds,
    /// Random common words, about one token each.
    Text,
}

/// What every request of a run has in common.
#[derive(Debug, Clone, Serialize)]
pub struct RequestShape {
    /// The model's name at the server.
    pub model: String,
    /// How the prompt is sent.
    pub prompt_kind: PromptKind,
    /// Whether an end-of-sequence token is passed over.
    pub ignore_eos: bool,
    /// What is stated as `max_tokens` where it is not the answer's length; the answer then ends by `stop_token`.
    pub declare_max_tokens: Option<u32>,
    /// Ends answers that are shorter than what is stated.
    pub stop_token: u32,
    /// Whether `trireme_timings` is asked for.
    pub timings: bool,
}

impl RequestShape {
    /// The body for `/v1/completions`, with an answer of `output_tokens` tokens.
    pub fn body(&self, prompt: Value, output_tokens: u32) -> Value {
        let mut body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(declared) = self.declare_max_tokens.filter(|declared| *declared > output_tokens) {
            // Kept away until the last token, and certain there.
            body["max_tokens"] = declared.into();
            body["min_tokens"] = (output_tokens - 1).into();
            body["stop_token_ids"] = json!([self.stop_token]);
            body["logit_bias"] = json!({ self.stop_token.to_string(): CERTAIN });
        }
        // Only where wanted: strict servers refuse what they do not know. Token ids make a token visible whose text
        // is empty because its character is not complete yet.
        let extensions = [
            ("ignore_eos", self.ignore_eos),
            ("return_token_ids", self.prompt_kind == PromptKind::TokenIds),
            ("trireme_timings", self.timings),
        ];
        for (field, _) in extensions.into_iter().filter(|(_, wanted)| *wanted) {
            body[field] = true.into();
        }
        body
    }
}

/// `tokens` common words.
pub(super) fn words(tokens: u32, rng: &mut StdRng) -> String {
    (0..tokens).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> RequestShape {
        RequestShape {
            model: "m".to_owned(),
            prompt_kind: PromptKind::TokenIds,
            ignore_eos: true,
            declare_max_tokens: None,
            stop_token: 120,
            timings: true,
        }
    }

    #[test]
    fn a_body_asks_for_what_is_wanted_and_nothing_else() {
        let body = shape().body(json!([1, 2]), 7);
        assert_eq!(body["prompt"], json!([1, 2]));
        assert_eq!(body["max_tokens"], 7);
        assert_eq!(body["stream_options"]["include_usage"], true);
        let plain =
            RequestShape { ignore_eos: false, timings: false, prompt_kind: PromptKind::Text, ..shape() };
        let body = plain.body("x".into(), 7);
        for field in ["ignore_eos", "return_token_ids", "trireme_timings", "logit_bias", "min_tokens"] {
            assert!(body.get(field).is_none(), "{field}");
        }
    }

    #[test]
    fn an_answer_shorter_than_stated_ends_by_a_token_that_is_certain() {
        let body = RequestShape { declare_max_tokens: Some(50), ..shape() }.body(json!([1]), 7);
        assert_eq!((&body["max_tokens"], &body["min_tokens"]), (&json!(50), &json!(6)));
        assert_eq!((&body["stop_token_ids"], &body["logit_bias"]), (&json!([120]), &json!({ "120": 100 })));
        let body = RequestShape { declare_max_tokens: Some(5), ..shape() }.body(json!([1]), 7);
        assert_eq!(body["max_tokens"], 7, "no answer is cut");
    }
}
