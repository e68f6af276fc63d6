//! Buffers of a step, and its end: final norm and head.

use compute::cuda::{Activations, Buffer, CudaError, Device, InputFormat, Inputs, NormRows, Pinned};
use model::ModelConfig;

use super::inputs::StepInputs;
use super::layer::LayerWorkspace;
use super::recorded::Recorded;
use super::weights::{Linear, Norm};
use crate::error::EngineError;
use crate::kv_cache::KvPool;

/// What makes logits of the residual stream.
#[derive(Clone, Copy)]
pub(super) struct Tail<'a> {
    pub norm: &'a Norm,
    pub head: &'a Linear,
}

/// Buffers of a step, sized for the largest one.
pub(super) struct Workspace {
    /// `[rows, hidden]`: the residual stream.
    pub hidden: Buffer<f32>,
    pub layer: LayerWorkspace,
    /// `[wanted, hidden]`, after the final norm.
    pub normed: Buffer<f32>,
    head_input: Activations,
    /// `[wanted, vocab]`; both grow to the most rows ever wanted at once.
    pub logits: Buffer<f32>,
    pub host: Host,
    wanted_max: usize,
    head_format: InputFormat,
    vocab_size: usize,
    hidden_size: usize,
}

/// What comes back.
pub(super) struct Host {
    pub logits: Pinned<f32>,
    pub hidden: Pinned<f32>,
}

impl Workspace {
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        kv: &KvPool,
        (format, router_format, head_format): (InputFormat, Option<InputFormat>, InputFormat),
        (rows_max, local): (usize, bool),
    ) -> Result<Self, EngineError> {
        Ok(Self {
            hidden: device.alloc(rows_max * config.hidden_size)?,
            layer: LayerWorkspace::new(
                device,
                config,
                &kv.geometry(),
                (format, router_format),
                rows_max,
                local,
            )?,
            normed: device.alloc(0)?,
            head_input: Activations::new(device, head_format, 0, config.hidden_size)?,
            logits: device.alloc(0)?,
            host: Host { logits: device.pinned(0)?, hidden: device.pinned(0)? },
            wanted_max: 0,
            head_format,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
        })
    }

    /// Bytes that [`Self::make_room`] takes of the device for `wanted` rows: logits, and states in f32 and as the head takes them, in
    /// f32 at most.
    pub fn room_bytes(config: &ModelConfig, wanted: u64) -> u64 {
        wanted.next_power_of_two() * (config.vocab_size as u64 + 2 * config.hidden_size as u64) * 4
    }

    /// Makes room for the logits of `wanted` rows. Recorded steps name the old room.
    pub fn make_room(
        &mut self,
        device: &Device,
        wanted: usize,
        recorded: &mut Vec<Recorded>,
    ) -> Result<(), CudaError> {
        if wanted <= self.wanted_max {
            return Ok(());
        }
        recorded.clear();
        let room = wanted.next_power_of_two();
        // The old room goes first: both may not fit. Until the new one is there, there is none.
        self.wanted_max = 0;
        self.logits = device.alloc(0)?;
        self.logits = device.alloc(room * self.vocab_size)?;
        self.normed = device.alloc(room * self.hidden_size)?;
        self.head_input = Activations::new(device, self.head_format, room, self.hidden_size)?;
        self.host.hidden = device.pinned(room * self.hidden_size)?;
        self.wanted_max = room;
        Ok(())
    }

    /// Final norm and head for the first `wanted` wanted rows.
    pub fn finish(
        &mut self,
        device: &Device,
        Tail { norm, head }: Tail<'_>,
        inputs: &StepInputs,
        wanted: usize,
    ) -> Result<(), CudaError> {
        let size = inputs.rows() * self.hidden_size;
        let rows = NormRows {
            x: &mut self.hidden.slice_mut(0..size),
            stride: self.hidden_size,
            add: None,
            index: Some(inputs.wanted_rows(wanted)),
        };
        let (weight, normed) = (norm.weight.view(), &mut self.normed.slice_mut(0..wanted * self.hidden_size));
        let logits = &mut self.logits.slice_mut(0..wanted * self.vocab_size);
        if self.head_format == InputFormat::F32 {
            device.norm(rows, weight, norm.eps, Some(normed), &mut [])?;
            return device.linear(&head.matrix, Inputs::F32(normed.view()), logits);
        }
        device.norm(rows, weight, norm.eps, Some(normed), &mut [&mut self.head_input])?;
        device.linear(&head.matrix, self.head_input.inputs(wanted), logits)
    }
}
