//! What a step and a hand-off take: linear in what they do, with constants that are measured elsewhere.

use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

/// A forward step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepTime {
    /// Microseconds of any step.
    pub step_us: f64,
    /// Microseconds of each row.
    pub row_us: f64,
    /// Nanoseconds of each row and token of its context.
    pub context_ns: f64,
}

/// A hand-off, from the last row computed to the sequence being ready.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HandoffTime {
    /// Microseconds of any hand-off.
    pub handoff_us: f64,
    /// Microseconds of each block.
    pub block_us: f64,
}

impl StepTime {
    /// For so many rows, with contexts of so many tokens summed over the rows.
    pub fn of(&self, rows: usize, context: usize) -> Duration {
        us(self.step_us + self.row_us * rows as f64 + self.context_ns * context as f64 / 1e3)
    }
}

impl HandoffTime {
    /// For so many blocks.
    pub fn of(&self, blocks: usize) -> Duration {
        us(self.handoff_us + self.block_us * blocks as f64)
    }
}

impl FromStr for StepTime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let [step_us, row_us, context_ns] = numbers(text)?;
        // A step of no time at all would repeat for ever at one moment.
        if step_us + row_us <= 0.0 {
            return Err("a step takes time".to_owned());
        }
        Ok(Self { step_us, row_us, context_ns })
    }
}

impl FromStr for HandoffTime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let [handoff_us, block_us] = numbers(text)?;
        Ok(Self { handoff_us, block_us })
    }
}

fn numbers<const N: usize>(text: &str) -> Result<[f64; N], String> {
    let expected = || format!("expected {N} numbers from 0 to 1e9 with commas between them");
    let numbers: Result<Vec<f64>, _> = text.split(',').map(|number| number.trim().parse()).collect();
    let numbers: [f64; N] = numbers.map_err(|_| expected())?.try_into().map_err(|_| expected())?;
    if numbers.iter().all(|number| (0.0..=1e9).contains(number)) { Ok(numbers) } else { Err(expected()) }
}

fn us(us: f64) -> Duration {
    Duration::from_secs_f64(us / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_linear_and_their_flags_are_checked() {
        let step: StepTime = "100, 10,5".parse().expect("three numbers");
        assert_eq!(step.of(2, 1000), Duration::from_micros(125));
        let handoff: HandoffTime = "7,3".parse().expect("two numbers");
        assert_eq!(handoff.of(4), Duration::from_micros(19));
        for flag in ["", "1,2", "1,2,3,4", "1,2,-3", "1,2,x", "0,0,1", "NaN,1,1"] {
            assert!(flag.parse::<StepTime>().is_err(), "{flag}");
        }
    }
}
