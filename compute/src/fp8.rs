//! E4M3 (the `fn` variant: largest value 448, no infinities, NaN = `0x7F`) and its scales.
//!
//! Scalar code and tables only; the vector forms in [`crate::cpu`] are tested to agree with these bit by bit.

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;

/// Channels that share one activation scale, and side of a weight block.
pub const BLOCK: usize = 128;

/// Smallest `amax` an activation block is scaled by, so that an all-zero block has a finite reciprocal.
pub const ACTIVATION_AMAX_MIN: f32 = 1e-4;

/// Smallest `amax` a cached latent block is scaled by: the smallest normal `f32` that stays normal after `/ 448`.
/// Latents may be legitimately small, hence no coarser clamp here.
pub const LATENT_AMAX_MIN: f32 = f32::MIN_POSITIVE * 512.0;

/// How an activation scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    /// `amax / 448` as it comes.
    F32,
    /// Rounded up to a power of two, as checkpoints with `scale_fmt: ue8m0` were trained.
    Ue8m0,
}

/// Value of every E4M3 code.
pub static E4M3_TO_F32: [f32; 256] = e4m3_table();

/// Value of every E4M3 code as bf16 bits. Exact, and never a bf16 subnormal (the smallest E4M3 value is 2⁻⁹), which
/// matters to `vdpbf16ps`: it reads subnormals as zero.
pub static E4M3_TO_BF16: [u16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = (E4M3_TO_F32[code].to_bits() >> 16) as u16;
        code += 1;
    }
    table
};

/// One byte of the bf16 bits of each of the 128 codes without sign: what byte permutes look up.
#[cfg(target_arch = "x86_64")]
pub(crate) const fn bf16_byte_table(shift: u32) -> [u8; 128] {
    let mut table = [0; 128];
    let mut code = 0;
    while code < 128 {
        table[code] = (E4M3_TO_BF16[code] >> shift) as u8;
        code += 1;
    }
    table
}

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0usize;
    while code < 256 {
        let exponent = (code >> 3) & 0xF;
        let mantissa = (code & 7) as f32;
        let magnitude = if code & 0x7F == 0x7F {
            f32::NAN
        } else if exponent == 0 {
            mantissa / 512.0
        } else {
            // 2^(e-7) assembled from bits: `powi` is not const.
            f32::from_bits(((exponent + 120) as u32) << 23) * (1.0 + mantissa / 8.0)
        };
        table[code] = if code & 0x80 != 0 { -magnitude } else { magnitude };
        code += 1;
    }
    table
}

/// The value of an E4M3 code.
#[inline]
pub fn decode(code: u8) -> f32 {
    E4M3_TO_F32[usize::from(code)]
}

/// The E4M3 code nearest to `x`: ties to even, saturating at ±448; NaN gives NaN.
#[inline]
pub fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7F;
    }
    let magnitude = magnitude.min(E4M3_MAX);
    if magnitude < 1.0 / 64.0 {
        // Subnormal: at 1.5·2^14 one ulp of f32 is 2^-9, so the addition itself rounds to nearest even.
        const MAGIC: f32 = 24576.0;
        return sign | (((magnitude + MAGIC).to_bits() - MAGIC.to_bits()) as u8);
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_FFFF + ((bits >> 20) & 1);
    sign | (((rounded >> 20) - (120 << 3)) as u8)
}

/// The scale of a block whose largest magnitude is `amax`: `max(amax, amax_min) / 448`, rounded up to a power of two
/// for [`ScaleFormat::Ue8m0`].
#[inline]
pub fn scale(amax: f32, amax_min: f32, format: ScaleFormat) -> f32 {
    let scale = amax.max(amax_min) / E4M3_MAX;
    match format {
        ScaleFormat::F32 => scale,
        ScaleFormat::Ue8m0 => power_of_two_up(scale),
    }
}

/// `2^ceil(log2 s)` for a positive normal `s`, from the bits alone.
#[inline]
fn power_of_two_up(s: f32) -> f32 {
    f32::from_bits((s.to_bits() + 0x7F_FFFF) & 0x7F80_0000)
}

/// `x` rounded to bf16, nearest even. NaN stays NaN.
#[inline]
pub fn to_bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// The value of bf16 bits.
#[inline]
pub fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests;
