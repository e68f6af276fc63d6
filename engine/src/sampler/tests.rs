use proptest::prelude::*;

use super::*;

fn params(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
    change(&mut params);
    params.validate().expect("test parameters are valid");
    params
}

fn sampler(params: &SamplingParams) -> SequenceSampler {
    SequenceSampler::new(params, 0, &[])
}

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// How often each token is drawn at `draws` positions.
fn histogram(params: &SamplingParams, logits: &[f32], draws: usize) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    let mut sampler = sampler(params);
    for position in 0..draws {
        let sampled = sampler.sample(&mut logits.to_vec(), position, &[]);
        counts[sampled.token.0 as usize] += 1;
    }
    counts
}

/// Which tokens can be drawn at all.
fn support(params: &SamplingParams, logits: &[f32]) -> Vec<usize> {
    let counts = histogram(params, logits, 4000);
    (0..logits.len()).filter(|&token| counts[token] > 0).collect()
}

/// Logits of the given probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn greedy_takes_the_first_of_the_best() {
    let sampled = sampler(&SamplingParams::greedy()).sample(&mut [0.0, 3.0, f32::NAN, 3.0], 0, &[]);
    assert_eq!(sampled.token, TokenId(1));
}

#[test]
fn log_probabilities_are_of_the_whole_vocabulary_and_before_temperature() {
    let params = params(|p| {
        p.temperature = 0.25;
        p.top_k = 1;
        p.logprobs = Some(2);
    });
    let sampled = sampler(&params).sample(&mut logits_of(&[0.2, 0.5, 0.2, 0.1]), 0, &[]);
    assert_eq!(sampled.token, TokenId(1));
    assert!((sampled.logprob - 0.5f32.ln()).abs() < 1e-6);
    let top: Vec<u32> = sampled.top.iter().map(|(token, _)| token.0).collect();
    assert_eq!(top, [1, 0], "descending, the lower id first among equals");
    assert!((sampled.top[1].1 - 0.2f32.ln()).abs() < 1e-6);
    assert_eq!(sampled.top[0].1, sampled.logprob);
}

#[test]
fn bias_comes_before_penalties() {
    // 1 - 3 = -2, then times the repetition penalty 2: -4. The other order would give 1 / 2 - 3 = -2.5.
    let params = params(|p| {
        p.temperature = 0.0;
        p.logit_bias = vec![(TokenId(0), -3.0)];
        p.repetition_penalty = 2.0;
    });
    let mut logits = [1.0, -3.0];
    let mut sampler = SequenceSampler::new(&params, 0, &ids(&[0]));
    assert_eq!(sampler.sample(&mut logits, 0, &[]).token, TokenId(1));
    assert_eq!(logits, [-4.0, -3.0]);
}

#[test]
fn repetition_sees_the_prompt_and_the_others_do_not() {
    let params = params(|p| {
        p.temperature = 0.0;
        p.repetition_penalty = 2.0;
        p.frequency_penalty = 0.5;
        p.presence_penalty = 0.25;
    });
    let mut sampler = SequenceSampler::new(&params, 0, &ids(&[0, 1, 1]));
    for token in ids(&[1, 2, 2]) {
        sampler.observe(token);
    }
    let mut logits = [4.0, -4.0, 4.0, 4.0];
    sampler.sample(&mut logits, 0, &[]);
    // Prompt only; prompt and once; twice; never.
    assert_eq!(logits, [2.0, -8.0 - 0.5 - 0.25, 2.0 - 1.0 - 0.25, 4.0]);
}

#[test]
fn suppressed_tokens_never_come() {
    let suppress = ids(&[1, 9]);
    let mut sampler = sampler(&params(|p| p.logit_bias = vec![(TokenId(1), 50.0)]));
    for position in 0..500 {
        let sampled = sampler.sample(&mut [0.0, 9.0, 0.0], position, &suppress);
        assert_ne!(sampled.token, TokenId(1));
    }
}

