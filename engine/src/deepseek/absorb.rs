//! The two absorbed halves of `kv_b`.
//!
//! `kv_b` `[heads * (nope + v), latent]` holds for every head `W_UK` `[nope, latent]`, which transposed takes a query into
//! the latent space, and `W_UV` `[v, latent]`, which takes the attended latent out of it. In FP8 both keep their codes and
//! block scales wherever a head's halves begin and end at scale blocks (all released models), a quarter of the bytes of
//! f32; transposing a matrix transposes its blocks.

use compute::{HeadMatrices, MatrixError};
use model::schema::TensorSpec;
use model::{Fp8Quantization, Numerics};

use super::Loader;
use crate::error::EngineError;

/// `W_UK` as `[heads, latent, nope]` and `W_UV` as `[heads, v, latent]`.
pub(crate) fn absorb(
    loader: &mut Loader<'_>,
    spec: &TensorSpec,
) -> Result<(HeadMatrices, HeadMatrices), EngineError> {
    let config = loader.config();
    let halves = Halves {
        heads: config.num_attention_heads,
        nope: config.qk_nope_head_dim,
        v: config.v_head_dim,
        latent: config.kv_lora_rank,
    };
    let stored =
        if loader.numerics() == Numerics::Fp8 && halves.fit_blocks() { loader.codes(spec)? } else { None };
    let split = match stored {
        Some(stored) => halves.split_fp8(&stored.codes, &stored.scales),
        None => halves.split(&loader.values(spec)?),
    };
    let (key, value) = split.map_err(|source| EngineError::Matrix { tensor: spec.name.clone(), source })?;
    Ok((loader.arrange_heads(spec, key)?, loader.arrange_heads(spec, value)?))
}

/// Widths of `kv_b`.
#[derive(Clone, Copy)]
struct Halves {
    heads: usize,
    nope: usize,
    v: usize,
    latent: usize,
}

impl Halves {
    fn fit_blocks(&self) -> bool {
        self.nope.is_multiple_of(Fp8Quantization::BLOCK) && self.v.is_multiple_of(Fp8Quantization::BLOCK)
    }

    fn split(self, weights: &[f32]) -> Result<(HeadMatrices, HeadMatrices), MatrixError> {
        let Self { heads, nope, v, latent } = self;
        let (key, value) = take_apart(weights, nope, v, latent);
        Ok((HeadMatrices::new(heads, latent, nope, key)?, HeadMatrices::new(heads, v, latent, value)?))
    }

    fn split_fp8(self, codes: &[u8], scales: &[f32]) -> Result<(HeadMatrices, HeadMatrices), MatrixError> {
        let Self { heads, nope, v, latent } = self;
        let (key, value) = take_apart(codes, nope, v, latent);
        let blocks = |width: usize| width.div_ceil(Fp8Quantization::BLOCK);
        let (key_scales, value_scales) = take_apart(scales, blocks(nope), blocks(v), blocks(latent));
        let key = HeadMatrices::fp8([heads, latent, nope], key, key_scales)?;
        Ok((key, HeadMatrices::fp8([heads, v, latent], value, value_scales)?))
    }
}

/// Heads of `[nope + v, latent]` into heads of `[latent, nope]` and of `[v, latent]`.
fn take_apart<T: Copy + Default>(heads: &[T], nope: usize, v: usize, latent: usize) -> (Vec<T>, Vec<T>) {
    let mut key = vec![T::default(); heads.len() / (nope + v) * nope];
    let mut value = Vec::with_capacity(heads.len() - key.len());
    for (rows, key) in heads.chunks_exact((nope + v) * latent).zip(key.chunks_exact_mut(latent * nope)) {
        let (key_rows, value_rows) = rows.split_at(nope * latent);
        for (channel, row) in key_rows.chunks_exact(latent).enumerate() {
            for (index, weight) in row.iter().enumerate() {
                key[index * nope + channel] = *weight;
            }
        }
        value.extend_from_slice(value_rows);
    }
    (key, value)
}
