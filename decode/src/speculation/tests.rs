use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

/// A machine and a model: seconds of a step, and how often the draft at each place stands.
struct World {
    rng: StdRng,
    speculation: Speculation,
    time: fn(usize, usize) -> f64,
    stands: [f64; 4],
}

impl World {
    fn new(seed: u64, time: fn(usize, usize) -> f64, stands: [f64; 4]) -> Self {
        println!("seed {seed}");
        Self { rng: StdRng::seed_from_u64(seed), speculation: Speculation::new(4), time, stands }
    }

    /// Runs steps of `sequences`; how often each number of drafts was planned, and tokens per second.
    fn run(&mut self, sequences: usize, steps: usize) -> ([usize; 5], f64) {
        let mut planned = [0; 5];
        let (mut tokens, mut seconds) = (0, 0.0);
        for _ in 0..steps {
            let drafts = self.speculation.plan(sequences);
            planned[drafts] += 1;
            for _ in 0..sequences {
                let stood = (0..drafts).take_while(|&place| self.rng.random_bool(self.stands[place])).count();
                self.speculation.observe_drafts(&mut OwnAcceptance::default(), drafts, stood);
                tokens += 1 + stood;
            }
            // A fifth of noise, and an interruption now and then.
            let mut took = (self.time)(sequences, drafts) * self.rng.random_range(0.9..1.1);
            seconds += took;
            if self.rng.random_bool(0.01) {
                took *= 20.0;
            }
            let took = Duration::from_secs_f64(took);
            self.speculation.observe_round(sequences, drafts, drafts * sequences, took);
        }
        (planned, tokens as f64 / seconds)
    }

    fn alone(&self, sequences: usize) -> f64 {
        sequences as f64 / (self.time)(sequences, 0)
    }
}

/// Rows cost little, drafts a fifth of a step: the more that stand the better.
fn memory_bound(sequences: usize, drafts: usize) -> f64 {
    1e-3 * (1.0 + 0.01 * (sequences * (1 + drafts)) as f64 + 0.2 * drafts as f64)
}

/// Every row costs the same.
fn compute_bound(sequences: usize, drafts: usize) -> f64 {
    1e-4 * (sequences * (1 + drafts) + sequences * drafts / 4) as f64
}

#[test]
fn good_drafts_are_taken_and_bad_ones_left() {
    for seed in 0..20 {
        let mut good = World::new(seed, memory_bound, [0.95, 0.9, 0.85, 0.8]);
        let (planned, rate) = good.run(1, 3000);
        assert!(planned[2] + planned[3] + planned[4] > 2500, "{planned:?}");
        assert!(rate > 2.0 * good.alone(1), "{rate} of {}", good.alone(1));

        let mut one = World::new(seed, memory_bound, [0.95, 0.2, 0.2, 0.2]);
        let (planned, rate) = one.run(1, 3000);
        assert!(planned[1] > 2000, "{planned:?}");
        assert!(rate > 1.5 * one.alone(1));
    }
}

/// Where no draft pays, trying costs next to nothing.
#[test]
fn it_is_never_much_slower_than_without() {
    for seed in 0..20 {
        for (time, stands) in
            [(compute_bound as fn(usize, usize) -> f64, [0.9; 4]), (memory_bound, [0.05; 4])]
        {
            for sequences in [1, 8, 32] {
                let mut world = World::new(seed, time, stands);
                let (planned, rate) = world.run(sequences, 4000);
                assert!(planned[0] > 3800, "{sequences} sequences: {planned:?}");
                assert!(rate > 0.985 * world.alone(sequences), "{rate} of {}", world.alone(sequences));
            }
        }
    }
}

/// Small models: a draft costs as much as a step, and so does a second row.
fn overhead_bound(sequences: usize, drafts: usize) -> f64 {
    6e-4 * (1.0 + 0.05 * sequences as f64) * (1.0 + 0.95 * drafts as f64)
}

/// Rows are free up to some sixteen of them, and cost the same each from there on.
fn a_roofline(sequences: usize, drafts: usize) -> f64 {
    1e-4 * ((sequences * (1 + drafts)).max(16) + 2 * drafts) as f64
}

/// Whatever the load does, with good first drafts that do not pay.
#[test]
fn what_does_not_pay_is_tried_ever_more_rarely() {
    for seed in 0..20 {
        let mut world = World::new(seed, overhead_bound, [0.92, 0.27, 0.12, 0.05]);
        let (mut tokens, mut seconds) = (0.0, 0.0);
        for sequences in [1, 8, 32, 8, 1, 32] {
            let (planned, rate) = world.run(sequences, 3000);
            assert!(planned[0] > 2960, "{sequences} sequences: {planned:?}");
            tokens += 3000.0 / world.alone(sequences);
            seconds += 3000.0 / rate;
        }
        assert!(tokens > 0.99 * seconds, "{tokens} of {seconds}");
        for sequences in [1, 8, 32] {
            let (planned, _) = world.run(sequences, 4000);
            assert!(planned[0] >= 3980, "{sequences} sequences: {planned:?}");
        }
    }
}

