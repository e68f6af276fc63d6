//! The requests a load is made of: all of one shape, no two alike.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};

/// Below these ids tokenizers keep their special tokens.
const TOKEN_ID_MIN: u32 = 100;

/// Words of one token in most vocabularies.
const WORDS: [&str; 16] = [
    "time", "water", "house", "world", "light", "music", "river", "table", "paper", "green", "north",
    "horse", "stone", "summer", "garden", "window",
];

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
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer at most; exactly, where the server honours `ignore_eos`.
    pub output_tokens: u32,
    /// How the prompt is sent.
    pub prompt_kind: PromptKind,
    /// The largest token id of prompts.
    pub token_id_max: u32,
    /// Whether an end-of-sequence token is passed over.
    pub ignore_eos: bool,
    /// Whether `trireme_timings` is asked for.
    pub timings: bool,
    /// Seed of the prompts.
    pub seed: u64,
}

/// Which request of a run this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// The load point; warm-up has one of its own.
    pub point: u32,
    /// Within the point.
    pub index: u32,
}

impl RequestShape {
    /// The body for `/v1/completions`. The same id and seed give the same body.
    pub fn body(&self, id: RequestId) -> Value {
        let mut rng = self.rng(id);
        let prompt: Value = match self.prompt_kind {
            PromptKind::TokenIds => {
                let id = |_| rng.random_range(TOKEN_ID_MIN..=self.token_id_max);
                (0..self.prompt_tokens).map(id).collect()
            }
            PromptKind::Text => {
                let word = |_| WORDS[rng.random_range(0..WORDS.len())];
                (0..self.prompt_tokens).map(word).collect::<Vec<_>>().join(" ").into()
            }
        };
        let mut body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
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

    fn rng(&self, id: RequestId) -> StdRng {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        seed[8..12].copy_from_slice(&id.point.to_le_bytes());
        seed[12..16].copy_from_slice(&id.index.to_le_bytes());
        StdRng::from_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(prompt_kind: PromptKind) -> RequestShape {
        RequestShape {
            model: "m".to_owned(),
            prompt_tokens: 300,
            output_tokens: 7,
            prompt_kind,
            token_id_max: 120,
            ignore_eos: true,
            timings: true,
            seed: 5,
        }
    }

    #[test]
    fn token_ids_have_the_length_and_range_asked_for() {
        let body = shape(PromptKind::TokenIds).body(RequestId { point: 0, index: 0 });
        let ids: Vec<u64> =
            body["prompt"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("a number")).collect();
        assert_eq!(ids.len(), 300);
        assert!(ids.iter().all(|id| (100..=120).contains(id)));
        assert!((100..=120).all(|id| ids.contains(&id)), "the whole range is used");
        assert_eq!(body["max_tokens"], 7);
        assert_eq!(body["stream_options"]["include_usage"], true);
    }

    #[test]
    fn each_request_has_its_own_prompt_and_a_repeat_has_the_same() {
        for kind in [PromptKind::TokenIds, PromptKind::Text] {
            let prompt = |point, index| shape(kind).body(RequestId { point, index })["prompt"].clone();
            assert_eq!(prompt(1, 2), prompt(1, 2));
            assert_ne!(prompt(1, 2), prompt(1, 3));
            assert_ne!(prompt(1, 2), prompt(2, 2));
        }
    }

    #[test]
    fn extensions_are_sent_only_where_wanted() {
        let plain = RequestShape { ignore_eos: false, timings: false, ..shape(PromptKind::Text) };
        let body = plain.body(RequestId { point: 0, index: 0 });
        for field in ["ignore_eos", "return_token_ids", "trireme_timings"] {
            assert!(body.get(field).is_none(), "{field}");
        }
    }
}
