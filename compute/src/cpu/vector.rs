//! One vector type per instruction set, so that an operator outside the matrix products is written once.
//!
//! An operator implements [`Operation`] with `#[inline(always)]` all the way down, and [`run`] compiles it once per
//! instruction set: everything is inlined into one function that has the features enabled. Hot loops here use no
//! closures and no iterator adaptors, which would be compiled on their own, without the features.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::Isa;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::broadcast;

/// The most lanes of any instruction set.
pub(super) const LANES_MAX: usize = 16;

/// A vector of f32.
///
/// # Safety
/// Every method asks that the machine has the instruction set; loads and stores ask for as many readable or writable
/// values behind the pointer as they name ([`Self::LANES`] if they name none). No alignment is asked for.
pub(super) trait Vector: Copy {
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self;
    /// The value at `at` in every lane.
    #[inline(always)]
    unsafe fn broadcast(at: *const f32) -> Self {
        // SAFETY: the same contract.
        unsafe { Self::splat(*at) }
    }
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn store(self, at: *mut f32);
    /// From little-endian bf16.
    unsafe fn load_bf16(at: *const u8) -> Self;
    /// To little-endian bf16, nearest even.
    unsafe fn store_bf16(self, at: *mut u8);
    /// From E4M3 codes.
    unsafe fn load_e4m3(at: *const u8) -> Self;
    /// To E4M3 codes as [`crate::fp8::encode`].
    unsafe fn store_e4m3(self, at: *mut u8);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + addend`, fused where the instruction set can.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger; `other` if either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller; `other` if either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn abs(self) -> Self;
    /// 2ⁿ of whole numbers in -126..=127.
    unsafe fn power_of_two(self) -> Self;
    /// The sums over the lanes of four vectors, each in the same fixed tree.
    unsafe fn sum4(vectors: [Self; 4]) -> [f32; 4];

    /// [`Self::sum4`] of each of the four.
    #[inline(always)]
    unsafe fn sum4x4(vectors: [[Self; 4]; 4]) -> [[f32; 4]; 4] {
        let [a, b, c, d] = vectors;
        // SAFETY: the same contract.
        unsafe { [Self::sum4(a), Self::sum4(b), Self::sum4(c), Self::sum4(d)] }
    }

    /// 64 E4M3 codes times `scale`.
    #[inline(always)]
    unsafe fn scale_e4m3_64(codes: *const u8, scale: Self, out: *mut f32) {
        let mut i = 0;
        while i < 64 {
            // SAFETY: the same contract, for 64 values in and out.
            unsafe { Self::load_e4m3(codes.add(i)).mul(scale).store(out.add(i)) }
            i += Self::LANES;
        }
    }

    /// 64 E4M3 codes as bf16; exact.
    #[inline(always)]
    unsafe fn e4m3_to_bf16_64(codes: *const u8, out: *mut u8) {
        let mut i = 0;
        while i < 64 {
            // SAFETY: the same contract, for 64 values in and out.
            unsafe { Self::load_e4m3(codes.add(i)).store_bf16(out.add(2 * i)) }
            i += Self::LANES;
        }
    }

    /// Asks for the line at an address, which may be any.
    #[inline(always)]
    fn prefetch(_at: *const u8) {}

    /// The sum over the lanes, in the tree of [`Self::sum4`].
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the same contract.
        unsafe { Self::sum4([self; 4])[0] }
    }

    /// Lane 0.
    #[inline(always)]
    unsafe fn first(self) -> f32 {
        let mut lanes = [0.0f32; LANES_MAX];
        // SAFETY: the same contract; room for any vector.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes[0]
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES_MAX];
        // SAFETY: the same contract; room for any vector.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut largest = lanes[0];
        let mut i = 1;
        while i < Self::LANES {
            largest = if lanes[i] > largest { lanes[i] } else { largest };
            i += 1;
        }
        largest
    }

    /// The first `count` values, zeros after them.
    #[inline(always)]
    unsafe fn load_partial(at: *const f32, count: usize) -> Self {
        let mut lanes = [0.0f32; LANES_MAX];
        // SAFETY: the same contract; room for any vector.
        unsafe {
            if count >= Self::LANES {
                return Self::load(at);
            }
            std::ptr::copy_nonoverlapping(at, lanes.as_mut_ptr(), count);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores the first `count` lanes.
    #[inline(always)]
    unsafe fn store_partial(self, at: *mut f32, count: usize) {
        let mut lanes = [0.0f32; LANES_MAX];
        // SAFETY: the same contract; room for any vector.
        unsafe {
            if count >= Self::LANES {
                return self.store(at);
            }
            self.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), at, count);
        }
    }

    /// eˣ within 2 ulp; below -87.3 (where f32 ends) the smallest normal, NaN for NaN. Range reduction by ln 2 in two
    /// parts (the first is exact times any n that occurs), then the Taylor polynomial of degree 7.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the same contract.
        unsafe {
            let x = Self::splat(88.0).min(Self::splat(-87.3).max(self));
            // Adding 1.5·2²³ leaves the nearest whole number in the low bits.
            let magic = Self::splat(12_582_912.0);
            let n = x.mul_add(Self::splat(std::f32::consts::LOG2_E), magic).sub(magic);
            let r = n.mul_add(Self::splat(-0.693_359_4), x);
            let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
            let mut sum = Self::splat(1.0 / 5040.0);
            sum = sum.mul_add(r, Self::splat(1.0 / 720.0));
            sum = sum.mul_add(r, Self::splat(1.0 / 120.0));
            sum = sum.mul_add(r, Self::splat(1.0 / 24.0));
            sum = sum.mul_add(r, Self::splat(1.0 / 6.0));
            sum = sum.mul_add(r, Self::splat(0.5));
            sum = sum.mul_add(r, Self::splat(1.0));
            sum = sum.mul_add(r, Self::splat(1.0));
            sum.mul(n.power_of_two())
        }
    }
}

/// An operator's inner loop, written for any vector.
pub(super) trait Operation {
    /// Does the work.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    unsafe fn run<V: Vector>(self);
}

/// Runs an operation with the vectors of `isa`, which the machine must have ([`super::Cpu`] sees to it).
pub(super) fn run(isa: Isa, operation: impl Operation) {
    match isa {
        // SAFETY: `isa` is available.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::run(operation) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::run(operation) },
        // SAFETY: plain Rust runs anywhere.
        _ => unsafe { operation.run::<portable::Portable>() },
    }
}

#[cfg(test)]
mod tests;
