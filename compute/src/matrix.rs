//! Weights in the formats they are stored in.
//!
//! A [`Matrix`] is `[rows, cols]` = `[out, in]`, row-major, as checkpoints have it. FP8 and BF16 weights stay where
//! they are (a slice of the mapped file, possibly unaligned) until [`Matrix::arranged`] copies them into the order that
//! the CPU's products read fastest.

use std::fmt;

use bytes::Bytes;

use crate::Isa;
use crate::arena::Arena;
use crate::fp8::{self, BLOCK};
use crate::panels::{PanelFormat, Panels};

/// How a matrix's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 4 bytes each.
    F32,
    /// 2 bytes each.
    Bf16,
    /// E4M3 with one f32 scale per 128×128 block (partial blocks at the edges).
    Fp8,
}

/// Storage that does not fit the shape it was declared with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The weights have another length than the shape asks for.
    #[error("matrix [{rows}, {cols}] needs {expected} {unit} of weights, got {got}")]
    Weights {
        /// Output width.
        rows: usize,
        /// Input width.
        cols: usize,
        /// Length asked for.
        expected: usize,
        /// Length given.
        got: usize,
        /// What is counted.
        unit: &'static str,
    },
    /// The scales have another count than the shape asks for.
    #[error("matrix [{rows}, {cols}] needs {expected} block scales, got {got}")]
    Scales {
        /// Output width.
        rows: usize,
        /// Input width.
        cols: usize,
        /// Count asked for.
        expected: usize,
        /// Count given.
        got: usize,
    },
}

#[derive(Clone)]
pub(crate) enum Storage {
    F32(Vec<f32>),
    Bf16(Bytes),
    Fp8 {
        codes: Bytes,
        scales: Vec<f32>,
    },
    /// Rearranged; no scales for BF16.
    Panels {
        panels: Panels,
        scales: Vec<f32>,
    },
}

/// A weight matrix `[rows, cols]` = `[out, in]`, row-major.
#[derive(Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    pub(crate) storage: Storage,
}

impl Matrix {
    /// Weights as f32, `rows * cols` of them.
    pub fn f32(rows: usize, cols: usize, weights: Vec<f32>) -> Result<Self, MatrixError> {
        check_weights(rows, cols, rows.saturating_mul(cols), weights.len(), "values")?;
        Ok(Self { rows, cols, storage: Storage::F32(weights) })
    }

    /// Weights as little-endian bf16, `2 * rows * cols` bytes of any alignment.
    pub fn bf16(rows: usize, cols: usize, weights: Bytes) -> Result<Self, MatrixError> {
        check_weights(rows, cols, rows.saturating_mul(cols).saturating_mul(2), weights.len(), "bytes")?;
        Ok(Self { rows, cols, storage: Storage::Bf16(weights) })
    }

