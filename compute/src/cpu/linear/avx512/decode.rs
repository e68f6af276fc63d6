//! Weights from memory to vectors, and what is done with the vectors.

use std::arch::x86_64::*;

use crate::fp8::E4M3_TO_BF16;

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

/// bf16 pairs into f32 lanes.
pub(super) struct Bf16;

/// f32 lanes.
pub(super) struct F32;

impl Arithmetic for Bf16 {
    const LANES: usize = 32;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply_add(acc: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: the same 512 bits under another name.
        let (x, w) = unsafe {
            (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w))
        };
        _mm512_dpbf16_ps(acc, x, w)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_pair(at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: reads `min(values, 64)` values of 2 bytes: a masked load touches no lane outside its mask.
        unsafe {
            if values >= 64 {
                [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())]
            } else {
                [
                    _mm512_maskz_loadu_epi16(mask(values) as u32, at.cast()),
                    _mm512_maskz_loadu_epi16((mask(values) >> 32) as u32, at.wrapping_add(64).cast()),
                ]
            }
        }
    }
}

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
pub(super) struct F32FromBf16;
pub(super) struct Bf16FromBf16;

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

impl Decode for Bf16FromBf16 {
    type Arithmetic = Bf16;
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: the same contract.
        unsafe { Bf16::load_pair(at, values) }
    }
}

impl Decode for F32FromBf16 {
    type Arithmetic = F32;
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: reads `min(values, 32)` values of 2 bytes.
        let pairs = unsafe { _mm512_maskz_loadu_epi16(mask(values) as u32, at.cast()) };
        widen(pairs)
    }
}

/// 32 bf16 to two vectors of f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(bf16: __m512i) -> [__m512i; 2] {
    [
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16))),
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(bf16))),
    ]
}

/// E4M3 to bf16 by table: `vpermi2b` looks 64 codes up in 128 entries, once for the low bytes and once for the high
/// ones; the sign bit is copied over, and the halves are interleaved.
pub(super) struct Bf16FromFp8 {
    low: [__m512i; 2],
    high: [__m512i; 2],
    /// Puts codes where interleaving within 128-bit lanes will leave their values in order.
    order: __m512i,
}

impl Bf16FromFp8 {
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        const LOW: [u8; 128] = byte_table(0);
        const HIGH: [u8; 128] = byte_table(8);
        // SAFETY: both halves of 128 bytes.
        let load = |table: &[u8; 128]| unsafe {
            [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table.as_ptr().add(64).cast())]
        };
        Self { low: load(&LOW), high: load(&HIGH), order: _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7) }
    }

    /// 64 codes to 64 bf16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn decode(&self, codes: __m512i) -> [__m512i; 2] {
        let codes = _mm512_permutexvar_epi64(self.order, codes);
        let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
        // high | (codes & 0x80)
        let high = _mm512_ternarylogic_epi64::<0xF8>(high, codes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

/// One byte of the bf16 bits of each of the 128 codes without sign.
const fn byte_table(shift: u32) -> [u8; 128] {
    let mut table = [0; 128];
    let mut code = 0;
    while code < 128 {
        table[code] = (E4M3_TO_BF16[code] >> shift) as u8;
        code += 1;
    }
    table
}

impl Decode for Bf16FromFp8 {
    type Arithmetic = Bf16;
    const BYTES: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: reads `min(values, 64)` bytes: a masked load touches no lane outside its mask.
        let codes = unsafe {
            if values >= 64 {
                _mm512_loadu_si512(at.cast())
            } else {
                _mm512_maskz_loadu_epi8(mask(values), at.cast())
            }
        };
        self.decode(codes)
    }
}

/// E4M3 to f32, by way of bf16.
pub(super) struct F32FromFp8(Bf16FromFp8);

impl F32FromFp8 {
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        Self(Bf16FromFp8::new())
    }
}

impl Decode for F32FromFp8 {
    type Arithmetic = F32;
    const BYTES: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn load_pair(&self, at: *const u8, values: usize) -> [__m512i; 2] {
        // SAFETY: reads `min(values, 32)` bytes.
        let codes = unsafe { _mm512_maskz_loadu_epi8(mask(values.min(32)), at.cast()) };
        widen(self.0.decode(codes)[0])
    }
}
