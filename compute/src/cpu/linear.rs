//! Matrix products: what is multiplied, and how the work is divided.
//!
//! An output element `(m, n)` is a sum over 128-blocks of K in order: a block's sum is built in a fixed order, scaled
//! (FP8), and added to the element's total. Neither the tile an element falls into, nor the division of work among
//! threads, nor how the weights lie changes a single one of these operations. Kernels pad: past the end of K zeros are
//! multiplied, and a partial tile computes outputs that nobody stores.
//!
//! Several products that do not depend on each other are one loop of the pool ([`Cpu::linear_all`]): waking and waiting
//! takes as long as reading some 100 KB of weights.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod panel;

use super::disjoint::Disjoint;
use super::{Cpu, Isa, part};
use crate::fp8::BLOCK;
use crate::matrix::{HeadStorage, Storage};
use crate::panels::PanelFormat;
use crate::{ActivationFormat, Activations, HeadMatrices, Matrix};

/// Outputs of a task: 32 rows of 7,168 FP8 weights take some 10 µs from memory, enough to hide the hand-out; and a
/// multiple of every kernel's tile, dividing 128, so that a tile lies within one scale block.
const TASK_OUTPUTS: usize = 32;

/// Rows of a task: 96 rows times 1,024 channels of bf16 stay in a 1 MB level-2 cache next to the task's sums.
const TASK_ROWS: usize = 96;

/// How far ahead of its use a weight is asked for, at least: what memory delivers in some 300 ns. Into the level-2 cache;
/// four short rows at a time are no stream that the hardware recognises, and it triples what a thread reads per second.
const PREFETCH_BYTES: usize = 8192;

/// Products of one loop at most; more are several loops.
const JOBS_MAX: usize = 64;

/// One product of [`Cpu::linear_all`].
pub struct LinearJob<'a> {
    /// `[n, k]`
    pub weights: &'a Matrix,
    /// Rows of `k` channels.
    pub input: &'a Activations,
    /// Which rows of the input.
    pub rows: InputRows<'a>,
    /// `[rows, n]`
    pub out: &'a mut [f32],
}

/// Which rows of its input a product takes.
#[derive(Clone, Copy, Debug)]
pub enum InputRows<'a> {
    /// All of them.
    All,
    /// So many from the first one on.
    Range {
        /// The first row.
        first: usize,
        /// How many.
        count: usize,
    },
    /// These, in this order.
    Index(&'a [u32]),
}

impl InputRows<'_> {
    /// How many rows, of an input of `all`.
    fn count(&self, all: usize) -> usize {
        match self {
            Self::All => all,
            Self::Range { count, .. } => *count,
            Self::Index(rows) => rows.len(),
        }
    }

    /// # Panics
    /// If a row is not among `all`.
    fn check(&self, all: usize) {
        match self {
            Self::All => {}
            Self::Range { first, count } => assert!(first + count <= all, "{first} + {count} of {all} rows"),
            Self::Index(rows) => {
                assert!(rows.iter().all(|&row| (row as usize) < all), "row index past {all} rows");
            }
        }
    }
}

/// Weights `[n, k]`.
#[derive(Clone, Copy)]
enum Weights<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u8]),
    Fp8 {
        codes: &'a [u8],
        scales: &'a [f32],
    },
    /// In the order of [`crate::panels`]; no scales for BF16.
    Panels {
        format: PanelFormat,
        values: &'a [u8],
        scales: &'a [f32],
    },
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
    m: usize,
    n: usize,
    k: usize,
    x: Inputs<'a>,
    x_stride: usize,
    rows: InputRows<'a>,
    y: Output<'a>,
}

