//! The MTP module in a step: keeping its cache beside the main model's, and drafting with it.
//!
//! [`crate::Engine::step_with_mtp`] is a step of the main model that also stores the module's row of each of its tokens, made from
//! the main model's own hidden states. So the module's cache is a function of the tokens, like the main model's, and
//! neither knows nor needs to know which of the step's tokens will stand: the rows of the others are behind the
//! sequence's end and will be overwritten. [`crate::Engine::draft`] lets the module guess a few tokens ahead by feeding its own
//! hidden state back; what it stores for its guesses is such rows as well.
//!
//! Deliberately not here: how many tokens to draft, how to choose one from its logits, and which of them stand.

use model::{BlockId, ModelConfig, TokenId};

use super::{CpuEngine, StepObserver, StepOutput, gather, run_head};
use crate::batch::{LogitsWanted, RowsOf, SequenceInput, StepBatch, recycle};
use crate::deepseek::{MtpModule, MtpWorkspace, StepContext};
use crate::error::{InvalidBatch, StepError};
use crate::stage::Stage;

/// One sequence's rows of a step that also keeps the MTP module's cache.
#[derive(Clone, Copy, Debug)]
pub struct FollowedInput<'a> {
    /// What the main model runs.
    pub sequence: SequenceInput<'a>,
    /// `[hidden]`: the main model's hidden state at the position before the first row, after the final norm. Empty where
    /// it is not known: then the module's row of the first token is left as it is. At position 0 it does not matter.
    pub before: &'a [f32],
}

/// What a step that keeps the MTP module's cache gives.
#[derive(Clone, Copy, Debug)]
pub struct FollowedOutput<'a> {
    /// `[wanted, vocab]`, in the batch's order.
    pub logits: &'a [f32],
    /// `[wanted, hidden]`: hidden states of the same rows after the final norm.
    pub hidden: &'a [f32],
    /// `[sequences, hidden]`: that of each sequence's last row, which its next step begins with.
    pub last: &'a [f32],
}

/// One sequence's rows for the MTP module.
#[derive(Clone, Copy, Debug)]
pub struct MtpInput<'a> {
    /// Tokens at their own positions, from 1 on; the rows of all earlier tokens are in the module's cache.
    pub sequence: SequenceInput<'a>,
    /// `[tokens, hidden]`: the hidden state at the position before each token, after the final norm: the main model's,
    /// or for further drafts the module's own [`StepOutput::hidden`].
    pub hidden: &'a [f32],
}

/// A sequence whose next tokens are to be guessed.
#[derive(Clone, Copy, Debug)]
pub struct DraftInput<'a> {
    /// Its last token.
    pub token: TokenId,
    /// The position of `token`, at least 1.
    pub position: usize,
    /// The sequence's KV blocks in order, reaching at least position `position + drafts_max - 1`.
    pub block_table: &'a [BlockId],
    /// `[hidden]`: the main model's hidden state at the position before `token`, after the final norm.
    pub hidden: &'a [f32],
    /// Tokens to guess at most, at least one.
    pub drafts_max: usize,
}

/// A loaded module with its buffers.
pub(super) struct Mtp {
    module: MtpModule,
    workspace: MtpWorkspace,
    /// Rows that are stored after a step.
    following: StepBatch,
    /// Sequences that go on drafting: index, last token.
    drafting: Vec<(usize, TokenId)>,
    /// `[sequences, hidden]`: states of their last rows.
    last: Vec<f32>,
}

impl Mtp {
    pub fn new(module: MtpModule, config: &ModelConfig, rows_max: usize) -> Self {
        Self {
            module,
            workspace: MtpWorkspace::new(config, rows_max),
            following: StepBatch::default(),
            drafting: Vec::new(),
            last: Vec::new(),
        }
    }
}

