//! Operators that treat each value by itself: SwiGLU's product, sums, rotation.

use super::disjoint::Disjoint;
use super::vector::{self, Operation, Vector};
use super::{Cpu, part, scratch};
use crate::{RopeRows, RopeTable};

/// Values of a task: some 5 µs.
const TASK_VALUES: usize = 16 * 1024;

impl Cpu {
    /// `out = silu(gate) · up`, element by element; `silu(g) = g / (1 + e^-g)`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "gate, up and output differ in length");
        let len = out.len();
        let out = Disjoint::new(out);
        self.divide(len.div_ceil(TASK_VALUES), len, &|task| {
            let range = part(task, TASK_VALUES, len);
            // SAFETY: tasks have different ranges.
            let out = unsafe { out.part(range.clone()) };
            vector::run(self.isa, SiluMul { gate: &gate[range.clone()], up: &up[range], out });
        });
    }

    /// Hands one row of [`Self::silu_mul`] to `then`.
    pub(crate) fn silu_mul_row(&self, gate: &[f32], up: &[f32], then: impl FnOnce(&[f32])) {
        scratch::with_f32(gate.len(), |out| {
            vector::run(self.isa, SiluMul { gate, up, out });
            then(out);
        });
    }

    /// `acc += x`, element by element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_in_place(&self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "sum and summand");
        let acc = Disjoint::new(acc);
        self.divide(x.len().div_ceil(TASK_VALUES), x.len(), &|task| {
            let range = part(task, TASK_VALUES, x.len());
            // SAFETY: tasks have different ranges.
            let acc = unsafe { acc.part(range.clone()) };
            for (acc, x) in acc.iter_mut().zip(&x[range]) {
                *acc += x;
            }
        });
    }

    /// `acc += weight · x`, element by element, product and sum rounded separately: one expert's vector into a token's
    /// sum.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_scaled(&self, acc: &mut [f32], weight: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "sum and summand");
        for (acc, x) in acc.iter_mut().zip(x) {
            *acc += weight * x;
        }
    }

    /// Rounds every value to the nearest bf16: what a value suffers that goes over the wire as bf16.
    pub fn round_to_bf16(&self, x: &mut [f32]) {
        let len = x.len();
        let x = Disjoint::new(x);
        // A value takes four times a copy.
        self.divide(len.div_ceil(TASK_VALUES), 4 * len, &|task| {
            // SAFETY: tasks have different ranges.
            vector::run(self.isa, RoundToBf16 { x: unsafe { x.part(part(task, TASK_VALUES, len)) } });
        });
    }

    /// `out[i] = from[index[i]]`, rows of `width` values.
    ///
    /// # Panics
    /// If the lengths do not fit or an index is past the rows.
    pub fn gather_rows(&self, from: &[f32], width: usize, index: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), index.len() * width, "gathered rows");
        let per_task = (TASK_VALUES / width.max(1)).max(1);
        let values = out.len();
        let out = Disjoint::new(out);
        self.divide(index.len().div_ceil(per_task), values, &|task| {
            for i in part(task, per_task, index.len()) {
                // SAFETY: tasks have different rows.
                let out = unsafe { out.part(i * width..(i + 1) * width) };
                out.copy_from_slice(&from[index[i] as usize * width..][..width]);
            }
        });
    }

    /// `out[m] += Σ_j weights[m, j] · vectors[m, j]`, vectors as wide as a row of `out`, `count` of them for each. The
    /// sum is taken first and in order, products and sums rounded separately: where and when a vector was computed cannot
    /// change it.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn add_weighted(&self, vectors: &[f32], weights: &[f32], count: usize, out: &mut [f32]) {
        if count == 0 || weights.is_empty() {
            return;
        }
        let rows = weights.len() / count;
        let width = out.len() / rows;
        assert!(weights.len() == rows * count && out.len() == rows * width, "weights and rows");
        assert_eq!(vectors.len(), count * out.len(), "vectors");
        let per_task = (TASK_VALUES / (width * count).max(1)).max(1);
        let out = Disjoint::new(out);
        self.divide(rows.div_ceil(per_task), vectors.len(), &|task| {
            for row in part(task, per_task, rows) {
                let vectors = &vectors[row * count * width..][..count * width];
                let weights = &weights[row * count..][..count];
                // SAFETY: tasks have different rows.
                let out = unsafe { out.part(row * width..(row + 1) * width) };
                vector::run(self.isa, AddWeighted { vectors, weights, out });
            }
        });
    }

    /// Rotates pairs `(x[2i], x[2i+1])` in place; they stay interleaved. `x` holds
    /// `positions.len() * rows.per_position` rows of `rows.stride` values.
    ///
    /// # Panics
    /// If `x` has another length, a row is too narrow, or a position is past the table.
    pub fn rope_interleaved(&self, x: &mut [f32], rows: RopeRows, positions: &[u32], table: &RopeTable) {
        let width = 2 * table.pairs();
        let position_values = rows.per_position * rows.stride;
        assert_eq!(x.len(), positions.len() * position_values, "rows to rotate");
        assert!(rows.offset + width <= rows.stride, "rotated values past their row");
        if x.is_empty() {
            return;
        }
        let per_task = (TASK_VALUES / position_values).max(1);
        let values = x.len();
        let x = Disjoint::new(x);
        self.divide(positions.len().div_ceil(per_task), values, &|task| {
            let range = part(task, per_task, positions.len());
            // SAFETY: tasks have different positions.
            let x = unsafe { x.part(range.start * position_values..range.end * position_values) };
            for (x, &position) in x.chunks_exact_mut(position_values).zip(&positions[range]) {
                let angles = table.at(position).as_chunks::<2>().0;
                for row in x.chunks_exact_mut(rows.stride) {
                    let pairs = row[rows.offset..][..width].as_chunks_mut::<2>().0;
                    for ([a, b], &[cos, sin]) in pairs.iter_mut().zip(angles) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
            }
        });
    }
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Operation for SiluMul<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.out.len();
        let mut i = 0;
        while i < len {
            // SAFETY: the machine has the instruction set; `len - i` values are left in all three slices.
            unsafe {
                let gate = V::load_partial(self.gate.as_ptr().add(i), len - i);
                let up = V::load_partial(self.up.as_ptr().add(i), len - i);
                let one = V::splat(1.0);
                let silu = gate.div(one.add(V::splat(0.0).sub(gate).exp()));
                silu.mul(up).store_partial(self.out.as_mut_ptr().add(i), len - i);
            }
            i += V::LANES;
        }
    }
}

