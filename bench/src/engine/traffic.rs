//! Bytes of weights that a step has to read: everything that every token goes through, and the experts that some token
//! of the step was routed to, once each, as stored in the checkpoint.

use model::schema::{self, TensorSpec};
use model::{Checkpoint, ExpertId};

/// Counts the bytes of one step after the other.
pub(super) struct Traffic {
    /// What every step reads.
    always: u64,
    /// Bytes of one routed expert by layer.
    expert: Vec<u64>,
    /// Whether this layer's expert has been counted, cleared by layer.
    seen: Vec<bool>,
    bytes: u64,
}

impl Traffic {
    /// For a checkpoint's main model; nothing counted yet.
    pub fn new(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let config = checkpoint.config();
        let global = schema::global(config);
        // The embedding table is looked up, not read.
        let mut always = stored(checkpoint, [global.norm, global.lm_head])?;
        let mut expert = Vec::new();
        for layer in 0..config.num_hidden_layers {
            always += stored(checkpoint, schema::layer(config, layer).into_specs())?;
            expert.push(if config.is_moe_layer(layer) {
                stored(checkpoint, schema::expert(config, layer, ExpertId(0)).into_specs())?
            } else {
                0
            });
        }
        Ok(Self { always, expert, seen: vec![false; config.n_routed_experts], bytes: 0 })
    }

    /// A step begins.
    pub fn step(&mut self) {
        self.bytes += self.always;
    }

    /// The step's tokens go to these experts of `layer`.
    pub fn routed(&mut self, layer: usize, ids: &[u16]) {
        self.seen.fill(false);
        for &id in ids {
            if !std::mem::replace(&mut self.seen[usize::from(id)], true) {
                self.bytes += self.expert[layer];
            }
        }
    }

    /// Everything counted since the last call.
    pub fn take(&mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

/// Bytes of some tensors with their scales.
fn stored(checkpoint: &Checkpoint, specs: impl IntoIterator<Item = TensorSpec>) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for spec in specs {
        for name in [spec.scale_name(), spec.name] {
            if checkpoint.contains(&name) {
                bytes += checkpoint.tensor(&name)?.data.len() as u64;
            }
        }
    }
    Ok(bytes)
}
