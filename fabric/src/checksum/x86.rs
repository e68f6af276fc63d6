//! xxh3-64 of long inputs in AVX-512 and AVX2, on its own and along with a copy.

use std::arch::x86_64::*;

use super::Stores;

/// Shorter inputs are hashed in another way.
pub(super) const SHORT_BYTES_MAX: usize = 240;

pub(super) const STRIPE_BYTES: usize = 64;
/// After each stripe the secret moves on by so much; at its end a block ends.
const SECRET_STEP_BYTES: usize = 8;
const STRIPES_PER_BLOCK: usize = (SECRET.len() - STRIPE_BYTES) / SECRET_STEP_BYTES;
const BLOCK_BYTES: usize = STRIPES_PER_BLOCK * STRIPE_BYTES;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

const START: [u64; 8] =
    [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];

/// Where each stripe of the input meets which part of the secret, and which blocks are scrambled: the same for every
/// width of vector.
macro_rules! hash {
    ($input:expr, $accumulate:ident, $scramble:ident, $accumulators:expr) => {{
        let (input, accumulators) = ($input, $accumulators);
        let last_stripe = &input[input.len() - STRIPE_BYTES..];
        // The last byte is left to the last stripe, whatever else it overlaps.
        let whole = &input[..input.len() - 1];
        let mut blocks = whole.chunks_exact(BLOCK_BYTES);
        for block in &mut blocks {
            for (stripe, secret) in
                block.chunks_exact(STRIPE_BYTES).zip(SECRET.windows(STRIPE_BYTES).step_by(8))
            {
                $accumulate(accumulators, stripe, secret);
            }
            $scramble(accumulators, &SECRET[SECRET.len() - STRIPE_BYTES..]);
        }
        let rest = blocks.remainder().chunks_exact(STRIPE_BYTES);
        for (stripe, secret) in rest.zip(SECRET.windows(STRIPE_BYTES).step_by(8)) {
            $accumulate(accumulators, stripe, secret);
        }
        $accumulate(accumulators, last_stripe, &SECRET[SECRET.len() - STRIPE_BYTES - 7..]);
    }};
}

#[target_feature(enable = "avx512f")]
pub(super) fn avx512(input: &[u8]) -> u64 {
    // SAFETY: 64 bytes are read of 64.
    let mut accumulators = unsafe { _mm512_loadu_si512(START.as_ptr().cast()) };
    hash!(input, accumulate_512, scramble_512, &mut accumulators);
    let mut lanes = START;
    // SAFETY: 64 bytes are written to 64.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), accumulators) };
    merge(&lanes, input.len())
}

#[target_feature(enable = "avx512f")]
fn accumulate_512(accumulators: &mut __m512i, stripe: &[u8], secret: &[u8]) {
    assert!(stripe.len() >= STRIPE_BYTES && secret.len() >= STRIPE_BYTES);
    // SAFETY: 64 bytes are read of each, which they have.
    let (data, key) =
        unsafe { (_mm512_loadu_si512(stripe.as_ptr().cast()), _mm512_loadu_si512(secret.as_ptr().cast())) };
    let mixed = _mm512_xor_si512(data, key);
    let product = _mm512_mul_epu32(mixed, _mm512_srli_epi64::<32>(mixed));
    let swapped = _mm512_shuffle_epi32::<0b01_00_11_10>(data);
    *accumulators = _mm512_add_epi64(*accumulators, _mm512_add_epi64(product, swapped));
}

#[target_feature(enable = "avx512f")]
fn scramble_512(accumulators: &mut __m512i, secret: &[u8]) {
    assert!(secret.len() >= STRIPE_BYTES);
    // SAFETY: 64 bytes are read, which there are.
    let key = unsafe { _mm512_loadu_si512(secret.as_ptr().cast()) };
    let shifted = _mm512_xor_si512(*accumulators, _mm512_srli_epi64::<47>(*accumulators));
    let mixed = _mm512_xor_si512(shifted, key);
    let prime = _mm512_set1_epi64(PRIME32_1 as i64);
    let low = _mm512_mul_epu32(mixed, prime);
    let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
    *accumulators = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
}

