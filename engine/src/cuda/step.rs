//! What a step lends to every layer, and what it tells its observer.

use compute::cuda::{Buffer, CudaError, Device, Mark, RopeTable, View};
use compute::{ActivationFormat, Cpu, KvGeometry};

use model::{ModelConfig, Numerics};

use super::inputs::StepInputs;
use crate::experts::Experts;
use crate::options::wire_activation_format;
use crate::stage::Stage;
use crate::step::{StepObserver, Watched};

/// Routed experts on other workers.
pub(super) struct Remote<'s> {
    pub experts: &'s mut dyn Experts,
    pub cpu: &'s Cpu,
    pub wire: ActivationFormat,
}

impl<'s> Remote<'s> {
    /// What a step is lent of `experts`, if they are elsewhere.
    pub fn of(
        experts: &'s mut Option<Box<dyn Experts>>,
        cpu: &'s Cpu,
        config: &ModelConfig,
        numerics: Numerics,
    ) -> Option<Self> {
        let experts = experts.as_deref_mut()?;
        Some(Self { experts, cpu, wire: wire_activation_format(config, numerics) })
    }
}

/// What a step lends to every layer.
pub(super) struct Step<'s> {
    pub device: &'s Device,
    pub inputs: &'s StepInputs,
    pub pool: &'s mut Buffer<u8>,
    pub geometry: &'s KvGeometry,
    pub rope: &'s RopeTable,
    /// No row sees more cache rows: the batch's longest context, or more where the step is recorded.
    pub context_max: usize,
    pub remote: Option<Remote<'s>>,
    pub observer: &'s mut dyn StepObserver,
    pub watched: Watched,
    /// When each layer's cache rows were stored, for an observer that wants to know.
    pub stored: Vec<Mark>,
}

impl Step<'_> {
    /// The rows of the next layer are on their way to the pool.
    pub fn layer_stored(&mut self) -> Result<(), CudaError> {
        if self.watched.layers_done {
            self.stored.push(self.device.mark()?);
        }
        Ok(())
    }

    /// A part of the step has been asked for; whoever measures waits until it is done.
    pub fn stage(&mut self, ended: Stage) -> Result<(), CudaError> {
        if self.watched.stages {
            self.device.synchronize()?;
            self.observer.stage(ended);
        }
        Ok(())
    }

    /// Shows the router's choice.
    pub fn routed(
        &mut self,
        layer: usize,
        ids: View<'_, u16>,
        weights: View<'_, f32>,
        top_k: usize,
    ) -> Result<(), CudaError> {
        if self.watched.values {
            let (mut host_ids, mut host_weights) = (vec![0; ids.len()], vec![0.0; weights.len()]);
            self.device.copy_out(ids, &mut host_ids)?;
            self.device.copy_out(weights, &mut host_weights)?;
            debug_assert!(host_ids.len().is_multiple_of(top_k));
            self.observer.routed(layer, &host_ids, &host_weights);
        }
        Ok(())
    }

    /// Shows the residual stream after a layer.
    pub fn layer_hidden(&mut self, layer: usize, hidden: View<'_, f32>) -> Result<(), CudaError> {
        if self.watched.values {
            let mut values = vec![0.0; hidden.len()];
            self.device.copy_out(hidden, &mut values)?;
            self.observer.layer_hidden(layer, &values);
        }
        Ok(())
    }
}
