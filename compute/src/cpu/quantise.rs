//! Rounding rows to bf16 and quantising them to E4M3 with a scale per 128 channels.

use super::Cpu;
use super::vector::{self, LANES_MAX, Operation, Vector};
use crate::fp8::{self, BLOCK, ScaleFormat};

impl Cpu {
    /// Quantises one row: codes, their values as little-endian bf16 (`2 * x.len()` bytes) if wanted, and a scale per
    /// 128 channels.
    pub(crate) fn quantise_row(&self, x: &[f32], rule: ScaleRule, codes: &mut [u8], scales: &mut [f32]) {
        assert!(codes.len() == x.len() && scales.len() == x.len().div_ceil(BLOCK));
        vector::run(self.isa, QuantiseRow { x, rule, codes, scales });
    }

    /// The values of E4M3 codes as bf16; exact.
    pub(crate) fn e4m3_to_bf16(&self, codes: &[u8], out: &mut [u16]) {
        assert_eq!(codes.len(), out.len());
        vector::run(self.isa, E4m3ToBf16 { codes, out });
    }

    /// Rounds to bf16, nearest even.
    pub(crate) fn f32_to_bf16(&self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len());
        vector::run(self.isa, F32ToBf16 { x, out });
    }
}

/// How a block's scale follows from its largest magnitude.
#[derive(Clone, Copy)]
pub(crate) struct ScaleRule {
    pub(crate) amax_min: f32,
    pub(crate) format: ScaleFormat,
}

struct QuantiseRow<'a> {
    x: &'a [f32],
    rule: ScaleRule,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
}

impl Operation for QuantiseRow<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let mut block = 0;
        while block < self.scales.len() {
            let start = block * BLOCK;
            let len = BLOCK.min(self.x.len() - start);
            // SAFETY: the machine has the instruction set; `len` values from `start` on in input and output.
            unsafe {
                let x = self.x.as_ptr().add(start);
                let mut amax = V::splat(0.0);
                let mut i = 0;
                while i < len {
                    // NaN does not count: `max` gives its second operand then.
                    amax = V::load_partial(x.add(i), len - i).abs().max(amax);
                    i += V::LANES;
                }
                let scale = fp8::scale(amax.largest(), self.rule.amax_min, self.rule.format);
                self.scales[block] = scale;
                let codes = self.codes.as_mut_ptr().add(start);
                i = 0;
                while i < len {
                    // Division, not multiplication by the reciprocal: the codes are then those of the scalar rule.
                    let scaled = V::load_partial(x.add(i), len - i).div(V::splat(scale));
                    if len - i >= V::LANES {
                        scaled.store_e4m3(codes.add(i));
                    } else {
                        let mut lanes = [0u8; LANES_MAX];
                        scaled.store_e4m3(lanes.as_mut_ptr());
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), codes.add(i), len - i);
                    }
                    i += V::LANES;
                }
            }
            block += 1;
        }
    }
}

struct E4m3ToBf16<'a> {
    codes: &'a [u8],
    out: &'a mut [u16],
}

impl Operation for E4m3ToBf16<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.codes.len();
        let mut i = 0;
        while i + 64 <= len {
            // SAFETY: the machine has the instruction set; 64 values are left in both slices.
            unsafe { V::e4m3_to_bf16_64(self.codes.as_ptr().add(i), self.out.as_mut_ptr().add(i).cast()) }
            i += 64;
        }
        while i + V::LANES <= len {
            // SAFETY: the machine has the instruction set; a whole vector is left in both slices.
            unsafe {
                V::load_e4m3(self.codes.as_ptr().add(i)).store_bf16(self.out.as_mut_ptr().add(i).cast())
            }
            i += V::LANES;
        }
        while i < len {
            self.out[i] = fp8::E4M3_TO_BF16[usize::from(self.codes[i])];
            i += 1;
        }
    }
}

struct F32ToBf16<'a> {
    x: &'a [f32],
    out: &'a mut [u16],
}

impl Operation for F32ToBf16<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.x.len();
        let mut i = 0;
        while i + V::LANES <= len {
            // SAFETY: the machine has the instruction set; a whole vector is left in both slices.
            unsafe { V::load(self.x.as_ptr().add(i)).store_bf16(self.out.as_mut_ptr().add(i).cast()) }
            i += V::LANES;
        }
        while i < len {
            self.out[i] = fp8::to_bf16(self.x[i]);
            i += 1;
        }
    }
}
