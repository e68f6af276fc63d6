//! A queue of two classes and any number of tenants: a synchronous function of (state, operation, now).
//!
//! **Within a class** it is start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a start tag, the tenant
//! with the smallest one is served, and what it is served costs it `cost / weight`. A tenant that comes back after
//! having nothing queued starts at the class's present tag, so that nobody saves up turns. Bound: over any time in
//! which two tenants both have something queued, what they are served, each divided by its weight, differs by at
//! most one of the largest items of each, divided by its weight. How often either of them asks does not enter.
//!
//! **Between the classes** interactive goes before batch, until the oldest of batch has waited for `aging_max`. From
//! then on batch is due, and while both are busy it gets a quarter of the cost that is served: after a due item of cost
//! c, interactive may take [`INTERACTIVE_PER_BATCH`] × c before the next.
//!
//! **The head stays the head**: [`FairQueue::peek`] names what is next, and who lacks the memory for it waits instead of
//! taking something smaller. What comes later overtakes it only until its tenant's tag has passed the head's, so a
//! stream of short prompts never holds off a long one for ever.
//!
//! Deliberately absent: a bound on the length, which is its owner's to refuse by, and clocks.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::{Priority, Share, WEIGHT_MAX};

/// Interactive cost that may pass between two due items of batch, per cost of the first of them.
pub const INTERACTIVE_PER_BATCH: u64 = 3;
/// Units of a tag for one unit of cost at weight 1: divisible by every weight up to 16, so that those come out exactly.
const TAG_PER_COST: u64 = 720_720;

/// Values that wait for their turn.
#[derive(Debug)]
pub struct FairQueue<T> {
    classes: [Class<T>; 2],
    aging_max: Duration,
    /// Interactive cost that goes before the next due item of batch.
    interactive_credit: u64,
    next_number: u64,
}

#[derive(Debug)]
struct Class<T> {
    tenants: BTreeMap<u64, Tenant<T>>,
    /// Start tag of what was served last.
    now: u64,
    items: usize,
}

#[derive(Debug)]
struct Tenant<T> {
    items: VecDeque<Item<T>>,
    start: u64,
}

#[derive(Debug)]
struct Item<T> {
    value: T,
    cost: u64,
    weight: u32,
    queued_at: Instant,
    /// Grows with every push: breaks ties.
    number: u64,
}

impl<T> FairQueue<T> {
    /// An empty queue in which batch waits behind interactive for `aging_max` at most.
    pub fn new(aging_max: Duration) -> Self {
        Self { classes: [Class::new(), Class::new()], aging_max, interactive_credit: 0, next_number: 0 }
    }

    /// Queues `value`, which takes `cost` of whatever is contended for, behind its tenant's others.
    pub fn push(&mut self, share: Share, cost: u64, value: T, now: Instant) {
        let number = self.next_number;
        self.next_number += 1;
        let class = &mut self.classes[share.priority as usize];
        let tenant = class.tenants.entry(share.tenant).or_insert(Tenant { items: VecDeque::new(), start: 0 });
        if tenant.items.is_empty() {
            tenant.start = tenant.start.max(class.now);
        }
        tenant.items.push_back(Item { value, cost, weight: share.weight.max(1), queued_at: now, number });
        class.items += 1;
    }

    /// What is next. The same until something is pushed, popped or removed, or time makes batch due.
    pub fn peek(&self, now: Instant) -> Option<&T> {
        let class = &self.classes[self.next_class(now)? as usize];
        let head = class.tenants.get(&class.next_tenant()?)?.items.front()?;
        Some(&head.value)
    }

    /// Takes what [`Self::peek`] names.
    pub fn pop(&mut self, now: Instant) -> Option<T> {
        let priority = self.next_class(now)?;
        let contended = self.classes.iter().all(|class| class.items > 0);
        let item = self.classes[priority as usize].pop()?;
        self.interactive_credit = match priority {
            Priority::Interactive => self.interactive_credit.saturating_sub(item.cost),
            Priority::Batch if contended => item.cost.saturating_mul(INTERACTIVE_PER_BATCH),
            Priority::Batch => self.interactive_credit,
        };
        Some(item.value)
    }

    /// Takes out everything that `unwanted` says yes to; it costs nobody anything.
    pub fn remove(&mut self, mut unwanted: impl FnMut(&T) -> bool) {
        for class in &mut self.classes {
            for tenant in class.tenants.values_mut() {
                tenant.items.retain(|item| !unwanted(&item.value));
            }
            class.items = class.tenants.values().map(|tenant| tenant.items.len()).sum();
            class.forget_idle();
        }
    }

    /// Makes room for one more of `share` in a queue that is full: takes out the newest value of who has the most queued,
    /// batch's before interactive's. `None` where that is no fairer than to refuse the newcomer: its own class holds
    /// nobody with more queued than it would have itself, and there is no lower class.
    pub fn displace(&mut self, share: Share) -> Option<T> {
        if share.priority == Priority::Interactive && self.classes[Priority::Batch as usize].items > 0 {
            return self.classes[Priority::Batch as usize].drop_newest(0);
        }
        let class = &mut self.classes[share.priority as usize];
        let own = class.tenants.get(&share.tenant).map_or(0, |tenant| tenant.items.len());
        class.drop_newest(own + 1)
    }

