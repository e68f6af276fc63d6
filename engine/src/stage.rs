//! The parts of a step that its observer can tell apart.

/// What has just been computed, in the order of a step. Reported once per layer and step, for all rows together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Rows of the embedding table.
    Embedding,
    /// Norm before a sub-layer, with its input rounded or quantised.
    Norm,
    /// The projections that read the hidden state: key and value latent, query latent.
    Compress,
    /// Latent norm and rotation, and the cache rows written.
    CacheRows,
    /// The query's own norm and up-projection, rotation.
    Queries,
    /// Queries into the latent space, `W_UK`.
    Absorb,
    /// Attention over the cache.
    Attention,
    /// Attended latents to values, `W_UV`.
    Values,
    /// Output projection of attention.
    Output,
    /// A dense layer's MLP.
    Dense,
    /// Router logits and the choice of experts.
    Router,
    /// Routed experts, until they are on their way or computed.
    Experts,
    /// The shared expert.
    SharedExpert,
    /// Waiting for routed experts, and their weighted sum.
    Combine,
    /// Final norm and head.
    Head,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 15] = [
        Self::Embedding,
        Self::Norm,
        Self::Compress,
        Self::CacheRows,
        Self::Queries,
        Self::Absorb,
        Self::Attention,
        Self::Values,
        Self::Output,
        Self::Dense,
        Self::Router,
        Self::Experts,
        Self::SharedExpert,
        Self::Combine,
        Self::Head,
    ];

    /// In a word or two.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Compress => "compress",
            Self::CacheRows => "cache rows",
            Self::Queries => "queries",
            Self::Absorb => "absorb",
            Self::Attention => "attention",
            Self::Values => "values",
            Self::Output => "output",
            Self::Dense => "dense mlp",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::SharedExpert => "shared expert",
            Self::Combine => "combine",
            Self::Head => "head",
        }
    }
}
