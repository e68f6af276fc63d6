use proptest::prelude::*;

use super::*;

const AGING: Duration = Duration::from_secs(5);

fn share(tenant: u64, weight: u32, priority: Priority) -> Share {
    Share { tenant, weight, priority }
}

const fn interactive(tenant: u64) -> Share {
    Share { tenant, weight: 1, priority: Priority::Interactive }
}

#[test]
fn one_tenant_is_first_in_first_out() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for (number, cost) in [(0, 9), (1, 1), (2, 5)] {
        queue.push(interactive(0), cost, number, now);
    }
    assert_eq!(queue.peek(now), Some(&0), "a long head is not overtaken by a short one behind it");
    let order: Vec<_> = std::iter::from_fn(|| queue.pop(now)).collect();
    assert_eq!(order, [0, 1, 2]);
}

#[test]
fn a_flood_of_one_tenant_does_not_delay_another() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for number in 0..100 {
        queue.push(interactive(1), 10, number, now);
    }
    assert_eq!(queue.pop(now), Some(0));
    queue.push(interactive(2), 10, 1000, now);
    let first: Vec<_> = (0..2).filter_map(|_| queue.pop(now)).collect();
    assert!(first.contains(&1000), "its first item goes within a turn, not behind a hundred: {first:?}");
}

#[test]
fn what_goes_before_a_newcomer_is_what_its_tenants_part_lets_pass() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    assert_eq!(queue.cost_before(interactive(1), 10), 0);
    for number in 0..100 {
        queue.push(interactive(1), 10, number, now);
    }
    assert_eq!(queue.cost_before(interactive(1), 10), 1000, "behind all of its own");
    assert_eq!(queue.cost_before(interactive(2), 10), 10, "another tenant takes turns");
    assert_eq!(queue.cost_before(share(2, 5, Priority::Interactive), 10), 2);
    assert_eq!(queue.cost_before(share(2, 1, Priority::Batch), 10), 1000);
    queue.push(share(2, 1, Priority::Batch), 7, 1000, now);
    assert_eq!(queue.cost_before(share(2, 1, Priority::Batch), 10), 1007);
    assert_eq!(queue.cost_before(interactive(2), 10), 10, "batch is behind it");
}

#[test]
fn a_stream_of_short_ones_does_not_hold_a_long_one_off() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    queue.push(interactive(1), 1000, 0, now);
    let mut passed = 0;
    while queue.peek(now) != Some(&0) {
        passed += 1;
        queue.pop(now);
        queue.push(interactive(2), 1, passed, now);
        assert!(passed < 10);
    }
    // Once it is the head it stays the head, whatever comes.
    for number in 1..1000 {
        queue.push(interactive(2), 1, number, now);
        if queue.peek(now) != Some(&0) {
            queue.pop(now);
        }
    }
    assert_eq!(queue.peek(now), Some(&0));
}

#[test]
fn batch_waits_behind_interactive_until_it_is_due_and_then_gets_a_quarter() {
    let start = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for number in 0..100 {
        queue.push(interactive(1), 1, "interactive", start);
        queue.push(share(2, 1, Priority::Batch), 1, "batch", start);
        let _ = number;
    }
    let before = start + AGING - Duration::from_millis(1);
    for _ in 0..20 {
        assert_eq!(queue.pop(before), Some("interactive"));
    }
    let after = start + AGING;
    let served: Vec<_> = (0..80).filter_map(|_| queue.pop(after)).collect();
    for window in served.windows(4) {
        assert_eq!(window.iter().filter(|&&class| class == "batch").count(), 1, "{served:?}");
    }
    assert_eq!(queue.len_of(Priority::Batch), 80);
}

#[test]
fn batch_alone_takes_everything() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for number in 0..5 {
        queue.push(share(2, 1, Priority::Batch), 1, number, now);
    }
    assert_eq!(std::iter::from_fn(|| queue.pop(now)).count(), 5);
    queue.push(interactive(1), 1, 9, now);
    assert_eq!(queue.pop(now), Some(9));
}