#[target_feature(enable = "avx2")]
pub(super) fn avx2(input: &[u8]) -> u64 {
    // SAFETY: twice 32 bytes are read of 64.
    let mut accumulators = unsafe {
        [_mm256_loadu_si256(START.as_ptr().cast()), _mm256_loadu_si256(START[4..].as_ptr().cast())]
    };
    hash!(input, accumulate_256, scramble_256, &mut accumulators);
    let mut lanes = START;
    // SAFETY: twice 32 bytes are written to 64.
    unsafe {
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), accumulators[0]);
        _mm256_storeu_si256(lanes[4..].as_mut_ptr().cast(), accumulators[1]);
    }
    merge(&lanes, input.len())
}

#[target_feature(enable = "avx2")]
fn accumulate_256(accumulators: &mut [__m256i; 2], stripe: &[u8], secret: &[u8]) {
    for (half, accumulator) in accumulators.iter_mut().enumerate() {
        let (stripe, secret) = (&stripe[32 * half..][..32], &secret[32 * half..][..32]);
        // SAFETY: 32 bytes are read of each, which they have.
        let (data, key) = unsafe {
            (_mm256_loadu_si256(stripe.as_ptr().cast()), _mm256_loadu_si256(secret.as_ptr().cast()))
        };
        let mixed = _mm256_xor_si256(data, key);
        let product = _mm256_mul_epu32(mixed, _mm256_srli_epi64::<32>(mixed));
        let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
        *accumulator = _mm256_add_epi64(*accumulator, _mm256_add_epi64(product, swapped));
    }
}

#[target_feature(enable = "avx2")]
fn scramble_256(accumulators: &mut [__m256i; 2], secret: &[u8]) {
    let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
    for (half, accumulator) in accumulators.iter_mut().enumerate() {
        let secret = &secret[32 * half..][..32];
        // SAFETY: 32 bytes are read, which there are.
        let key = unsafe { _mm256_loadu_si256(secret.as_ptr().cast()) };
        let shifted = _mm256_xor_si256(*accumulator, _mm256_srli_epi64::<47>(*accumulator));
        let mixed = _mm256_xor_si256(shifted, key);
        let low = _mm256_mul_epu32(mixed, prime);
        let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
        *accumulator = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
    }
}

/// The state of a copy that is hashed on its way. The lanes lie in memory between two calls, and in registers within one.
pub(super) struct Hash {
    lanes: [u64; 8],
    /// Stripes that have been hashed.
    stripes: usize,
    wide: bool,
}

impl Hash {
    /// For an input of `bytes`. `None`: too short, or a machine without the instructions.
    pub fn of(bytes: usize) -> Option<Self> {
        let wide = is_x86_feature_detected!("avx512f");
        let able = bytes > SHORT_BYTES_MAX && (wide || is_x86_feature_detected!("avx2"));
        able.then_some(Self { lanes: START, stripes: 0, wide })
    }

    /// Hashes the stripe of the destination that ends at `at`, unless it is left to the end.
    ///
    /// # Safety
    /// The destination has been written up to `at`, a multiple of stripes.
    pub unsafe fn hash_behind(&mut self, into: *const u8, at: usize, bytes: usize) {
        if at < bytes {
            // SAFETY: it ends within what has been written.
            let stripe = unsafe { into.add(at - STRIPE_BYTES) };
            // SAFETY: a stripe is read, and stored where it was.
            unsafe { self.stripes(stripe, stripe.cast_mut(), 1, Stores::Cached) };
        }
    }

    /// Copies and hashes whole stripes of `available` bytes to `at` of the destination, which has `bytes`; how many bytes it
    /// were. What is left to the end is not among them.
    ///
    /// # Safety
    /// `from` can be read for `available` bytes, the destination be written for as many from `at`, a multiple of stripes.
    pub unsafe fn copy(
        &mut self,
        from: *const u8,
        into: *mut u8,
        at: usize,
        bytes: usize,
        available: usize,
        stores: Stores,
    ) -> usize {
        if !at.is_multiple_of(STRIPE_BYTES) {
            return 0;
        }
        let left = ((bytes - 1) / STRIPE_BYTES).saturating_sub(at / STRIPE_BYTES);
        let whole = left.min(available / STRIPE_BYTES);
        // The last stripe may overlap the one before it, and is read from the destination: it had better be in the cache.
        let far = left.saturating_sub(1).min(whole);
        let aligned = (into as usize).is_multiple_of(STRIPE_BYTES);
        let streamed = if stores == Stores::Streaming && aligned { far } else { 0 };
        // SAFETY: as the caller promises; the two calls share what `whole` stripes there are.
        unsafe {
            self.stripes(from, into.add(at), streamed, Stores::Streaming);
            let rest = streamed * STRIPE_BYTES;
            self.stripes(from.add(rest), into.add(at + rest), whole - streamed, Stores::Cached);
        }
        whole * STRIPE_BYTES
    }

