//! RMS norm.

use super::disjoint::Disjoint;
use super::vector::{self, Operation, Vector};
use super::{Cpu, part};

/// Values of a task: some 5 µs.
const TASK_VALUES: usize = 16 * 1024;

impl Cpu {
    /// `y = x / sqrt(mean(x²) + eps) · w` for rows of `w.len()` values.
    ///
    /// # Panics
    /// If `x` and `y` differ in length or are no whole number of rows.
    pub fn rms_norm(&self, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let dim = w.len();
        assert_eq!(x.len(), y.len(), "rows in and out");
        if x.is_empty() {
            return;
        }
        assert!(dim > 0 && x.len().is_multiple_of(dim), "{} values in rows of {dim}", x.len());
        let rows = x.len() / dim;
        let rows_per_task = (TASK_VALUES / dim).max(1);
        let out = Disjoint::new(y);
        self.divide(rows.div_ceil(rows_per_task), x.len(), &|task| {
            let rows = part(task, rows_per_task, rows);
            let range = rows.start * dim..rows.end * dim;
            // SAFETY: tasks have different rows.
            let y = unsafe { out.part(range.clone()) };
            vector::run(self.isa, RmsNorm { x: &x[range], w, eps, y });
        });
    }
}

struct RmsNorm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Operation for RmsNorm<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let dim = self.w.len();
        let mut start = 0;
        while start < self.x.len() {
            // SAFETY: the machine has the instruction set; whole rows of `dim` values in all three slices.
            unsafe {
                row::<V>(
                    self.x.as_ptr().add(start),
                    self.w.as_ptr(),
                    dim,
                    self.eps,
                    self.y.as_mut_ptr().add(start),
                );
            }
            start += dim;
        }
    }
}

#[inline(always)]
unsafe fn row<V: Vector>(x: *const f32, w: *const f32, dim: usize, eps: f32, y: *mut f32) {
    // SAFETY: `dim` values behind each pointer; partial loads and stores stay within them.
    unsafe {
        // Four sums, vector i into sum i mod 4: hides the latency of the addition.
        let mut sums = [V::splat(0.0); 4];
        let mut i = 0;
        while i < dim {
            let mut lane = 0;
            while lane < 4 && i < dim {
                let x = V::load_partial(x.add(i), dim - i);
                sums[lane] = x.mul_add(x, sums[lane]);
                i += V::LANES;
                lane += 1;
            }
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        let factor = V::splat(1.0 / (sum / dim as f32 + eps).sqrt());
        i = 0;
        while i < dim {
            let value = V::load_partial(x.add(i), dim - i).mul(factor);
            value.mul(V::load_partial(w.add(i), dim - i)).store_partial(y.add(i), dim - i);
            i += V::LANES;
        }
    }
}
