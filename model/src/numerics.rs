//! The two numerics and the formats of a cached KV row.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the forward pass rounds. Part of the execution fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// Weights multiplied out, activations, KV and everything on the wire in f32. The golden numbers hold here.
    Reference,
    /// For serving: weights as stored, activations quantised as the checkpoint asks, KV in FP8 unless told otherwise.
    Fp8,
}

/// How a KV row is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// Latent and rope in f32. The only format of [`Numerics::Reference`].
    F32,
    /// Latent and rope in bf16.
    Bf16,
    /// Latent in e4m3 with one f32 scale per 128 channels, rope in bf16, whose range e4m3 does not cover.
    Fp8,
}

impl KvFormat {
    /// What `numerics` stores when the configuration does not say.
    pub fn default_for(numerics: Numerics) -> Self {
        match numerics {
            Numerics::Reference => Self::F32,
            Numerics::Fp8 => Self::Fp8,
        }
    }
}

/// A name that is none of the known ones.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no {what}; known: {known}")]
pub struct UnknownName {
    /// What was expected, in words.
    pub what: &'static str,
    /// The name that was given.
    pub name: String,
    /// The names that would have been understood.
    pub known: &'static str,
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reference => "reference",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for Numerics {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "reference" => Ok(Self::Reference),
            "fp8" => Ok(Self::Fp8),
            _ => Err(UnknownName { what: "numerics", name: name.into(), known: "reference, fp8" }),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for KvFormat {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "fp8" => Ok(Self::Fp8),
            _ => Err(UnknownName { what: "KV format", name: name.into(), known: "f32, bf16, fp8" }),
        }
    }
}
