//! Draws against the definition, token by token.

use compute::cuda::{Adjustment, DRAWN_WORDS, Device, DrawRow};
use compute::{GUMBEL_TOKENS, GumbelKey, Isa};
use rand::RngExt;
use rand::rngs::StdRng;

use super::support::{compared, device, floats, fresh, output, read, small};

/// The kernel's unit of probability.
const UNIT: f64 = (1u64 << 40) as f64;

#[derive(Clone, Debug)]
struct Case {
    row: Option<DrawRow>,
    adjustments: Vec<Adjustment>,
}

const GREEDY: DrawRow = DrawRow {
    adjustments: (0, 0),
    repetition: 1.0,
    frequency: 0.0,
    presence: 0.0,
    temperature: None,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    seed: 0,
    choice: 0,
    position: 0,
};

/// One of each way to draw, so that even a few rows meet every branch.
fn kinds() -> [DrawRow; 7] {
    let drawn = DrawRow { temperature: Some(0.8), ..GREEDY };
    [
        DrawRow { top_k: 7, top_p: 0.9, min_p: 0.01, ..drawn },
        GREEDY,
        drawn,
        DrawRow { top_k: 7, ..drawn },
        DrawRow { top_p: 0.3, ..drawn },
        DrawRow { top_p: 1e-6, ..drawn },
        DrawRow { min_p: 0.05, ..drawn },
    ]
}

/// Row `index` of a batch: one of each kind first, then anything.
fn nth_case(rng: &mut StdRng, vocab: usize, index: usize) -> Case {
    let mut case = case(rng, vocab);
    if let Some(&kind) = kinds().get(index) {
        let (seed, position) = (rng.random(), rng.random_range(0..1 << 20));
        case.row = Some(DrawRow { seed, position, repetition: 1.3, frequency: 0.4, presence: -0.5, ..kind });
    }
    case
}

fn case(rng: &mut StdRng, vocab: usize) -> Case {
    let mut adjustments = Vec::new();
    for token in 0..vocab as u32 {
        if rng.random_range(0..20) == 0 {
            adjustments.push(Adjustment {
                token,
                bias: if rng.random_range(0..2) == 0 { 0.0 } else { rng.random_range(-3.0..3.0) },
                in_prompt: rng.random_range(0..2) == 0,
                generated: rng.random_range(0..3),
                suppressed: rng.random_range(0..5) == 0,
            });
        }
    }
    if rng.random_range(0..3) == 0 {
        adjustments.clear();
    }
    let one_of = |rng: &mut StdRng, values: &[f32]| values[rng.random_range(0..values.len())];
    let row = DrawRow {
        repetition: one_of(rng, &[1.0, 1.3, 0.7]),
        frequency: one_of(rng, &[0.0, 0.4]),
        presence: one_of(rng, &[0.0, -0.5]),
        temperature: [None, Some(0.2), Some(1.0), Some(1.8)][rng.random_range(0..4)],
        top_k: [0, 1, 7, 50, vocab as u32][rng.random_range(0..5)],
        top_p: one_of(rng, &[1.0, 0.9, 0.3, 1e-6]),
        min_p: one_of(rng, &[0.0, 0.05, 1.0]),
        seed: rng.random(),
        choice: rng.random_range(0..3),
        position: rng.random_range(0..1 << 20),
        ..GREEDY
    };
    Case { row: Some(row).filter(|_| rng.random_range(0..8) > 0), adjustments }
}

/// What the definition says of a row: its adjusted logits, and the tokens that may be drawn with their scores.
struct Expected {
    logits: Vec<f32>,
    scores: Vec<(usize, f32)>,
    log_total: f64,
}

