//! How many tokens of a prompt are likely to be computed, before it is tokenised and placed: what the prompts of late were
//! like. A guess that is wrong moves the expected TTFT of a request that waits; what is placed is counted exactly.

/// Weight of the newest prompt: follows a change of what is asked within some thirty requests.
const WEIGHT: f64 = 1.0 / 32.0;
/// Before any prompt was seen: English and code have three to four bytes a token.
const TOKENS_PER_BYTE: f64 = 0.3;

/// What prompts of late were like.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    tokens_per_byte: f64,
    /// Share of a prompt's tokens that no worker was thought to hold.
    computed: f64,
}

impl Default for Estimate {
    fn default() -> Self {
        Self { tokens_per_byte: TOKENS_PER_BYTE, computed: 1.0 }
    }
}

impl Estimate {
    /// Tokens that are likely to be computed of a prompt of so many bytes of text and tokens.
    pub fn computed(&self, bytes: usize, tokens: usize) -> u64 {
        ((bytes as f64 * self.tokens_per_byte + tokens as f64) * self.computed) as u64
    }

    /// A text of `bytes` became `tokens`.
    pub fn observe_text(&mut self, bytes: usize, tokens: usize) {
        if bytes > 0 {
            self.tokens_per_byte += (tokens as f64 / bytes as f64 - self.tokens_per_byte) * WEIGHT;
        }
    }

    /// Of a prompt of `tokens`, `computed` were thought to be nowhere.
    pub fn observe_placed(&mut self, tokens: u64, computed: u64) {
        if tokens > 0 {
            self.computed += (computed.min(tokens) as f64 / tokens as f64 - self.computed) * WEIGHT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_from_what_is_asked() {
        let mut estimate = Estimate::default();
        assert_eq!(estimate.computed(0, 700), 700, "token ids are counted");
        assert_eq!(estimate.computed(1000, 0), 300);
        for _ in 0..200 {
            estimate.observe_text(1000, 500);
            estimate.observe_placed(1000, 100);
        }
        assert!((49..=51).contains(&estimate.computed(1000, 0)), "{estimate:?}");
        assert!((99..=101).contains(&estimate.computed(0, 1000)), "{estimate:?}");
    }
}
