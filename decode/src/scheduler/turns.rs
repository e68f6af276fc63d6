//! Whose turn it is when more sequences run than fit a step.
//!
//! Start-time fair queueing over *flows*, a tenant's sequences of one class: each flow has a start tag, the flow with the
//! smallest one sends its longest-waiting sequence, and that costs it 1 / weight. A flow that had nothing to send
//! starts again at the present tag. A tenant's batch sequences count a third of its interactive ones: they hold
//! memory, so they are slowed down and never stopped. While everybody fits, nobody is charged.
//!
//! Deliberately absent: what makes a sequence unable to take its turn. It is asked, and the turn goes to the next.

use std::collections::{BTreeMap, VecDeque};

use proto::share::{Priority, Share, WEIGHT_MAX};

use super::SequenceId;

/// Turns of an interactive flow for one of a batch flow of equal weight.
const INTERACTIVE_PER_BATCH: u64 = 3;
/// Units of a tag for a turn at weight 1: 720,720 is divisible by every weight up to 16, so that those come out exactly.
const TAG_PER_TURN: u64 = 720_720 * 100 * INTERACTIVE_PER_BATCH;

/// Running sequences by flow.
#[derive(Debug)]
pub(super) struct Turns {
    flows: BTreeMap<(u64, Priority), Flow>,
    /// Start tag of the flow that had the last turn.
    now: u64,
    sequences: usize,
}

#[derive(Debug)]
struct Flow {
    weight: u64,
    start: u64,
    /// The one that waited longest first.
    order: VecDeque<SequenceId>,
    /// Sequences at the front of `order` that this step has not asked yet.
    unasked: usize,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self { flows: BTreeMap::new(), now: 0, sequences: 0 }
    }

    /// How many sequences take turns.
    pub(super) fn len(&self) -> usize {
        self.sequences
    }

    /// Every sequence that takes turns.
    pub(super) fn iter(&self) -> impl Iterator<Item = SequenceId> {
        self.flows.values().flat_map(|flow| flow.order.iter().copied())
    }

    /// A sequence runs from now on.
    pub(super) fn join(&mut self, id: SequenceId, share: Share) {
        let now = self.now;
        let flow = self.flows.entry((share.tenant, share.priority)).or_insert_with(|| Flow {
            weight: 1,
            start: now,
            order: VecDeque::new(),
            unasked: 0,
        });
        let class = match share.priority {
            Priority::Interactive => INTERACTIVE_PER_BATCH,
            Priority::Batch => 1,
        };
        // The router's configuration may have changed since the last one.
        flow.weight = u64::from(share.weight.clamp(1, WEIGHT_MAX)) * class;
        flow.order.push_back(id);
        self.sequences += 1;
    }

    /// A sequence has ended.
    pub(super) fn leave(&mut self, id: SequenceId, share: Share) {
        let key = (share.tenant, share.priority);
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let Some(at) = flow.order.iter().position(|&running| running == id) else { return };
        flow.order.remove(at);
        self.sequences -= 1;
        if flow.order.is_empty() {
            self.flows.remove(&key);
        }
    }

    /// A step is formed: everybody may be asked once.
    pub(super) fn begin(&mut self) {
        for flow in self.flows.values_mut() {
            flow.unasked = flow.order.len();
            // Who had its chances and did not take them saves none up.
            flow.start = flow.start.max(self.now);
        }
    }

    /// Asks whose turn it is; `take` says whether the sequence can. Returns whom it was given to, `None` once all were
    /// asked. A turn that is `charged` costs its flow.
    pub(super) fn next(
        &mut self,
        charged: bool,
        mut take: impl FnMut(SequenceId) -> bool,
    ) -> Option<SequenceId> {
        loop {
            let asked = self.flows.values_mut().filter(|flow| flow.unasked > 0);
            let flow = asked.min_by_key(|flow| flow.start)?;
            flow.unasked -= 1;
            flow.order.rotate_left(1);
            let Some(&id) = flow.order.back() else { continue };
            if take(id) {
                if charged {
                    self.now = flow.start;
                    flow.start += TAG_PER_TURN / flow.weight;
                }
                return Some(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tenant: u64, weight: u32, priority: Priority) -> Share {
        Share { tenant, weight, priority }
    }

    /// Turns that each of `shares` (with so many sequences) gets in `steps` of `batch`.
    fn turns(shares: &[(Share, u64)], batch: usize, steps: usize) -> Vec<usize> {
        let mut turns = Turns::new();
        let mut id = 0;
        let mut whose = Vec::new();
        for (at, &(share, count)) in shares.iter().enumerate() {
            for _ in 0..count {
                turns.join(SequenceId(id), share);
                whose.push(at);
                id += 1;
            }
        }
        let mut got = vec![0; shares.len()];
        for _ in 0..steps {
            turns.begin();
            for _ in 0..batch {
                let id = turns.next(true, |_| true).expect("more run than fit");
                got[whose[id.0 as usize]] += 1;
            }
        }
        got
    }

    #[test]
    fn a_tenant_with_many_sequences_gets_no_more_turns_than_one_with_few() {
        let [one, two] = [1, 2].map(|tenant| share(tenant, 1, Priority::Interactive));
        assert_eq!(turns(&[(one, 12), (two, 4)], 4, 30), [60, 60]);
        let heavy = share(2, 3, Priority::Interactive);
        assert_eq!(turns(&[(one, 12), (heavy, 12)], 4, 30), [30, 90]);
    }

    #[test]
    fn batch_is_slowed_down_and_not_stopped() {
        let (fast, slow) = (share(1, 1, Priority::Interactive), share(1, 1, Priority::Batch));
        assert_eq!(turns(&[(fast, 8), (slow, 8)], 4, 30), [90, 30]);
    }

    #[test]
    fn a_turn_that_nobody_can_take_goes_to_the_next() {
        let mut turns = Turns::new();
        for id in 0..3 {
            turns.join(SequenceId(id), Share::default());
        }
        turns.begin();
        assert_eq!(turns.next(true, |id| id.0 == 2), Some(SequenceId(2)));
        assert_eq!(turns.next(true, |_| true), None, "each is asked once a step");
        turns.leave(SequenceId(2), Share::default());
        assert_eq!((turns.len(), turns.iter().count()), (2, 2));
    }

    #[test]
    fn nobody_saves_turns_up() {
        let [one, two] = [1, 2].map(|tenant| share(tenant, 1, Priority::Interactive));
        let mut turns = Turns::new();
        (0..4).for_each(|id| turns.join(SequenceId(id), one));
        (4..8).for_each(|id| turns.join(SequenceId(id), two));
        let mut step = |able: fn(SequenceId) -> bool| {
            turns.begin();
            (0..2).filter_map(|_| turns.next(true, able)).filter(|id| id.0 >= 4).count()
        };
        // The second tenant's readers are behind for a while.
        (0..100).for_each(|_| assert_eq!(step(|id| id.0 < 4), 0));
        let got: usize = (0..10).map(|_| step(|_| true)).sum();
        assert!((9..=12).contains(&got), "{got} of 20 turns");
    }
}
