//! Rows on their way into a matrix product, as the product takes them.

use super::{Buffer, CudaError, Device, Inputs};
use crate::fp8::{BLOCK, ScaleFormat};

/// What rows are rounded to before a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFormat {
    /// As they are.
    F32,
    /// Rounded to bf16.
    Bf16,
    /// E4M3 per row and 128 channels.
    Fp8(ScaleFormat),
    /// Three bf16 values whose sum is the f32: what [`Device::linear_parts`] takes.
    Parts,
}

impl From<crate::ActivationFormat> for InputFormat {
    fn from(format: crate::ActivationFormat) -> Self {
        match format {
            crate::ActivationFormat::F32 => Self::F32,
            crate::ActivationFormat::Bf16 => Self::Bf16,
            crate::ActivationFormat::Fp8(scale) => Self::Fp8(scale),
        }
    }
}

/// Room for `rows_max` rows of `channels` in one format.
pub struct Activations {
    format: InputFormat,
    channels: usize,
    pub(super) f32: Buffer<f32>,
    pub(super) bf16: Buffer<u16>,
    pub(super) codes: Buffer<u8>,
    pub(super) scales: Buffer<f32>,
}

impl Activations {
    /// Allocates it; what it holds is undefined.
    pub fn new(
        device: &Device,
        format: InputFormat,
        rows_max: usize,
        channels: usize,
    ) -> Result<Self, CudaError> {
        let values = rows_max * channels;
        let when = |is: bool, len: usize| if is { len } else { 0 };
        let fp8 = matches!(format, InputFormat::Fp8(_));
        let bf16 = match format {
            InputFormat::Bf16 => values,
            InputFormat::Parts => 3 * values,
            _ => 0,
        };
        Ok(Self {
            format,
            channels,
            f32: device.alloc(when(format == InputFormat::F32, values))?,
            bf16: device.alloc(bf16)?,
            codes: device.alloc(when(fp8, values))?,
            scales: device.alloc(when(fp8, rows_max * channels.div_ceil(BLOCK)))?,
        })
    }

    /// What rows are rounded to.
    pub fn format(&self) -> InputFormat {
        self.format
    }

    /// Channels of a row.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The first `rows` rows.
    ///
    /// # Panics
    /// If there is no room for so many.
    pub fn inputs(&self, rows: usize) -> Inputs<'_> {
        let values = rows * self.channels;
        match self.format {
            InputFormat::F32 => Inputs::F32(self.f32.slice(0..values)),
            InputFormat::Bf16 => Inputs::Bf16(self.bf16.slice(0..values)),
            InputFormat::Parts => Inputs::Bf16(self.bf16.slice(0..3 * values)),
            InputFormat::Fp8(_) => Inputs::Fp8 {
                codes: self.codes.slice(0..values),
                scales: self.scales.slice(0..rows * self.channels.div_ceil(BLOCK)),
            },
        }
    }
}

impl Device {
    /// Rounds rows `x` `[rows, channels]` into `out`.
    ///
    /// # Panics
    /// If `x` is no whole number of rows or `out` has no room, or wants [`InputFormat::Parts`].
    pub fn prepare(&self, x: super::View<'_, f32>, out: &mut Activations) -> Result<(), CudaError> {
        assert!(x.len().is_multiple_of(out.channels), "{} values in rows of {}", x.len(), out.channels);
        let blocks = x.len() / out.channels * out.channels.div_ceil(BLOCK);
        match out.format {
            InputFormat::F32 => self.copy_within(x, &mut out.f32.slice_mut(0..x.len())),
            InputFormat::Bf16 => self.round_bf16(x, &mut out.bf16.slice_mut(0..x.len())),
            InputFormat::Fp8(format) => {
                let (codes, scales) =
                    (&mut out.codes.slice_mut(0..x.len()), &mut out.scales.slice_mut(0..blocks));
                self.quantise(x, out.channels, format, codes, scales)
            }
            InputFormat::Parts => panic!("only the norm makes parts"),
        }
    }
}
