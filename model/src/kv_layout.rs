//! How KV lies in memory and on the wire: a value with a digest, so that two workers can tell whether they mean the
//! same bytes.
//!
//! A row is one token's KV in one layer: the latent, then one f32 scale per 128 latent channels (FP8 alone), then the
//! rotary key with its pairs interleaved as in the checkpoint, then padding to 16 bytes. A pool is
//! `[block][layer][token]` of rows: a block's layers lie together, and a layer of a block is one contiguous piece.

use xxhash_rust::xxh3::xxh3_64;

use crate::config::ModelConfig;
use crate::numerics::KvFormat;

/// The layout of one model's KV in one format. Everything else follows from the fields.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// How a row's numbers are stored.
    pub format: KvFormat,
    /// Layers with KV, MTP's included.
    pub layers: usize,
    /// Channels of the latent.
    pub latent: usize,
    /// Channels of the rotary key.
    pub rope: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
}

impl KvLayout {
    /// 64 tokens: two FP8 tiles, and what a decode kernel reads at once.
    pub const BLOCK_TOKENS: usize = 64;
    /// Latent channels that share a scale.
    pub const SCALE_GROUP: usize = 128;
    /// Rows begin at multiples of this: the width of a vector load on a GPU.
    pub const ROW_ALIGNMENT: usize = 16;

    /// The layout for `config` with the first `mtp_layers` of its MTP layers.
    pub fn for_model(config: &ModelConfig, format: KvFormat, mtp_layers: usize) -> Self {
        Self {
            format,
            layers: config.num_hidden_layers + mtp_layers,
            latent: config.kv_lora_rank,
            rope: config.qk_rope_head_dim,
            block_tokens: Self::BLOCK_TOKENS,
        }
    }

    /// Bytes of the latent: where the scales begin.
    pub fn latent_bytes(&self) -> usize {
        self.latent
            * match self.format {
                KvFormat::F32 => 4,
                KvFormat::Bf16 => 2,
                KvFormat::Fp8 => 1,
            }
    }

    /// f32 scales in a row.
    pub fn scales_per_row(&self) -> usize {
        match self.format {
            KvFormat::Fp8 => self.latent.div_ceil(Self::SCALE_GROUP),
            KvFormat::F32 | KvFormat::Bf16 => 0,
        }
    }

    /// Where in a row the rotary key begins.
    pub fn rope_offset(&self) -> usize {
        self.latent_bytes() + 4 * self.scales_per_row()
    }

    /// Bytes of the rotary key.
    pub fn rope_bytes(&self) -> usize {
        self.rope
            * match self.format {
                KvFormat::F32 => 4,
                KvFormat::Bf16 | KvFormat::Fp8 => 2,
            }
    }

    /// Bytes of one token in one layer, padding included: 656 for V3 in FP8.
    pub fn row_bytes(&self) -> usize {
        (self.rope_offset() + self.rope_bytes()).next_multiple_of(Self::ROW_ALIGNMENT)
    }

    /// Bytes of one layer of a block, which is one contiguous piece.
    pub fn layer_stride(&self) -> usize {
        self.row_bytes() * self.block_tokens
    }

    /// Bytes of a block: all its layers.
    pub fn block_bytes(&self) -> usize {
        self.layer_stride() * self.layers
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// The canonical text: every property that two workers must share, in words.
    pub fn describe(&self) -> String {
        let Self { format, layers, latent, rope, block_tokens } = self;
        format!(
            "format={format} layers={layers} latent={latent} rope={rope} block_tokens={block_tokens} \
             scale_group={} scales={} rope_pairs=interleaved rope_offset={} row_bytes={} layer_stride={} \
             block_bytes={} pool=block,layer,token",
            Self::SCALE_GROUP,
            self.scales_per_row(),
            self.rope_offset(),
            self.row_bytes(),
            self.layer_stride(),
            self.block_bytes(),
        )
    }

    /// xxh3-64 of [`Self::describe`]. Equal digests mean equal bytes for equal KV.
    pub fn digest(&self) -> u64 {
        xxh3_64(self.describe().as_bytes())
    }
}

#[cfg(test)]
mod tests;
