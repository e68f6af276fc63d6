//! Weights on the device.

use super::{Buffer, CudaError, Device, Uploads, ViewMut};
use crate::WeightFormat;
use crate::fp8::{self, BLOCK};
use crate::matrix::{HeadStorage, Storage};

/// `count` matrices of one shape and format, one after the other.
pub(super) struct Stack {
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) format: WeightFormat,
    weights: Buffer<u8>,
    scales: Buffer<f32>,
}

impl Stack {
    fn alloc(
        device: &Device,
        count: usize,
        (rows, cols): (usize, usize),
        format: WeightFormat,
    ) -> Result<Self, CudaError> {
        let (value, scales) = match format {
            WeightFormat::F32 => (4, 0),
            WeightFormat::Bf16 => (2, 0),
            WeightFormat::Fp8 => (1, rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK)),
        };
        let weights = device.alloc(count * rows * cols * value)?;
        Ok(Self { count, rows, cols, format, weights, scales: device.alloc(count * scales)? })
    }

    /// Where there are `uploads`, bytes that are the file's own go through them.
    fn set(
        &mut self,
        device: &Device,
        index: usize,
        matrix: &crate::Matrix,
        uploads: Option<&mut Uploads>,
    ) -> Result<(), CudaError> {
        assert!(
            (matrix.rows(), matrix.cols(), matrix.format()) == (self.rows, self.cols, self.format),
            "matrices of one shape and format"
        );
        let (bytes, scales) = (self.weights.len() / self.count, self.scales.len() / self.count);
        let later = |weights: &bytes::Bytes, to: &mut Buffer<u8>| match uploads {
            Some(uploads) => uploads.copy(weights, to, index * bytes),
            None => device.copy_in(weights, &mut to.slice_mut(index * bytes..(index + 1) * bytes)),
        };
        match &matrix.storage {
            Storage::F32(weights) => {
                let to = &mut self.weights.slice_mut(index * bytes..(index + 1) * bytes);
                device.copy_in(bytes_of(weights), to)
            }
            Storage::Bf16(weights) => later(weights, &mut self.weights),
            Storage::Fp8 { codes, scales: values } => {
                later(codes, &mut self.weights)?;
                device.copy_in(values, &mut self.scales.slice_mut(index * scales..(index + 1) * scales))
            }
            Storage::Panels { .. } => unreachable!("only what the CPU multiplies is arranged for it"),
        }
    }

    pub(super) fn scales_len(&self) -> usize {
        self.scales.len()
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        (self.weights.view().address(), self.scales.view().address())
    }
}

/// A weight matrix `[rows, cols]` = `[out, in]` on the device, stored as [`crate::Matrix`] stores it.
pub struct Matrix(pub(super) Stack);

impl Matrix {
    /// Copies a matrix to the device.
    pub fn new(device: &Device, matrix: &crate::Matrix) -> Result<Self, CudaError> {
        let mut stack = Stack::alloc(device, 1, (matrix.rows(), matrix.cols()), matrix.format())?;
        stack.set(device, 0, matrix, None)?;
        Ok(Self(stack))
    }

    /// As [`Self::new`], through `uploads`: it is there once they are finished.
    pub fn new_later(
        device: &Device,
        matrix: &crate::Matrix,
        uploads: &mut Uploads,
    ) -> Result<Self, CudaError> {
        let mut stack = Stack::alloc(device, 1, (matrix.rows(), matrix.cols()), matrix.format())?;
        stack.set(device, 0, matrix, Some(uploads))?;
        Ok(Self(stack))
    }

    /// Room for one; what it holds is undefined.
    pub fn alloc(device: &Device, rows: usize, cols: usize, format: WeightFormat) -> Result<Self, CudaError> {
        Ok(Self(Stack::alloc(device, 1, (rows, cols), format)?))
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.0.cols
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.0.format
    }

    /// Weights as bytes, and scales.
    pub fn parts_mut(&mut self) -> (ViewMut<'_, u8>, ViewMut<'_, f32>) {
        (self.0.weights.view_mut(), self.0.scales.view_mut())
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        self.0.addresses()
    }
}

/// A matrix of the same shape and format for each of some experts.
pub struct ExpertMatrices(pub(super) Stack);