fn expected(case: &Case, row: &DrawRow, logits: &[f32]) -> Expected {
    let mut logits = logits.to_vec();
    for change in &case.adjustments {
        let x = &mut logits[change.token as usize];
        *x += change.bias;
        if change.in_prompt || change.generated > 0 {
            *x = if *x > 0.0 { *x / row.repetition } else { *x * row.repetition };
        }
        *x -= row.frequency * change.generated as f32;
        if change.generated > 0 {
            *x -= row.presence;
        }
        if change.suppressed {
            *x = f32::NEG_INFINITY;
        }
    }
    let is = Isa::detect();
    let best = is.argmax(&logits);
    let peak = logits[best];
    let total: f64 = logits.iter().filter(|x| !x.is_nan()).map(|x| f64::from(x - peak).exp()).sum();
    let log_total = f64::from(peak) + total.ln();
    let log_total = if peak.is_finite() { log_total } else { f64::NEG_INFINITY };
    let Some(temperature) = row.temperature.filter(|_| peak.is_finite()) else {
        return Expected { scores: vec![(best, 0.0)], logits, log_total };
    };
    let weight = |x: f32| f64::from(((x - peak) / temperature).exp());
    let mut kept: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
    kept.retain(|&i| row.min_p <= 0.0 || weight(logits[i]) >= f64::from(row.min_p));
    kept.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if row.top_k > 0 && kept.len() > row.top_k as usize {
        let last = logits[kept[row.top_k as usize - 1]];
        kept.retain(|&i| logits[i] >= last);
    }
    if row.top_p < 1.0 {
        let total: f64 = kept.iter().map(|&i| (weight(logits[i]) * UNIT).round()).sum();
        let limit = f64::from(row.top_p) * total;
        let mut before = 0.0;
        kept.retain(|&i| {
            let stays = before < limit.max(1.0);
            before += (weight(logits[i]) * UNIT).round();
            stays
        });
    }
    let key = GumbelKey { seed: row.seed, choice: row.choice, position: row.position };
    let noise = |token: usize| is.gumbel_noise(key, &[token as u32; GUMBEL_TOKENS])[0];
    let score = |i: usize| (i, (logits[i] - peak) / temperature + noise(i));
    Expected { scores: kept.into_iter().map(score).collect(), logits, log_total }
}

fn run(device: &Device, logits: &[f32], vocab: usize, cases: &[Case]) -> (Vec<u32>, Vec<f32>) {
    let (mut words, mut changes, mut first) = (Vec::new(), Vec::new(), 0);
    for case in cases {
        let count = case.adjustments.len() as u32;
        match case.row {
            None => words.extend(DrawRow::NOT_DRAWN),
            Some(row) => words.extend(DrawRow { adjustments: (first, count), ..row }.words()),
        }
        changes.extend(case.adjustments.iter().flat_map(Adjustment::words));
        first += count;
    }
    words.extend(changes);
    let plan = device.upload(&words).expect("a plan");
    let mut there = device.upload(logits).expect("logits");
    let drawn = output(device, cases.len() * DRAWN_WORDS, |out| {
        device.sample(&mut there.view_mut(), vocab, plan.view(), &mut out.view_mut())
    });
    (drawn, read(device, there.view()))
}

