//! The engine: everything one worker needs to run forward steps, on whichever device.

use model::{Checkpoint, Device, ExecutionFingerprint, KvLayout, ModelConfig, TokenId};

use crate::batch::SequenceInput;
use crate::cuda::{CudaEngine, RoutedExperts};
use crate::drawing::{Drafter, Draw, Drawn};
use crate::error::{EngineError, StepError};
use crate::experts::{ExpertBank, Experts, LocalExperts};
use crate::kv_cache::KvPool;
use crate::options::{EngineOptions, SyntheticWeights};
use crate::step::{CpuEngine, DraftInput, FollowedInput, FollowedOutput, MtpInput, StepObserver, StepOutput};

/// A model ready to step, with its KV cache.
pub struct Engine(Backend);

enum Backend {
    Cpu(Box<CpuEngine>),
    Cuda(Box<CudaEngine>),
}

impl Engine {
    /// Loads everything but the routed experts, which `experts` reaches.
    ///
    /// `progress` is told `(bytes done, bytes in all)`.
    ///
    /// # Errors
    /// Whatever is wrong with checkpoint, options or device; an engine that does not fit its device is refused before
    /// anything is loaded.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        experts: Box<dyn Experts>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        match options.device {
            Device::Cpu => CpuEngine::load(checkpoint, options, experts, progress).map(Self::cpu),
            Device::Cuda(ordinal) => {
                let experts = RoutedExperts::Remote(experts);
                CudaEngine::load(checkpoint, options, ordinal, experts, progress).map(Self::cuda)
            }
        }
    }

    /// Loads everything, the routed experts onto the same device.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_experts(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        match options.device {
            Device::Cpu => {
                let bank = ExpertBank::load_all(checkpoint, options.numerics, options.mtp, progress)?;
                Self::load(checkpoint, options, Box::new(LocalExperts::new(bank)), progress)
            }
            Device::Cuda(ordinal) => {
                let experts = RoutedExperts::Local;
                CudaEngine::load(checkpoint, options, ordinal, experts, progress).map(Self::cuda)
            }
        }
    }

    /// An engine whose weights, experts included, are made on its device: for measurements at sizes that nobody wants to
    /// store.
    ///
    /// # Errors
    /// As [`Self::load`]; [`EngineError::NoBackEnd`] where the device makes no weights.
    pub fn synthetic(
        config: &ModelConfig,
        options: &EngineOptions,
        weights: SyntheticWeights,
    ) -> Result<Self, EngineError> {
        match options.device {
            Device::Cpu => Err(EngineError::NoBackEnd { device: options.device }),
            Device::Cuda(ordinal) => CudaEngine::synthetic(config, options, ordinal, weights).map(Self::cuda),
        }
    }

    fn cpu(engine: CpuEngine) -> Self {
        Self(Backend::Cpu(Box::new(engine)))
    }

    fn cuda(engine: CudaEngine) -> Self {
        Self(Backend::Cuda(Box::new(engine)))
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        match &self.0 {
            Backend::Cpu(engine) => engine.config(),
            Backend::Cuda(engine) => engine.config(),
        }
    }

    /// How the cache is laid out.
    pub fn kv_layout(&self) -> &KvLayout {
        match &self.0 {
            Backend::Cpu(engine) => engine.kv().layout(),
            Backend::Cuda(engine) => engine.kv_layout(),
        }
    }

    /// What must be equal for two workers to give the same bits.
    pub fn fingerprint(&self) -> &ExecutionFingerprint {
        match &self.0 {
            Backend::Cpu(engine) => engine.fingerprint(),
            Backend::Cuda(engine) => engine.fingerprint(),
        }
    }

    /// The KV cache.
    pub fn kv(&self) -> &KvPool {
        match &self.0 {
            Backend::Cpu(engine) => engine.kv(),
            Backend::Cuda(engine) => engine.kv(),
        }
    }

    /// The KV cache, for rows that were computed elsewhere.
    pub fn kv_mut(&mut self) -> &mut KvPool {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.kv_mut(),
            Backend::Cuda(engine) => engine.kv_mut(),
        }
    }

    /// The largest number of rows in a step.
    pub fn step_tokens_max(&self) -> usize {
        match &self.0 {
            Backend::Cpu(engine) => engine.step_tokens_max(),
            Backend::Cuda(engine) => engine.step_tokens_max(),
        }
    }

    /// Runs rows of some sequences through the main model.
    ///
    /// # Errors
    /// [`StepError::Invalid`] before anything is computed; [`StepError::Experts`] where the routed experts fail, after
    /// which the rows of this step count as not in the cache. The engine can go on in either case. After
    /// [`StepError::Device`] it cannot: its worker must end.
    pub fn step(
        &mut self,
        inputs: &[SequenceInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.step(inputs, observer),
            Backend::Cuda(engine) => engine.step(inputs, observer),
        }
    }

    /// As [`Self::step`], for whoever wants tokens: `draws` says, row by row in the batch's order, how the token of each wanted
    /// row is drawn, or none where its logits are wanted. A device that can draws there, and no logits come to the host but
    /// those that are asked for; elsewhere [`Drawn::token`] draws from them.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_drawing(
        &mut self,
        inputs: &[SequenceInput<'_>],
        draws: &mut dyn Iterator<Item = Option<Draw<'_>>>,
        observer: &mut dyn StepObserver,
    ) -> Result<Drawn<'_>, StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => {
                let vocab = engine.config().vocab_size;
                let StepOutput { logits, hidden } = engine.step(inputs, observer)?;
                Ok(Drawn::from_logits(logits, vocab, hidden))
            }
            Backend::Cuda(engine) => engine.step_drawing(inputs, draws, observer),
        }
    }

    /// Whether the MTP module is loaded.
    pub fn has_mtp(&self) -> bool {
        match &self.0 {
            Backend::Cpu(engine) => engine.has_mtp(),
            Backend::Cuda(engine) => engine.has_mtp(),
        }
    }

    /// As [`Self::step`], and stores the MTP module's rows of the same tokens. The observer sees the module's layer last.
    ///
    /// # Errors
    /// As [`Self::step`]; [`InvalidBatch::NoMtp`](crate::InvalidBatch::NoMtp) where the engine was loaded without the module.
    pub fn step_with_mtp(
        &mut self,
        inputs: &[FollowedInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<FollowedOutput<'_>, StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.step_with_mtp(inputs, observer),
            Backend::Cuda(engine) => engine.step_with_mtp(inputs, observer),
        }
    }

    /// As [`Self::step_with_mtp`], with tokens as [`Self::step_drawing`] gives them; beside them the states of the sequences' last
    /// rows, as [`FollowedOutput::last`].
    ///
    /// # Errors
    /// As [`Self::step_with_mtp`].
    pub fn step_with_mtp_drawing(
        &mut self,
        inputs: &[FollowedInput<'_>],
        draws: &mut dyn Iterator<Item = Option<Draw<'_>>>,
        observer: &mut dyn StepObserver,
    ) -> Result<(Drawn<'_>, &[f32]), StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => {
                let vocab = engine.config().vocab_size;
                let FollowedOutput { logits, hidden, last } = engine.step_with_mtp(inputs, observer)?;
                Ok((Drawn::from_logits(logits, vocab, hidden), last))
            }
            Backend::Cuda(engine) => engine.step_with_mtp_drawing(inputs, draws, observer),
        }
    }

    /// Runs rows of some sequences through the MTP module, which stores its own layer of the cache.
    ///
    /// # Errors
    /// As [`Self::step`]; [`InvalidBatch::NoMtp`](crate::InvalidBatch::NoMtp) where the engine was loaded without the module.
    pub fn mtp_step(
        &mut self,
        inputs: &[MtpInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.mtp_step(inputs, observer),
            Backend::Cuda(engine) => engine.mtp_step(inputs, observer),
        }
    }

    /// Stores the MTP module's rows of some sequences' tokens, as [`Self::mtp_step`] does, and computes nothing else.
    ///
    /// # Errors
    /// As [`Self::mtp_step`], before anything is stored.
    pub fn mtp_store(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.mtp_store(inputs),
            Backend::Cuda(engine) => engine.mtp_store(inputs),
        }
    }

    /// Guesses the tokens behind each sequence's last one. Whenever one of them has logits for another guess,
    /// `choose(index, logits)` says which token it is, or that this sequence has guessed enough; `logits` `[vocab]` may be
    /// overwritten.
    ///
    /// # Errors
    /// As [`Self::mtp_step`]. What was chosen before a failure may be kept or thrown away.
    pub fn draft(
        &mut self,
        inputs: &[DraftInput<'_>],
        choose: &mut dyn FnMut(usize, &mut [f32]) -> Option<TokenId>,
    ) -> Result<(), StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.draft(inputs, choose),
            Backend::Cuda(engine) => engine.draft(inputs, choose),
        }
    }

    /// As [`Self::draft`], with guesses drawn on the device where it can draw.
    ///
    /// # Errors
    /// As [`Self::draft`].
    pub fn draft_drawing(
        &mut self,
        inputs: &[DraftInput<'_>],
        drafter: &mut dyn Drafter,
    ) -> Result<(), StepError> {
        match &mut self.0 {
            Backend::Cpu(engine) => engine.draft(inputs, &mut |index, logits| {
                let token = drafter.guess(index, logits)?;
                drafter.take(index, token).then_some(token)
            }),
            Backend::Cuda(engine) => engine.draft_drawing(inputs, drafter),
        }
    }
}
