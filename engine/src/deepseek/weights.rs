//! From tensors on disk to operands: which numerics wants which matrix in which form.

use compute::{
    ActivationFormat, Activations, Arena, Cpu, HeadMatrices, InputRows, LinearJob, Matrix, MatrixError,
    WeightFormat,
};
use model::schema::TensorSpec;
use model::{Checkpoint, Dtype, ModelConfig, Numerics};

use super::Progress;
use crate::error::EngineError;
use crate::options::fp8_activation_format;

/// A weight matrix and what its input is rounded to.
pub(crate) struct Linear {
    matrix: Matrix,
    input_format: ActivationFormat,
}

impl Linear {
    /// The weights.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// What [`Self::forward`] expects its input in.
    pub fn input_format(&self) -> ActivationFormat {
        self.input_format
    }

    /// Output width.
    pub fn width(&self) -> usize {
        self.matrix.rows()
    }

    /// Input width.
    pub fn input_width(&self) -> usize {
        self.matrix.cols()
    }

    /// `out[m, width] = input[m, input_width] · Wᵀ`.
    pub fn forward(&self, cpu: &Cpu, input: &Activations, out: &mut [f32]) {
        debug_assert_eq!(input.format(), self.input_format, "the loader checks that neighbours agree");
        cpu.linear(&self.matrix, input, out);
    }

    /// [`Self::forward`] for some rows of `input`, to be run together with other products.
    pub fn job<'a>(
        &'a self,
        input: &'a Activations,
        rows: InputRows<'a>,
        out: &'a mut [f32],
    ) -> LinearJob<'a> {
        LinearJob { weights: &self.matrix, input, rows, out }
    }
}

/// A matrix that is stored in FP8, row-major.
pub(crate) struct StoredFp8 {
    pub codes: Vec<u8>,
    /// Per 128×128 block.
    pub scales: Vec<f32>,
}

/// `x * rsqrt(mean(x²) + eps) * weight`.
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// Normalises rows as wide as the weight.
    pub fn forward(&self, cpu: &Cpu, x: &[f32], out: &mut [f32]) {
        cpu.rms_norm(x, &self.weight, self.eps, out);
    }
}

/// Reads a checkpoint's tensors into operands of one numerics, and tells how far it is.
///
/// Names and shapes come from [`model::schema`], and [`Checkpoint::open`] has checked the directory against it.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    numerics: Numerics,
    progress: &'a mut Progress<'a>,
    bytes_done: u64,
    bytes_total: u64,
    /// Where matrices lie in the order that the processor reads fastest.
    arena: Arena,
    /// Whether they are to.
    arranges: bool,
}

impl<'a> Loader<'a> {
    /// A loader for the tensors of `plan`. Progress counts weights; the scales of FP8 matrices, 0.02 % of them, are left out.
    pub fn new(
        checkpoint: &'a Checkpoint,
        numerics: Numerics,
        plan: impl Iterator<Item = TensorSpec>,
        progress: &'a mut Progress<'a>,
    ) -> Result<Self, EngineError> {
        let mut bytes_total = 0;
        for spec in plan.filter(|spec| checkpoint.contains(&spec.name)) {
            bytes_total += checkpoint.tensor(&spec.name)?.data.len() as u64;
        }
        progress(0, bytes_total);
        Ok(Self {
            checkpoint,
            numerics,
            progress,
            bytes_done: 0,
            bytes_total,
            arena: Arena::new(),
            arranges: true,
        })
    }

    /// Leaves matrices as they lie in the file: for a device that copies them.
    pub fn unarranged(self) -> Self {
        Self { arranges: false, ..self }
    }

