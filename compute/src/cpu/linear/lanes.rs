//! Products in lanes of f32, for the instruction sets without bf16 arithmetic: AVX2 and portable.
//!
//! Tiles are 4 outputs wide. For up to 2 rows weights are decoded on their way into the products; for more, 4 weight rows
//! are decoded into scratch first and used for all rows of the task, 2 at a time. Decoding is exact, so both give the
//! same bits.

use std::ops::Range;

use super::super::vector::{self, LANES_MAX, Operation, Vector};
use super::super::{Isa, scratch};
use super::{Inputs, PREFETCH_BYTES, Product, Weights};
use crate::fp8::BLOCK;

/// Outputs of a tile.
const TILE: usize = 4;
/// Rows of a tile: 8 sums hide the latency of the multiply-add, and 16 registers hold no more.
const ROWS: usize = 2;

/// Outputs `outputs` of rows `rows`.
struct Lanes<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    outputs: Range<usize>,
    /// Room for a tile's weight rows.
    decoded: &'a mut [f32],
}

/// Computes outputs `outputs` of rows `rows`.
///
/// # Safety
/// Nobody else writes these outputs; every input row is inside `product.x`.
pub(super) unsafe fn compute(isa: Isa, product: &Product<'_>, rows: Range<usize>, outputs: Range<usize>) {
    scratch::with_f32(TILE * product.k, |decoded| {
        vector::run(isa, Lanes { product, rows, outputs, decoded });
    });
}

impl Operation for Lanes<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: the machine has the instruction set, and the promise to `compute` above.
        unsafe {
            match (self.product.weights, self.product.x) {
                (Weights::F32(w), Inputs::F32(x)) => {
                    self.compute::<V, F32, F32>(w.as_ptr().cast(), x.as_ptr().cast());
                }
                (Weights::Bf16(w), Inputs::F32(x)) => {
                    self.compute::<V, Bf16, F32>(w.as_ptr(), x.as_ptr().cast())
                }
                (Weights::Fp8 { codes, .. }, Inputs::F32(x)) => {
                    self.compute::<V, E4m3, F32>(codes.as_ptr(), x.as_ptr().cast());
                }
                (Weights::Bf16(w), Inputs::Bf16(x)) => {
                    self.compute::<V, Bf16, Bf16>(w.as_ptr(), x.as_ptr().cast())
                }
                (Weights::Fp8 { codes, .. }, Inputs::Fp8 { values, .. }) => {
                    self.compute::<V, E4m3, Bf16>(codes.as_ptr(), values.as_ptr().cast());
                }
                _ => unreachable!("formats are paired by `Product::new`, and panels are AVX-512's"),
            }
        }
    }
}

impl Lanes<'_> {
    /// # Safety
    /// `weights` and `inputs` are the starts of the product's operands, stored as `W` and `X`.
    #[inline(always)]
    unsafe fn compute<V: Vector, W: Stored, X: Stored>(self, weights: *const u8, inputs: *const u8) {
        let k = self.product.k;
        let ahead = PREFETCH_BYTES.next_multiple_of((TILE * k * W::BYTES).max(1));
        let decode_first = self.rows.len() > ROWS;
        let mut n = self.outputs.start;
        while n < self.outputs.end {
            // Past the last row, the last one again: computed, not stored.
            let mut tile = [weights; TILE];
            let mut i = 0;
            while i < TILE {
                // SAFETY: inside the weights, which hold `n * k` values.
                tile[i] = unsafe { weights.add((n + i).min(self.product.n - 1) * k * W::BYTES) };
                i += 1;
            }
            // SAFETY: the caller's promise; the decoded rows are as long as the stored ones.
            unsafe {
                if decode_first {
                    let decoded = self.decoded.as_mut_ptr();
                    let mut rows = [decoded.cast::<u8>().cast_const(); TILE];
                    let mut i = 0;
                    while i < TILE {
                        let row = decoded.add(i * k);
                        decode::<V, W>(tile[i], row, k);
                        rows[i] = row.cast::<u8>().cast_const();
                        i += 1;
                    }
                    self.tile::<V, F32, X>(&rows, inputs, n, 0);
                } else {
                    self.tile::<V, W, X>(&tile, inputs, n, ahead);
                }
            }
            n += TILE;
        }
    }

    /// All rows of the task for one tile of outputs; asks for what lies `ahead` bytes further, if anything does.
    #[inline(always)]
    unsafe fn tile<V: Vector, W: Stored, X: Stored>(
        &self,
        w: &[*const u8; TILE],
        x: *const u8,
        n: usize,
        ahead: usize,
    ) {
        let mut m = self.rows.start;
        while m < self.rows.end {
            // SAFETY: the caller's promise; so many rows are left.
            unsafe {
                if self.rows.end - m >= ROWS {
                    self.rows::<V, W, X, ROWS>(w, x, m, n, ahead);
                    m += ROWS;
                } else {
                    self.rows::<V, W, X, 1>(w, x, m, n, ahead);
                    m += 1;
                }
            }
        }
    }

    /// Rows `m..m + M` for one tile of outputs.
    #[inline(always)]
    unsafe fn rows<V: Vector, W: Stored, X: Stored, const M: usize>(
        &self,
        w: &[*const u8; TILE],
        x: *const u8,
        m: usize,
        n: usize,
        ahead: usize,
    ) {
        let product = self.product;
        let weight_scales = product.weight_scales(n);
        let mut inputs = [x; M];
        let mut input_scales: [&[f32]; M] = [&[]; M];
        let mut i = 0;
        while i < M {
            // SAFETY: inside the inputs, by the promise to `compute`.
            inputs[i] = unsafe { x.add(product.input_row(m + i) * product.x_stride * X::BYTES) };
            input_scales[i] = product.input_scales(m + i);
            i += 1;
        }
        // SAFETY: columns up to K are inside all rows; the last vector is loaded as far as it goes.
        unsafe {
            let mut totals = [[V::splat(0.0); TILE]; M];
            let mut block = 0;
            while block < product.k_blocks() {
                let end = product.k.min((block + 1) * BLOCK);
                let mut sums = [[V::splat(0.0); TILE]; M];
                let mut column = block * BLOCK;
                if ahead > 0 {
                    prefetch::<V>(w, column * W::BYTES + ahead, BLOCK * W::BYTES);
                }
                while column + V::LANES <= end {
                    step::<V, W, X, M>(w, &inputs, column, V::LANES, &mut sums);
                    column += V::LANES;
                }
                if column < end {
                    step::<V, W, X, M>(w, &inputs, column, end - column, &mut sums);
                }
                i = 0;
                while i < M {
                    let scale = match (weight_scales.get(block), input_scales[i].get(block)) {
                        (Some(w), Some(x)) => w * x,
                        (Some(w), None) => *w,
                        _ => 1.0,
                    };
                    let mut j = 0;
                    while j < TILE {
                        totals[i][j] = sums[i][j].mul_add(V::splat(scale), totals[i][j]);
                        j += 1;
                    }
                    i += 1;
                }
                block += 1;
            }
            i = 0;
            while i < M {
                let values = V::sum4(totals[i]);
                product.y.write(m + i, n, &values[..TILE.min(self.outputs.end - n)]);
                i += 1;
            }
        }
    }
}

