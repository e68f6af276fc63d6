//! Hop 9: finished KV on its way to decode while the next layers and chunks run.
//!
//! A [`Handoff`] keeps one mark per sequence and layer: how many rows are in the pool for good, and how many blocks
//! have been given to the transfer. Whatever lies between is offered when a layer of a chunk finishes, and offered
//! again when the transfer had no room. Nothing is copied or queued here: until the commit the blocks stay in the pool,
//! so back-pressure costs two numbers, and the device thread never waits for a peer.
//!
//! Whole blocks go as they fill; the prompt's last, partial one goes once, when it holds its last row. The first token
//! follows the last block. Invariant: a block is offered only after every row that it will ever hold is computed.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crossbeam_channel::Select;
use engine::{KvPool, StepObserver, Watched};
use kvtransfer::sender::SenderStats;
use kvtransfer::{Sender, SenderEvent, TransferError, TransferId};
use model::{BlockId, KvLayout, TokenId};
use proto::ticket::KvTicket;
use tracing::Span;

use crate::scheduler::{Chunk, Scheduler, SequenceId};

/// Blocks of one layer in one push. V3's take 42 kB each: a third of a megabyte keeps frames short enough to let other
/// sequences in between.
const RUN_BLOCKS_MAX: usize = 8;

/// How a hand-off ended.
#[derive(Debug)]
pub enum Outcome {
    /// Every block is committed; `handoff` is the time since the first token was known.
    Committed {
        /// Since the first token.
        handoff: Duration,
    },
    /// Decode refused it.
    Refused {
        /// Why.
        detail: String,
    },
    /// Decode went away.
    Lost,
}

/// Every sequence's transfer.
pub struct Handoff {
    sender: Sender,
    block_tokens: usize,
    row_bytes: usize,
    layers: usize,
    /// In order of arrival, which is the order in which they get what room there is.
    outgoing: BTreeMap<SequenceId, Outgoing>,
    sequences: HashMap<TransferId, SequenceId>,
}

struct Outgoing {
    transfer: TransferId,
    prompt_tokens: usize,
    /// The first block that decode wants.
    first_block: usize,
    /// One past the last block.
    end_block: usize,
    layers: Vec<LayerMark>,
    first_token: FirstToken,
    /// Something could not be given to the transfer yet.
    backlog: bool,
    /// Something can never be given to it, and why.
    broken: Option<String>,
    /// Open from the ticket to the end.
    hop: Span,
}

/// Progress of one layer of one sequence.
#[derive(Clone, Copy)]
struct LayerMark {
    /// Rows computed, from the prompt's start.
    rows: usize,
    /// The block to push next, counted from the sequence's start.
    next_block: usize,
}

enum FirstToken {
    Unknown,
    Known {
        token: TokenId,
        since: Instant,
        /// It was sent, on whatever path. Until then it waits for the blocks before it.
        sent: bool,
        /// It was sent on the path that the transfer takes now.
        sent_here: bool,
    },
}

impl Handoff {
    /// No transfers, of pools with this layout.
    pub fn new(sender: Sender, layout: &KvLayout) -> Self {
        Self {
            sender,
            block_tokens: layout.block_tokens,
            row_bytes: layout.row_bytes(),
            layers: layout.layers,
            outgoing: BTreeMap::new(),
            sequences: HashMap::new(),
        }
    }

    /// Opens the transfer that `ticket` permits. The ticket fits prompt and layout: the server has checked.
    ///
    /// # Errors
    /// The ticket is in use here, or too many transfers are.
    pub fn begin(
        &mut self,
        id: SequenceId,
        request_id: &str,
        ticket: &KvTicket,
        now: Instant,
    ) -> Result<(), TransferError> {
        let transfer = self.sender.begin(ticket.clone(), now)?;
        let first_block = ticket.first_block as usize;
        let mark = LayerMark { rows: 0, next_block: first_block };
        self.sequences.insert(transfer, id);
        self.outgoing.insert(
            id,
            Outgoing {
                transfer,
                prompt_tokens: ticket.prompt_tokens as usize,
                first_block,
                end_block: ticket.end_block() as usize,
                layers: vec![mark; self.layers],
                first_token: FirstToken::Unknown,
                backlog: false,
                broken: None,
                hop: tracing::info_span!("handoff", hop = 9, request_id),
            },
        );
        Ok(())
    }

