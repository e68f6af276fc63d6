//! Haystacks: conversations of a length in tokens, with a needle at a depth.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, ensure};
use model::{ChatMessage, ChatTemplate, TokenId, Tokenizer};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::Map;

/// Tokens of an answer at most: a sentence.
pub(super) const ANSWER_TOKENS_MAX: u32 = 24;

/// Hay: turns that have nothing to do with any needle.
const TURNS: [(&str, &str); 16] = [
    ("What sound does a cow make?", "A cow says moo."),
    ("How are you today?", "I am happy to be here. How are you?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Why do birds fly?",
        "Birds have wings, light bones and strong muscles. When they flap their wings, they push the air down, and that \
         lifts them up.",
    ),
    (
        "I feel sad today.",
        "I am sorry to hear that. Everybody feels sad now and then. Talking to a friend can help.",
    ),
    ("Can you count to ten?", "Of course! 1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    (
        "What is a planet?",
        "A planet is a big round body that travels around a star. We live on the planet Earth.",
    ),
    ("Tell me a joke.", "What do you call a bear with no teeth? A gummy bear!"),
    (
        "Write a poem about the moon.",
        "The moon is round, the moon is bright,\nIt watches over us at night.\nIt looks through every window pane,\nAnd \
         comes back every night again.",
    ),
    ("What is the opposite of hot?", "Cold is the opposite of hot."),
    (
        "How do I make a sandwich?",
        "Take two slices of bread. Spread some butter on them. Put cheese, tomato and lettuce on one slice. Put the other \
         slice on top. Enjoy!",
    ),
    ("Tell me a fact about elephants.", "Elephants drink with the help of their trunks."),
    ("What day comes after Monday?", "Tuesday comes after Monday."),
    ("What is two plus three?", "Two plus three is five."),
    ("What do bees make?", "Bees make honey."),
    ("What color is the sky?", "The sky is blue."),
];

const NAMES: [&str; 12] =
    ["Oscar", "Louis", "Sofia", "Emma", "Anna", "Ben", "Max", "Tom", "Lucy", "Mia", "Leo", "Sam"];

/// What is hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Needle {
    /// The user's name: what the demo model was trained to remember.
    Name,
    /// A number of four digits: nothing can be guessed.
    Number,
}

/// A haystack as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The conversation, up to where the model answers.
    pub tokens: Vec<TokenId>,
    /// What an answer must contain.
    pub expected: String,
}

impl Prompt {
    /// Whether an answer has the needle as a word of its own.
    pub fn found_in(&self, answer: &str) -> bool {
        answer.split(|c: char| !c.is_alphanumeric()).any(|word| word.eq_ignore_ascii_case(&self.expected))
    }
}

/// Makes haystacks for one model.
pub struct Haystack {
    folder: PathBuf,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Haystack {
    /// With the tokenizer and the chat template of a checkpoint folder.
    ///
    /// # Errors
    /// There is none, or it cannot be used.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let template = ChatTemplate::open(folder)?
            .ok_or_else(|| anyhow!("--model {} has no chat template", folder.display()))?;
        Ok(Self { folder: folder.to_owned(), tokenizer: Tokenizer::open(folder)?, template })
    }

    /// As many turns as fit `length` tokens, with the needle after `depth` percent of them. The same arguments give the
    /// same prompt; another `sample` has other hay and another needle.
    ///
    /// # Errors
    /// Not even the needle and the question fit, or the template refuses the conversation.
    pub fn prompt(
        &self,
        needle: Needle,
        length: usize,
        depth: u32,
        seed: u64,
        sample: u32,
    ) -> anyhow::Result<Prompt> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(&sample.to_le_bytes());
        key[12..20].copy_from_slice(&(length as u64).to_le_bytes());
        let mut rng = StdRng::from_seed(key);
        let (expected, statement, reply, question) = match needle {
            Needle::Name => {
                let name = NAMES[rng.random_range(0..NAMES.len())].to_owned();
                let reply = format!("Nice to meet you, {name}! How can I help you?");
                (name.clone(), format!("My name is {name}."), reply, "What is my name?")
            }
            Needle::Number => {
                let number = rng.random_range(1000..10_000u32).to_string();
                let statement = format!("Please remember this: the secret number is {number}.");
                let reply = format!("I will remember that the secret number is {number}.");
                (number, statement, reply, "What is the secret number?")
            }
        };
        // More than fit: no turn has fewer tokens than one.
        let hay: Vec<(&str, &str)> = (0..length).map(|_| TURNS[rng.random_range(0..TURNS.len())]).collect();
        let conversation = |turns: usize| {
            let at = (turns * depth as usize + 50) / 100;
            let mut messages = Vec::with_capacity(2 * turns + 3);
            for (i, (user, assistant)) in hay[..turns].iter().enumerate() {
                if i == at {
                    push(&mut messages, &statement, &reply);
                }
                push(&mut messages, user, assistant);
            }
            if at >= turns {
                push(&mut messages, &statement, &reply);
            }
            messages.push(message("user", question));
            let text = self.template.render(&messages, false, true, &Map::new())?;
            anyhow::Ok(self.tokenizer.encode(&text)?)
        };
        let mut tokens = conversation(0)?;
        let folder = self.folder.display();
        let least = tokens.len();
        ensure!(
            least <= length,
            "--lengths {length}: needle and question alone take {least} tokens ({folder})"
        );
        // The largest number of turns that fits.
        let (mut fits, mut too_many) = (0, hay.len());
        while fits + 1 < too_many {
            let middle = fits + (too_many - fits) / 2;
            let longer = conversation(middle)?;
            if longer.len() <= length {
                (fits, tokens) = (middle, longer);
            } else {
                too_many = middle;
            }
        }
        Ok(Prompt { tokens, expected })
    }
}

fn push(messages: &mut Vec<ChatMessage>, user: &str, assistant: &str) {
    messages.push(message("user", user));
    messages.push(message("assistant", assistant));
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}