    pub fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// Bytes of weights read so far, as stored, without scales.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done
    }

    /// Bytes of weights that the plan asks for.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    /// Whether an optional tensor is stored.
    pub fn contains(&self, spec: &TensorSpec) -> bool {
        self.checkpoint.contains(&spec.name)
    }

    /// A matrix with the activations that the numerics gives it.
    pub fn linear(&mut self, spec: &TensorSpec) -> Result<Linear, EngineError> {
        let stored = self.stored(spec)?;
        let matrix = match self.numerics {
            Numerics::Reference => multiply_out(spec, &stored)?,
            Numerics::Fp8 => stored,
        };
        let input_format = match matrix.format() {
            WeightFormat::F32 => ActivationFormat::F32,
            WeightFormat::Bf16 => ActivationFormat::Bf16,
            WeightFormat::Fp8 => fp8_activation_format(self.config()),
        };
        if !self.arranges {
            return Ok(Linear { matrix, input_format });
        }
        let matrix = matrix.arranged(&mut self.arena).map_err(|source| no_memory(spec, source))?;
        Ok(Linear { matrix, input_format })
    }

    /// A matrix in f32 with f32 activations in either numerics: the router, whose choices must not hang on rounding.
    pub fn linear_f32(&mut self, spec: &TensorSpec) -> Result<Linear, EngineError> {
        let stored = self.stored(spec)?;
        Ok(Linear { matrix: multiply_out(spec, &stored)?, input_format: ActivationFormat::F32 })
    }

    /// A table whose rows are looked up, as stored: a lookup multiplies out exactly.
    pub fn table(&mut self, spec: &TensorSpec) -> Result<Matrix, EngineError> {
        self.stored(spec)
    }

    /// All values of a matrix in f32, row-major.
    pub fn values(&mut self, spec: &TensorSpec) -> Result<Vec<f32>, EngineError> {
        Ok(self.stored(spec)?.to_f32())
    }

    /// Codes and block scales of a matrix that is stored in FP8; of others, nothing.
    pub fn codes(&mut self, spec: &TensorSpec) -> Result<Option<StoredFp8>, EngineError> {
        let tensor = self.checkpoint.tensor(&spec.name)?;
        if tensor.dtype != Dtype::F8E4m3 {
            return Ok(None);
        }
        let scales = self.checkpoint.tensor(&spec.scale_name())?;
        self.bytes_done += tensor.data.len() as u64;
        (self.progress)(self.bytes_done, self.bytes_total);
        Ok(Some(StoredFp8 { codes: tensor.data.to_vec(), scales: f32_values(&scales.data) }))
    }

    /// One matrix per head where the processor reads it fastest.
    pub fn arrange_heads(
        &mut self,
        spec: &TensorSpec,
        heads: HeadMatrices,
    ) -> Result<HeadMatrices, EngineError> {
        if !self.arranges {
            return Ok(heads);
        }
        heads.arranged(&mut self.arena).map_err(|source| no_memory(spec, source))
    }

    /// A norm's weight.
    pub fn norm(&mut self, spec: &TensorSpec, eps: f32) -> Result<RmsNorm, EngineError> {
        Ok(RmsNorm { weight: self.values(spec)?, eps })
    }

    /// A tensor as it lies in the file; a vector is a matrix of one row.
    fn stored(&mut self, spec: &TensorSpec) -> Result<Matrix, EngineError> {
        let tensor = self.checkpoint.tensor(&spec.name)?;
        let cols = spec.shape.last().copied().unwrap_or(1);
        let rows = spec.elements() / cols;
        let bytes = tensor.data.len() as u64;
        let matrix = match tensor.dtype {
            Dtype::F32 => Matrix::f32(rows, cols, f32_values(&tensor.data)),
            Dtype::Bf16 => Matrix::bf16(rows, cols, tensor.data),
            Dtype::F8E4m3 => {
                let scales = self.checkpoint.tensor(&spec.scale_name())?;
                Matrix::fp8(rows, cols, tensor.data, f32_values(&scales.data))
            }
        };
        self.bytes_done += bytes;
        (self.progress)(self.bytes_done, self.bytes_total);
        matrix.map_err(|source| mismatch(spec, source))
    }
}

/// Matrices that read the same prepared activations must want the same format; no released checkpoint mixes them.
pub(crate) fn expect_input_format(
    linear: &Linear,
    spec: &TensorSpec,
    format: ActivationFormat,
) -> Result<(), EngineError> {
    if linear.input_format == format {
        Ok(())
    } else {
        Err(EngineError::MixedFormats { tensor: spec.name.clone() })
    }
}

fn no_memory(spec: &TensorSpec, source: std::io::Error) -> EngineError {
    EngineError::Memory { tensor: spec.name.clone(), source }
}

fn multiply_out(spec: &TensorSpec, matrix: &Matrix) -> Result<Matrix, EngineError> {
    Matrix::f32(matrix.rows(), matrix.cols(), matrix.to_f32()).map_err(|source| mismatch(spec, source))
}

fn mismatch(spec: &TensorSpec, source: MatrixError) -> EngineError {
    EngineError::Matrix { tensor: spec.name.clone(), source }
}

fn f32_values(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]])).collect()
}
