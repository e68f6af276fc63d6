//! Weights rearranged for AVX-512: outputs in lanes.
//!
//! Rows (outputs) are taken 64 at a time, a *panel*; within a panel the weights of two neighbouring columns (inputs) lie
//! together, four vectors of 16 outputs × 2 inputs each, which is what `vdpbf16ps` wants: every lane adds up one output,
//! the two inputs are broadcast. A panel is read front to back, whatever is multiplied; past the last row and the last
//! column there are zeros.
//!
//! BF16 lies as the vectors do. Of FP8, 64 codes make two vectors; they lie so that the halves which the decoder looks up
//! for their low and high bytes interleave to the vectors without being put in order first.

use std::sync::Arc;

use crate::arena::{Arena, Block};
use crate::fp8;

/// Outputs of a panel. Divides 128, so that a panel lies in one row of scales.
pub(crate) const PANEL: usize = 64;
/// Vectors of outputs in a panel.
pub(crate) const VECTORS: usize = PANEL / LANES;
/// Outputs of a vector.
const LANES: usize = 16;

/// How the values of panels are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanelFormat {
    Bf16,
    Fp8,
}

impl PanelFormat {
    /// Bytes of two columns of a panel.
    pub(crate) fn pair_bytes(self) -> usize {
        match self {
            Self::Bf16 => 4 * PANEL,
            Self::Fp8 => 2 * PANEL,
        }
    }

    /// Where in its two columns the value of output `n` (of 64) and column `half` (0 or 1) lies.
    fn offset(self, n: usize, half: usize) -> usize {
        let (vector, lane) = (n / LANES, n % LANES);
        match self {
            Self::Bf16 => 64 * vector + 4 * lane + 2 * half,
            Self::Fp8 => 64 * (vector / 2) + 16 * (lane / 4) + 8 * (vector % 2) + 2 * (lane % 4) + half,
        }
    }

    /// Bytes of a matrix, its last panel padded.
    pub(crate) fn matrix_bytes(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(PANEL) * self.panel_bytes(cols)
    }

    /// Bytes of a panel over `cols` columns.
    pub(crate) fn panel_bytes(self, cols: usize) -> usize {
        cols.div_ceil(2) * self.pair_bytes()
    }
}

/// The values of a matrix in panels. Scales stay as they were.
#[derive(Clone)]
pub(crate) struct Panels {
    pub(crate) format: PanelFormat,
    pub(crate) values: Arc<Block>,
}

impl Panels {
    /// Rearranges `count` matrices `[rows, cols]`, stored row-major one behind the other: 1 byte a value for FP8, 2
    /// for BF16.
    pub(crate) fn new(
        format: PanelFormat,
        [count, rows, cols]: [usize; 3],
        values: &[u8],
        arena: &mut Arena,
    ) -> std::io::Result<Self> {
        let panel_bytes = format.panel_bytes(cols);
        let block = arena.take(count * format.matrix_bytes(rows, cols), |out| {
            if values.is_empty() {
                return;
            }
            let matrices = out.chunks_exact_mut(format.matrix_bytes(rows, cols));
            for (out, values) in matrices.zip(values.chunks_exact(values.len() / count)) {
                for (panel, out) in out.chunks_exact_mut(panel_bytes).enumerate() {
                    fill(format, values, cols, panel * PANEL..rows.min((panel + 1) * PANEL), 0..cols, out);
                }
            }
        })?;
        Ok(Self { format, values: Arc::new(block) })
    }

    /// Value `(row, col)` of matrix `index` of `[rows, cols]`, without its scale.
    pub(crate) fn value(&self, [rows, cols]: [usize; 2], index: usize, row: usize, col: usize) -> f32 {
        let matrix = index * self.format.matrix_bytes(rows, cols);
        let pair = matrix + row / PANEL * self.format.panel_bytes(cols) + col / 2 * self.format.pair_bytes();
        let at = pair + self.format.offset(row % PANEL, col % 2);
        match self.format {
            PanelFormat::Bf16 => fp8::from_bf16(u16::from_le_bytes([self.values[at], self.values[at + 1]])),
            PanelFormat::Fp8 => fp8::decode(self.values[at]),
        }
    }
}

/// Rows `rows` (at most a panel) and columns `columns` (from an even one on) of row-major `values` into `out`, which
/// holds whole pairs of columns.
pub(crate) fn fill(
    format: PanelFormat,
    values: &[u8],
    cols: usize,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    out: &mut [u8],
) {
    let pair_bytes = format.pair_bytes();
    if rows.len() < PANEL || columns.len() % 2 == 1 {
        out.fill(0);
    }
    for (n, row) in rows.enumerate() {
        let at = format.offset(n, 0);
        match format {
            PanelFormat::Fp8 => {
                let row = &values[row * cols..][columns.clone()];
                copy_pairs::<2>(row, &mut out[at..], pair_bytes);
            }
            PanelFormat::Bf16 => {
                let row = &values[row * cols * 2..][2 * columns.start..2 * columns.end];
                copy_pairs::<4>(row, &mut out[at..], pair_bytes);
            }
        }
    }
}

/// Pairs of `B` bytes, `stride` bytes apart; the last may be half a pair.
fn copy_pairs<const B: usize>(row: &[u8], out: &mut [u8], stride: usize) {
    let (pairs, rest) = row.as_chunks::<B>();
    let mut places = out.chunks_mut(stride);
    for (pair, out) in pairs.iter().zip(&mut places) {
        out[..B].copy_from_slice(pair);
    }
    if let (false, Some(out)) = (rest.is_empty(), places.next()) {
        out[..rest.len()].copy_from_slice(rest);
    }
}
