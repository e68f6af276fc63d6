//! Two columns of a panel from memory to vectors of bf16 pairs, and what is done with them.

use std::arch::x86_64::*;

use super::super::super::vector::broadcast;
use crate::fp8::bf16_byte_table;
use crate::panels::{PanelFormat, VECTORS};

/// How weights are stored.
///
/// # Safety
/// Every method asks that the machine has [`crate::Isa::Avx512`].
pub(super) trait Weights: Sized {
    const FORMAT: PanelFormat;

    unsafe fn new() -> Self;

    /// Two vectors of 16 outputs × 2 inputs in bf16: half of a pair of columns.
    ///
    /// # Safety
    /// Half a pair of columns can be read from `at`.
    unsafe fn load_half(&self, at: *const u8) -> [__m512i; 2];

    /// Four vectors of 16 outputs × 2 inputs in bf16.
    ///
    /// # Safety
    /// A pair of columns can be read from `at`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn load(&self, at: *const u8) -> [__m512i; VECTORS] {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (self.load_half(at), self.load_half(at.add(Self::FORMAT.pair_bytes() / 2)));
            [a[0], a[1], b[0], b[1]]
        }
    }
}

/// How inputs are stored, and the products that this makes.
///
/// # Safety
/// Every method asks that the machine has [`crate::Isa::Avx512`].
pub(super) trait Inputs {
    /// Bytes of two inputs.
    const PAIR_BYTES: usize;

    /// Adds the products of input pair `pair` of `M` rows.
    ///
    /// # Safety
    /// Each row has this pair.
    unsafe fn multiply_add<const M: usize, const V: usize>(
        sums: &mut [[__m512; V]; M],
        weights: &[__m512i; V],
        rows: &[*const u8; M],
        pair: usize,
    );
}

pub(super) struct Bf16Weights;

impl Weights for Bf16Weights {
    const FORMAT: PanelFormat = PanelFormat::Bf16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn new() -> Self {
        Self
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_half(&self, at: *const u8) -> [__m512i; 2] {
        // SAFETY: half a pair of columns is two vectors.
        unsafe { [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())] }
    }
}

/// E4M3 to bf16 by table: `vpermi2b` looks 64 codes up in 128 entries, once for the low bytes and once for the high
/// ones; the sign bit is copied over, and the halves are interleaved.
pub(super) struct Fp8Weights {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl Weights for Fp8Weights {
    const FORMAT: PanelFormat = PanelFormat::Fp8;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn new() -> Self {
        const LOW: [u8; 128] = bf16_byte_table(0);
        const HIGH: [u8; 128] = bf16_byte_table(8);
        // SAFETY: both halves of 128 bytes.
        let load = |table: &[u8; 128]| unsafe {
            [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table.as_ptr().add(64).cast())]
        };
        Self { low: load(&LOW), high: load(&HIGH) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn load_half(&self, at: *const u8) -> [__m512i; 2] {
        // SAFETY: half a pair of columns is a line.
        let codes = unsafe { _mm512_loadu_si512(at.cast()) };
        let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
        // high | (codes & 0x80)
        let high = _mm512_ternarylogic_epi64::<0xF8>(high, codes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

/// bf16, two inputs at a time.
pub(super) struct Bf16Inputs;

impl Inputs for Bf16Inputs {
    const PAIR_BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply_add<const M: usize, const V: usize>(
        sums: &mut [[__m512; V]; M],
        weights: &[__m512i; V],
        rows: &[*const u8; M],
        pair: usize,
    ) {
        for m in 0..M {
            // SAFETY: the caller's promise; the same 512 bits under another name.
            unsafe {
                let x = std::mem::transmute::<__m512i, __m512bh>(broadcast(rows[m].cast::<u32>(), pair));
                for v in 0..V {
                    let w = std::mem::transmute::<__m512i, __m512bh>(weights[v]);
                    sums[m][v] = _mm512_dpbf16_ps(sums[m][v], w, x);
                }
            }
        }
    }
}

/// f32, one input after the other.
pub(super) struct F32Inputs;

impl Inputs for F32Inputs {
    const PAIR_BYTES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_add<const M: usize, const V: usize>(
        sums: &mut [[__m512; V]; M],
        weights: &[__m512i; V],
        rows: &[*const u8; M],
        pair: usize,
    ) {
        let first = weights.map(|w| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)));
        for m in 0..M {
            // SAFETY: the caller's promise.
            let x = unsafe { _mm512_castsi512_ps(broadcast(rows[m].cast(), 2 * pair)) };
            for v in 0..V {
                sums[m][v] = _mm512_fmadd_ps(first[v], x, sums[m][v]);
            }
        }
        let mask = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
        let second = weights.map(|w| _mm512_castsi512_ps(_mm512_and_si512(w, mask)));
        for m in 0..M {
            // SAFETY: the caller's promise.
            let x = unsafe { _mm512_castsi512_ps(broadcast(rows[m].cast(), 2 * pair + 1)) };
            for v in 0..V {
                sums[m][v] = _mm512_fmadd_ps(second[v], x, sums[m][v]);
            }
        }
    }
}
