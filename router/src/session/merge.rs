//! Two racing streams, one sequence of tokens.
//!
//! prefill: first token, done. decode: hand-off done, tokens, finished; or, where it computes the prompt, first token,
//! tokens, finished. Tokens of decode that overtake
//! prefill's first token wait for it, and decode's end counts only once the first token is out. A plain
//! state machine: events in, tokens out in order.

use model::TokenId;
use proto::v1::{self, decode_event, prefill_event};

use super::event::FinishReason;

/// Decode's verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub reason: FinishReason,
    /// The stop token id that ended the sequence, if one did.
    pub token: Option<TokenId>,
}

/// What became of the tokens that decode drafted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Drafts {
    pub accepted: u32,
    pub rejected: u32,
}

/// What has come of both streams.
#[derive(Debug)]
pub(super) struct Merge {
    tokens_max: usize,
    tokens: usize,
    first_token: bool,
    handed_over: bool,
    /// Decode computes the prompt.
    alone: bool,
    early: Vec<v1::GeneratedToken>,
    end: Option<End>,
    cached_tokens: u32,
    drafts: Drafts,
    prompt: Vec<v1::GeneratedToken>,
    timings: v1::Timings,
}

impl Merge {
    /// For a sequence of at most `tokens_max` generated tokens.
    pub fn new(tokens_max: u32) -> Self {
        Self {
            tokens_max: tokens_max as usize,
            tokens: 0,
            first_token: false,
            handed_over: false,
            alone: false,
            early: Vec::new(),
            end: None,
            cached_tokens: 0,
            drafts: Drafts::default(),
            prompt: Vec::new(),
            timings: v1::Timings::default(),
        }
    }

    /// The same, from decode alone.
    pub fn of_one(tokens_max: u32) -> Self {
        let mut merge = Self::new(tokens_max);
        merge.handed_over = true;
        merge.alone = true;
        merge.timings.prefill_on_decode = true;
        merge
    }

    /// Takes an event of prefill; returns the tokens that are now in order.
    ///
    /// # Errors
    /// How the worker broke the protocol.
    pub fn prefill(&mut self, event: v1::PrefillEvent) -> Result<Vec<v1::GeneratedToken>, &'static str> {
        match event.event.ok_or("it sent an empty event")? {
            prefill_event::Event::FirstToken(first) => self.first(first),
            prefill_event::Event::Done(done) => {
                self.handed_over = true;
                self.timings.handoff_us = done.handoff_us;
                Ok(Vec::new())
            }
        }
    }

    /// Takes an event of decode behind the ticket; returns the tokens that are now in order.
    ///
    /// # Errors
    /// How the worker broke the protocol.
    pub fn decode(&mut self, event: v1::DecodeEvent) -> Result<Vec<v1::GeneratedToken>, &'static str> {
        match event.event.ok_or("it sent an empty event")? {
            decode_event::Event::Ticket(_) | decode_event::Event::Reserved(_) => Err("it reserved twice"),
            decode_event::Event::FirstToken(first) if self.alone => self.first(first),
            decode_event::Event::FirstToken(_) => Err("it computed a prompt that it was not asked to"),
            decode_event::Event::Handoff(handoff) => {
                // Prefill's own measure, from its last layer on, is the better one where it comes.
                if !self.handed_over {
                    self.timings.handoff_us = handoff.handoff_us;
                }
                self.handed_over = true;
                Ok(Vec::new())
            }
            decode_event::Event::Tokens(message) => {
                self.count(message.tokens.len())?;
                let Drafts { accepted, rejected } = &mut self.drafts;
                *accepted = accepted.saturating_add(message.accepted_drafts);
                *rejected = rejected.saturating_add(message.rejected_drafts);
                if self.first_token {
                    return Ok(message.tokens);
                }
                self.early.extend(message.tokens);
                Ok(Vec::new())
            }
            decode_event::Event::Finished(finished) => {
                let reason = match finished.reason() {
                    v1::FinishReason::Stop => FinishReason::Stop,
                    v1::FinishReason::Length => FinishReason::Length,
                    v1::FinishReason::Cancelled => {
                        return Err("it cancelled a sequence that nobody had cancelled");
                    }
                    v1::FinishReason::Unspecified => return Err("it gave no reason for the end"),
                };
                self.end = Some(End { reason, token: finished.stop_token_id.map(TokenId) });
                self.timings.decode_first_us = finished.first_step_us;
                self.timings.decode_us = finished.decode_us;
                Ok(Vec::new())
            }
        }
    }

    /// The token behind the prompt, from whoever computed that.
    fn first(&mut self, first: v1::FirstToken) -> Result<Vec<v1::GeneratedToken>, &'static str> {
        if self.first_token {
            return Err("it sent two first tokens");
        }
        let mut tokens = vec![first.token.ok_or("its first token is missing")?];
        self.count(1)?;
        self.first_token = true;
        self.cached_tokens = first.cached_tokens;
        self.prompt = first.prompt;
        self.timings.prefill_queue_us = first.queue_us;
        self.timings.prefill_us = first.compute_us;
        tokens.append(&mut self.early);
        Ok(tokens)
    }

    /// Whether the sequence still depends on the prefill worker.
    pub fn needs_prefill(&self) -> bool {
        !self.alone && !(self.first_token && (self.handed_over || self.end.is_some()))
    }

    /// Whether decode still has something to say: it may be through before prefill's first token is here.
    pub fn needs_decode(&self) -> bool {
        self.end.is_none()
    }

    /// How the sequence ended, once every token of it is out.
    pub fn end(&self) -> Option<End> {
        self.end.filter(|_| self.first_token)
    }

    /// Prompt tokens whose KV prefill found instead of computing it.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// What became of drafts so far.
    pub fn drafts(&self) -> Drafts {
        self.drafts
    }

    /// The prompt's tokens behind its first with their log-probabilities, once, where they were asked for.
    pub fn take_prompt(&mut self) -> Vec<v1::GeneratedToken> {
        std::mem::take(&mut self.prompt)
    }

    /// What the workers measured.
    pub fn timings(&self) -> v1::Timings {
        self.timings
    }

    fn count(&mut self, tokens: usize) -> Result<(), &'static str> {
        self.tokens += tokens;
        match self.tokens <= self.tokens_max {
            true => Ok(()),
            false => Err("it sent more tokens than were asked for"),
        }
    }
}

#[cfg(test)]
mod tests;