#[test]
fn what_is_removed_is_gone_and_charged_to_nobody() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for number in 0..6 {
        queue.push(interactive(number % 2), 1000, number, now);
    }
    queue.remove(|&number| number == 0 || number == 3);
    queue.check_invariants();
    let mut left: Vec<_> = queue.iter().copied().collect();
    left.sort_unstable();
    assert_eq!(left, [1, 2, 4, 5]);
    let order: Vec<_> = std::iter::from_fn(|| queue.pop(now)).collect();
    assert_eq!(order, [1, 2, 4, 5]);
}

#[test]
fn a_full_queue_makes_room_at_the_cost_of_who_has_the_most() {
    let now = Instant::now();
    let mut queue = FairQueue::new(AGING);
    for number in 0..3 {
        queue.push(interactive(1), 1, number, now);
    }
    queue.push(interactive(2), 1, 10, now);
    queue.push(share(1, 1, Priority::Batch), 1, 20, now);
    assert_eq!(queue.displace(interactive(1)), Some(20), "batch first");
    assert_eq!(queue.displace(interactive(1)), None, "it would only push itself out");
    assert_eq!(queue.displace(interactive(2)), Some(2), "the newest of three");
    assert_eq!(queue.displace(interactive(2)), None, "two and two would be no fairer");
    assert_eq!(queue.displace(interactive(3)), Some(1));
    assert_eq!(queue.displace(interactive(3)), None);
    assert_eq!(queue.displace(share(3, 1, Priority::Batch)), None, "batch pushes no interactive request out");
    queue.check_invariants();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two tenants whose queues never run dry, with any weights, costs and arrival rates: what each is served, over its
    /// weight, differs by one largest item of each.
    #[test]
    fn backlogged_tenants_are_served_by_weight(
        weights in (1u32..8, 1u32..8),
        costs in prop::collection::vec((1u64..50, 1u64..50), 300),
        burst in 1usize..20,
    ) {
        let now = Instant::now();
        let mut queue = FairQueue::new(AGING);
        let tenants = [share(1, weights.0, Priority::Interactive), share(2, weights.1, Priority::Interactive)];
        let mut served = [0f64; 2];
        let mut costs = costs.into_iter();
        let mut queued = [0usize; 2];
        for _ in 0..200 {
            // The second asks in bursts; both always have something queued.
            for at in 0..2 {
                let wanted = if at == 0 { 1 } else { burst };
                while queued[at] < wanted {
                    let (one, two) = costs.next().unwrap_or((50, 1));
                    let cost = if at == 0 { one } else { two };
                    queue.push(tenants[at], cost, (at, cost), now);
                    queued[at] += 1;
                }
            }
            let (at, cost) = queue.pop(now).expect("backlogged");
            queue.check_invariants();
            queued[at] -= 1;
            served[at] += cost as f64 / f64::from(tenants[at].weight);
            let bound = 50.0 / f64::from(weights.0) + 50.0 / f64::from(weights.1) + 1.0;
            prop_assert!((served[0] - served[1]).abs() <= bound, "{served:?} beyond {bound}");
        }
    }

    /// Under any arrivals, batch is served a quarter of the cost from its aging bound on.
    #[test]
    fn batch_progresses_under_any_overload(arrivals in prop::collection::vec((0u64..4, 1u64..100), 1..200)) {
        let start = Instant::now();
        let mut queue = FairQueue::new(AGING);
        queue.push(share(9, 1, Priority::Batch), 7, (9, 7), start);
        queue.push(share(9, 1, Priority::Batch), 7, (9, 7), start);
        let later = start + AGING;
        let mut since_batch = 0;
        let mut batch = 0;
        for (tenant, cost) in arrivals {
            queue.push(interactive(tenant), cost, (tenant, cost), later);
            queue.push(interactive(tenant), cost, (tenant, cost), later);
            let (tenant, cost) = queue.pop(later).expect("queued");
            if tenant == 9 {
                since_batch = 0;
                batch += 1;
            } else {
                prop_assert!(batch == 2 || since_batch < 7 * INTERACTIVE_PER_BATCH, "batch is due");
                since_batch += cost;
            }
        }
        prop_assert!(batch > 0, "the first of them was due at once");
    }
}
