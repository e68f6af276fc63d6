//! What must hold of a [`Scheduler`] after every event. For tests and simulation.

use super::banker::Banker;
use super::sequence::State;
use super::{Scheduler, Sequence, SequenceId};

impl Scheduler {
    /// Panics when the books do not balance. For tests and simulation; costs a walk over everything.
    pub fn check_invariants(&self) {
        self.blocks.check_invariants(self.sequences.values().filter_map(|sequence| sequence.table.as_ref()));
        self.queue.check_invariants();
        assert!(self.holders <= self.limits.sequences_max);
        assert!(self.queue.len() + self.restoring.len() <= self.limits.queue_max);
        let (mut paused, mut short, mut owed) = (0, 0, 0);
        for (&id, sequence) in &self.sequences {
            self.check_sequence(id, sequence);
            paused += usize::from(matches!(sequence.state, State::Running { paused: Some(_), .. }));
            short += usize::from(sequence.short);
            owed += sequence.owed_blocks();
        }
        let armed = self.sequences.values().filter(|sequence| sequence.ticket.is_some()).count();
        assert_eq!(self.tickets.len(), armed, "a ticket leads nowhere");
        assert_eq!((self.paused, self.short, self.owed), (paused, short, owed));
        let holders = self.sequences.values().filter(|sequence| sequence.table.is_some()).count();
        assert_eq!(self.holders, holders);
        assert_eq!(self.turns.iter().count(), self.turns.len());
        let queued = self.sequences.values().filter(|sequence| sequence.is_queued()).count();
        assert_eq!(self.queue.len() + self.restoring.len(), queued);
        let states = queued + self.turns.len() + self.finished.len() + self.waiting();
        assert_eq!(states, self.sequences.len());
        let mut banker = Banker::new(self.limits.kv_blocks, self.limits.sequences_max);
        let safe = banker.safe(&self.blocks, &self.sequences, None);
        assert!(safe, "not every sequence can reach its worst case");
    }

    fn check_sequence(&self, id: SequenceId, sequence: &Sequence) {
        let running = matches!(sequence.state, State::Running { .. });
        let finished = matches!(sequence.state, State::Finished(_));
        let queued = sequence.is_queued();
        assert_eq!(self.turns.iter().any(|turn| turn == id), running, "{id:?} has turns while it runs");
        let waits = self.queue.iter().any(|&waits| waits == id);
        let restoring = self.restoring.contains(&id);
        assert!(!(waits && restoring), "{id:?} is queued once it is restored");
        assert_eq!(waits || restoring, queued, "{id:?} is queued without blocks");
        assert_eq!(self.finished.contains(&id), finished, "{id:?} is listed once it has finished");
        assert!(sequence.generated <= sequence.rule.tokens_max(), "{id:?} exceeds max_tokens");
        assert!(finished || running == (sequence.generated > 0), "{id:?} runs from its first token on");
        assert!(running || !sequence.short, "{id:?} is short while it runs");
        let prefilling = matches!(sequence.state, State::Prefilling { .. });
        let listed = self.prefilling.iter().filter(|&&listed| listed == id).count();
        assert_eq!(listed, usize::from(prefilling), "{id:?} is listed while its prompt is computed here");
        if let State::Prefilling { computed } = sequence.state {
            let found = sequence.shared_blocks() * self.limits.block_tokens;
            assert!(computed + self.limits.rerun_tokens >= found, "{id:?} starts behind what it found");
            assert!(computed <= sequence.prompt_tokens, "{id:?} computes its prompt");
        }
        let Some(table) = &sequence.table else {
            return assert!((queued || finished) && sequence.ticket.is_none(), "{id:?} holds nothing");
        };
        assert!(!queued, "{id:?} holds blocks and is queued");
        let length = sequence.prompt_tokens + sequence.generated as usize;
        assert_eq!(sequence.tokens.len(), length, "{id:?} knows its tokens");
        let blocks = table.blocks().len();
        let computed = if running { length - 1 } else { sequence.prompt_tokens };
        let least = computed.div_ceil(self.limits.block_tokens);
        assert!(finished || blocks >= least, "{id:?} has a block for every row that is computed");
        let tokens = sequence.prompt_tokens + sequence.rule.tokens_max() as usize;
        assert_eq!(sequence.life_blocks, tokens.div_ceil(self.limits.block_tokens));
        assert!(blocks <= sequence.life_blocks, "{id:?} holds more than it can ever use");
        assert!(sequence.shared_blocks() * self.limits.block_tokens <= sequence.prompt_tokens);
        if let Some(ticket) = sequence.ticket {
            assert_eq!(self.tickets.get(&ticket), Some(&id), "{ticket} leads to {id:?}");
        }
    }
}
