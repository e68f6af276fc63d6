//! Rotary positions: theta, YaRN's stretched frequencies and the factor it puts on the attention scale.
//!
//! All in f64: an angle is position times frequency, and at position 160,000 the difference between f32 and f64
//! frequencies is visible in the logits. Formulas: YaRN, arXiv 2309.00071, as DeepSeek's modelling code applies
//! them, which is to every context length and not only beyond the original one.

use serde_json::json;

use super::fields::Fields;
use crate::error::ConfigError;

/// Rotary position embedding of the `qk_rope_head_dim` channels, pairs interleaved.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Context extension, where the checkpoint has it.
    pub yarn: Option<Yarn>,
}

/// YaRN's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer than the original context.
    pub factor: f64,
    /// Context of the pre-training.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a frequency stays as it is.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Numerator of the gain on cos and sin.
    pub mscale: f64,
    /// Denominator of that gain, and what the softmax scale grows by.
    pub mscale_all_dim: f64,
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).
    pub(super) fn from_fields(config: &Fields<'_>) -> Result<Self, ConfigError> {
        let parameters = config.object("rope_parameters")?;
        let scaling = match &parameters {
            Some(_) => parameters,
            None => config.object("rope_scaling")?,
        };
        let inner_theta = scaling.as_ref().map(|s| theta(s)).transpose()?.flatten();
        let theta = match inner_theta {
            Some(theta) => theta,
            None => theta(config)?.ok_or_else(|| config.missing("rope_theta"))?,
        };
        let yarn = scaling.map(|s| Yarn::from_fields(&s)).transpose()?.flatten();
        Ok(Self { theta, yarn })
    }

    /// Angle per position of each of the `dim / 2` pairs, in radians, highest frequency first.
    pub fn frequencies(&self, dim: usize) -> Vec<f64> {
        let plain = (0..dim / 2).map(|i| self.theta.powf(-((2 * i) as f64) / dim as f64));
        let Some(yarn) = &self.yarn else { return plain.collect() };
        let (low, high) = yarn.ramp(self.theta, dim);
        plain
            .enumerate()
            .map(|(i, f)| {
                let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / yarn.factor * stretched + f * (1.0 - stretched)
            })
            .collect()
    }

    /// What cos and sin are multiplied by: 1 in every released model.
    pub fn gain(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |y| y.magnitude(y.mscale) / y.magnitude(y.mscale_all_dim))
    }

    /// What the plain softmax scale is multiplied by.
    pub fn softmax_gain(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |y| y.magnitude(y.mscale_all_dim).powi(2))
    }
}

impl Yarn {
    /// `None` for the plain rotary embedding under its name.
    fn from_fields(scaling: &Fields<'_>) -> Result<Option<Self>, ConfigError> {
        const KINDS: &[(&str, bool)] = &[("yarn", true), ("default", false)];
        let kind = match scaling.choice("rope_type", KINDS)? {
            Some(kind) => kind,
            None => scaling.choice("type", KINDS)?.ok_or_else(|| scaling.missing("rope_type"))?,
        };
        if !kind {
            return Ok(None);
        }
        // Both change the formulas below, and no DeepSeek checkpoint sets them.
        scaling.only("truncate", json!(true))?;
        if let Some(value) = scaling.value("attention_factor") {
            return Err(scaling.invalid("attention_factor", "absent (mscale is what is supported)", value));
        }
        let number = |field, range, default: Option<f64>| {
            scaling.number(field, range)?.or(default).ok_or_else(|| scaling.missing(field))
        };
        let yarn = Self {
            factor: number("factor", 1.0..=65_536.0, None)?,
            original_max_position_embeddings: scaling
                .integer("original_max_position_embeddings", 1..=super::POSITIONS_MAX)?
                .ok_or_else(|| scaling.missing("original_max_position_embeddings"))?,
            beta_fast: number("beta_fast", 1e-3..=1e6, Some(32.0))?,
            beta_slow: number("beta_slow", 1e-3..=1e6, Some(1.0))?,
            mscale: number("mscale", 0.0..=100.0, Some(1.0))?,
            mscale_all_dim: number("mscale_all_dim", 0.0..=100.0, Some(0.0))?,
        };
        if yarn.beta_fast < yarn.beta_slow {
            let expected = "at least `beta_slow`";
            return Err(scaling.invalid("beta_fast", expected, &json!(yarn.beta_fast)));
        }
        Ok(Some(yarn))
    }

    /// Pair indices between which frequencies go over from kept to divided.
    fn ramp(&self, theta: f64, dim: usize) -> (f64, f64) {
        let context = self.original_max_position_embeddings as f64;
        let pair_turning = |rotations: f64| {
            dim as f64 * (context / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let low = pair_turning(self.beta_fast).floor().max(0.0);
        let high = pair_turning(self.beta_slow).ceil().min(dim as f64 - 1.0);
        // The modelling code's guard against a division by zero; above 0 also where high < low on toy sizes.
        (low, if high == low { low + 0.001 } else { high })
    }

    fn magnitude(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }
}

fn theta(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    // Below e the ramp's logarithm turns; released models have 10,000 to some millions.
    fields.number("rope_theta", 10.0..=1e12)
}