impl<'a> Product<'a> {
    fn new(job: LinearJob<'a>) -> Self {
        let LinearJob { weights: w, input: x, rows, out } = job;
        let (m, n, k) = (rows.count(x.rows()), w.rows(), w.cols());
        assert_eq!(x.channels(), k, "activations of another width than the matrix");
        assert_eq!(out.len(), m * n, "output [{m}, {n}]");
        rows.check(x.rows());
        let weights = match &w.storage {
            Storage::F32(weights) => Weights::F32(weights),
            Storage::Bf16(weights) => Weights::Bf16(weights),
            Storage::Fp8 { codes, scales } => Weights::Fp8 { codes, scales },
            Storage::Panels { panels, scales } => {
                Weights::Panels { format: panels.format, values: &panels.values, scales }
            }
        };
        let inputs = match (x.format(), w.format()) {
            (ActivationFormat::F32, _) => Inputs::F32(&x.f32),
            (ActivationFormat::Bf16, crate::WeightFormat::Bf16) => Inputs::Bf16(&x.bf16),
            (ActivationFormat::Fp8(_), crate::WeightFormat::Fp8) => {
                Inputs::Fp8 { values: &x.bf16, scales: &x.scales }
            }
            (format, weights) => panic!("{format:?} activations do not go with {weights:?} weights"),
        };
        let y = Output { values: Disjoint::new(out), stride: n, first: 0 };
        Product { weights, m, n, k, x: inputs, x_stride: x.stride(), rows, y }
    }

    fn input_row(&self, m: usize) -> usize {
        match self.rows {
            InputRows::All => m,
            InputRows::Range { first, .. } => first + m,
            InputRows::Index(rows) => rows[m] as usize,
        }
    }

    fn k_blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Block scales of weight row `n`, one per K block; for formats without scales, none.
    fn weight_scales(&self, n: usize) -> &[f32] {
        match self.weights {
            Weights::Fp8 { scales, .. } | Weights::Panels { format: PanelFormat::Fp8, scales, .. } => {
                &scales[n / BLOCK * self.k_blocks()..][..self.k_blocks()]
            }
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

    /// Rows and outputs of a task.
    fn task_size(&self, isa: Isa) -> (usize, usize) {
        match (isa, self.weights) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Weights::Bf16(_) | Weights::Fp8 { .. } | Weights::Panels { .. }) => {
                // Even chunks: a short last one would decode the weights for few rows.
                let chunks = self.m.div_ceil(panel::TASK_ROWS).max(1);
                (self.m.div_ceil(chunks).max(1), crate::panels::PANEL)
            }
            // A router has few outputs: something for every thread all the same.
            _ if self.n <= 8 * TASK_OUTPUTS => (TASK_ROWS, TASK_OUTPUTS / 4),
            _ => (TASK_ROWS, TASK_OUTPUTS),
        }
    }

    fn tasks(&self, isa: Isa) -> usize {
        let (rows, outputs) = self.task_size(isa);
        self.m.div_ceil(rows) * self.n.div_ceil(outputs)
    }

    /// Computes one of [`Self::tasks`].
    ///
    /// # Safety
    /// The machine has `isa`; nobody else computes this task; every input row is inside `x`.
    unsafe fn compute(&self, isa: Isa, task: usize) {
        let (task_rows, task_outputs) = self.task_size(isa);
        // Row chunks vary fastest: threads that work at the same time then share the weights' cache lines.
        let chunks = self.m.div_ceil(task_rows);
        let rows = part(task % chunks, task_rows, self.m);
        let outputs = part(task / chunks, task_outputs, self.n);
        match (isa, self.weights) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's promises, handed on; a task of this kind is a panel.
            (Isa::Avx512, Weights::Bf16(_) | Weights::Fp8 { .. } | Weights::Panels { .. }) => unsafe {
                panel::compute(self, rows, task / chunks);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx512, Weights::F32(_)) => unsafe { avx512::compute(self, rows, outputs) },
            // SAFETY: as above.
            _ => unsafe { lanes::compute(isa, self, rows, outputs) },
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
        let job = LinearJob { weights: w, input: x, rows: InputRows::All, out: y };
        self.products(&[Some(Product::new(job))]);
    }

