//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//!
//! A draw is a pure function of (seed, choice, position). No state advances, so the token drawn at a position is the
//! same whichever worker draws it, however often, and whatever was drawn before.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Weyl increments of the key: the golden ratio and sqrt(3) - 1, as the paper has them.
const KEY_INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One block of 128 random bits.
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let left = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
        key = [key[0].wrapping_add(KEY_INCREMENTS[0]), key[1].wrapping_add(KEY_INCREMENTS[1])];
    }
    counter
}

/// A uniform number in `[0, 1)` for the token at `position` of the `choice`-th completion of a request.
///
/// 53 bits: one draw resolves every probability that an f64 sum over the vocabulary can hold.
pub(crate) fn uniform(seed: u64, choice: u32, position: u64) -> f64 {
    let counter = [position as u32, (position >> 32) as u32, choice, 0];
    let bits = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
    let mantissa = ((u64::from(bits[0]) << 32) | u64::from(bits[1])) >> 11;
    mantissa as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests;
