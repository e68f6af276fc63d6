//! Products over [panels](crate::panels) in AVX-512: outputs in lanes, inputs broadcast.
//!
//! An output is one lane of one vector: within a block of 128 inputs it adds up two inputs at a time, in order, with
//! `vdpbf16ps` (or one at a time with FMA for f32 inputs); a block's sum is scaled and added to the total. Nothing is
//! added across lanes, and promotion costs one instruction in 65.
//!
//! Up to [`DIRECT_ROWS`] rows, a whole panel goes from memory through the decoder into the products, totals in registers.
//! More rows are taken [`TILE_ROWS`] at a time for half a panel of a block: 20 sums, 2 weights, an input and the decoder's
//! tables fill 29 of the 32 registers, and 11 loads feed 20 products. Every tile decodes anew: the decoder's shuffles run
//! on a unit that the products leave free, and a decoded copy would have to be written and read. Per element both ways
//! do the same operations in the same order.
//!
//! Matrices that are not in panels are brought into that order block by block, into scratch: the same bits, slowly.
//!
//! `vdpbf16ps` reads and writes subnormals as zero. E4M3 values are never bf16 subnormals; bf16 weights below 1.2e-38
//! count as zero here.

// Tiles are indexed by row and vector, in several arrays at a time.
#![allow(clippy::needless_range_loop)]

mod decode;

use std::arch::x86_64::*;
use std::ops::Range;

use self::decode::{Bf16Inputs, Bf16Weights, F32Inputs, Fp8Weights};
use super::super::scratch;
use super::avx512::{block_scale, promote};
use super::{Inputs, Output, Product, Weights};
use crate::fp8::BLOCK;
use crate::panels::{self, PANEL, PanelFormat, VECTORS};

/// Rows computed straight from memory; with 5 the decoder's tables no longer fit the registers.
const DIRECT_ROWS: usize = 4;
/// Rows of a tile at most.
const TILE_ROWS: usize = 10;
/// Rows of a task at most: their totals take 48 KiB and 1,024 channels of them 384 KiB of a 1 MiB level-2 cache.
pub(super) const TASK_ROWS: usize = 192;
/// Vectors of half a panel.
const HALF: usize = VECTORS / 2;
/// Pairs of columns in a block.
const PAIRS: usize = BLOCK / 2;
/// How far ahead of its use a weight is asked for.
const PREFETCH_BYTES: usize = 4096;

/// Sums of some rows: `[row][vector]`.
type Sums<const M: usize, const V: usize> = [[__m512; V]; M];

/// A block of a panel and some rows.
#[derive(Clone, Copy)]
struct Tile {
    block: usize,
    weights: *const u8,
    /// The first row.
    row: usize,
    /// Of these rows, `[row][vector]`.
    totals: *mut __m512,
    /// Whether to ask for the weights behind this block meanwhile.
    prefetch: bool,
}