    /// As [`Self::linear`] for the rows `row_index` of `x`: row `i` of `y` `[row_index.len(), n]` has the bits that
    /// `linear` gives row `row_index[i]`.
    ///
    /// # Panics
    /// As [`Self::linear`], and if an index is past the rows.
    pub fn linear_rows(&self, w: &Matrix, x: &Activations, row_index: &[u32], y: &mut [f32]) {
        let rows = InputRows::Index(row_index);
        self.products(&[Some(Product::new(LinearJob { weights: w, input: x, rows, out: y }))]);
    }

    /// Two products at a time, each as [`Self::linear`].
    ///
    /// # Panics
    /// As [`Self::linear_rows`].
    pub fn linear_pair(&self, jobs: [LinearJob<'_>; 2]) {
        self.products(&jobs.map(|job| Some(Product::new(job))));
    }

    /// Several products at a time, each as [`Self::linear`].
    ///
    /// # Panics
    /// As [`Self::linear_rows`].
    pub fn linear_all<'a>(&self, jobs: impl Iterator<Item = LinearJob<'a>>) {
        let mut jobs = jobs.fuse();
        loop {
            let products: [_; JOBS_MAX] = std::array::from_fn(|_| jobs.next().map(Product::new));
            if products[0].is_none() {
                return;
            }
            self.products(&products);
        }
    }

    /// Products of different outputs, those that there are, in one loop.
    fn products<const N: usize>(&self, products: &[Option<Product<'_>>; N]) {
        let mut ends = [usize::MAX; N];
        let (mut tasks, mut work) = (0, 0);
        for (end, product) in ends.iter_mut().zip(products.iter().flatten()) {
            tasks += product.tasks(self.isa);
            work += product.m * product.n * product.k;
            *end = tasks;
        }
        self.divide(tasks, work, &|task| {
            let index = ends.partition_point(|&end| end <= task);
            let first = if index == 0 { 0 } else { ends[index - 1] };
            if let Some(Some(product)) = products.get(index) {
                // SAFETY: `isa` is available; tasks are disjoint parts of the outputs, which are different slices;
                // rows were checked against the inputs.
                unsafe { product.compute(self.isa, task - first) }
            }
        });
    }

    /// `y[m, h, o] = Σ_i x[m, h, i] · w[h, o, i]` in f32: `m` rows of one vector per head.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn head_matmul(&self, w: &HeadMatrices, x: &[f32], m: usize, y: &mut [f32]) {
        let (heads, n, k) = (w.heads(), w.out_dim(), w.in_dim());
        assert_eq!(x.len(), m * heads * k, "input [{m}, {heads}, {k}]");
        assert_eq!(y.len(), m * heads * n, "output [{m}, {heads}, {n}]");
        if heads == 0 {
            return;
        }
        let values = Disjoint::new(y);
        let product = |head: usize| {
            let blocks = n.div_ceil(BLOCK) * k.div_ceil(BLOCK);
            let of = |bytes: usize| head * bytes..(head + 1) * bytes;
            let weights = match &w.storage {
                HeadStorage::F32(weights) => Weights::F32(&weights[of(n * k)]),
                HeadStorage::Bf16(weights) => Weights::Bf16(&weights[of(2 * n * k)]),
                HeadStorage::Fp8 { codes, scales } => {
                    Weights::Fp8 { codes: &codes[of(n * k)], scales: &scales[of(blocks)] }
                }
                HeadStorage::Panels { panels, scales } => Weights::Panels {
                    format: panels.format,
                    values: &panels.values[of(panels.format.matrix_bytes(n, k))],
                    scales: if scales.is_empty() { &[] } else { &scales[of(blocks)] },
                },
            };
            let x = Inputs::F32(&x[(head * k).min(x.len())..]);
            let y = Output { values, stride: heads * n, first: head * n };
            Product { weights, m, n, k, x, x_stride: heads * k, rows: InputRows::All, y }
        };
        let tasks = product(0).tasks(self.isa);
        self.divide(heads * tasks, m * heads * n * k, &|task| {
            // SAFETY: heads and tasks are disjoint parts of `y`; the lengths were checked above.
            unsafe { product(task / tasks).compute(self.isa, task % tasks) }
        });
    }
}

#[cfg(test)]
mod tests;