    /// Cost that goes before another item of `share` that costs `cost`, as it looks now: at most everything in its class,
    /// and no more than its tenant's part of it lets pass. For batch, interactive goes before.
    pub fn cost_before(&self, share: Share, cost: u64) -> u64 {
        let class = self.classes[share.priority as usize].cost_before(share, cost);
        match share.priority {
            Priority::Interactive => class,
            Priority::Batch => {
                class.saturating_add(self.classes[Priority::Interactive as usize].costs().sum())
            }
        }
    }

    /// Everything queued, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let tenants = self.classes.iter().flat_map(|class| class.tenants.values());
        tenants.flat_map(|tenant| tenant.items.iter().map(|item| &item.value))
    }

    /// How many values wait.
    pub fn len(&self) -> usize {
        self.classes.iter().map(|class| class.items).sum()
    }

    /// How many values of a class wait.
    pub fn len_of(&self, priority: Priority) -> usize {
        self.classes[priority as usize].items
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn next_class(&self, now: Instant) -> Option<Priority> {
        let [interactive, batch] = &self.classes;
        match (interactive.items, batch.items) {
            (0, 0) => None,
            (_, 0) => Some(Priority::Interactive),
            (0, _) => Some(Priority::Batch),
            _ => {
                let waited = batch.oldest().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
                let due = waited >= self.aging_max && self.interactive_credit == 0;
                Some(if due { Priority::Batch } else { Priority::Interactive })
            }
        }
    }

    /// Panics when the books do not balance. For tests and simulation.
    pub fn check_invariants(&self) {
        for class in &self.classes {
            let items: usize = class.tenants.values().map(|tenant| tenant.items.len()).sum();
            assert_eq!(class.items, items);
            for (id, tenant) in &class.tenants {
                assert!(
                    !tenant.items.is_empty() || tenant.start > class.now,
                    "{id} is remembered for nothing"
                );
            }
        }
    }
}

impl<T> Class<T> {
    fn new() -> Self {
        Self { tenants: BTreeMap::new(), now: 0, items: 0 }
    }

    fn next_tenant(&self) -> Option<u64> {
        let heads = self.tenants.iter().filter_map(|(&id, tenant)| {
            let head = tenant.items.front()?;
            Some((tenant.start, head.number, id))
        });
        heads.min().map(|(_, _, id)| id)
    }

    fn costs(&self) -> impl Iterator<Item = u64> {
        self.tenants.values().flat_map(|tenant| tenant.items.iter().map(|item| item.cost))
    }

    fn cost_before(&self, share: Share, cost: u64) -> u64 {
        let all = self.costs().sum();
        let weight = u64::from(share.weight.clamp(1, WEIGHT_MAX));
        let (mut own, mut weights) = (0u64, weight);
        for (&id, tenant) in &self.tenants {
            if id == share.tenant {
                own = tenant.items.iter().map(|item| item.cost).sum();
            } else if let Some(item) = tenant.items.front() {
                weights += u64::from(item.weight.min(WEIGHT_MAX));
            }
        }
        // While it and what its tenant has before it are served, everybody gets a part by weight.
        let served = (own + cost).saturating_mul(weights) / weight;
        served.saturating_sub(cost).min(all)
    }

    fn oldest(&self) -> Option<Instant> {
        self.tenants.values().filter_map(|tenant| tenant.items.front()).map(|item| item.queued_at).min()
    }

    fn pop(&mut self) -> Option<Item<T>> {
        let tenant = self.tenants.get_mut(&self.next_tenant()?)?;
        let item = tenant.items.pop_front()?;
        self.items -= 1;
        self.now = tenant.start;
        let tags = u64::from(item.weight.min(WEIGHT_MAX));
        tenant.start = tenant.start.saturating_add(item.cost.max(1).saturating_mul(TAG_PER_COST) / tags);
        self.forget_idle();
        Some(item)
    }

    /// Takes the newest item of the tenant with the most, if that has more than `items`.
    fn drop_newest(&mut self, items: usize) -> Option<T> {
        let (_, tenant) = self.tenants.iter_mut().max_by_key(|(_, tenant)| tenant.items.len())?;
        if tenant.items.len() <= items {
            return None;
        }
        let item = tenant.items.pop_back()?;
        self.items -= 1;
        self.forget_idle();
        Some(item.value)
    }

    /// A tenant with nothing queued matters only while it is ahead of the others.
    fn forget_idle(&mut self) {
        if self.items == 0 {
            self.tenants.clear();
            self.now = 0;
        }
        let now = self.now;
        self.tenants.retain(|_, tenant| !tenant.items.is_empty() || tenant.start > now);
    }
}

#[cfg(test)]
mod tests;