    /// Weights as E4M3 codes, `rows * cols` bytes, and their block scales `[ceil(rows/128), ceil(cols/128)]`, which
    /// multiply (the checkpoint's `weight_scale_inv`).
    pub fn fp8(rows: usize, cols: usize, weights: Bytes, scales: Vec<f32>) -> Result<Self, MatrixError> {
        check_weights(rows, cols, rows.saturating_mul(cols), weights.len(), "bytes")?;
        let expected = rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK);
        if scales.len() != expected {
            return Err(MatrixError::Scales { rows, cols, expected, got: scales.len() });
        }
        Ok(Self { rows, cols, storage: Storage::Fp8 { codes: weights, scales } })
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        match &self.storage {
            Storage::F32(_) => WeightFormat::F32,
            Storage::Bf16(_) => WeightFormat::Bf16,
            Storage::Fp8 { .. } => WeightFormat::Fp8,
            Storage::Panels { panels, .. } => match panels.format {
                PanelFormat::Bf16 => WeightFormat::Bf16,
                PanelFormat::Fp8 => WeightFormat::Fp8,
            },
        }
    }

    /// The same matrix in the order that the products of [`crate::Cpu::new`] read fastest, in memory of `arena`; as it is
    /// where there is no better one. A result's bits do not depend on it.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn arranged(self, arena: &mut Arena) -> std::io::Result<Self> {
        let Self { rows, cols, storage } = self;
        let size = [1, rows, cols];
        let storage = match storage {
            storage if Isa::detect() != Isa::Avx512 => storage,
            Storage::Bf16(weights) => {
                let panels = Panels::new(PanelFormat::Bf16, size, &weights, arena)?;
                Storage::Panels { panels, scales: Vec::new() }
            }
            Storage::Fp8 { codes, scales } => {
                Storage::Panels { panels: Panels::new(PanelFormat::Fp8, size, &codes, arena)?, scales }
            }
            storage => storage,
        };
        Ok(Self { rows, cols, storage })
    }

    /// Bytes that weights and scales take.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(weights) => weights.len() * 4,
            Storage::Bf16(weights) => weights.len(),
            Storage::Fp8 { codes, scales } => codes.len() + scales.len() * 4,
            Storage::Panels { panels, scales } => panels.values.len() + scales.len() * 4,
        }
    }

    /// Row `row` multiplied out into `out` (`cols` values): how an embedding is looked up.
    ///
    /// # Panics
    /// If `row` is out of range or `out` has another length than `cols`.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix of {}", self.rows);
        assert_eq!(out.len(), self.cols, "output of a row");
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.storage {
            Storage::F32(weights) => out.copy_from_slice(&weights[range]),
            Storage::Bf16(weights) => {
                let row = &weights[range.start * 2..range.end * 2];
                for (out, pair) in out.iter_mut().zip(row.chunks_exact(2)) {
                    *out = fp8::from_bf16(u16::from_le_bytes([pair[0], pair[1]]));
                }
            }
            Storage::Fp8 { codes, scales } => {
                let scales = &scales[row / BLOCK * self.cols.div_ceil(BLOCK)..];
                for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(codes[range].chunks(BLOCK)).zip(scales)
                {
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = fp8::decode(code) * scale;
                    }
                }
            }
            Storage::Panels { panels, scales } => {
                let scales = scales.get(row / BLOCK * self.cols.div_ceil(BLOCK)..).unwrap_or(&[]);
                for (col, out) in out.iter_mut().enumerate() {
                    let value = panels.value([self.rows, self.cols], 0, row, col);
                    *out = scales.get(col / BLOCK).map_or(value, |scale| value * scale);
                }
            }
        }
    }

    /// All weights multiplied out, `[rows, cols]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        if self.cols > 0 {
            for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
                self.row_f32(row, out);
            }
        }
        out
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix[{}, {}] {:?}", self.rows, self.cols, self.format())
    }
}

fn check_weights(
    rows: usize,
    cols: usize,
    expected: usize,
    got: usize,
    unit: &'static str,
) -> Result<(), MatrixError> {
    if expected == got { Ok(()) } else { Err(MatrixError::Weights { rows, cols, expected, got, unit }) }
}

/// One matrix per head, `[heads, out, in]`: the absorbed halves of MLA's `kv_b`, `W_UK` as `[latent, nope]` and
/// `W_UV` as `[v, latent]`.
#[derive(Clone)]
pub struct HeadMatrices {
    heads: usize,
    out_dim: usize,
    in_dim: usize,
    pub(crate) storage: HeadStorage,
}

#[derive(Clone)]
pub(crate) enum HeadStorage {
    F32(Vec<f32>),
    /// Little endian, as [`Storage::Bf16`].
    Bf16(Vec<u8>),
    /// As [`Storage::Fp8`], scales `[heads, ceil(out/128), ceil(in/128)]`.
    Fp8 {
        codes: Vec<u8>,
        scales: Vec<f32>,
    },
    /// Rearranged; no scales for BF16.
    Panels {
        panels: Panels,
        scales: Vec<f32>,
    },
}

impl HeadMatrices {
    /// From f32 values `[heads, out_dim, in_dim]`. They are kept as bf16 when that loses nothing: half the bytes to
    /// read, the same products.
    pub fn new(heads: usize, out_dim: usize, in_dim: usize, weights: Vec<f32>) -> Result<Self, MatrixError> {
        // The kernel for bf16 takes two inputs at a time.
        let exact = in_dim.is_multiple_of(2) && weights.iter().all(|w| w.to_bits() & 0xFFFF == 0);
        Self::check(heads, out_dim, in_dim, weights.len())?;
        let storage = if exact {
            HeadStorage::Bf16(weights.iter().flat_map(|&w| fp8::to_bf16(w).to_le_bytes()).collect())
        } else {
            HeadStorage::F32(weights)
        };
        Ok(Self { heads, out_dim, in_dim, storage })
    }

