//! Matrix products: what is multiplied, and how the work is divided.
//!
//! An output element `(m, n)` is a sum over 128-blocks of K in order. A block's sum is built in the vector lanes of the
//! instruction set, scaled (FP8), and added to the element's own lanes; the lanes are added up once, at the end, in a
//! fixed tree. Neither the tile an element falls into nor the division of work among threads changes a single one of
//! these operations. Kernels pad: columns past K are multiplied as zeros, and a partial tile computes a row twice and
//! stores it once.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;

use std::ops::Range;

use super::disjoint::Disjoint;
use super::{Cpu, Isa, part};
use crate::fp8::BLOCK;
use crate::matrix::{HeadStorage, Storage};
use crate::{ActivationFormat, Activations, HeadMatrices, Matrix};

/// Outputs of a task: 32 rows of 7,168 FP8 weights take some 10 µs from memory, enough to hide the hand-out; and a
/// multiple of every kernel's tile, dividing 128, so that a tile lies within one scale block.
const TASK_OUTPUTS: usize = 32;

/// Rows of a task: 96 rows times 1,024 channels of bf16 stay in a 1 MB level-2 cache next to the task's sums.
const TASK_ROWS: usize = 96;

/// How far ahead of its use a weight is asked for, at least: what memory delivers in some 300 ns. Into the level-2 cache;
/// four short rows at a time are no stream that the hardware recognises, and it triples what a thread reads per second.
const PREFETCH_BYTES: usize = 8192;

/// Weights `[n, k]`, row-major.
#[derive(Clone, Copy)]
enum Weights<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u8]),
    Fp8 { codes: &'a [u8], scales: &'a [f32] },
}

/// Input rows of `k` values, `x_stride` values apart.
#[derive(Clone, Copy)]
enum Inputs<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    Fp8 { values: &'a [u16], scales: &'a [f32] },
}

/// One product `y[m, n] = Σ_k x[row(m), k] · w[n, k]`.
#[derive(Clone, Copy)]
struct Product<'a> {
    weights: Weights<'a>,
    n: usize,
    k: usize,
    x: Inputs<'a>,
    x_stride: usize,
    /// Which input row each output row takes; all of them in order if absent.
    rows: Option<&'a [u32]>,
    y: Output<'a>,
}

impl Product<'_> {
    fn input_row(&self, m: usize) -> usize {
        self.rows.map_or(m, |rows| rows[m] as usize)
    }

    fn k_blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Block scales of weight row `n`, one per K block; for formats without scales, none.
    fn weight_scales(&self, n: usize) -> &[f32] {
        match self.weights {
            Weights::Fp8 { scales, .. } => &scales[n / BLOCK * self.k_blocks()..][..self.k_blocks()],
            _ => &[],
        }
    }

    /// Block scales of output row `m`'s input, one per K block; for formats without scales, none.
    fn input_scales(&self, m: usize) -> &[f32] {
        match self.x {
            Inputs::Fp8 { scales, .. } => &scales[self.input_row(m) * self.k_blocks()..][..self.k_blocks()],
            _ => &[],
        }
    }
}

/// The output, `stride` values from row to row; column 0 of the product is its column `first`.
#[derive(Clone, Copy)]
struct Output<'a> {
    values: Disjoint<'a, f32>,
    stride: usize,
    first: usize,
}

impl Output<'_> {
    /// Stores outputs `n..n + values.len()` of row `m`.
    ///
    /// # Safety
    /// No two threads write the same element.
    #[inline]
    unsafe fn write(&self, m: usize, n: usize, values: &[f32]) {
        let at = m * self.stride + self.first + n;
        // SAFETY: the caller's promise.
        unsafe { self.values.part(at..at + values.len()) }.copy_from_slice(values);
    }
}

impl Cpu {
    /// `y[m, n] = Σ_k x[m, k] · w[n, k]`: any weights with f32 activations, else weights and activations of the same
    /// format. K is summed in 128-blocks in order; an FP8 block's sum is scaled by `s_x · s_w` before it is added.
    ///
    /// # Panics
    /// If the formats do not go together or a length does not fit.
    pub fn linear(&self, w: &Matrix, x: &Activations, y: &mut [f32]) {
        self.matrix_product(w, x, None, x.rows(), y);
    }

