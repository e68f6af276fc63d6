//! Drawing a token by the Gumbel-max rule: of `logit / temperature + noise(token)` the largest.
//!
//! The noise of a token is a function of (seed, choice, position, token): no state advances, and no token's noise depends on
//! another token, on what was cut off the distribution, or on how it is ordered. Two distributions that are nearly equal
//! therefore nearly always give the same token, which is what drafts live from.
//!
//! Random words come from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). They become noise
//! in plain f32 operations, each rounded on its own: the same bits in every instruction set, and wherever else these operations
//! are done in this order. Deliberately not here: which tokens may be drawn at all.

use super::Isa;
use super::vector::{self, Operation, Vector};

/// Tokens whose words come of one call: four words of each of [`LANES`] counters.
const BLOCK: usize = 4 * LANES;
/// Counters side by side: a vector of the widest instruction set.
const LANES: usize = 16;

/// No noise is as large: that of the smallest word is `33 ln 2`.
const NOISE_MAX: f32 = 23.0;

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Weyl increments of the key: the golden ratio and sqrt(3) - 1, as the paper has them.
const KEY_INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// What the noise of a draw follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GumbelKey {
    /// Of the request.
    pub seed: u64,
    /// Which of the request's completions.
    pub choice: u32,
    /// Of the token that is drawn.
    pub position: u64,
}

/// Tokens of a [`Isa::gumbel_noise`] call.
pub const GUMBEL_TOKENS: usize = LANES;

impl Isa {
    /// The index of the largest `(x[i] - peak) / temperature + noise(i)`, the lowest among equals; of a value that is no
    /// number never. `first` is taken where nothing exceeds it, and must be finite; `peak` is no less than any value. The
    /// instruction set must be [`Self::available`].
    pub fn gumbel_argmax(
        self,
        x: &[f32],
        first: usize,
        peak: f32,
        temperature: f32,
        key: GumbelKey,
    ) -> usize {
        let noise = self.gumbel_noise(key, &[first as u32; LANES])[0];
        let mut best = Best { index: first, score: score(x[first], peak, temperature) + noise };
        vector::run(self, Argmax { x, peak, temperature, key, best: &mut best });
        best.index
    }

    /// Each token's noise. The instruction set must be [`Self::available`].
    pub fn gumbel_noise(self, key: GumbelKey, tokens: &[u32; GUMBEL_TOKENS]) -> [f32; GUMBEL_TOKENS] {
        let mut out = [0.0; LANES];
        vector::run(self, Noise { key, tokens, out: &mut out });
        out
    }
}

/// Philox4x32-10: 128 random bits.
#[inline(always)]
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < ROUNDS {
        let left = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let right = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
        key = [key[0].wrapping_add(KEY_INCREMENTS[0]), key[1].wrapping_add(KEY_INCREMENTS[1])];
        round += 1;
    }
    counter
}

/// The four words of a counter. Token `t` has word `t / 16 % 4` of counter `16 (t / 64) + t % 16`, so that 64 tokens' words
/// are the words of 16 counters side by side.
#[inline(always)]
fn words(key: GumbelKey, counter: u32) -> [u32; 4] {
    let GumbelKey { seed, choice, position } = key;
    let counter = [counter, position as u32, (position >> 32) as u32, choice];
    philox4x32(counter, [seed as u32, (seed >> 32) as u32])
}

/// A word as Gumbel noise: `-ln(-ln(1 - v))` with `v` the word over 2³².
///
/// The large values, of which draws are made, come of small words, where `v` is exact to 2⁻³³: 1 - v would be exact to 2⁻²⁴ only.
#[inline(always)]
fn gumbel(word: u32) -> f32 {
    let v = (word as f32 + 0.5) * (1.0 / 4_294_967_296.0);
    let v = if v < 1.0 - f32::EPSILON / 2.0 { v } else { 1.0 - f32::EPSILON / 2.0 };
    // Kahan's way to ln(1 - v): the quotient makes good what 1 - v was rounded by. Where that is 1 it is no number, and v exact.
    let rest = 1.0 - v;
    let exponential = -ln(rest) * (v / (1.0 - rest));
    -ln(if exponential > v { exponential } else { v })
}

