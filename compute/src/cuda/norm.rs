//! RMS norm fused with what comes before (a sum) and after (rounding for the next product).

use super::launch::{Argument, Grid, launch, size};
use super::{Activations, CudaError, Device, InputFormat, View, ViewMut};
use crate::fp8::{self, ScaleFormat};

/// The kernel's parameters; `struct Norm` there.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Norm {
    x: u64,
    add: u64,
    rows: u64,
    w: u64,
    y: u64,
    y_bf16: u64,
    y_parts: u64,
    codes: u64,
    scales: u64,
    x_rows: u32,
    stride: u32,
    dim: u32,
    vector: u32,
    power_of_two: u32,
    eps: f32,
    amax_min: f32,
    unused: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Norm {}

/// Threads of a row: the kernel's own number.
pub(super) const THREADS: u32 = 512;

/// Up to so many rows of such widths are shared by the blocks of a cluster, so many each. The same bits.
const SPLIT_ROWS: usize = 16;
const SPLIT_DIMS: std::ops::RangeInclusive<usize> = 2049..=8192;
const SPLIT: usize = 4;

/// Rows to norm: the first values, as many as the norm's weight has, of every `stride` in `x`.
pub struct NormRows<'a, 'b> {
    /// `[rows, stride]`.
    pub x: &'a mut ViewMut<'b, f32>,
    /// Values from row to row.
    pub stride: usize,
    /// Added to `x` first, and stored there: `[rows, stride]`.
    pub add: Option<View<'a, f32>>,
    /// Which rows of `x`, in the order of the outputs; none: all. An index past the rows ends the context.
    pub index: Option<View<'a, u32>>,
}

impl Device {
    /// `x / sqrt(mean(x²) + eps) · w` for each row, as f32 into `plain` and rounded into each of `outputs`, which have
    /// different formats.
    ///
    /// # Panics
    /// If a length does not fit, or two outputs have formats that lie in the same place.
    pub fn norm(
        &self,
        rows: NormRows<'_, '_>,
        w: View<'_, f32>,
        eps: f32,
        plain: Option<&mut ViewMut<'_, f32>>,
        outputs: &mut [&mut Activations],
    ) -> Result<(), CudaError> {
        let (dim, add) = (w.len(), rows.add);
        let mut norm = Norm::new(rows.x.view(), rows.stride, w, eps);
        assert!(add.is_none_or(|add| add.len() == rows.x.len()), "a summand for each value");
        let count = rows.index.map_or(rows.x.len() / rows.stride, |index| index.len());
        norm.add = add.map_or(0, |add| add.address());
        norm.rows = rows.index.map_or(0, |index| index.address());
        if count == 0 {
            return Ok(());
        }
        if let Some(plain) = plain {
            assert_eq!(plain.len(), count * dim, "rows out");
            norm.y = plain.address();
        }
        norm.round_into(count, outputs);
        norm.choose_loads();
        let few = count <= SPLIT_ROWS && SPLIT_DIMS.contains(&dim) && !self.architecture.starts_with("sm_8");
        // SAFETY: a thread block or four a row; indices are checked in the kernel, everything else above; null is not written.
        unsafe {
            if few {
                launch!(self, norm_rows_split, Grid::line(SPLIT * count, THREADS); norm)
            } else {
                launch!(self, norm_rows, Grid::line(count, THREADS); norm)
            }
        }
    }
}

impl Norm {
    /// All rows of `x`, the first values of every `stride`, into nothing yet.
    pub(super) fn new(x: View<'_, f32>, stride: usize, w: View<'_, f32>, eps: f32) -> Self {
        let dim = w.len();
        assert!(dim > 0 && dim <= stride && x.len().is_multiple_of(stride), "rows of {dim} in {stride}");
        Self {
            x: x.address(),
            add: 0,
            rows: 0,
            w: w.address(),
            y: 0,
            y_bf16: 0,
            y_parts: 0,
            codes: 0,
            scales: 0,
            x_rows: size(x.len() / stride),
            stride: size(stride),
            dim: size(dim),
            vector: 0,
            power_of_two: 0,
            eps,
            amax_min: fp8::ACTIVATION_AMAX_MIN,
            unused: 0,
        }
    }

    /// `count` rows go into each of `outputs`.
    pub(super) fn round_into(&mut self, count: usize, outputs: &mut [&mut Activations]) {
        for output in outputs {
            assert_eq!(output.channels(), self.dim as usize, "channels out");
            // Slicing checks that there is room.
            output.inputs(count);
            let place = match output.format() {
                InputFormat::F32 => (&mut self.y, output.f32.view().address()),
                InputFormat::Bf16 => (&mut self.y_bf16, output.bf16.view().address()),
                InputFormat::Parts => (&mut self.y_parts, output.bf16.view().address()),
                InputFormat::Fp8(format) => {
                    self.power_of_two = u32::from(format == ScaleFormat::Ue8m0);
                    self.scales = output.scales.view().address();
                    (&mut self.codes, output.codes.view().address())
                }
            };
            assert!(*place.0 == 0, "two outputs of one format");
            *place.0 = place.1;
        }
    }

    /// Whether four values are loaded and stored at a time. Once all places are known.
    pub(super) fn choose_loads(&mut self) {
        let places = [self.x, self.add, self.w, self.y, self.y_bf16, self.y_parts, self.codes];
        let by_four = self.stride.is_multiple_of(4) && self.dim.is_multiple_of(4);
        self.vector = u32::from(by_four && places.into_iter().all(|address| address.is_multiple_of(16)));
    }
}