#[test]
fn truncation_follows_vllm() {
    let five = logits_of(&[0.05, 0.4, 0.1, 0.25, 0.2]);
    let check = |change: fn(&mut SamplingParams), logits: &[f32], expect: &[usize]| {
        assert_eq!(support(&params(change), logits), expect);
    };
    check(|_| {}, &five, &[0, 1, 2, 3, 4]);
    check(|p| p.top_k = 2, &five, &[1, 3]);
    check(|p| p.top_k = 100, &five, &[0, 1, 2, 3, 4]);
    // Everything that ties with the k-th stays.
    check(|p| p.top_k = 2, &logits_of(&[0.2, 0.4, 0.2, 0.2]), &[0, 1, 2, 3]);
    // 0.4 is not yet 0.5, so the next one stays as well; 0.65 is enough.
    check(|p| p.top_p = 0.5, &five, &[1, 3]);
    check(|p| p.top_p = 0.66, &five, &[1, 3, 4]);
    check(|p| p.top_p = 1e-6, &five, &[1]);
    check(|p| p.min_p = 0.45, &five, &[1, 3, 4]);
    // Top-p looks at what top-k left: of 0.4 and 0.25, 0.4 has 0.615.
    check(
        |p| {
            p.top_k = 2;
            p.top_p = 0.6;
        },
        &five,
        &[1],
    );
    // Min-p comes first: it leaves 0.4, 0.25 and 0.2, of which the first has 0.47.
    check(
        |p| {
            p.min_p = 0.45;
            p.top_p = 0.45;
        },
        &five,
        &[1],
    );
    // Temperature comes before all of them: at 0.1 the best has nearly everything.
    check(
        |p| {
            p.temperature = 0.1;
            p.top_p = 0.9;
        },
        &five,
        &[1],
    );
}

#[test]
fn equal_logits_are_cut_in_the_order_of_ids() {
    let params = params(|p| p.top_p = 0.5);
    assert_eq!(support(&params, &[0.0; 4]), [0, 1]);
}

/// Draws follow the distribution: a chi-square test with fixed draws, so it never flickers.
#[test]
fn draws_follow_the_distribution() {
    let check = |params: &SamplingParams, expect: &[f64]| {
        let draws = 60_000;
        let counts = histogram(params, &logits_of(&[0.05, 0.4, 0.1, 0.25, 0.2]), draws);
        let chi_square: f64 = counts
            .iter()
            .zip(expect)
            .map(|(&count, &share)| match share > 0.0 {
                true => (f64::from(count) - share * draws as f64).powi(2) / (share * draws as f64),
                false => f64::from(count) * f64::INFINITY,
            })
            .filter(|term| !term.is_nan())
            .sum();
        // 4 degrees of freedom: 18.5 is the 99.9 % point.
        assert!(
            chi_square < 18.5,
            "seed {}: {counts:?} instead of {expect:?}, chi-square {chi_square}",
            params.seed
        );
    };
    for seed in 0..8 {
        check(&params(|p| p.seed = seed), &[0.05, 0.4, 0.1, 0.25, 0.2]);
        check(
            &params(|p| {
                p.seed = seed;
                p.top_k = 2;
            }),
            &[0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0],
        );
        let squares = 0.0025 + 0.16 + 0.01 + 0.0625 + 0.04;
        let expect = [0.0025, 0.16, 0.01, 0.0625, 0.04].map(|square| square / squares);
        check(
            &params(|p| {
                p.seed = seed;
                p.temperature = 0.5;
            }),
            &expect,
        );
    }
}

