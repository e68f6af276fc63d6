//! Operators that treat each value by itself: SwiGLU's product, sums, rotation.

use super::disjoint::Disjoint;
use super::vector::{self, Operation, Vector};
use super::{Cpu, part};
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
        vector::run(self.isa, RoundToBf16 { x });
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
