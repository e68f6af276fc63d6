//! The dimensions that operators are timed at.

/// A model to take shapes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModelShapes {
    /// DeepSeek-V3.
    V3,
    /// The demo model.
    Tiny,
    /// The synthetic checkpoint of 701 M parameters that CPU engines are compared with (`trireme synth --help`).
    Synth,
}

/// The dimensions of a model that its operators see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shapes {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Inner width of a dense layer.
    pub inner: usize,
    /// Inner width of an expert.
    pub expert_inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Rank of the query projection.
    pub query_rank: usize,
    /// Width of the cached latent.
    pub latent: usize,
    /// Rotary channels.
    pub rope: usize,
    /// Channels of a head without position.
    pub nope: usize,
    /// Channels of a value head.
    pub value: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub topk: usize,
    /// Groups of experts, and how many of them a token may use.
    pub groups: (usize, usize),
    /// Token ids.
    pub vocab: usize,
}

impl ModelShapes {
    /// As the flag spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V3 => "v3",
            Self::Tiny => "tiny",
            Self::Synth => "synth",
        }
    }

    /// Its dimensions.
    pub fn shapes(self) -> Shapes {
        match self {
            Self::V3 => Shapes {
                hidden: 7168,
                inner: 18_432,
                expert_inner: 2048,
                heads: 128,
                query_rank: 1536,
                latent: 512,
                rope: 64,
                nope: 128,
                value: 128,
                experts: 256,
                topk: 8,
                groups: (8, 4),
                vocab: 129_280,
            },
            Self::Tiny => Shapes {
                hidden: 384,
                inner: 1024,
                expert_inner: 128,
                heads: 6,
                query_rank: 256,
                latent: 128,
                rope: 32,
                nope: 64,
                value: 64,
                experts: 16,
                topk: 4,
                groups: (4, 2),
                vocab: 4096,
            },
            Self::Synth => Shapes {
                hidden: 1024,
                inner: 2816,
                expert_inner: 512,
                heads: 8,
                query_rank: 768,
                latent: 512,
                rope: 64,
                nope: 128,
                value: 128,
                experts: 32,
                topk: 4,
                groups: (8, 4),
                vocab: 32_000,
            },
        }
    }
}

impl Shapes {
    /// The projections of a layer that are stored in FP8: name, outputs, inputs.
    pub fn projections(&self) -> [(&'static str, usize, usize); 8] {
        let Self { hidden, heads, latent, .. } = *self;
        [
            ("q_a", self.query_rank, hidden),
            ("q_b", heads * (self.nope + self.rope), self.query_rank),
            ("kv_a", latent + self.rope, hidden),
            ("o", hidden, heads * self.value),
            ("dense gate", self.inner, hidden),
            ("dense down", hidden, self.inner),
            ("shared gate", self.expert_inner, hidden),
            ("shared down", hidden, self.expert_inner),
        ]
    }
}