/// What holds for one load says nothing of another.
#[test]
fn it_drafts_at_loads_where_that_pays() {
    for seed in 0..20 {
        let mut world = World::new(seed, a_roofline, [0.9, 0.5, 0.2, 0.1]);
        for round in 0..3 {
            for (sequences, pays) in [(2, true), (32, false), (4, true), (24, false)] {
                let (planned, rate) = world.run(sequences, 1000);
                let drafting = 1000 - planned[0];
                let expected = if pays { 950..1000 } else { 0..50 };
                assert!(expected.contains(&drafting), "round {round}, {sequences} sequences: {planned:?}");
                let least = if pays { 1.4 } else { 0.98 };
                assert!(rate > least * world.alone(sequences), "{rate} of {}", world.alone(sequences));
            }
        }
    }
}

/// Times that say nothing are not acted upon: three steps in ten take anything up to three times as long.
#[test]
fn noise_alone_makes_nobody_draft() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut speculation = Speculation::new(3);
        let mut drafted = 0;
        for _ in 0..10_000 {
            let drafts = speculation.plan(4);
            drafted += usize::from(drafts > 0);
            for _ in 0..4 {
                let stood = (0..drafts).take_while(|place| rng.random_bool([0.6, 0.3, 0.1][*place])).count();
                speculation.observe_drafts(&mut OwnAcceptance::default(), drafts, stood);
            }
            let slow = if rng.random_bool(0.3) { rng.random_range(1.0..3.0) } else { 1.0 };
            let took = Duration::from_secs_f64(slow * overhead_bound(4, drafts));
            speculation.observe_round(4, drafts, 4 * drafts, took);
        }
        assert!(drafted < 700, "{drafted}");
    }
}

#[test]
fn it_notices_when_the_text_changes() {
    let mut world = World::new(1, memory_bound, [0.02; 4]);
    world.run(4, 2000);
    world.stands = [0.95; 4];
    // Only one step in 128 drafts by now.
    world.run(4, 6000);
    let (planned, _) = world.run(4, 1000);
    assert!(planned[0] < 100, "{planned:?}");
    world.stands = [0.02; 4];
    world.run(4, 500);
    let (planned, _) = world.run(4, 1000);
    assert!(planned[0] > 900, "{planned:?}");
}

/// In a batch of others, whose drafts are worth their rows, one whose are not sits out, and is asked again.
#[test]
fn a_sequence_whose_drafts_do_not_stand_sits_out() {
    let mut world = World::new(2, |n, k| 1e-4 * (n * (1 + k)) as f64 + 5e-4, [0.9, 0.6, 0.3, 0.1]);
    world.run(8, 1000);
    let mut own = OwnAcceptance::default();
    let mut took_part = 0;
    for step in 0..1000 {
        world.speculation.observe_drafts(&mut OwnAcceptance::default(), 1, usize::from(step % 10 > 0));
        if world.speculation.is_worth(&mut own, 8, 1) {
            took_part += 1;
            world.speculation.observe_drafts(&mut own, 1, usize::from(step > 900));
        }
    }
    assert!((20..400).contains(&took_part), "{took_part}");
    assert!(world.speculation.is_worth(&mut own, 8, 1), "its drafts stand by now");
}

#[test]
fn without_drafts_nothing_is_drafted() {
    let mut speculation = Speculation::new(0);
    for sequences in [1, 5, 600] {
        for _ in 0..300 {
            assert_eq!(speculation.plan(sequences), 0);
            speculation.observe_round(sequences, 0, 0, Duration::from_millis(1));
        }
    }
}

/// Short runs at ever other sizes: what one size has shown to be a loss is tried rarely at the next.
#[test]
fn finding_out_at_a_new_size_costs_little() {
    for seed in 0..20 {
        let mut world = World::new(seed, overhead_bound, [0.5, 0.27, 0.12, 0.05]);
        world.run(8, 600);
        let (mut tokens, mut seconds) = (0.0, 0.0);
        for sequences in [12, 16, 24, 32, 48, 64, 128, 256] {
            let (planned, rate) = world.run(sequences, 100);
            assert!(planned[0] >= 94, "{sequences} sequences: {planned:?}");
            tokens += 100.0 / world.alone(sequences);
            seconds += 100.0 / rate;
        }
        assert!(tokens > 0.97 * seconds, "{tokens} of {seconds}");
    }
}
