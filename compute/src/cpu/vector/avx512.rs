//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use super::{Operation, Vector};
use crate::fp8::bf16_byte_table;

/// Compiles `operation` for AVX-512.
///
/// # Safety
/// The machine has [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,f16c,fma")]
pub(super) unsafe fn run(operation: impl Operation) {
    // SAFETY: the caller's promise.
    unsafe { operation.run::<F32x16>() }
}

/// The 32 bits at `from + index` in every lane. By hand, because the compiler takes `vbroadcastss` for what goes into
/// float arithmetic, which on Zen 4 occupies a unit that the products need (174 against 222 GFLOP/s).
///
/// # Safety
/// The machine has AVX-512; the 32 bits can be read.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in super::super) unsafe fn broadcast(from: *const u32, index: usize) -> __m512i {
    let lanes: __m512i;
    // SAFETY: reads the 32 bits that the caller promises, and nothing else.
    unsafe {
        std::arch::asm!(
            "vpbroadcastd {lanes}, dword ptr [{from} + 4 * {index}]",
            lanes = lateout(zmm_reg) lanes,
            from = in(reg) from,
            index = in(reg) index,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    lanes
}

/// 64 E4M3 codes as bf16 by table: `vpermi2b` looks them up in 128 entries, once for the low bytes and once for the high
/// ones; the sign bit is copied over, and the halves are interleaved within 128-bit lanes.
///
/// # Safety
/// The machine has [`crate::Isa::Avx512`].
#[inline(always)]
unsafe fn e4m3_to_bf16(codes: __m512i) -> [__m512i; 2] {
    const LOW: [u8; 128] = bf16_byte_table(0);
    const HIGH: [u8; 128] = bf16_byte_table(8);
    // SAFETY: the caller's promise; both halves of 128 bytes.
    unsafe {
        let table = |table: &[u8; 128], codes| {
            let low = _mm512_loadu_si512(table.as_ptr().cast());
            _mm512_permutex2var_epi8(low, codes, _mm512_loadu_si512(table.as_ptr().add(64).cast()))
        };
        let (low, high) = (table(&LOW, codes), table(&HIGH, codes));
        // high | (codes & 0x80)
        let high = _mm512_ternarylogic_epi64::<0xF8>(high, codes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

/// Lane `i` of the result is vector `i`'s quarters added up: even plus odd ones of two vectors at a time.
///
/// # Safety
/// The machine has [`crate::Isa::Avx512`].
#[inline(always)]
unsafe fn quarters(a: F32x16, b: F32x16, c: F32x16, d: F32x16) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let ab =
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a.0, b.0), _mm512_shuffle_f32x4::<0xDD>(a.0, b.0));
        let cd =
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c.0, d.0), _mm512_shuffle_f32x4::<0xDD>(c.0, d.0));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
    }
}

#[derive(Clone, Copy)]
pub(super) struct F32x16(__m512);

// SAFETY of all blocks below: the trait's contract, that the machine has the instruction set and pointers lead to
// enough values, is what each intrinsic asks for.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for F32x16 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn broadcast(at: *const f32) -> Self {
        unsafe { Self(_mm512_castsi512_ps(broadcast(at.cast(), 0))) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(at)) }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        unsafe { _mm512_storeu_ps(at, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const u8) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, at: *mut u8) {
        // Not `vcvtneps2bf16`, which flushes subnormals: a stored value is the same on every instruction set.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
            // Rounding could carry a NaN's payload into infinity: NaN is made quiet instead.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000));
            let packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            _mm256_storeu_si256(at.cast(), packed);
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(at: *const u8) -> Self {
        // Shifted into a half-precision number a code is its value over 256, subnormals included; NaN is put in.
        unsafe {
            let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
            let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7F));
            let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
            let half = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
            let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
            let half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7E00));
            Self(_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0)))
        }
    }

    #[inline(always)]
    unsafe fn store_e4m3(self, at: *mut u8) {
        // As `fp8::encode`, all cases computed and blended.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let sign = _mm512_and_si512(_mm512_srli_epi32::<24>(bits), _mm512_set1_epi32(0x80));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let magnitude = _mm512_min_ps(_mm512_abs_ps(self.0), _mm512_set1_ps(448.0));
            let bits = _mm512_castps_si512(magnitude);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7_FFFF)), odd);
            let code = _mm512_sub_epi32(_mm512_srli_epi32::<20>(rounded), _mm512_set1_epi32(120 << 3));
            let magic = _mm512_set1_ps(24576.0);
            let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(magnitude, _mm512_set1_ps(1.0 / 64.0));
            let code = _mm512_mask_sub_epi32(
                code,
                small,
                _mm512_castps_si512(_mm512_add_ps(magnitude, magic)),
                _mm512_castps_si512(magic),
            );
            let code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7F));
            let packed = _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
            _mm_storeu_si128(at.cast(), packed);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Self(_mm512_div_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Self(_mm512_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Self(_mm512_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        unsafe { Self(_mm512_abs_ps(self.0)) }
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
        }
    }

    #[inline(always)]
    unsafe fn scale_e4m3_64(codes: *const u8, scale: Self, out: *mut f32) {
        unsafe {
            // Where interleaving within 128-bit lanes, bytes and then words, will leave their values in order.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let codes = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes.cast()));
            let zero = _mm512_setzero_si512();
            let bf16 = e4m3_to_bf16(codes);
            let mut half = 0;
            while half < 2 {
                let values =
                    [_mm512_unpacklo_epi16(zero, bf16[half]), _mm512_unpackhi_epi16(zero, bf16[half])];
                let out = out.add(32 * half);
                _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_castsi512_ps(values[0]), scale.0));
                _mm512_storeu_ps(out.add(16), _mm512_mul_ps(_mm512_castsi512_ps(values[1]), scale.0));
                half += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn e4m3_to_bf16_64(codes: *const u8, out: *mut u8) {
        unsafe {
            // Where interleaving within 128-bit lanes will leave their values in order.
            let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes.cast()));
            let [first, second] = e4m3_to_bf16(codes);
            _mm512_storeu_si512(out.cast(), first);
            _mm512_storeu_si512(out.add(64).cast(), second);
        }
    }

    #[inline(always)]
    fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn sum4(vectors: [Self; 4]) -> [f32; 4] {
        unsafe {
            let [a, b, c, d] = vectors;
            let quarters = quarters(a, b, c, d);
            let pairs = _mm512_add_ps(quarters, _mm512_permute_ps::<0b01_00_11_10>(quarters));
            let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0b10_11_00_01>(pairs));
            let first = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), first);
            out
        }
    }

    #[inline(always)]
    unsafe fn sum4x4(vectors: [[Self; 4]; 4]) -> [[f32; 4]; 4] {
        unsafe {
            let [a, b, c, d] = vectors;
            // One of each, so that a lane has a row of the result in the end.
            let (first, second) = (quarters(a[0], b[0], c[0], d[0]), quarters(a[1], b[1], c[1], d[1]));
            let (third, fourth) = (quarters(a[2], b[2], c[2], d[2]), quarters(a[3], b[3], c[3], d[3]));
            let halves =
                |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b));
            let (ab, cd) = (halves(first, second), halves(third, fourth));
            let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xDD>(ab, cd));
            let mut out = [[0.0; 4]; 4];
            _mm512_storeu_ps(out.as_mut_ptr().cast(), sums);
            out
        }
    }
}