    /// As [`Self::new`], every value rounded to bf16 first: half the bytes where FP8 weights with f32 scales would
    /// otherwise need f32.
    pub fn rounded_to_bf16(
        heads: usize,
        out_dim: usize,
        in_dim: usize,
        weights: &[f32],
    ) -> Result<Self, MatrixError> {
        Self::check(heads, out_dim, in_dim, weights.len())?;
        let storage = if in_dim.is_multiple_of(2) {
            HeadStorage::Bf16(weights.iter().flat_map(|&w| fp8::to_bf16(w).to_le_bytes()).collect())
        } else {
            HeadStorage::F32(weights.iter().map(|&w| fp8::from_bf16(fp8::to_bf16(w))).collect())
        };
        Ok(Self { heads, out_dim, in_dim, storage })
    }

    /// From E4M3 codes `[heads, out_dim, in_dim]` and scales per 128×128 block of each head's matrix, `[heads,
    /// ceil(out_dim/128), ceil(in_dim/128)]`; `in_dim` is even.
    ///
    /// # Panics
    /// If `in_dim` is odd.
    pub fn fp8(
        [heads, out_dim, in_dim]: [usize; 3],
        codes: Vec<u8>,
        scales: Vec<f32>,
    ) -> Result<Self, MatrixError> {
        assert!(in_dim.is_multiple_of(2), "the kernel takes two inputs at a time");
        Self::check(heads, out_dim, in_dim, codes.len())?;
        let expected = heads * out_dim.div_ceil(BLOCK) * in_dim.div_ceil(BLOCK);
        if scales.len() != expected {
            let got = scales.len();
            return Err(MatrixError::Scales { rows: heads * out_dim, cols: in_dim, expected, got });
        }
        Ok(Self { heads, out_dim, in_dim, storage: HeadStorage::Fp8 { codes, scales } })
    }

    /// As [`Matrix::arranged`].
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn arranged(self, arena: &mut Arena) -> std::io::Result<Self> {
        let Self { heads, out_dim, in_dim, storage } = self;
        let size = [heads, out_dim, in_dim];
        let storage = match storage {
            storage if Isa::detect() != Isa::Avx512 => storage,
            HeadStorage::Bf16(weights) => {
                let panels = Panels::new(PanelFormat::Bf16, size, &weights, arena)?;
                HeadStorage::Panels { panels, scales: Vec::new() }
            }
            HeadStorage::Fp8 { codes, scales } => {
                HeadStorage::Panels { panels: Panels::new(PanelFormat::Fp8, size, &codes, arena)?, scales }
            }
            storage => storage,
        };
        Ok(Self { heads, out_dim, in_dim, storage })
    }

    fn check(heads: usize, out_dim: usize, in_dim: usize, got: usize) -> Result<(), MatrixError> {
        let rows = heads.saturating_mul(out_dim);
        check_weights(rows, in_dim, rows.saturating_mul(in_dim), got, "values")
    }

    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Output width of a head.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// Input width of a head.
    pub fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// Weight `(head, out, in)`.
    pub fn weight(&self, head: usize, row: usize, col: usize) -> f32 {
        let i = (head * self.out_dim + row) * self.in_dim + col;
        match &self.storage {
            HeadStorage::F32(weights) => weights[i],
            HeadStorage::Bf16(weights) => {
                fp8::from_bf16(u16::from_le_bytes([weights[2 * i], weights[2 * i + 1]]))
            }
            HeadStorage::Fp8 { codes, scales } => {
                fp8::decode(codes[i]) * scales[self.scale_index(head, row, col)]
            }
            HeadStorage::Panels { panels, scales } => {
                let value = panels.value([self.out_dim, self.in_dim], head, row, col);
                scales.get(self.scale_index(head, row, col)).map_or(value, |scale| value * scale)
            }
        }
    }

    /// All weights multiplied out, `[heads, out, in]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let columns = |head, row| (0..self.in_dim).map(move |col| self.weight(head, row, col));
        let rows = |head| (0..self.out_dim).flat_map(move |row| columns(head, row));
        (0..self.heads).flat_map(rows).collect()
    }

    fn scale_index(&self, head: usize, row: usize, col: usize) -> usize {
        let (rows, cols) = (self.out_dim.div_ceil(BLOCK), self.in_dim.div_ceil(BLOCK));
        (head * rows + row / BLOCK) * cols + col / BLOCK
    }
}

impl fmt::Debug for HeadMatrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeadMatrices[{}, {}, {}]", self.heads, self.out_dim, self.in_dim)
    }
}

#[cfg(test)]
mod tests;