/// A sampler rebuilt from prompt and tokens goes on as the first one would have.
#[test]
fn a_replayed_sampler_goes_on_with_the_same_tokens() {
    let params = params(|p| {
        p.seed = 99;
        p.top_p = 0.9;
        p.frequency_penalty = 0.7;
        p.repetition_penalty = 1.3;
    });
    let prompt = ids(&[3, 5]);
    let logits = |position: usize| -> Vec<f32> {
        (0..32).map(|token| ((token * 7 + position * 13) % 11) as f32 * 0.3).collect()
    };
    let run = |sampler: &mut SequenceSampler, from: usize| -> Vec<TokenId> {
        (from..40)
            .map(|position| {
                let token = sampler.sample(&mut logits(position), position, &[]).token;
                sampler.observe(token);
                token
            })
            .collect()
    };
    let whole = run(&mut SequenceSampler::new(&params, 2, &prompt), 0);
    let mut resumed = SequenceSampler::new(&params, 2, &prompt);
    for &token in &whole[..17] {
        resumed.observe(token);
    }
    assert_eq!(run(&mut resumed, 17), whole[17..]);
    let other_choice = run(&mut SequenceSampler::new(&params, 3, &prompt), 0);
    assert_ne!(other_choice, whole);
}

/// No row of logits, however odd, makes the sampler fail or leave the vocabulary.
#[test]
fn odd_logits_give_a_token() {
    let rows: [&[f32]; 4] =
        [&[f32::NEG_INFINITY; 3], &[f32::NAN; 3], &[1e38, -1e38, 0.0], &[f32::INFINITY, 0.0, 1.0]];
    for row in rows {
        for temperature in [0.0, 1e-4, 1.0] {
            for top_p in [1.0, 0.3] {
                let params = params(|p| {
                    p.temperature = temperature;
                    p.top_p = top_p;
                });
                let sampled = sampler(&params).sample(&mut row.to_vec(), 0, &[]);
                assert!((sampled.token.0 as usize) < row.len());
                assert!(!sampled.logprob.is_nan(), "{row:?}: {sampled:?}");
            }
        }
    }
}

/// Probability relative to the best token's.
fn weight(logit: f32, peak: f32, temperature: f32) -> f32 {
    ((logit - peak) / temperature).exp()
}

/// vLLM's way, step by step over the whole vocabulary: probabilities sorted ascending, masked by cumulative sums.
fn survivors_by_definition(limits: &Truncation, logits: &[f32], temperature: f32) -> Vec<u32> {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut mass: Vec<f64> =
        logits.iter().map(|&logit| f64::from(weight(logit, peak, temperature))).collect();
    mass.iter_mut().filter(|mass| **mass < f64::from(limits.min_p)).for_each(|mass| *mass = 0.0);
    let mut ascending: Vec<usize> = (0..logits.len()).collect();
    ascending.sort_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
    if limits.top_k > 0 && (limits.top_k as usize) < logits.len() {
        let threshold = logits[ascending[logits.len() - limits.top_k as usize]];
        (0..logits.len()).filter(|&token| logits[token] < threshold).for_each(|token| mass[token] = 0.0);
    }
    let total: f64 = mass.iter().sum();
    let mut cumulative = 0.0;
    for &token in &ascending[..logits.len() - 1] {
        cumulative += mass[token];
        if cumulative <= (1.0 - f64::from(limits.top_p)) * total {
            mass[token] = 0.0;
        }
    }
    (0..logits.len() as u32).filter(|&token| mass[token as usize] > 0.0).collect()
}

proptest! {
    #[test]
    fn truncation_is_what_its_definition_says(
        // Several blocks of weights at times.
        logits in prop::collection::vec(-6.0f32..6.0, 1..400),
        temperature in 0.2f32..2.0,
        top_k in 0u32..20,
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
    ) {
        let limits = Truncation { top_k, top_p, min_p };
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut weights, mut blocks, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        let mut spare = Vec::new();
        Isa::detect().softmax_weights(&logits, peak, temperature, &mut weights, &mut blocks);
        limits.apply(&logits, &weights, &blocks, &mut kept, &mut spare);
        let mut tokens: Vec<u32> = kept.iter().map(|candidate| candidate.token).collect();
        tokens.sort_unstable();
        prop_assert_eq!(tokens, survivors_by_definition(&limits, &logits, temperature));
    }
}
