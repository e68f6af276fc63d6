//! What must hold of a [`Scheduler`] after every event. For tests and simulation.

use super::Scheduler;
use super::sequence::State;

impl Scheduler {
    /// Panics when the books do not balance. For tests and simulation; costs a walk over everything.
    pub fn check_invariants(&self) {
        self.blocks.check_invariants(self.sequences.values().map(|sequence| &sequence.table));
        assert!(self.sequences.len() <= self.limits.sequences_max);
        let mut paused = 0;
        for (id, sequence) in &self.sequences {
            let running = matches!(sequence.state, State::Running { .. });
            let finished = matches!(sequence.state, State::Finished(_));
            assert_eq!(self.turns.contains(id), running, "{id:?} has turns while it runs");
            assert_eq!(self.finished.contains(id), finished, "{id:?} is listed once it has finished");
            assert!(sequence.generated <= sequence.rule.tokens_max(), "{id:?} exceeds max_tokens");
            assert!(finished || running == (sequence.generated > 0), "{id:?} runs from its first token on");
            paused += usize::from(matches!(sequence.state, State::Running { paused: Some(_), .. }));
            let tokens = sequence.prompt_tokens + sequence.rule.tokens_max() as usize;
            let blocks = tokens.div_ceil(self.limits.block_tokens);
            assert_eq!(sequence.block_table().len(), blocks, "{id:?} holds blocks for its whole life");
            let length = sequence.prompt_tokens + sequence.generated as usize;
            assert_eq!(sequence.tokens.len(), length, "{id:?} knows its tokens");
            assert!(sequence.shared_blocks() * self.limits.block_tokens <= sequence.prompt_tokens);
            if let Some(ticket) = sequence.ticket {
                assert_eq!(self.tickets.get(&ticket), Some(id), "{ticket} leads to {id:?}");
            }
        }
        let armed = self.sequences.values().filter(|sequence| sequence.ticket.is_some()).count();
        assert_eq!(self.tickets.len(), armed, "a ticket leads nowhere");
        assert_eq!(self.paused, paused);
        assert_eq!(self.turns.len() + self.finished.len() + self.waiting(), self.sequences.len());
    }
}
