//! Weights in the formats they are stored in.
//!
//! A [`Matrix`] is `[rows, cols]` = `[out, in]`, row-major, as checkpoints have it. FP8 and BF16 weights stay where
//! they are (a slice of the mapped file, possibly unaligned); nothing is repacked at load, so a model starts at once
//! and processes on one host share its pages.

use std::fmt;

use bytes::Bytes;

use crate::fp8::{self, BLOCK};

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
    Fp8 { codes: Bytes, scales: Vec<f32> },
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
        match self.storage {
            Storage::F32(_) => WeightFormat::F32,
            Storage::Bf16(_) => WeightFormat::Bf16,
            Storage::Fp8 { .. } => WeightFormat::Fp8,
        }
    }

    /// Bytes that weights and scales take.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(weights) => weights.len() * 4,
            Storage::Bf16(weights) => weights.len(),
            Storage::Fp8 { codes, scales } => codes.len() + scales.len() * 4,
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
}

impl HeadMatrices {
    /// From f32 values `[heads, out_dim, in_dim]`. They are kept as bf16 when that loses nothing: half the bytes to
    /// read, the same products.
    pub fn new(heads: usize, out_dim: usize, in_dim: usize, weights: Vec<f32>) -> Result<Self, MatrixError> {
        let exact = weights.iter().all(|w| w.to_bits() & 0xFFFF == 0);
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
        let storage =
            HeadStorage::Bf16(weights.iter().flat_map(|&w| fp8::to_bf16(w).to_le_bytes()).collect());
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
        }
    }
}

impl fmt::Debug for HeadMatrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeadMatrices[{}, {}, {}]", self.heads, self.out_dim, self.in_dim)
    }
}

#[cfg(test)]
mod tests;