    /// # Safety
    /// `from` can be read, and `into` be written, for so many stripes; streaming, `into` is aligned to one.
    unsafe fn stripes(&mut self, from: *const u8, into: *mut u8, stripes: usize, stores: Stores) {
        // SAFETY: as the caller promises; the machine has the instructions, as `of` has asked.
        unsafe {
            match (self.wide, stores) {
                (true, Stores::Cached) => {
                    copy_512::<false>(&mut self.lanes, self.stripes, from, into, stripes)
                }
                (true, Stores::Streaming) => {
                    copy_512::<true>(&mut self.lanes, self.stripes, from, into, stripes);
                }
                (false, Stores::Cached) => {
                    copy_256::<false>(&mut self.lanes, self.stripes, from, into, stripes)
                }
                (false, Stores::Streaming) => {
                    copy_256::<true>(&mut self.lanes, self.stripes, from, into, stripes);
                }
            }
        }
        self.stripes += stripes;
    }

    /// The hash of the destination.
    ///
    /// # Safety
    /// It has been written, all its `bytes`.
    pub unsafe fn finish(mut self, into: *const u8, bytes: usize) -> u64 {
        let secret = &SECRET[SECRET.len() - STRIPE_BYTES - 7..];
        // SAFETY: the last stripe's bytes, of more than `SHORT_BYTES_MAX`; the machine has the instructions.
        unsafe {
            let last = std::slice::from_raw_parts(into.add(bytes - STRIPE_BYTES), STRIPE_BYTES);
            if self.wide {
                last_512(&mut self.lanes, last, secret);
            } else {
                last_256(&mut self.lanes, last, secret);
            }
            // What went past the cache is seen by whoever is told of it.
            _mm_sfence();
        }
        merge(&self.lanes, bytes)
    }
}

/// Copies whole stripes past the cache; how many bytes that were.
///
/// # Safety
/// `from` can be read for as many bytes as `into` has, none of them of `into`.
pub(super) unsafe fn stream(from: *const u8, into: &mut [u8]) -> usize {
    let aligned = into.as_ptr().cast::<__m512i>().is_aligned();
    if !aligned || !is_x86_feature_detected!("avx512f") {
        return 0;
    }
    // SAFETY: the machine has the instructions, and the destination is aligned, as just asked.
    unsafe { stream_512(from, into) }
}

/// # Safety
/// As [`stream`]; `into` is aligned to a stripe.
#[target_feature(enable = "avx512f")]
unsafe fn stream_512(from: *const u8, into: &mut [u8]) -> usize {
    let (stripes, into) = (into.len() / STRIPE_BYTES, into.as_mut_ptr());
    for at in (0..stripes).map(|stripe| stripe * STRIPE_BYTES) {
        // SAFETY: within both sides, aligned.
        unsafe { _mm512_stream_si512(into.add(at).cast(), _mm512_loadu_si512(from.add(at).cast())) }
    }
    // What went past the cache is seen by whoever is told of it.
    _mm_sfence();
    stripes * STRIPE_BYTES
}

/// # Safety
/// As [`Hash::stripes`].
#[target_feature(enable = "avx512f")]
unsafe fn copy_512<const STREAM: bool>(
    lanes: &mut [u64; 8],
    first: usize,
    from: *const u8,
    into: *mut u8,
    stripes: usize,
) {
    // SAFETY: 64 bytes are read of 64.
    let mut accumulators = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
    let mut nth = first % STRIPES_PER_BLOCK;
    for stripe in 0..stripes {
        // SAFETY: of the stripes that the caller vouches for; the secret has 64 bytes from each step on.
        let (data, key) = unsafe {
            (
                _mm512_loadu_si512(from.add(stripe * STRIPE_BYTES).cast()),
                _mm512_loadu_si512(SECRET.as_ptr().add(nth * SECRET_STEP_BYTES).cast()),
            )
        };
        // SAFETY: as above; aligned where it streams.
        unsafe {
            let place = into.add(stripe * STRIPE_BYTES).cast();
            if STREAM { _mm512_stream_si512(place, data) } else { _mm512_storeu_si512(place, data) }
        }
        let mixed = _mm512_xor_si512(data, key);
        let product = _mm512_mul_epu32(mixed, _mm512_srli_epi64::<32>(mixed));
        let swapped = _mm512_shuffle_epi32::<0b01_00_11_10>(data);
        accumulators = _mm512_add_epi64(accumulators, _mm512_add_epi64(product, swapped));
        nth += 1;
        if nth == STRIPES_PER_BLOCK {
            scramble_512(&mut accumulators, &SECRET[SECRET.len() - STRIPE_BYTES..]);
            nth = 0;
        }
    }
    // SAFETY: 64 bytes are written to 64.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), accumulators) }
}