    /// Notes the first token; it leaves behind the last block.
    pub fn finish(&mut self, id: SequenceId, token: TokenId, now: Instant) {
        if let Some(outgoing) = self.outgoing.get_mut(&id) {
            outgoing.first_token = FirstToken::Known { token, since: now, sent: false, sent_here: false };
            outgoing.backlog = true;
        }
    }

    /// Gives a sequence's transfer up, telling decode. Unknown ids are ignored: the transfer may have ended first.
    pub fn abort(&mut self, id: SequenceId, reason: &str) {
        if let Some(outgoing) = self.outgoing.remove(&id) {
            self.sequences.remove(&outgoing.transfer);
            self.sender.abort(outgoing.transfer, reason);
        }
    }

    /// Adds decode's answers to what the device thread sleeps on.
    pub fn wait_on<'a>(&'a self, select: &mut Select<'a>) {
        self.sender.wait_on(select);
    }

    /// Whether something waits for room in the transfer.
    pub fn has_backlog(&self) -> bool {
        self.outgoing.values().any(|outgoing| outgoing.backlog)
    }

    /// Says which hand-offs have ended, and offers again what the transfers of the others had no room for.
    pub fn poll(&mut self, scheduler: &Scheduler, kv: &KvPool, now: Instant) -> Vec<(SequenceId, Outcome)> {
        let mut ended = Vec::new();
        for event in self.sender.poll(now) {
            match event {
                SenderEvent::Committed { id } => {
                    ended.extend(self.remove(id).map(|(id, outgoing)| (id, outgoing.committed(now))));
                }
                SenderEvent::Refused { id, detail } => {
                    ended.extend(self.remove(id).map(|(id, _)| (id, Outcome::Refused { detail })));
                }
                SenderEvent::Lost { id } => {
                    ended.extend(self.remove(id).map(|(id, _)| (id, Outcome::Lost)));
                }
                SenderEvent::Resumed { id, missing } => {
                    let id = self.sequences.get(&id);
                    if let Some(outgoing) = id.and_then(|id| self.outgoing.get_mut(id)) {
                        outgoing.start_over(missing);
                    }
                }
            }
        }
        for (&id, outgoing) in self.outgoing.iter_mut().filter(|(_, outgoing)| outgoing.backlog) {
            let block_table = scheduler.block_table(id);
            let pool = Pool { kv, block_table, block_tokens: self.block_tokens, row_bytes: self.row_bytes };
            outgoing.push_all(&mut self.sender, &pool);
        }
        let broken =
            self.outgoing.iter_mut().filter_map(|(&id, outgoing)| Some((id, outgoing.broken.take()?)));
        for (id, detail) in broken.collect::<Vec<_>>() {
            self.abort(id, &detail);
            ended.push((id, Outcome::Refused { detail }));
        }
        ended
    }

    /// What the transfers have counted.
    pub fn stats(&self) -> SenderStats {
        self.sender.stats()
    }

    fn remove(&mut self, transfer: TransferId) -> Option<(SequenceId, Outgoing)> {
        let id = self.sequences.remove(&transfer)?;
        Some((id, self.outgoing.remove(&id)?))
    }

    /// An observer for the step that runs `step`.
    pub fn during<'a>(&'a mut self, scheduler: &'a Scheduler, step: &'a [Chunk]) -> PushWhileComputing<'a> {
        PushWhileComputing { handoff: self, scheduler, step }
    }
}

/// Watches a step and pushes each layer's blocks as they are done.
pub struct PushWhileComputing<'a> {
    handoff: &'a mut Handoff,
    scheduler: &'a Scheduler,
    step: &'a [Chunk],
}

impl StepObserver for PushWhileComputing<'_> {
    fn watched(&self) -> Watched {
        Watched { layers_done: true, values: false, stages: false }
    }

    fn layer_done(&mut self, layer: usize, kv: &KvPool) {
        let Handoff { sender, outgoing, block_tokens, row_bytes, .. } = &mut *self.handoff;
        for chunk in self.step {
            let Some(outgoing) = outgoing.get_mut(&chunk.id) else {
                continue;
            };
            let Some(mark) = outgoing.layers.get_mut(layer) else {
                continue;
            };
            mark.rows = chunk.start + chunk.tokens;
            let block_table = self.scheduler.block_table(chunk.id);
            let pool = Pool { kv, block_table, block_tokens: *block_tokens, row_bytes: *row_bytes };
            outgoing.push_layer(layer, sender, &pool);
        }
    }
}

