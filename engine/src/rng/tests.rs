use super::*;

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

#[test]
fn seed_choice_and_position_each_matter() {
    let base = uniform(7, 0, 0);
    assert_eq!(base, uniform(7, 0, 0));
    for other in [
        uniform(8, 0, 0),
        uniform(7 + (1 << 32), 0, 0),
        uniform(7, 1, 0),
        uniform(7, 0, 1),
        uniform(7, 0, 1 << 32),
    ] {
        assert_ne!(base, other);
    }
}

#[test]
fn draws_are_uniform_over_positions() {
    let draws = 100_000u64;
    let mut buckets = [0u32; 16];
    for position in 0..draws {
        let value = uniform(0x5eed, 3, position);
        assert!((0.0..1.0).contains(&value));
        buckets[(value * 16.0) as usize] += 1;
    }
    let expect = draws as f64 / 16.0;
    let chi_square: f64 = buckets.iter().map(|&n| (f64::from(n) - expect).powi(2) / expect).sum();
    // 15 degrees of freedom: 37.7 is the 99.9 % point. The draws are fixed, so this never flickers.
    assert!(chi_square < 37.7, "chi-square {chi_square}");
}