#[target_feature(enable = "avx512f")]
fn last_512(lanes: &mut [u64; 8], stripe: &[u8], secret: &[u8]) {
    // SAFETY: 64 bytes are read of 64.
    let mut accumulators = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
    accumulate_512(&mut accumulators, stripe, secret);
    // SAFETY: 64 bytes are written to 64.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), accumulators) }
}

/// # Safety
/// As [`Hash::stripes`].
#[target_feature(enable = "avx2")]
unsafe fn copy_256<const STREAM: bool>(
    lanes: &mut [u64; 8],
    first: usize,
    from: *const u8,
    into: *mut u8,
    stripes: usize,
) {
    let mut accumulators = load_256(lanes);
    let mut nth = first % STRIPES_PER_BLOCK;
    for stripe in 0..stripes {
        for (half, accumulator) in accumulators.iter_mut().enumerate() {
            let at = stripe * STRIPE_BYTES + 32 * half;
            // SAFETY: of the stripes that the caller vouches for; the secret has 64 bytes from each step on.
            let (data, key) = unsafe {
                (
                    _mm256_loadu_si256(from.add(at).cast()),
                    _mm256_loadu_si256(SECRET.as_ptr().add(nth * SECRET_STEP_BYTES + 32 * half).cast()),
                )
            };
            // SAFETY: as above; aligned where it streams.
            unsafe {
                let place = into.add(at).cast();
                if STREAM { _mm256_stream_si256(place, data) } else { _mm256_storeu_si256(place, data) }
            }
            let mixed = _mm256_xor_si256(data, key);
            let product = _mm256_mul_epu32(mixed, _mm256_srli_epi64::<32>(mixed));
            let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
            *accumulator = _mm256_add_epi64(*accumulator, _mm256_add_epi64(product, swapped));
        }
        nth += 1;
        if nth == STRIPES_PER_BLOCK {
            scramble_256(&mut accumulators, &SECRET[SECRET.len() - STRIPE_BYTES..]);
            nth = 0;
        }
    }
    store_256(lanes, accumulators);
}

#[target_feature(enable = "avx2")]
fn last_256(lanes: &mut [u64; 8], stripe: &[u8], secret: &[u8]) {
    let mut accumulators = load_256(lanes);
    accumulate_256(&mut accumulators, stripe, secret);
    store_256(lanes, accumulators);
}

#[target_feature(enable = "avx2")]
fn load_256(lanes: &[u64; 8]) -> [__m256i; 2] {
    // SAFETY: twice 32 bytes are read of 64.
    unsafe { [_mm256_loadu_si256(lanes.as_ptr().cast()), _mm256_loadu_si256(lanes[4..].as_ptr().cast())] }
}

#[target_feature(enable = "avx2")]
fn store_256(lanes: &mut [u64; 8], accumulators: [__m256i; 2]) {
    // SAFETY: twice 32 bytes are written to 64.
    unsafe {
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), accumulators[0]);
        _mm256_storeu_si256(lanes[4..].as_mut_ptr().cast(), accumulators[1]);
    }
}

fn merge(lanes: &[u64; 8], bytes: usize) -> u64 {
    let words = SECRET[11..].as_chunks::<8>().0;
    let mut hash = (bytes as u64).wrapping_mul(PRIME64_1);
    for (lanes, words) in lanes.as_chunks::<2>().0.iter().zip(words.as_chunks::<2>().0) {
        let [a, b] = [0, 1].map(|i| lanes[i] ^ u64::from_le_bytes(words[i]));
        let product = u128::from(a) * u128::from(b);
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
    hash ^ hash >> 32
}

/// The algorithm's default.
#[rustfmt::skip]
const SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];
