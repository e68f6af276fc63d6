//! Rows on their way into a matrix product, as the product takes them.

use super::{Buffer, CudaError, Device, Inputs, Pinned};
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

/// Rows of one format in page-locked memory, on their way to the device or from it.
pub struct RowStaging {
    f32: Pinned<f32>,
    bf16: Pinned<u16>,
    codes: Pinned<u8>,
    scales: Pinned<f32>,
}

impl RowStaging {
    /// Room for `rows_max` rows of `channels`.
    ///
    /// # Panics
    /// For parts, which never leave the device.
    pub fn new(
        device: &Device,
        format: InputFormat,
        rows_max: usize,
        channels: usize,
    ) -> Result<Self, CudaError> {
        assert_ne!(format, InputFormat::Parts, "parts stay on the device");
        let when = |is: bool, len: usize| if is { len } else { 0 };
        let (values, fp8) = (rows_max * channels, matches!(format, InputFormat::Fp8(_)));
        Ok(Self {
            f32: device.pinned(when(format == InputFormat::F32, values))?,
            bf16: device.pinned(when(format == InputFormat::Bf16, values))?,
            codes: device.pinned(when(fp8, values))?,
            scales: device.pinned(when(fp8, rows_max * channels.div_ceil(BLOCK)))?,
        })
    }

    /// Brings the first `rows` rows of `from` here. They are there after [`Device::synchronize`].
    ///
    /// # Panics
    /// If there are not so many, or no room for them.
    pub fn fetch(&mut self, device: &Device, from: &Activations, rows: usize) -> Result<(), CudaError> {
        match from.inputs(rows) {
            Inputs::F32(x) => device.copy_out_later(x, &mut self.f32),
            Inputs::Bf16(x) => device.copy_out_later(x, &mut self.bf16),
            Inputs::Fp8 { codes, scales } => {
                device.copy_out_later(codes, &mut self.codes)?;
                device.copy_out_later(scales, &mut self.scales)
            }
        }
    }

    /// The first `rows` rows, fetched before, as the wire has them.
    pub fn to_wire(&self, rows: usize, channels: usize, out: &mut Vec<u8>) {
        out.clear();
        if !self.codes.is_empty() {
            let blocks = channels.div_ceil(BLOCK);
            let scales = self.scales.chunks_exact(blocks);
            for (codes, scales) in self.codes.chunks_exact(channels).zip(scales).take(rows) {
                out.extend_from_slice(codes);
                out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
            }
        } else if !self.bf16.is_empty() {
            out.extend(self.bf16[..rows * channels].iter().flat_map(|value| value.to_le_bytes()));
        } else {
            out.extend(self.f32[..rows * channels].iter().flat_map(|value| value.to_le_bytes()));
        }
    }

    /// Sends rows to the first places of `to`; they stay here as they are until [`Device::synchronize`].
    ///
    /// # Panics
    /// If formats or channels differ, or there is no room.
    pub fn send(
        &mut self,
        device: &Device,
        rows: &crate::Activations,
        to: &mut Activations,
    ) -> Result<(), CudaError> {
        assert!(InputFormat::from(rows.format()) == to.format, "rows of one format");
        assert_eq!(rows.channels(), to.channels, "rows of one width");
        let (count, channels) = (rows.rows(), rows.channels());
        let values = count * channels;
        match to.format {
            InputFormat::F32 => {
                take_rows(&rows.f32, rows.stride(), channels, &mut self.f32[..values]);
                device.copy_in_later(&self.f32, &mut to.f32.slice_mut(0..values))
            }
            InputFormat::Bf16 => {
                take_rows(&rows.bf16, rows.stride(), channels, &mut self.bf16[..values]);
                device.copy_in_later(&self.bf16, &mut to.bf16.slice_mut(0..values))
            }
            InputFormat::Fp8(_) => {
                let (codes, scales) = rows.codes();
                self.codes[..values].copy_from_slice(codes);
                self.scales[..scales.len()].copy_from_slice(scales);
                device.copy_in_later(&self.codes, &mut to.codes.slice_mut(0..values))?;
                device.copy_in_later(&self.scales, &mut to.scales.slice_mut(0..scales.len()))
            }
            InputFormat::Parts => unreachable!("no rows of the host are parts"),
        }
    }
}

/// Rows that are `stride` apart, one after the other.
fn take_rows<T: Copy>(from: &[T], stride: usize, width: usize, to: &mut [T]) {
    for (row, to) in to.chunks_exact_mut(width).enumerate() {
        to.copy_from_slice(&from[row * stride..][..width]);
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