impl ExpertMatrices {
    /// Room for `experts` of them; what it holds is undefined.
    pub fn alloc(
        device: &Device,
        experts: usize,
        (rows, cols): (usize, usize),
        format: WeightFormat,
    ) -> Result<Self, CudaError> {
        Ok(Self(Stack::alloc(device, experts, (rows, cols), format)?))
    }

    /// Whether `matrix` has the shape and format of these.
    pub fn takes(&self, matrix: &crate::Matrix) -> bool {
        let Stack { rows, cols, format, .. } = self.0;
        (matrix.rows(), matrix.cols(), matrix.format()) == (rows, cols, format)
    }

    /// Copies an expert's matrix to the device.
    ///
    /// # Panics
    /// If there is no such expert or the matrix has another shape or format.
    pub fn set(&mut self, device: &Device, expert: usize, matrix: &crate::Matrix) -> Result<(), CudaError> {
        self.0.set(device, expert, matrix, None)
    }

    /// As [`Self::set`], through `uploads`: it is there once they are finished.
    ///
    /// # Panics
    /// As [`Self::set`].
    pub fn set_later(
        &mut self,
        device: &Device,
        expert: usize,
        matrix: &crate::Matrix,
        uploads: &mut Uploads,
    ) -> Result<(), CudaError> {
        self.0.set(device, expert, matrix, Some(uploads))
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.0.format
    }

    /// Experts.
    pub fn experts(&self) -> usize {
        self.0.count
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.0.cols
    }

    /// Weights as bytes, and scales, expert after expert.
    pub fn parts_mut(&mut self) -> (ViewMut<'_, u8>, ViewMut<'_, f32>) {
        (self.0.weights.view_mut(), self.0.scales.view_mut())
    }
}

/// One matrix per head `[heads, out, in]` on the device.
pub struct HeadMatrices {
    pub(super) heads: usize,
    pub(super) out_dim: usize,
    pub(super) in_dim: usize,
    pub(super) bf16: bool,
    pub(super) weights: Buffer<u8>,
}

impl HeadMatrices {
    /// Copies the matrices to the device, as [`crate::HeadMatrices`] stores them.
    pub fn new(device: &Device, matrices: &crate::HeadMatrices) -> Result<Self, CudaError> {
        let (bf16, weights) = match &matrices.storage {
            HeadStorage::F32(weights) => (false, device.upload(bytes_of(weights))?),
            HeadStorage::Bf16(weights) => (true, device.upload(weights)?),
            HeadStorage::Fp8 { .. } | HeadStorage::Panels { .. } => {
                (false, device.upload(bytes_of(&matrices.to_f32()))?)
            }
        };
        Ok(Self { weights, bf16, ..Self::shape(device, matrices)? })
    }

    /// Copies the matrices to the device, rounded to bf16 for the matrix unit.
    pub fn new_bf16(device: &Device, matrices: &crate::HeadMatrices) -> Result<Self, CudaError> {
        let weights = match &matrices.storage {
            HeadStorage::Bf16(weights) => device.upload(weights)?,
            _ => {
                let bits: Vec<u16> = matrices.to_f32().iter().map(|&weight| fp8::to_bf16(weight)).collect();
                device.upload(bytes_of(&bits))?
            }
        };
        Ok(Self { weights, bf16: true, ..Self::shape(device, matrices)? })
    }

    /// Room for bf16 matrices; what it holds is undefined.
    pub fn alloc_bf16(
        device: &Device,
        heads: usize,
        out_dim: usize,
        in_dim: usize,
    ) -> Result<Self, CudaError> {
        let weights = device.alloc(heads * out_dim * in_dim * 2)?;
        Ok(Self { heads, out_dim, in_dim, bf16: true, weights })
    }

    fn shape(device: &Device, matrices: &crate::HeadMatrices) -> Result<Self, CudaError> {
        let (heads, out_dim, in_dim) = (matrices.heads(), matrices.out_dim(), matrices.in_dim());
        Ok(Self { heads, out_dim, in_dim, bf16: false, weights: device.alloc(0)? })
    }

    /// Outputs of a head.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }
}

/// Plain numbers as the bytes the device gets; the host is little endian, as the device is.
fn bytes_of<T: super::Element>(values: &[T]) -> &[u8] {
    // SAFETY: the bytes of plain numbers, for as long as they are borrowed.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