/// The natural logarithm of a positive normal number, within 2 ulp (the polynomial is Cephes'; no operation is fused).
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // x = m · 2ⁿ with m between the square roots of 1/2 and 2.
    let n = (bits.wrapping_sub(0x3F35_04F3) as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub((n << 23) as u32)) - 1.0;
    let (n, z) = (n as f32, f * f);
    let mut sum = 7.037_683_6e-2;
    sum = sum * f - 1.151_461e-1;
    sum = sum * f + 1.167_699_9e-1;
    sum = sum * f - 1.242_014_1e-1;
    sum = sum * f + 1.424_932_3e-1;
    sum = sum * f - 1.666_805_7e-1;
    sum = sum * f + 2.000_071_5e-1;
    sum = sum * f - 2.499_999_4e-1;
    sum = sum * f + 3.333_333e-1;
    let mut ln = sum * f * z;
    ln += n * -2.121_944_4e-4;
    ln -= 0.5 * z;
    (f + ln) + n * 0.693_359_4
}

#[inline(always)]
fn score(x: f32, peak: f32, temperature: f32) -> f32 {
    (x - peak) / temperature
}

struct Noise<'a> {
    key: GumbelKey,
    tokens: &'a [u32; LANES],
    out: &'a mut [f32; LANES],
}

// Plain loops over arrays, which the compiler makes vectors of: the arithmetic is in no instruction set's hands.
impl Operation for Noise<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let mut i = 0;
        while i < LANES {
            let token = self.tokens[i];
            let words = words(self.key, token / BLOCK as u32 * LANES as u32 + token % LANES as u32);
            self.out[i] = gumbel(words[(token as usize / LANES) % 4]);
            i += 1;
        }
    }
}

struct Best {
    index: usize,
    score: f32,
}

struct Argmax<'a> {
    x: &'a [f32],
    peak: f32,
    temperature: f32,
    key: GumbelKey,
    best: &'a mut Best,
}

impl Operation for Argmax<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { x, peak, temperature, key, best } = self;
        let mut start = 0;
        while start < x.len() {
            // Past the end nothing can win.
            let mut scores = [f32::NEG_INFINITY; BLOCK];
            let count = if x.len() - start < BLOCK { x.len() - start } else { BLOCK };
            scores[..count].copy_from_slice(&x[start..start + count]);
            let mut top = f32::NEG_INFINITY;
            let mut i = 0;
            while i < BLOCK {
                scores[i] = score(scores[i], peak, temperature);
                top = if scores[i] > top { scores[i] } else { top };
                i += 1;
            }
            // What a token of this block needs to win. Most blocks' best could not with any noise.
            let needed = best.score - top;
            if needed < NOISE_MAX {
                consider(key, start, &scores, needed, best);
            }
            start += BLOCK;
        }
    }
}

/// Looks at the 64 tokens from `start` on, the best of which needs noise of `needed` to win.
#[inline(always)]
fn consider(key: GumbelKey, start: usize, scores: &[f32; BLOCK], needed: f32, best: &mut Best) {
    let mut random = [0u32; BLOCK];
    let mut least = u32::MAX;
    let mut i = 0;
    while i < LANES {
        let words = words(key, (start / 4 + i) as u32);
        random[i] = words[0];
        random[LANES + i] = words[1];
        random[2 * LANES + i] = words[2];
        random[3 * LANES + i] = words[3];
        i += 1;
    }
    i = 0;
    while i < BLOCK {
        least = if random[i] < least { random[i] } else { least };
        i += 1;
    }
    // Noise is at most -ln(v): logarithms are only taken where the least word may be enough.
    if f64::from(least) > (-f64::from(needed)).exp() * 1.001 * 4_294_967_296.0 {
        return;
    }
    let mut sums = [0.0f32; BLOCK];
    i = 0;
    while i < BLOCK {
        sums[i] = scores[i] + gumbel(random[i]);
        i += 1;
    }
    i = 0;
    while i < BLOCK {
        let index = start + i;
        // Of equals the lowest, the one that was known first included.
        if sums[i] > best.score || sums[i] == best.score && index < best.index {
            *best = Best { index, score: sums[i] };
        }
        i += 1;
    }
}

#[cfg(test)]
mod tests;