struct AddWeighted<'a> {
    vectors: &'a [f32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Operation for AddWeighted<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.out.len();
        let mut i = 0;
        while i < len {
            // SAFETY: the machine has the instruction set; `len - i` values are left in each vector and the output.
            unsafe {
                let at = self.vectors.as_ptr().add(i);
                let mut sum = V::load_partial(at, len - i).mul(V::splat(self.weights[0]));
                let mut j = 1;
                while j < self.weights.len() {
                    let vector = V::load_partial(at.add(j * len), len - i);
                    sum = sum.add(vector.mul(V::splat(self.weights[j])));
                    j += 1;
                }
                let out = self.out.as_mut_ptr().add(i);
                V::load_partial(out, len - i).add(sum).store_partial(out, len - i);
            }
            i += V::LANES;
        }
    }
}

struct RoundToBf16<'a> {
    x: &'a mut [f32],
}

impl Operation for RoundToBf16<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.x.len();
        let mut bits = [0u8; 2 * vector::LANES_MAX];
        let mut i = 0;
        while i < len {
            // SAFETY: the machine has the instruction set; `len - i` values are left; room for any vector in `bits`.
            unsafe {
                let x = self.x.as_mut_ptr().add(i);
                V::load_partial(x, len - i).store_bf16(bits.as_mut_ptr());
                V::load_bf16(bits.as_ptr()).store_partial(x, len - i);
            }
            i += V::LANES;
        }
    }
}
