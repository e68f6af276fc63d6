//! `quantization_config`: DeepSeek's block-scaled FP8.

use serde_json::json;

use super::fields::Fields;
use crate::error::ConfigError;

/// FP8 weights: e4m3 in blocks of 128×128, each with one f32 scale that the values are multiplied by
/// (`weight_scale_inv`, "inv" for historical reasons). Blocks at the lower and right edge may be partial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Quantization {
    /// How activation scales are rounded when activations are quantised on line.
    pub scale_format: ScaleFormat,
}

impl Fp8Quantization {
    /// Rows and columns of a weight block, channels of an activation group.
    pub const BLOCK: usize = 128;

    pub(super) fn from_fields(config: &Fields<'_>) -> Result<Option<Self>, ConfigError> {
        let Some(fields) = config.object("quantization_config")? else { return Ok(None) };
        if fields.value("quant_method").is_none() {
            return Err(fields.missing("quant_method"));
        }
        fields.only("quant_method", json!("fp8"))?;
        fields.only("fmt", json!("e4m3"))?;
        fields.only("activation_scheme", json!("dynamic"))?;
        // Without it the scales would be one per tensor.
        if fields.value("weight_block_size").is_none() {
            return Err(fields.missing("weight_block_size"));
        }
        fields.only("weight_block_size", json!([Self::BLOCK, Self::BLOCK]))?;
        let formats = [("ue8m0", ScaleFormat::Ue8m0), ("float", ScaleFormat::F32)];
        let scale_format = fields.choice("scale_fmt", &formats)?.unwrap_or(ScaleFormat::F32);
        Ok(Some(Self { scale_format }))
    }
}

/// How an activation group's scale is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleFormat {
    /// amax / 448 as it is.
    F32,
    /// Rounded up to a power of two, as V3.1 was trained.
    Ue8m0,
}