    /// As [`Self::linear`] for the rows `row_index` of `x`: row `i` of `y` `[row_index.len(), n]` has the bits that
    /// `linear` gives row `row_index[i]`.
    ///
    /// # Panics
    /// As [`Self::linear`], and if an index is past the rows.
    pub fn linear_rows(&self, w: &Matrix, x: &Activations, row_index: &[u32], y: &mut [f32]) {
        assert!(row_index.iter().all(|&row| (row as usize) < x.rows()), "row index past {} rows", x.rows());
        self.matrix_product(w, x, Some(row_index), row_index.len(), y);
    }

    fn matrix_product(&self, w: &Matrix, x: &Activations, rows: Option<&[u32]>, m: usize, y: &mut [f32]) {
        let (n, k) = (w.rows(), w.cols());
        assert_eq!(x.channels(), k, "activations of another width than the matrix");
        assert_eq!(y.len(), m * n, "output [{m}, {n}]");
        let weights = match &w.storage {
            Storage::F32(weights) => Weights::F32(weights),
            Storage::Bf16(weights) => Weights::Bf16(weights),
            Storage::Fp8 { codes, scales } => Weights::Fp8 { codes, scales },
        };
        let inputs = match (x.format(), weights) {
            (ActivationFormat::F32, _) => Inputs::F32(&x.f32),
            (ActivationFormat::Bf16, Weights::Bf16(_)) => Inputs::Bf16(&x.bf16),
            (ActivationFormat::Fp8(_), Weights::Fp8 { .. }) => {
                Inputs::Fp8 { values: &x.bf16, scales: &x.scales }
            }
            (format, _) => panic!("{format:?} activations do not go with {:?} weights", w.format()),
        };
        let y = Output { values: Disjoint::new(y), stride: n, first: 0 };
        let product = Product { weights, n, k, x: inputs, x_stride: x.stride(), rows, y };
        let (row_chunks, groups) = (m.div_ceil(TASK_ROWS), n.div_ceil(TASK_OUTPUTS));
        let task = |task: usize| {
            // Row chunks vary fastest: threads that work at the same time then share the weights' cache lines.
            let rows = part(task % row_chunks, TASK_ROWS, m);
            let outputs = part(task / row_chunks, TASK_OUTPUTS, n);
            // SAFETY: parts of different tasks are disjoint, and rows were checked against `x`.
            unsafe { compute(self.isa, &product, rows, outputs) }
        };
        self.divide(row_chunks * groups, m * n * k, &task);
    }

    /// `y[m, h, o] = Σ_i x[m, h, i] · w[h, o, i]` in f32: `m` rows of one vector per head.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn head_matmul(&self, w: &HeadMatrices, x: &[f32], m: usize, y: &mut [f32]) {
        let (heads, n, k) = (w.heads(), w.out_dim(), w.in_dim());
        assert_eq!(x.len(), m * heads * k, "input [{m}, {heads}, {k}]");
        assert_eq!(y.len(), m * heads * n, "output [{m}, {heads}, {n}]");
        let values = Disjoint::new(y);
        let (row_chunks, groups) = (m.div_ceil(TASK_ROWS), n.div_ceil(TASK_OUTPUTS));
        let task = |task: usize| {
            let (rows, outputs) = (task % row_chunks, task / row_chunks % groups);
            let head = task / row_chunks / groups;
            let weights = match &w.storage {
                HeadStorage::F32(weights) => Weights::F32(&weights[head * n * k..][..n * k]),
                HeadStorage::Bf16(weights) => Weights::Bf16(&weights[2 * head * n * k..][..2 * n * k]),
            };
            let x = Inputs::F32(&x[head * k..]);
            let y = Output { values, stride: heads * n, first: head * n };
            let product = Product { weights, n, k, x, x_stride: heads * k, rows: None, y };
            let (rows, outputs) = (part(rows, TASK_ROWS, m), part(outputs, TASK_OUTPUTS, n));
            // SAFETY: heads, row chunks and output groups are disjoint parts of `y`; the lengths were checked above.
            unsafe { compute(self.isa, &product, rows, outputs) }
        };
        self.divide(heads * row_chunks * groups, m * heads * n * k, &task);
    }
}

/// Computes outputs `outputs` of rows `rows`.
///
/// # Safety
/// The machine has `isa`; nobody else writes these outputs; every input row is inside `product.x`.
unsafe fn compute(isa: Isa, product: &Product<'_>, rows: Range<usize>, outputs: Range<usize>) {
    match isa {
        // SAFETY: the caller's promises, handed on.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::compute(product, rows, outputs) },
        // SAFETY: as above.
        _ => unsafe { lanes::compute(isa, product, rows, outputs) },
    }
}

#[cfg(test)]
mod tests;
