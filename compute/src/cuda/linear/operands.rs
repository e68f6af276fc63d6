//! What a matrix product reads and where it writes.

use crate::cuda::{View, ViewMut};
use crate::fp8::BLOCK;

/// Input rows `[m, k]` of a matrix product.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    /// As they are; goes with any weights.
    F32(View<'a, f32>),
    /// bf16 bits; goes with bf16 weights.
    Bf16(View<'a, u16>),
    /// E4M3 `[m, k]` and scales `[m, ceil(k/128)]`; goes with FP8 weights.
    Fp8 {
        /// Codes.
        codes: View<'a, u8>,
        /// A scale per 128 channels.
        scales: View<'a, f32>,
    },
}

impl Inputs<'_> {
    /// Rows of `k` channels.
    pub(super) fn rows(&self, k: usize) -> usize {
        let values = match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::Fp8 { codes, .. } => codes.len(),
        };
        assert!(k > 0 && values.is_multiple_of(k), "{values} values in rows of {k}");
        let rows = values / k;
        if let Self::Fp8 { scales, .. } = self {
            assert_eq!(scales.len(), rows * k.div_ceil(BLOCK), "a scale per 128 channels");
        }
        rows
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        match self {
            Self::F32(x) => (x.address(), 0),
            Self::Bf16(x) => (x.address(), 0),
            Self::Fp8 { codes, scales } => (codes.address(), scales.address()),
        }
    }

    pub(super) fn rows_by_four(&self, k: usize) -> bool {
        match self {
            Self::F32(x) => x.rows_by_four(k),
            Self::Bf16(x) => x.rows_by_four(k),
            Self::Fp8 { codes, .. } => codes.rows_by_four(k),
        }
    }
}

/// Where a product goes.
pub enum Outputs<'a, 'b> {
    /// As it is.
    F32(&'a mut ViewMut<'b, f32>),
    /// Rounded to bf16, nearest even.
    Bf16(&'a mut ViewMut<'b, u16>),
}

impl Outputs<'_, '_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(y) => y.len(),
            Self::Bf16(y) => y.len(),
        }
    }

    pub(super) fn address(&self) -> u64 {
        match self {
            Self::F32(y) => y.address(),
            Self::Bf16(y) => y.address(),
        }
    }
}
