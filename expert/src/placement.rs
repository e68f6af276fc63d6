//! Which worker holds which expert: a static, versioned table per MoE layer.
//!
//! Invariant: every logical expert of every MoE layer (the MTP module's included) has exactly one
//! owner. A table never changes after it is made; a new placement is a new table with another
//! version. Replicas and the on-line balancer are deliberately not here yet: with one replica each,
//! a physical expert carries its logical expert's id.

use std::collections::BTreeMap;

use model::{ExpertId, ModelConfig};
use xxhash_rust::xxh3::Xxh3;

/// Workers in one placement at most. A rank is stored in 16 bits, and the widest published
/// deployment (EP320) is far below.
pub const WORKERS_MAX: usize = 4096;

/// Why a table is no placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No worker, or more than [`WORKERS_MAX`].
    #[error("placement: workers is {workers}, expected 1..={WORKERS_MAX}")]
    Workers {
        /// Workers asked for.
        workers: usize,
    },
    /// No expert, or more than an [`ExpertId`] can name.
    #[error("placement: experts is {experts}, expected 1..=65536")]
    Experts {
        /// Routed experts per layer asked for.
        experts: usize,
    },
    /// A layer's row does not name an owner for each expert.
    #[error("placement: layer {layer} names owners for {found} experts, expected {expected}")]
    Incomplete {
        /// Layer id.
        layer: usize,
        /// Owners in the row.
        found: usize,
        /// Routed experts per layer.
        expected: usize,
    },
    /// An owner is no rank of this placement.
    #[error("placement: layer {layer} gives expert {expert} to worker {rank} of {workers}")]
    UnknownWorker {
        /// Layer id.
        layer: usize,
        /// The expert.
        expert: usize,
        /// The owner named.
        rank: u16,
        /// Workers in the placement.
        workers: usize,
    },
    /// The list of addresses is not one per rank.
    #[error("placement: {addresses} addresses for {workers} workers")]
    Addresses {
        /// Addresses given.
        addresses: usize,
        /// Workers in the placement.
        workers: usize,
    },
}

/// The table: `owner[layer][logical expert] = rank`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    version: u64,
    workers: usize,
    experts: usize,
    layers: BTreeMap<usize, Vec<u16>>,
}

impl Placement {
    /// Checks a table: `layers` maps each MoE layer to the owning rank of each of its `experts`.
    ///
    /// The version is a digest of the content, so two processes that derive the same table from
    /// the same configuration agree without a word, and any disagreement is refused at dispatch.
    pub fn new(
        workers: usize,
        experts: usize,
        layers: BTreeMap<usize, Vec<u16>>,
    ) -> Result<Self, PlacementError> {
        if workers == 0 || workers > WORKERS_MAX {
            return Err(PlacementError::Workers { workers });
        }
        if experts == 0 || experts > usize::from(u16::MAX) + 1 {
            return Err(PlacementError::Experts { experts });
        }
        for (&layer, owners) in &layers {
            if owners.len() != experts {
                return Err(PlacementError::Incomplete { layer, found: owners.len(), expected: experts });
            }
            let stray = owners.iter().position(|&rank| usize::from(rank) >= workers);
            if let Some(expert) = stray {
                return Err(PlacementError::UnknownWorker { layer, expert, rank: owners[expert], workers });
            }
        }
        let version = digest(workers, experts, &layers);
        Ok(Self { version, workers, experts, layers })
    }

    /// Runs of neighbouring experts, as equal as the division allows: rank r holds
    /// `r*experts/workers .. (r+1)*experts/workers`. The default, because neighbours lie together in
    /// the checkpoint and in a group-limited router's groups.
    pub fn contiguous(
        layers: impl IntoIterator<Item = usize>,
        experts: usize,
        workers: usize,
    ) -> Result<Self, PlacementError> {
        Self::by_formula(layers, experts, workers, |expert| {
            // The inverse of the ranges above: the last rank whose range starts at or before it.
            ((expert + 1) * workers - 1) / experts
        })
    }

    /// Expert e on rank `e % workers`: spreads neighbouring (often correlated) experts.
    pub fn round_robin(
        layers: impl IntoIterator<Item = usize>,
        experts: usize,
        workers: usize,
    ) -> Result<Self, PlacementError> {
        Self::by_formula(layers, experts, workers, |expert| expert % workers)
    }

    fn by_formula(
        layers: impl IntoIterator<Item = usize>,
        experts: usize,
        workers: usize,
        rank: impl Fn(usize) -> usize,
    ) -> Result<Self, PlacementError> {
        if workers == 0 || workers > WORKERS_MAX {
            return Err(PlacementError::Workers { workers });
        }
        let row: Vec<u16> = (0..experts).map(|expert| rank(expert) as u16).collect();
        let layers = layers.into_iter().map(|layer| (layer, row.clone()));
        Self::new(workers, experts, layers.collect())
    }

    /// Stamped on every dispatch; equal exactly when the tables are.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Number of workers; ranks are `0..workers`.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// Routed experts per MoE layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The MoE layers, ascending.
    pub fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.keys().copied()
    }

    /// The owning rank of each logical expert of `layer`; `None` when it is no MoE layer.
    pub fn owners(&self, layer: usize) -> Option<&[u16]> {
        self.layers.get(&layer).map(Vec::as_slice)
    }

    /// Whether `rank` holds `expert` of `layer`.
    pub fn holds(&self, rank: usize, layer: usize, expert: ExpertId) -> bool {
        self.owners(layer)
            .and_then(|owners| owners.get(usize::from(expert.0)))
            .is_some_and(|&owner| usize::from(owner) == rank)
    }

    /// What `rank` has to load: its experts per layer, layers without any left out.
    pub fn share(&self, rank: usize) -> Vec<(usize, Vec<ExpertId>)> {
        let held = |owners: &[u16]| -> Vec<ExpertId> {
            let mine = owners.iter().zip(0u16..=u16::MAX);
            mine.filter(|(owner, _)| usize::from(**owner) == rank)
                .map(|(_, expert)| ExpertId(expert))
                .collect()
        };
        self.layers
            .iter()
            .map(|(&layer, owners)| (layer, held(owners)))
            .filter(|(_, experts)| !experts.is_empty())
            .collect()
    }
}

/// The layers whose MLP is a mixture of experts, the MTP modules' included.
pub fn moe_layers(config: &ModelConfig) -> Vec<usize> {
    (0..config.layers_with_mtp()).filter(|&layer| config.is_moe_layer(layer)).collect()
}

fn digest(workers: usize, experts: usize, layers: &BTreeMap<usize, Vec<u16>>) -> u64 {
    let mut hash = Xxh3::new();
    let mut put = |value: u64| hash.update(&value.to_le_bytes());
    put(workers as u64);
    put(experts as u64);
    for (&layer, owners) in layers {
        put(layer as u64);
        owners.iter().for_each(|&rank| put(u64::from(rank)));
    }
    hash.digest()
}

#[cfg(test)]
mod tests;
