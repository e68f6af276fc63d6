//! A tensor of the checkpoint: name, dtype, shape and its bytes in place.

use bytes::Bytes;

/// How a weight is stored. Little endian, as everything in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Eight bits: 1 sign, 4 exponent, 3 mantissa; finite up to 448, no infinity.
    F8E4m3,
    /// The upper half of an f32.
    Bf16,
    /// IEEE single.
    F32,
}

impl Dtype {
    /// The name that safetensors uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::F8E4m3 => "F8_E4M3",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F8E4m3 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    pub(super) fn from_safetensors(name: &str) -> Option<Self> {
        [Self::F8E4m3, Self::Bf16, Self::F32].into_iter().find(|dtype| dtype.name() == name)
    }
}

/// A weight. Cloning shares the bytes; they stay mapped while any clone lives.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// How its elements are stored.
    pub dtype: Dtype,
    /// Row-major, `[out, in]` for matrices.
    pub shape: Vec<usize>,
    /// The elements, a slice of the mapped file: little endian, and aligned to nothing.
    pub data: Bytes,
}

impl Tensor {
    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values of a BF16 or F32 tensor, exactly. `None` for F8_E4M3, whose values mean nothing without scales.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match self.dtype {
            Dtype::F8E4m3 => None,
            Dtype::Bf16 => {
                let (pairs, _) = self.data.as_chunks::<2>();
                let widen = |pair: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
                Some(pairs.iter().map(widen).collect())
            }
            Dtype::F32 => {
                let (quads, _) = self.data.as_chunks::<4>();
                Some(quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect())
            }
        }
    }
}

/// A projection as stored: the weight, and its block scales where it is FP8.
#[derive(Clone, Debug)]
pub struct MatrixTensors {
    /// `[out, in]`
    pub weight: Tensor,
    /// F32, `[ceil(out / 128), ceil(in / 128)]`, to be multiplied. Present exactly when `weight` is F8_E4M3.
    pub scales: Option<Tensor>,
}

/// A tensor's description, without its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// How its elements are stored.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: &'a [usize],
    /// The file that has it.
    pub file: &'a std::path::Path,
    /// Bytes on disk.
    pub bytes: usize,
}
