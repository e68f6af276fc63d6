//! Eight lanes in plain Rust. Products and sums are rounded separately: a fused one in software would take an age.

use super::Vector;
use crate::fp8;

const LANES: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

macro_rules! lanes {
    ($lane:ident => $value:expr) => {{
        let mut out = [0.0f32; LANES];
        let mut $lane = 0;
        while $lane < LANES {
            out[$lane] = $value;
            $lane += 1;
        }
        Portable(out)
    }};
}

// The bodies need no promise but valid pointers.
impl Vector for Portable {
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's pointer to 8 values.
        Self(unsafe { at.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's pointer to 8 values.
        unsafe { at.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const u8) -> Self {
        // SAFETY: the caller's pointer to 8 values.
        let bits = unsafe { at.cast::<[u16; LANES]>().read_unaligned() };
        lanes!(i => fp8::from_bf16(u16::from_le(bits[i])))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, at: *mut u8) {
        // SAFETY: the caller's pointer to 8 values.
        unsafe { at.cast::<[u16; LANES]>().write_unaligned(self.0.map(|x| fp8::to_bf16(x).to_le())) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(at: *const u8) -> Self {
        // SAFETY: the caller's pointer to 8 codes.
        let codes = unsafe { at.cast::<[u8; LANES]>().read_unaligned() };
        lanes!(i => fp8::decode(codes[i]))
    }

    #[inline(always)]
    unsafe fn store_e4m3(self, at: *mut u8) {
        // SAFETY: the caller's pointer to 8 codes.
        unsafe { at.cast::<[u8; LANES]>().write_unaligned(self.0.map(fp8::encode)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        lanes!(i => self.0[i] + other.0[i])
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        lanes!(i => self.0[i] - other.0[i])
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        lanes!(i => self.0[i] * other.0[i])
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        lanes!(i => self.0[i] / other.0[i])
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        lanes!(i => self.0[i] * factor.0[i] + addend.0[i])
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        lanes!(i => if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        lanes!(i => if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] })
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        lanes!(i => self.0[i].abs())
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        lanes!(i => f32::from_bits((((self.0[i] as i32) + 127) as u32) << 23))
    }

    #[inline(always)]
    unsafe fn sum4(vectors: [Self; 4]) -> [f32; 4] {
        vectors.map(|Portable(v)| {
            let half = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
            (half[0] + half[2]) + (half[1] + half[3])
        })
    }
}
