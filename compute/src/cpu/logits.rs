//! A row of logits on its way to a token: the largest, and the softmax's weights. On one thread: a vocabulary takes some
//! microseconds.
//!
//! NaN counts as minus infinity, and minus infinity weighs nothing.

use super::Isa;
use super::vector::{self, LANES_MAX, Operation, Vector};

/// Values of a [`WeightBlock`].
pub const WEIGHT_BLOCK: usize = 64;

/// Logits that are looked at together for the largest.
const MAX_BLOCK: usize = 512;

/// Below this an exponential is no normal f32, and counts as zero.
const EXP_MIN: f32 = -87.0;

/// What 64 neighbouring weights come to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WeightBlock {
    /// Their sum, added up in a fixed order.
    pub sum: f32,
    /// The largest of them.
    pub max: f32,
}

impl Isa {
    /// Index of the largest value, the lowest among equals; 0 if there is none. The instruction set must be
    /// [`Self::available`].
    pub fn argmax(self, x: &[f32]) -> usize {
        let (mut best, mut first) = (f32::NEG_INFINITY, None);
        for (block, values) in x.chunks(MAX_BLOCK).enumerate() {
            let mut largest = f32::NEG_INFINITY;
            vector::run(self, Largest { values, largest: &mut largest });
            if largest > best {
                (best, first) = (largest, Some(block * MAX_BLOCK));
            }
        }
        let index = |start: usize| x[start..].iter().position(|&value| value == best).map(|i| start + i);
        first.and_then(index).unwrap_or(0)
    }

    /// `Σ exp(x - peak)`, blocks of 64 summed in f32 and added up in f64. The instruction set must be
    /// [`Self::available`].
    pub fn sum_exp(self, x: &[f32], peak: f32) -> f64 {
        let mut total = 0.0;
        vector::run(self, SumExp { x, peak, total: &mut total });
        total
    }

    /// `weights[i] = exp((x[i] - peak) / temperature)`, and what each [`WEIGHT_BLOCK`] of them comes to. The instruction
    /// set must be [`Self::available`].
    pub fn softmax_weights(
        self,
        x: &[f32],
        peak: f32,
        temperature: f32,
        weights: &mut Vec<f32>,
        blocks: &mut Vec<WeightBlock>,
    ) {
        weights.resize(x.len(), 0.0);
        blocks.resize(x.len().div_ceil(WEIGHT_BLOCK), WeightBlock::default());
        vector::run(self, Weights { x, peak, temperature, weights, blocks });
    }
}

struct Largest<'a> {
    values: &'a [f32],
    largest: &'a mut f32,
}

impl Operation for Largest<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.values.len();
        // SAFETY: the machine has the instruction set; whole vectors inside the slice.
        unsafe {
            let mut largest = V::splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i + V::LANES <= len {
                largest = V::load(self.values.as_ptr().add(i)).max(largest);
                i += V::LANES;
            }
            *self.largest = largest.largest();
            while i < len {
                let value = *self.values.as_ptr().add(i);
                *self.largest = if value > *self.largest { value } else { *self.largest };
                i += 1;
            }
        }
    }
}

/// `exp(x)`, zero where that is no normal f32 and for NaN.
///
/// # Safety
/// The machine has `V`'s instruction set.
#[inline(always)]
unsafe fn weight<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // NaN loses against the bound, and infinite distances become finite ones.
        let x = x.max(V::splat(2.0 * EXP_MIN));
        // One above the bound, zero at it and below.
        let counts = x.sub(V::splat(EXP_MIN)).mul(V::splat(f32::MAX / 512.0));
        x.exp().mul(V::splat(1.0).min(counts.max(V::splat(0.0))))
    }
}

/// The first `count` of the values at `at`, less `peak`; minus infinity after them.
///
/// # Safety
/// The machine has `V`'s instruction set; so many values are there.
#[inline(always)]
unsafe fn below_peak<V: Vector>(at: *const f32, count: usize, peak: V) -> V {
    // SAFETY: the caller's promise; room for any vector.
    unsafe {
        if count >= V::LANES {
            return V::load(at).sub(peak);
        }
        let mut lanes = [f32::NEG_INFINITY; LANES_MAX];
        std::ptr::copy_nonoverlapping(at, lanes.as_mut_ptr(), count);
        V::load(lanes.as_ptr()).sub(peak)
    }
}

struct SumExp<'a> {
    x: &'a [f32],
    peak: f32,
    total: &'a mut f64,
}

impl Operation for SumExp<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.x.len();
        // SAFETY: the machine has the instruction set; `len - i` values are left.
        unsafe {
            let peak = V::splat(self.peak);
            let mut i = 0;
            while i < len {
                let end = len.min(i + WEIGHT_BLOCK);
                let mut sum = V::splat(0.0);
                while i < end {
                    sum = sum.add(weight(below_peak(self.x.as_ptr().add(i), end - i, peak)));
                    i += V::LANES;
                }
                *self.total += f64::from(sum.sum());
                i = end;
            }
        }
    }
}

struct Weights<'a> {
    x: &'a [f32],
    peak: f32,
    temperature: f32,
    weights: &'a mut [f32],
    blocks: &'a mut [WeightBlock],
}

impl Operation for Weights<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.x.len();
        // SAFETY: the machine has the instruction set; `len - i` values are left in both slices.
        unsafe {
            let (peak, temperature) = (V::splat(self.peak), V::splat(self.temperature));
            let mut i = 0;
            while i < len {
                let end = len.min(i + WEIGHT_BLOCK);
                let block = i / WEIGHT_BLOCK;
                let (mut sum, mut max) = (V::splat(0.0), V::splat(0.0));
                while i < end {
                    let weight = weight(below_peak(self.x.as_ptr().add(i), end - i, peak).div(temperature));
                    weight.store_partial(self.weights.as_mut_ptr().add(i), end - i);
                    sum = sum.add(weight);
                    max = weight.max(max);
                    i += V::LANES;
                }
                self.blocks[block] = WeightBlock { sum: sum.sum(), max: max.largest() };
                i = end;
            }
        }
    }
}

#[cfg(test)]
mod tests;
