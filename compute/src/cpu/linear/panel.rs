//! Products over [panels](crate::panels) in AVX-512: outputs in lanes, inputs broadcast.
//!
//! An output is one lane of one vector: within a block of 128 inputs it adds up two inputs at a time, in order, with
//! `vdpbf16ps` (or one at a time with FMA for f32 inputs); a block's sum is scaled and added to the total. Nothing is
//! added across lanes, and promotion costs one instruction in 65.
//!
//! Up to [`DIRECT_ROWS`] rows, weights go from memory through the decoder straight into the products. With more, a block
//! of a panel is decoded once into the level-1 cache and used for all rows of the task, [`TILE_ROWS`] at a time: 24 sums,
//! 4 weights and a broadcast input fill 29 of the 32 registers, and ten loads feed 24 products. Per element both ways do
//! the same operations in the same order.
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
/// Rows of a tile.
const TILE_ROWS: usize = 6;
/// Rows of a task at most: their totals take 48 KiB and 1,024 channels of them 384 KiB of a 1 MiB level-2 cache.
pub(super) const TASK_ROWS: usize = 192;
/// Pairs of columns in a block.
const PAIRS: usize = BLOCK / 2;
/// How far ahead of its use a weight is asked for.
const PREFETCH_BYTES: usize = 4096;
/// Bytes of a decoded block of a panel.
const DECODED_BYTES: usize = PAIRS * VECTORS * 64;

/// Sums of a tile: `[row][vector]`.
type Sums<const M: usize> = [[__m512; VECTORS]; M];

/// A decoded block and some rows.
#[derive(Clone, Copy)]
struct Tile {
    block: usize,
    /// The first row.
    row: usize,
    decoded: *const __m512i,
    /// Of these rows, `[row][vector]`.
    totals: *mut __m512,
    /// Weights to ask for meanwhile, and how many lines of them per pair of columns.
    next: *const u8,
    lines: usize,
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
    let decoded = if rows.len() > DIRECT_ROWS { DECODED_BYTES / 4 } else { 0 };
    let raw = if matches!(source, Source::RowMajor(_)) { PAIRS * W::FORMAT.pair_bytes() / 4 } else { 0 };
    scratch::with_f32(totals + decoded + raw, |memory| {
        let (totals, memory) = memory.split_at_mut(totals);
        let (decoded, raw) = memory.split_at_mut(decoded);
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
                _ => task.tiles::<X>(rows, totals.as_mut_ptr().cast(), decoded.as_mut_ptr().cast(), raw),
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
        let mut totals: Sums<M> = [[_mm512_setzero_ps(); VECTORS]; M];
        for block in 0..self.product.k_blocks() {
            let weights = self.block(block, raw);
            let mut sums: Sums<M> = [[_mm512_setzero_ps(); VECTORS]; M];
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

    /// All rows, a decoded block after the other.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn tiles<X: decode::Inputs>(
        &self,
        rows: Range<usize>,
        totals: *mut __m512,
        decoded: *mut __m512i,
        raw: &mut [u8],
    ) {
        // An empty K leaves no block to begin the totals.
        if self.product.k == 0 {
            for i in 0..rows.len() * VECTORS {
                // SAFETY: a vector for each.
                unsafe { *totals.add(i) = _mm512_setzero_ps() }
            }
        }
        for block in 0..self.product.k_blocks() {
            let weights = self.block(block, raw);
            let pairs = self.pairs(block);
            let decoded = if W::FORMAT == PanelFormat::Bf16 {
                // As it lies there.
                weights.cast::<__m512i>()
            } else {
                for pair in 0..pairs {
                    // SAFETY: so many pairs are in the block, and room for them decoded.
                    unsafe {
                        let vectors = self.weights.load(weights.add(pair * W::FORMAT.pair_bytes()));
                        for v in 0..VECTORS {
                            _mm512_store_si512(decoded.add(pair * VECTORS + v), vectors[v]);
                        }
                    }
                }
                decoded.cast_const()
            };
            // What lies behind this block is the next one, of this panel or of the one that this thread takes next.
            let mut next = weights.wrapping_add(pairs * W::FORMAT.pair_bytes());
            let mut lines = PAIRS * W::FORMAT.pair_bytes() / 64;
            let mut row = 0;
            while row < rows.len() {
                let tile = Tile {
                    block,
                    row: rows.start + row,
                    decoded,
                    // SAFETY: totals for each row of the task.
                    totals: unsafe { totals.add(row * VECTORS) },
                    next,
                    // All of it in the first two tiles: no later than memory can deliver it.
                    lines: lines.min(PAIRS * W::FORMAT.pair_bytes() / 128).div_ceil(PAIRS),
                };
                next = next.wrapping_add(64 * PAIRS * tile.lines);
                lines = lines.saturating_sub(PAIRS * tile.lines);
                // SAFETY: rows of this task; totals for each.
                unsafe {
                    row += match rows.len() - row {
                        1 => self.tile::<X, 1>(tile),
                        2 => self.tile::<X, 2>(tile),
                        3 => self.tile::<X, 3>(tile),
                        // Two tiles alike are quicker than a large and a small one.
                        4 | 7 | 8 => self.tile::<X, 4>(tile),
                        5 | 9 | 10 => self.tile::<X, 5>(tile),
                        _ => self.tile::<X, TILE_ROWS>(tile),
                    };
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

    /// Adds a decoded block's products with `M` rows to their totals; returns `M`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    unsafe fn tile<X: decode::Inputs, const M: usize>(&self, tile: Tile) -> usize {
        let Tile { block, row: m, decoded, totals, next, lines } = tile;
        let inputs: [_; M] = std::array::from_fn(|i| self.input_row::<X>(m + i));
        let mut sums: Sums<M> = [[_mm512_setzero_ps(); VECTORS]; M];
        for pair in 0..self.pairs(block) {
            for line in 0..lines {
                _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * (lines * pair + line)).cast());
            }
            // SAFETY: so many pairs were decoded and are in the inputs.
            unsafe {
                let at = decoded.add(pair * VECTORS);
                let weights: [_; VECTORS] = std::array::from_fn(|v| _mm512_loadu_si512(at.add(v)));
                X::multiply_add(&mut sums, &weights, &inputs, block * PAIRS + pair);
            }
        }
        let weight_scales = self.product.weight_scales(self.first());
        for i in 0..M {
            let scale = block_scale(weight_scales, self.product.input_scales(m + i), block);
            for v in 0..VECTORS {
                // SAFETY: the caller's totals; those before the first block are not there yet.
                unsafe {
                    let total = totals.add(i * VECTORS + v);
                    let before = if block == 0 { _mm512_setzero_ps() } else { *total };
                    *total = promote(scale, sums[i][v], before);
                }
            }
        }
        M
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