/// Asks for `bytes` of each row from `offset` on.
#[inline(always)]
fn prefetch<V: Vector>(rows: &[*const u8; TILE], offset: usize, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        let mut j = 0;
        while j < TILE {
            V::prefetch(rows[j].wrapping_add(offset + line));
            j += 1;
        }
        line += 64;
    }
}

/// Adds the products of `count` columns.
#[inline(always)]
unsafe fn step<V: Vector, W: Stored, X: Stored, const M: usize>(
    w: &[*const u8; TILE],
    x: &[*const u8; M],
    column: usize,
    count: usize,
    sums: &mut [[V; TILE]; M],
) {
    // SAFETY: the caller's promise that `count` values from `column` on are there.
    unsafe {
        let mut inputs = [V::splat(0.0); M];
        let mut i = 0;
        while i < M {
            inputs[i] = load::<V, X>(x[i].add(column * X::BYTES), count);
            i += 1;
        }
        let mut j = 0;
        while j < TILE {
            let weight = load::<V, W>(w[j].add(column * W::BYTES), count);
            i = 0;
            while i < M {
                sums[i][j] = inputs[i].mul_add(weight, sums[i][j]);
                i += 1;
            }
            j += 1;
        }
    }
}

/// Decodes a row of `k` values.
#[inline(always)]
unsafe fn decode<V: Vector, W: Stored>(row: *const u8, out: *mut f32, k: usize) {
    let mut column = 0;
    while column < k {
        // SAFETY: the caller's promise of `k` values in and out.
        unsafe {
            load::<V, W>(row.add(column * W::BYTES), k - column).store_partial(out.add(column), k - column)
        }
        column += V::LANES;
    }
}

/// The first `count` values from `at` on, zeros after them.
#[inline(always)]
unsafe fn load<V: Vector, S: Stored>(at: *const u8, count: usize) -> V {
    // SAFETY: the caller's promise; room for any vector.
    unsafe {
        if count >= V::LANES {
            return S::load(at);
        }
        let mut padded = [0u8; 4 * LANES_MAX];
        std::ptr::copy_nonoverlapping(at, padded.as_mut_ptr(), count * S::BYTES);
        S::load(padded.as_ptr())
    }
}

/// How values lie in memory. All-zero bytes are zero.
trait Stored {
    const BYTES: usize;

    /// A whole vector.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set, and so many values are there.
    unsafe fn load<V: Vector>(at: *const u8) -> V;
}

struct F32;
struct Bf16;
struct E4m3;

impl Stored for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const u8) -> V {
        // SAFETY: the same contract.
        unsafe { V::load(at.cast()) }
    }
}

impl Stored for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const u8) -> V {
        // SAFETY: the same contract.
        unsafe { V::load_bf16(at) }
    }
}

impl Stored for E4m3 {
    const BYTES: usize = 1;

    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const u8) -> V {
        // SAFETY: the same contract.
        unsafe { V::load_e4m3(at) }
    }
}