/// Where a product's weights are.
#[derive(Clone, Copy)]
enum Source<'a> {
    Panels(&'a [u8]),
    RowMajor(&'a [u8]),
}

/// Computes outputs `panel * 64..` of rows `rows`.
///
/// # Safety
/// The machine has [`crate::Isa::Avx512`]; nobody else writes these outputs; every input row is inside `product.x`.
pub(super) unsafe fn compute(product: &Product<'_>, rows: Range<usize>, panel: usize) {
    let (format, source) = match product.weights {
        Weights::Panels { format, values, .. } => (format, Source::Panels(values)),
        Weights::Bf16(values) => (PanelFormat::Bf16, Source::RowMajor(values)),
        Weights::Fp8 { codes, .. } => (PanelFormat::Fp8, Source::RowMajor(codes)),
        Weights::F32(_) => unreachable!("f32 weights have a kernel of their own"),
    };
    // SAFETY: the caller's promises, handed on.
    unsafe {
        match (format, product.x) {
            (PanelFormat::Fp8, Inputs::F32(x)) => {
                run::<Fp8Weights, F32Inputs>(product, source, x.as_ptr().cast(), rows, panel);
            }
            (PanelFormat::Bf16, Inputs::F32(x)) => {
                run::<Bf16Weights, F32Inputs>(product, source, x.as_ptr().cast(), rows, panel);
            }
            (PanelFormat::Fp8, Inputs::Bf16(x) | Inputs::Fp8 { values: x, .. }) => {
                run::<Fp8Weights, Bf16Inputs>(product, source, x.as_ptr().cast(), rows, panel);
            }
            (PanelFormat::Bf16, Inputs::Bf16(x) | Inputs::Fp8 { values: x, .. }) => {
                run::<Bf16Weights, Bf16Inputs>(product, source, x.as_ptr().cast(), rows, panel);
            }
        }
    }
}

/// A panel of a product with its formats resolved.
struct Task<'a, W> {
    product: &'a Product<'a>,
    source: Source<'a>,
    inputs: *const u8,
    panel: usize,
    weights: W,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn run<W: decode::Weights, X: decode::Inputs>(
    product: &Product<'_>,
    source: Source<'_>,
    inputs: *const u8,
    rows: Range<usize>,
    panel: usize,
) {
    // SAFETY: the machine has the instruction set.
    let task = Task { product, source, inputs, panel, weights: unsafe { W::new() } };
    let totals = if rows.len() > DIRECT_ROWS { rows.len() * PANEL } else { 0 };
    let raw = if matches!(source, Source::RowMajor(_)) { PAIRS * W::FORMAT.pair_bytes() / 4 } else { 0 };
    scratch::with_f32(totals + raw, |memory| {
        let (totals, raw) = memory.split_at_mut(totals);
        // SAFETY: plain bytes of plain floats.
        let raw = unsafe { std::slice::from_raw_parts_mut(raw.as_mut_ptr().cast::<u8>(), 4 * raw.len()) };
        // SAFETY: the caller's promises.
        unsafe {
            match rows.len() {
                0 => {}
                1 => task.direct::<X, 1>(rows.start, raw),
                2 => task.direct::<X, 2>(rows.start, raw),
                3 => task.direct::<X, 3>(rows.start, raw),
                DIRECT_ROWS => task.direct::<X, DIRECT_ROWS>(rows.start, raw),
                _ => task.tiles::<X>(rows, totals.as_mut_ptr().cast(), raw),
            }
        }
    });
}

impl<W: decode::Weights> Task<'_, W> {
    /// First output of the panel.
    fn first(&self) -> usize {
        self.panel * PANEL
    }

    /// Pairs of columns in `block`.
    fn pairs(&self, block: usize) -> usize {
        BLOCK.min(self.product.k - block * BLOCK).div_ceil(2)
    }

    /// The panel's weights of `block`; those that are not in panels are rearranged into `raw`.
    fn block<'s>(&'s self, block: usize, raw: &'s mut [u8]) -> *const u8 {
        let Product { n, k, .. } = *self.product;
        match self.source {
            Source::Panels(values) => {
                let start = self.panel * W::FORMAT.panel_bytes(k) + block * PAIRS * W::FORMAT.pair_bytes();
                values[start..].as_ptr()
            }
            Source::RowMajor(values) => {
                let rows = self.first()..n.min(self.first() + PANEL);
                let columns = block * BLOCK..k.min((block + 1) * BLOCK);
                let out = &mut raw[..self.pairs(block) * W::FORMAT.pair_bytes()];
                panels::fill(W::FORMAT, values, k, rows, columns, out);
                out.as_ptr()
            }
        }
    }

    /// Start of row `m`'s input.
    fn input_row<X: decode::Inputs>(&self, m: usize) -> *const u8 {
        // SAFETY: inside the inputs, by the promise to `compute`.
        unsafe { self.inputs.add(self.product.input_row(m) * self.product.x_stride * X::PAIR_BYTES / 2) }
    }

    /// Rows `m..m + M`, weights straight from where they lie.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn direct<X: decode::Inputs, const M: usize>(&self, m: usize, raw: &mut [u8]) {
        let inputs: [_; M] = std::array::from_fn(|i| self.input_row::<X>(m + i));
        let input_scales: [_; M] = std::array::from_fn(|i| self.product.input_scales(m + i));
        let weight_scales = self.product.weight_scales(self.first());
        let mut totals: Sums<M, VECTORS> = [[_mm512_setzero_ps(); VECTORS]; M];
        for block in 0..self.product.k_blocks() {
            let weights = self.block(block, raw);
            let mut sums: Sums<M, VECTORS> = [[_mm512_setzero_ps(); VECTORS]; M];
            for pair in 0..self.pairs(block) {
                // SAFETY: so many pairs are in the block, in weights and (padded to pairs) inputs; a prefetch touches
                // nothing.
                unsafe {
                    let at = weights.add(pair * W::FORMAT.pair_bytes());
                    for line in 0..W::FORMAT.pair_bytes() / 64 {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES + 64 * line).cast());
                    }
                    let weights = self.weights.load(at);
                    X::multiply_add(&mut sums, &weights, &inputs, block * PAIRS + pair);
                }
            }
            for i in 0..M {
                let scale = block_scale(weight_scales, input_scales[i], block);
                for v in 0..VECTORS {
                    totals[i][v] = promote(scale, sums[i][v], totals[i][v]);
                }
            }
        }
        for i in 0..M {
            // SAFETY: this task's outputs.
            unsafe { store(&self.product.y, m + i, self.first(), self.product.n, &totals[i]) }
        }
    }

    /// All rows, a block after the other.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn tiles<X: decode::Inputs>(&self, rows: Range<usize>, totals: *mut __m512, raw: &mut [u8]) {
        for i in 0..rows.len() * VECTORS {
            // SAFETY: a vector for each.
            unsafe { *totals.add(i) = _mm512_setzero_ps() }
        }
        let tiles = rows.len().div_ceil(TILE_ROWS);
        for block in 0..self.product.k_blocks() {
            let weights = self.block(block, raw);
            for tile in 0..tiles {
                // Tiles of one size, or one row apart.
                let (row, end) = (tile * rows.len() / tiles, (tile + 1) * rows.len() / tiles);
                // SAFETY: totals for each row of the task.
                let totals = unsafe { totals.add(row * VECTORS) };
                // Behind this block lies the next one, of this panel or of the one that this thread takes next.
                let next = Tile { block, weights, row: rows.start + row, totals, prefetch: tile == 0 };
                // SAFETY: rows of this task; more than `DIRECT_ROWS` rows in tiles of one size are five or more in each.
                unsafe {
                    match end - row {
                        ..=5 => self.tile::<X, 5>(next),
                        6 => self.tile::<X, 6>(next),
                        7 => self.tile::<X, 7>(next),
                        8 => self.tile::<X, 8>(next),
                        9 => self.tile::<X, 9>(next),
                        TILE_ROWS.. => self.tile::<X, TILE_ROWS>(next),
                    }
                }
            }
        }
        for i in 0..rows.len() {
            // SAFETY: written above; this task's outputs.
            unsafe {
                let totals = &*totals.add(i * VECTORS).cast::<[__m512; VECTORS]>();
                store(&self.product.y, rows.start + i, self.first(), self.product.n, totals);
            }
        }
    }

    /// Adds a block's products with `M` rows to their totals.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn tile<X: decode::Inputs, const M: usize>(&self, tile: Tile) {
        let Tile { block, weights, row: m, totals, prefetch } = tile;
        let first = block * PAIRS * X::PAIR_BYTES;
        let inputs: [_; M] = std::array::from_fn(|i| self.input_row::<X>(m + i).wrapping_add(first));
        let weight_scales = self.product.weight_scales(self.first());
        // A factor of one leaves a block's sum as it is.
        let scales: [f32; M] = std::array::from_fn(|i| {
            block_scale(weight_scales, self.product.input_scales(m + i), block).unwrap_or(1.0)
        });
        let pair_bytes = W::FORMAT.pair_bytes();
        for half in 0..2 {
            let weights = weights.wrapping_add(half * pair_bytes / 2);
            // SAFETY: the block's pairs are in weights and inputs.
            let sums = unsafe {
                if prefetch {
                    self.half::<X, M, true>(weights, &inputs, self.pairs(block))
                } else {
                    self.half::<X, M, false>(weights, &inputs, self.pairs(block))
                }
            };
            for i in 0..M {
                for v in 0..HALF {
                    // SAFETY: the caller's totals.
                    unsafe {
                        let total = totals.add(i * VECTORS + half * HALF + v);
                        *total = _mm512_fmadd_ps(sums[i][v], _mm512_set1_ps(scales[i]), *total);
                    }
                }
            }
        }
    }

    /// Sums of `M` rows over `pairs` pairs of columns; asks for the same half of the next block if `PREFETCH`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn half<X: decode::Inputs, const M: usize, const PREFETCH: bool>(
        &self,
        weights: *const u8,
        inputs: &[*const u8; M],
        pairs: usize,
    ) -> Sums<M, HALF> {
        let pair_bytes = W::FORMAT.pair_bytes();
        let mut sums: Sums<M, HALF> = [[_mm512_setzero_ps(); HALF]; M];
        for pair in 0..pairs {
            // SAFETY: the caller's promise; a prefetch touches nothing.
            unsafe {
                let at = weights.add(pair * pair_bytes);
                if PREFETCH {
                    for line in 0..pair_bytes / 128 {
                        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(PAIRS * pair_bytes + 64 * line).cast());
                    }
                }
                X::multiply_add(&mut sums, &self.weights.load_half(at), inputs, pair);
            }
        }
        sums
    }
}

/// Stores outputs `first..` of row `m`, those before `end`.
///
/// # Safety
/// Nobody else writes these outputs.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(y: &Output<'_>, m: usize, first: usize, end: usize, totals: &[__m512; VECTORS]) {
    let mut values = [0.0f32; PANEL];
    for v in 0..VECTORS {
        // SAFETY: room for all vectors.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr().add(16 * v), totals[v]) }
    }
    // SAFETY: the caller's promise.
    unsafe { y.write(m, first, &values[..PANEL.min(end - first)]) }
}