#[test]
#[ignore = "needs a CUDA device"]
fn tokens_are_those_of_the_definition() {
    let device = device();
    let mut rng = fresh();
    // The last is more than a cluster's threads can hold.
    let all: &[(usize, usize)] = &[
        (1, 40),
        (2, 40),
        (63, 40),
        (64, 40),
        (65, 40),
        (1000, 40),
        (4099, 40),
        (129_280, 12),
        (140_003, 12),
    ];
    // A launch under racecheck takes five seconds and more, however few its rows.
    let few: &[(usize, usize)] = &[(1, 8), (1000, 8), (140_003, 1)];
    for &(vocab, rows) in if small() { few } else { all } {
        println!("vocabulary {vocab}, {rows} rows");
        let mut logits: Vec<f32> =
            floats(&mut rng, rows * vocab).iter().map(|x| (x * 4.0).min(30.0)).collect();
        for x in logits.iter_mut().step_by(17) {
            // Many that are equal.
            *x = 3.0;
        }
        if vocab > 2 {
            (logits[1], logits[vocab - 1]) = (f32::NAN, f32::NEG_INFINITY);
        }
        let cases: Vec<Case> = (0..rows).map(|index| nth_case(&mut rng, vocab, index)).collect();
        let (drawn, changed) = run(device, &logits, vocab, &cases);
        if !small() {
            let (again, _) = run(device, &logits, vocab, &cases);
            assert_eq!(drawn, again, "the same draws give the same bits");
        }
        for (index, case) in cases.iter().enumerate() {
            let before = &logits[index * vocab..(index + 1) * vocab];
            let (after, drawn) =
                (&changed[index * vocab..(index + 1) * vocab], &drawn[3 * index..3 * index + 3]);
            let Some(row) = &case.row else {
                assert_eq!(drawn, [u32::MAX; 3], "vocabulary {vocab}, row {index} is left alone");
                continue;
            };
            let what = format!("vocabulary {vocab}, row {index}, {row:?}");
            let Expected { logits, scores, log_total } = expected(case, row, before);
            for (token, (a, b)) in after.iter().zip(&logits).enumerate() {
                assert!(a == b || a.is_nan() && b.is_nan(), "{what}: logit {token} is {a}, not {b}");
            }
            let token = drawn[0] as usize;
            let best = scores.iter().map(|&(_, score)| score).fold(f32::NEG_INFINITY, f32::max);
            let own = scores.iter().find(|&&(index, _)| index == token);
            assert!(own.is_some_and(|&(_, score)| score == best), "{what}: token {token}");
            let logprob = f64::from(logits[token]) - log_total;
            let got = f64::from(f32::from_bits(drawn[1]));
            if log_total == f64::NEG_INFINITY {
                assert_eq!(got, f64::NEG_INFINITY, "{what}: nothing may come");
                continue;
            }
            assert!((got - logprob).abs() < 2e-5 * logprob.abs().max(1.0), "{what}: {got} for {logprob}");
        }
    }
}

/// Company does not matter: a row alone has the bits that it has among others.
#[test]
#[ignore = "needs a CUDA device"]
fn rows_are_drawn_alone() {
    let device = device();
    let mut rng = fresh();
    let vocab = if small() { 300 } else { 5000 };
    let logits = floats(&mut rng, 9 * vocab);
    let cases: Vec<Case> = (0..9).map(|index| nth_case(&mut rng, vocab, index)).collect();
    let (together, _) = run(device, &logits, vocab, &cases);
    for index in compared(cases.len()) {
        let case = &cases[index];
        let row = &logits[index * vocab..(index + 1) * vocab];
        let (alone, _) = run(device, row, vocab, std::slice::from_ref(case));
        assert_eq!(alone, together[3 * index..3 * index + 3], "row {index}");
    }
}

/// What a draw takes of V3's vocabulary, for the record: nothing is asserted of it.
#[test]
#[ignore = "needs a CUDA device"]
fn what_a_draw_takes() {
    let device = device();
    if small() {
        return;
    }
    let mut rng = fresh();
    let vocab = 129_280;
    let sampled = DrawRow { temperature: Some(0.8), seed: 3, ..GREEDY };
    let kinds = [
        ("greedy", GREEDY),
        ("temperature", sampled),
        ("top-k 40", DrawRow { top_k: 40, ..sampled }),
        ("top-p 0.9", DrawRow { top_p: 0.9, ..sampled }),
        ("top-k 40, top-p 0.9", DrawRow { top_k: 40, top_p: 0.9, ..sampled }),
    ];
    for rows in [1, 64, 256] {
        let mut logits = device.upload(&floats(&mut rng, rows * vocab)).expect("logits");
        for (name, row) in kinds {
            let words: Vec<u32> = (0..rows).flat_map(|_| row.words()).collect();
            let plan = device.upload(&words).expect("a plan");
            let mut drawn = device.alloc(rows * DRAWN_WORDS).expect("room");
            let mut run = |times: usize| {
                device.time_ms(|| {
                    (0..times).try_for_each(|_| {
                        device.sample(&mut logits.view_mut(), vocab, plan.view(), &mut drawn.view_mut())
                    })
                })
            };
            run(3).expect("warm");
            let ms = run(20).expect("timed") / 20.0;
            println!("draw {rows} x {vocab}, {name}: {:.1} µs", ms * 1e3);
        }
    }
}