impl CpuEngine {
    /// Whether the MTP module is loaded.
    pub fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    /// As [`Self::step`], and stores the MTP module's rows of the same tokens. The observer sees the module's layer last.
    ///
    /// # Errors
    /// As [`Self::step`]; [`InvalidBatch::NoMtp`] where the engine was loaded without the module.
    pub fn step_with_mtp(
        &mut self,
        inputs: &[FollowedInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<FollowedOutput<'_>, StepError> {
        let hidden_size = self.config.hidden_size;
        self.require_mtp()?;
        check_before(inputs, hidden_size)?;
        self.run_layers(inputs.iter().map(|input| input.sequence), observer)?;

        let Self { cpu, kv, rope, experts, batch, model, workspace, mtp, .. } = self;
        let Mtp { module, workspace: mtp_workspace, following, last, .. } =
            mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let size = batch.rows() * hidden_size;
        model.norm.forward(cpu, &workspace.hidden[..size], &mut workspace.normed[..size]);
        let normed = &workspace.normed[..size];
        observer.stage(Stage::Norm);
        follow(following, &mut mtp_workspace.hidden, batch, inputs, normed);
        if following.rows() == 0 {
            observer.layer_done(model.layers.len(), kv);
        } else {
            let experts = experts.as_mut();
            let mut step =
                StepContext { cpu, kv, rope, experts, observer, batch: following, attention_rows: &[] };
            let pairs = &mut workspace.hidden[..following.rows() * hidden_size];
            module.store(&mut step, &mut workspace.layer, mtp_workspace, &model.embedding, pairs);
        }
        gather(normed, &batch.wanted, hidden_size, &mut workspace.wanted);
        let wanted = &workspace.wanted[..batch.wanted.len() * hidden_size];
        let logits = run_head(cpu, &model.head, wanted, &mut workspace.head_input, &mut workspace.logits);
        observer.stage(Stage::Head);
        last.clear();
        let mut end = 0;
        for rows in batch.sequence_rows() {
            end += rows * hidden_size;
            last.extend_from_slice(&normed[end - hidden_size..end]);
        }
        Ok(FollowedOutput { logits, hidden: wanted, last })
    }

    /// Runs rows of some sequences through the MTP module, which stores its own layer of the cache.
    ///
    /// # Errors
    /// As [`Self::step`]; [`InvalidBatch::NoMtp`] where the engine was loaded without the module.
    pub fn mtp_step(
        &mut self,
        inputs: &[MtpInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutput<'_>, StepError> {
        self.form_mtp(inputs)?;
        self.run_mtp(observer)
    }

    /// Stores the module's rows of some sequences' tokens, as [`Self::mtp_step`] does, and computes nothing else. No logits
    /// may be wanted.
    ///
    /// # Errors
    /// As [`Self::mtp_step`], before anything is stored.
    pub fn mtp_store(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), StepError> {
        self.form_mtp(inputs)?;
        let Self { cpu, kv, rope, experts, batch, model, workspace, config, mtp, .. } = self;
        let Mtp { module, workspace: mtp_workspace, .. } = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let experts = experts.as_mut();
        let mut step = StepContext { cpu, kv, rope, experts, observer: &mut (), batch, attention_rows: &[] };
        let pairs = &mut workspace.hidden[..batch.rows() * config.hidden_size];
        module.store(&mut step, &mut workspace.layer, mtp_workspace, &model.embedding, pairs);
        Ok(())
    }

    /// Forms a batch of the module's rows and takes their states.
    fn form_mtp(&mut self, inputs: &[MtpInput<'_>]) -> Result<(), InvalidBatch> {
        let hidden_size = self.config.hidden_size;
        self.require_mtp()?;
        self.batch.form(RowsOf::Mtp, inputs.iter().map(|input| input.sequence), &self.limits)?;
        let mut taken = 0;
        for (sequence, MtpInput { sequence: SequenceInput { tokens, .. }, hidden }) in
            inputs.iter().enumerate()
        {
            let (values, tokens) = (hidden.len(), tokens.len());
            if values != tokens * hidden_size {
                return Err(InvalidBatch::Hidden { sequence, values, tokens, hidden_size });
            }
            let Some(mtp) = &mut self.mtp else { break };
            mtp.workspace.hidden[taken..taken + values].copy_from_slice(hidden);
            taken += values;
        }
        Ok(())
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
        let hidden_size = self.config.hidden_size;
        self.require_mtp()?;
        let mut drafting = self.mtp.as_mut().map(|mtp| std::mem::take(&mut mtp.drafting)).unwrap_or_default();
        drafting.clear();
        drafting.extend(inputs.iter().map(|input| input.token).enumerate());
        let result = self.draft_rounds(inputs, &mut drafting, hidden_size, choose);
        if let Some(mtp) = &mut self.mtp {
            mtp.drafting = drafting;
        }
        result
    }

    fn draft_rounds(
        &mut self,
        inputs: &[DraftInput<'_>],
        drafting: &mut Vec<(usize, TokenId)>,
        hidden_size: usize,
        choose: &mut dyn FnMut(usize, &mut [f32]) -> Option<TokenId>,
    ) -> Result<(), StepError> {
        for round in 0.. {
            if drafting.is_empty() {
                break;
            }
            let rows = drafting.iter().map(|(index, token)| SequenceInput {
                tokens: std::slice::from_ref(token),
                position: inputs[*index].position + round,
                block_table: inputs[*index].block_table,
                logits: LogitsWanted::Last,
            });
            self.batch.form(RowsOf::Mtp, rows, &self.limits)?;
            if round == 0 {
                self.take_first_states(inputs, hidden_size)?;
            }
            self.run_mtp(&mut ())?;
            let Self { workspace, mtp: Some(mtp), config, .. } = self else { break };
            let (mut row, mut kept) = (0, 0);
            drafting.retain_mut(|(index, token)| {
                let logits = &mut workspace.logits[row * config.vocab_size..][..config.vocab_size];
                let state = row * hidden_size..(row + 1) * hidden_size;
                row += 1;
                let Some(chosen) = choose(*index, logits) else { return false };
                *token = chosen;
                let goes_on = round + 1 < inputs[*index].drafts_max;
                if goes_on {
                    mtp.workspace.hidden[kept..kept + hidden_size].copy_from_slice(&workspace.normed[state]);
                    kept += hidden_size;
                }
                goes_on
            });
        }
        Ok(())
    }

    fn take_first_states(
        &mut self,
        inputs: &[DraftInput<'_>],
        hidden_size: usize,
    ) -> Result<(), InvalidBatch> {
        let Some(mtp) = &mut self.mtp else { return Err(InvalidBatch::NoMtp) };
        let rows = mtp.workspace.hidden.chunks_exact_mut(hidden_size);
        for (sequence, (input, row)) in inputs.iter().zip(rows).enumerate() {
            let values = input.hidden.len();
            if values != hidden_size {
                return Err(InvalidBatch::Hidden { sequence, values, tokens: 1, hidden_size });
            }
            row.copy_from_slice(input.hidden);
        }
        Ok(())
    }

    /// Runs the batch that was formed on the states that were taken.
    fn run_mtp(&mut self, observer: &mut dyn StepObserver) -> Result<StepOutput<'_>, StepError> {
        let Self { cpu, kv, rope, experts, batch, attention_rows, model, workspace, config, mtp, .. } = self;
        let Mtp { module, workspace: mtp_workspace, .. } = mtp.as_mut().ok_or(InvalidBatch::NoMtp)?;
        let views = batch.attention_rows(recycle(std::mem::take(attention_rows)));
        let experts = experts.as_mut();
        let mut step = StepContext { cpu, kv, rope, experts, observer, batch, attention_rows: &views };
        let hidden = &mut workspace.hidden[..batch.rows() * config.hidden_size];
        let result = module.forward(&mut step, &mut workspace.layer, mtp_workspace, &model.embedding, hidden);
        *attention_rows = recycle(views);
        result?;
        let head = module.head.as_ref().unwrap_or(&model.head);
        Ok(workspace.finish(cpu, &batch.wanted, &module.norm, head, observer))
    }

    fn require_mtp(&self) -> Result<(), InvalidBatch> {
        if self.mtp.is_some() { Ok(()) } else { Err(InvalidBatch::NoMtp) }
    }
}

/// Whether each state before a first row is one, or none.
pub(crate) fn check_before(inputs: &[FollowedInput<'_>], hidden_size: usize) -> Result<(), InvalidBatch> {
    for (sequence, input) in inputs.iter().enumerate() {
        let values = input.before.len();
        if values != 0 && values != hidden_size {
            return Err(InvalidBatch::Hidden { sequence, values, tokens: 1, hidden_size });
        }
    }
    Ok(())
}

/// Gathers the module's rows of a step's tokens: each with the main model's state one position earlier, which the step
/// itself has made for all but the first row of a sequence.
fn follow(
    following: &mut StepBatch,
    states: &mut [f32],
    main: &StepBatch,
    inputs: &[FollowedInput<'_>],
    normed: &[f32],
) {
    let hidden_size = normed.len() / main.rows();
    let mut states = states.chunks_exact_mut(hidden_size);
    let mut first = 0;
    following.start_following();
    for (input, rows) in inputs.iter().zip(main.sequence_rows()) {
        for row in first..first + rows {
            let before =
                if row > first { &normed[(row - 1) * hidden_size..][..hidden_size] } else { input.before };
            let at_start = main.positions[row] == 0;
            if before.is_empty() && !at_start {
                continue;
            }
            let Some(state) = states.next() else { return };
            if at_start {
                state.fill(0.0);
            } else {
                state.copy_from_slice(before);
            }
            following.push_following(main, row);
        }
        first += rows;
    }
}
