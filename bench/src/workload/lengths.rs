//! Published distributions of prompt and answer lengths, as quantiles: a load like production's without its traces.
//!
//! Taken from all rows of the files that [`super::Trace`] reads:
//! `azure-conv` and `azure-code` from AzurePublicDataset's `AzureLLMInferenceTrace_{conv,code}.csv` of 2023 (CC-BY-4.0;
//! Patel et al., "Splitwise", ISCA 2024), 19,366 and 8,819 requests; `mooncake` from kvcache-ai/Mooncake's
//! `FAST25-release/traces/conversation_trace.jsonl` (Apache-2.0; Qin et al., "Mooncake", FAST 2025), 12,031 requests.

use serde::Serialize;

/// The shares of requests that the rows of a table are for.
const SHARES: [f64; 16] =
    [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0];

/// A published distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Published {
    /// Azure 2023, conversation.
    AzureConv,
    /// Azure 2023, code completion.
    AzureCode,
    /// Mooncake, conversation.
    Mooncake,
}

/// Tokens at each of [`SHARES`].
#[derive(Debug, Clone, Copy)]
pub struct Quantiles(&'static [u32; SHARES.len()]);

impl Published {
    /// Tokens of prompts.
    pub fn input(self) -> Quantiles {
        Quantiles(match self {
            Self::AzureConv => {
                &[2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2735, 4083, 4142, 6212, 14_050]
            }
            Self::AzureCode => {
                &[3, 17, 75, 147, 386, 770, 1075, 1469, 1909, 2433, 3192, 5186, 7302, 7436, 7437, 7437]
            }
            Self::Mooncake => &[
                891, 894, 901, 964, 1662, 3263, 4993, 6909, 9570, 13_196, 17_869, 27_367, 39_552, 85_401,
                121_301, 126_195,
            ],
        })
    }

    /// Tokens of answers.
    pub fn output(self) -> Quantiles {
        Quantiles(match self {
            Self::AzureConv => &[7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 954, 1000],
            Self::AzureCode => &[6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 252, 824, 1899],
            Self::Mooncake => &[1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 1120, 2000, 2000],
        })
    }
}

impl Quantiles {
    /// The length that `share` (0 to 1) of the requests do not exceed; geometric between the rows, whose
    /// tails are long.
    pub fn at(self, share: f64) -> f64 {
        let above = SHARES.iter().position(|&row| share < row).unwrap_or(SHARES.len() - 1).max(1);
        let (low, high) = (SHARES[above - 1], SHARES[above]);
        let (from, to) = (f64::from(self.0[above - 1]), f64::from(self.0[above]));
        from * (to / from).powf(((share - low) / (high - low)).clamp(0.0, 1.0))
    }

    /// The longest.
    pub fn longest(self) -> u32 {
        self.0[SHARES.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Published; 3] = [Published::AzureConv, Published::AzureCode, Published::Mooncake];

    #[test]
    fn quantiles_are_met_at_their_rows_and_grow_between() {
        for published in ALL {
            for table in [published.input(), published.output()] {
                for (share, tokens) in SHARES.into_iter().zip(table.0) {
                    assert_eq!(table.at(share).round() as u32, *tokens, "{published:?} at {share}");
                }
                let values: Vec<f64> = (0..=1000).map(|i| table.at(f64::from(i) / 1e3)).collect();
                assert!(values.is_sorted(), "{published:?}");
            }
        }
    }

    /// Sixteen quantiles and what lies between them keep the mean that the files have.
    #[test]
    fn means_are_those_of_the_traces() {
        let mean =
            |table: Quantiles| (0..100_000).map(|i| table.at((f64::from(i) + 0.5) / 1e5)).sum::<f64>() / 1e5;
        for (published, input, output) in [
            (Published::AzureConv, 1154.7, 211.1),
            (Published::AzureCode, 2047.8, 27.9),
            (Published::Mooncake, 12_035.1, 342.6),
        ] {
            for (found, expected) in [(mean(published.input()), input), (mean(published.output()), output)] {
                assert!(
                    (found / expected - 1.0).abs() < 0.08,
                    "{published:?}: {found}, the trace has {expected}"
                );
            }
        }
    }
}