/// Where a sequence's rows lie.
struct Pool<'a> {
    kv: &'a KvPool,
    block_table: &'a [BlockId],
    block_tokens: usize,
    row_bytes: usize,
}

impl Outgoing {
    /// Offers everything that is ready, and the first token behind it.
    fn push_all(&mut self, sender: &mut Sender, pool: &Pool<'_>) {
        self.backlog = false;
        for layer in 0..self.layers.len() {
            self.push_layer(layer, sender, pool);
        }
        let complete = self.layers.iter().all(|mark| mark.next_block == self.end_block);
        if let FirstToken::Known { token, since, sent_here: false, .. } = self.first_token
            && complete
        {
            match sender.finish(self.transfer, token) {
                Ok(()) => {
                    self.first_token = FirstToken::Known { token, since, sent: true, sent_here: true };
                }
                Err(error) => self.note(error),
            }
        }
    }

    /// Decode has said what it has: offers everything again, of which only what is missing is sent.
    fn start_over(&mut self, missing: usize) {
        let _hop = self.hop.enter();
        tracing::info!(missing, "the hand-off goes on where it was");
        for mark in &mut self.layers {
            mark.next_block = self.first_block;
        }
        if let FirstToken::Known { sent_here, .. } = &mut self.first_token {
            *sent_here = false;
        }
        self.backlog = true;
    }

    /// What decode's commit means: nothing, unless all was sent.
    fn committed(&self, now: Instant) -> Outcome {
        match self.first_token {
            FirstToken::Known { since, sent: true, .. } => {
                Outcome::Committed { handoff: now.saturating_duration_since(since) }
            }
            FirstToken::Unknown | FirstToken::Known { .. } => {
                Outcome::Refused { detail: "it committed what was not sent".to_owned() }
            }
        }
    }

    /// Offers the blocks of `layer` that are ready and not pushed.
    fn push_layer(&mut self, layer: usize, sender: &mut Sender, pool: &Pool<'_>) {
        let mark = &mut self.layers[layer];
        let ready =
            if mark.rows == self.prompt_tokens { self.end_block } else { mark.rows / pool.block_tokens };
        let hop = self.hop.enter();
        while mark.next_block < ready {
            let end = ready.min(mark.next_block + RUN_BLOCKS_MAX);
            let run = mark.next_block..end;
            let last_rows = pool.rows(end - 1, self.prompt_tokens);
            let mut blocks = [const { Cow::Borrowed::<[u8]>(&[]) }; RUN_BLOCKS_MAX];
            let mut pieces = [&[][..]; RUN_BLOCKS_MAX];
            let places = &pool.block_table[run.clone()];
            pool.kv.each_block_layer(places, layer, &mut |index, copy| blocks[index] = copy);
            for ((piece, copy), block) in pieces.iter_mut().zip(&blocks).zip(run.clone()) {
                *piece = &copy[..pool.rows(block, self.prompt_tokens) * pool.row_bytes];
            }
            // Layers, blocks and rows were u32 in the ticket.
            let (first_block, pieces) = (run.start as u32, &pieces[..run.len()]);
            match sender.push_blocks(self.transfer, layer as u32, first_block, pieces, last_rows as u32) {
                Ok(()) => mark.next_block = end,
                Err(error) => {
                    drop(hop);
                    return self.note(error);
                }
            }
        }
    }

    /// What could not be given to the transfer now, or ever.
    fn note(&mut self, error: TransferError) {
        match error {
            // Ended: the next poll says how.
            TransferError::Full | TransferError::Ended(_) => self.backlog = true,
            // A bug on this side. Trying again would go on for ever.
            error => {
                tracing::error!(%error, "a push is not what its ticket permits");
                self.broken.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

impl Pool<'_> {
    /// Rows of a prompt that `block` holds.
    fn rows(&self, block: usize, prompt_tokens: usize) -> usize {
        (prompt_tokens - block * self.block_tokens).min(self.block_tokens)
    }
}

#[cfg(test)]
mod tests;
