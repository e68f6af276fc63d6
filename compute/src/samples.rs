//! Random operands for tests; the seed is printed, and shown when a test fails.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fp8::BLOCK;
use crate::{Matrix, WeightFormat};

pub(crate) struct Samples {
    rng: StdRng,
}

impl Samples {
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self { rng: StdRng::seed_from_u64(seed) }
    }

    /// Uniform in -1..1, now and then a hundred times as large, as activations are.
    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let x = self.rng.random_range(-1.0f32..1.0);
                if self.rng.random_range(0..50) == 0 { x * 100.0 } else { x }
            })
            .collect()
    }

    pub(crate) fn below(&mut self, end: u32) -> u32 {
        self.rng.random_range(0..end)
    }

    /// Any E4M3 code but NaN, subnormals included.
    pub(crate) fn codes(&mut self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|_| {
                let code = self.rng.random_range(0..0x7Fu8);
                code | (self.rng.random_range(0..2u8) << 7)
            })
            .collect()
    }

    /// Random weights; those in bytes start at an odd address of a larger buffer, as in a mapped file.
    pub(crate) fn matrix(&mut self, format: WeightFormat, n: usize, k: usize) -> Matrix {
        let odd = |bytes: Vec<u8>| {
            let mut buffer = vec![0xFF; 1];
            buffer.extend(bytes);
            Bytes::from(buffer).slice(1..)
        };
        match format {
            WeightFormat::F32 => Matrix::f32(n, k, self.floats(n * k)),
            WeightFormat::Bf16 => {
                let weights = self.floats(n * k);
                let bits = weights.iter().flat_map(|&w| crate::fp8::to_bf16(w).to_le_bytes()).collect();
                Matrix::bf16(n, k, odd(bits))
            }
            WeightFormat::Fp8 => {
                let scales = (0..n.div_ceil(BLOCK) * k.div_ceil(BLOCK))
                    .map(|_| self.rng.random_range(1e-4f32..1e-2))
                    .collect();
                Matrix::fp8(n, k, odd(self.codes(n * k)), scales)
            }
        }
        .expect("lengths fit")
    }
}

/// Bits of floats, for exact comparison.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
