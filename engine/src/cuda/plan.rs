//! Whether an engine fits its device, said before anything is loaded.

use compute::cuda::Device;
use model::{KvLayout, ModelConfig};

use super::workspace::Workspace;
use crate::error::EngineError;
use crate::options::EngineOptions;

/// What an engine takes of a device's memory, in bytes.
pub(super) struct Plan {
    weights: u64,
    kv: u64,
    workspace: u64,
    free: u64,
    block: u64,
}

/// What kernels, graphs and the driver's own needs are left.
pub(super) const RESERVE: u64 = 1 << 30;
/// Rows of a step that logits are wanted of, at most: decode's largest batch with all the drafts that it may have. Prefill
/// wants few rows' of its larger steps.
const WANTED_MAX: u64 = 8192;

impl Plan {
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        options: &EngineOptions,
        layout: &KvLayout,
        weights: u64,
    ) -> Result<Self, EngineError> {
        let (free, total) = device.memory()?;
        let plan = Self {
            weights,
            kv: layout.block_bytes() as u64 * options.kv_blocks_max as u64,
            workspace: workspace(config, options.step_tokens_max as u64, options.mtp),
            free: free as u64,
            block: layout.block_bytes() as u64,
        };
        tracing::info!(
            device = device.name(),
            total_gib = gib(total as u64),
            free_gib = gib(plan.free),
            weights_gib = gib(plan.weights),
            kv_gib = gib(plan.kv),
            workspace_gib = gib(plan.workspace),
            "memory plan"
        );
        Ok(plan)
    }

    /// Refuses what does not fit, naming what would.
    pub fn check(&self) -> Result<(), EngineError> {
        let room = self.free.saturating_sub(RESERVE);
        if self.weights + self.kv + self.workspace <= room {
            return Ok(());
        }
        let left = room.saturating_sub(self.weights + self.workspace);
        Err(EngineError::DeviceMemory {
            weights: self.weights,
            kv: self.kv,
            workspace: self.workspace,
            free: self.free,
            blocks_fit: left / self.block.max(1),
        })
    }
}

/// Of the largest step, about: every buffer that grows with its rows.
fn workspace(config: &ModelConfig, rows: u64, mtp: bool) -> u64 {
    let heads = config.num_attention_heads as u64;
    let (hidden, top_k) = (config.hidden_size as u64, config.num_experts_per_tok as u64);
    let query = heads * config.q_head_dim() as u64 * 4;
    let latents = heads * config.kv_lora_rank as u64 * 4;
    let values = heads * config.v_head_dim as u64 * 5;
    let experts = top_k * (config.moe_intermediate_size as u64 * 9 + hidden * 2);
    let mlp = config.intermediate_size.max(config.shared_intermediate_size()) as u64 * 9;
    // States, embeddings and both of them normed, in f32 and as the projection takes them.
    let module = if mtp { hidden * 24 } else { 0 };
    let rows_bytes = rows * (query * 2 + latents + values + experts + mlp + hidden * 20 + module);
    rows_bytes + Workspace::room_bytes(config, rows.min(WANTED_MAX)) + (1 << 30)
}

fn gib(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 30) * 100.0).round() / 100.0
}
