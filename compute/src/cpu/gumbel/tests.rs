use super::*;
use crate::samples::Samples;

fn key(seed: u64, position: u64) -> GumbelKey {
    GumbelKey { seed, choice: 0, position }
}

/// Known answers published with Random123 (`kat_vectors`).
#[test]
fn philox_gives_the_published_answers() {
    let check = |counter, key, expect| assert_eq!(philox4x32(counter, key), expect);
    check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    check(
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    );
}

/// A token's noise, from the definition.
fn noise_of(key: GumbelKey, token: u32) -> f32 {
    let words = words(key, 16 * (token / 64) + token % 16);
    gumbel(words[(token / 16 % 4) as usize])
}

#[test]
fn noise_is_the_double_logarithm() {
    let edges = [0, 1, 2, 255, 256, 1 << 16, u32::MAX / 2, u32::MAX - 129, u32::MAX - 128, u32::MAX];
    let many = (0..200_000u32).map(|i| i.wrapping_mul(2_654_435_761));
    for word in edges.into_iter().chain(many) {
        let v = ((f64::from(word) + 0.5) / 4_294_967_296.0).min(1.0 - 2f64.powi(-24));
        let expected = -(-(-v).ln_1p()).ln();
        let noise = gumbel(word);
        let tolerance =
            1e-6 * expected.abs().max(1.0) + 4e-7 / (1.0 - v).max(1e-7) * f64::from(word > 1 << 31);
        assert!((f64::from(noise) - expected).abs() <= tolerance, "{word}: {noise} for {expected}");
        assert!(noise < NOISE_MAX);
        // What skipping blocks relies on.
        assert!(f64::from(noise) <= -v.ln() + 1e-5, "{word}: {noise}");
    }
}

/// Every instruction set has the bits of the definition, which is compiled for none.
#[test]
fn every_instruction_set_has_the_same_noise() {
    let keys = [key(0, 0), key(7, 1), key(u64::MAX - 3, 1 << 40), GumbelKey { choice: 5, ..key(7, 1) }];
    for isa in Isa::available() {
        for key in keys {
            for base in [0u32, 1, 63, 64, 1000, 129_279, u32::MAX - 40] {
                let tokens: [u32; LANES] = std::array::from_fn(|i| base.saturating_add(3 * i as u32));
                let noise = isa.gumbel_noise(key, &tokens);
                for (token, noise) in tokens.into_iter().zip(noise) {
                    assert_eq!(noise.to_bits(), noise_of(key, token).to_bits(), "{isa:?} {key:?} {token}");
                }
            }
        }
    }
}

#[test]
fn seed_choice_position_and_token_each_matter() {
    let base = GumbelKey { seed: 7, choice: 0, position: 9 };
    let others = [
        (GumbelKey { seed: 8, ..base }, 3),
        (GumbelKey { seed: 7 + (1 << 32), ..base }, 3),
        (GumbelKey { choice: 1, ..base }, 3),
        (GumbelKey { position: 10, ..base }, 3),
        (GumbelKey { position: 9 + (1 << 32), ..base }, 3),
        (base, 4),
        (base, 19),
        (base, 67),
    ];
    for (key, token) in others {
        assert_ne!(noise_of(base, 3), noise_of(key, token), "{key:?} {token}");
    }
}

/// Blocks that are skipped could not have won, whatever the shape of the distribution.
#[test]
fn the_largest_sum_is_found() {
    let mut samples = Samples::new(41);
    for isa in Isa::available() {
        for (len, spread) in
            [(1, 1.0), (15, 1.0), (64, 3.0), (65, 0.0), (700, 4.0), (4096, 0.01), (4096, 9.0)]
        {
            for position in 0..40 {
                let mut x: Vec<f32> = samples.floats(len).iter().map(|x| x * spread).collect();
                if len > 20 {
                    (x[3], x[len - 1]) = (f32::NAN, f32::NEG_INFINITY);
                }
                let first = isa.argmax(&x);
                let temperature = [0.3, 1.0, 1.7][position as usize % 3];
                let key = key(5, position);
                let sum = |i: usize| score(x[i], x[first], temperature) + noise_of(key, i as u32);
                let expected = (0..len).filter(|&i| !x[i].is_nan()).fold(first, |best, i| {
                    if sum(i) > sum(best) || sum(i) == sum(best) && i < best { i } else { best }
                });
                let index = isa.gumbel_argmax(&x, first, x[first], temperature, key);
                assert_eq!(index, expected, "{isa:?} {len} {spread} {position}");
            }
        }
    }
}

/// Draws follow the softmax: a chi-square test with fixed draws, so it never flickers.
#[test]
fn draws_follow_the_softmax() {
    let x: Vec<f32> = (0..200).map(|i| (i * 37 % 101) as f32 * 0.03).collect();
    let isa = Isa::detect();
    let first = isa.argmax(&x);
    for seed in 0..4 {
        let draws = 200_000;
        let mut counts = vec![0u32; x.len()];
        for position in 0..draws {
            counts[isa.gumbel_argmax(&x, first, x[first], 0.8, key(seed, position))] += 1;
        }
        let weights: Vec<f64> = x.iter().map(|x| f64::from(x / 0.8).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chi_square: f64 = counts
            .iter()
            .zip(&weights)
            .map(|(&count, weight)| {
                (f64::from(count) - weight / total * draws as f64, weight / total * draws as f64)
            })
            .map(|(difference, expected)| difference * difference / expected)
            .sum();
        // 199 degrees of freedom: 265 is the 99.9 % point.
        assert!(chi_square < 265.0, "seed {seed}: chi-square {chi_square}");
    }
}
