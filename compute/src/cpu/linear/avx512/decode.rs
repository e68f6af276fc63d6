//! Weights from memory to vectors, and what is done with the vectors.

use std::arch::x86_64::*;

/// How a vector of inputs and one of weights are multiplied and added up.
pub(super) trait Arithmetic {
    /// Values in a vector.
    const LANES: usize;

    /// `acc + x · w`, in lanes of f32.
    ///
    /// # Safety
    /// The machine has [`crate::Isa::Avx512`].
    unsafe fn multiply_add(acc: __m512, x: __m512i, w: __m512i) -> __m512;

    /// Two vectors of inputs, as far as there are `values`; zeros after them.
    ///
    /// # Safety
    /// As above; `min(values, 2 * LANES)` values can be read from `at`.
    unsafe fn load_pair(at: *const u8, values: usize) -> [__m512i; 2];
}

/// f32 lanes.
pub(super) struct F32;

impl Arithmetic for F32 {
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_add(acc: __m512, x: __m512i, w: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), acc)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_pair(at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: reads `min(values, 32)` values of 4 bytes: a masked load touches no lane outside its mask.
        unsafe {
            if values >= 32 {
                [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())]
            } else {
                [
                    _mm512_maskz_loadu_epi32(mask(values) as u16, at.cast()),
                    _mm512_maskz_loadu_epi32((mask(values) >> 16) as u16, at.wrapping_add(64).cast()),
                ]
            }
        }
    }
}

/// The lowest `min(values, 64)` bits.
#[inline]
fn mask(values: usize) -> u64 {
    if values >= 64 { u64::MAX } else { (1 << values) - 1 }
}

/// Stored weights to vectors for an [`Arithmetic`]. Scales are not applied.
pub(super) trait Decode {
    type Arithmetic: Arithmetic;
    /// Bytes of a stored weight.
    const BYTES: usize;

    /// Two vectors of weights, as far as there are `values`; zeros after them.
    ///
    /// # Safety
    /// The machine has [`crate::Isa::Avx512`]; `min(values, 2 * LANES)` weights can be read from `at`.
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2];
}

pub(super) struct F32FromF32;

impl Decode for F32FromF32 {
    type Arithmetic = F32;
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: the same contract.
        unsafe { F32::load_pair(at, values) }
    }
}
