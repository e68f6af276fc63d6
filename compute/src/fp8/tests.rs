use super::*;

#[test]
fn golden_codes() {
    // Semantics note, section 1.8.
    let cases: [(f32, u8, f32); 10] = [
        (1.0, 0x38, 1.0),
        (0.1, 0x1D, 0.101_562_5),
        (-0.3, 0xAA, -0.3125),
        (448.0, 0x7E, 448.0),
        (500.0, 0x7E, 448.0),
        (0.001_953_125, 0x01, 0.001_953_125),
        (0.000_976_562_5, 0x00, 0.0),
        (0.002_929_687_5, 0x02, 0.003_906_25),
        (17.0, 0x58, 16.0),
        (19.0, 0x5A, 20.0),
    ];
    for (x, code, value) in cases {
        assert_eq!(encode(x), code, "{x}");
        assert_eq!(decode(code), value, "{x}");
    }
    assert_eq!(encode(f32::NAN) & 0x7F, 0x7F);
    assert!(decode(0x7F).is_nan() && decode(0xFF).is_nan());
    assert_eq!(encode(f32::INFINITY), 0x7E);
}

#[test]
fn golden_blocks() {
    let block = [0.5f32, -3.0, 0.001, 2.75];
    let check = |format, scale_expected: f32, codes: [u8; 4], values: [f32; 4]| {
        let s = scale(3.0, ACTIVATION_AMAX_MIN, format);
        assert!((s - scale_expected).abs() <= 1e-9, "{s}");
        for i in 0..4 {
            assert_eq!(encode(block[i] / s), codes[i], "{i}");
            assert!((decode(codes[i]) * s - values[i]).abs() < 1e-6);
        }
    };
    check(ScaleFormat::F32, 6.696_429e-3, [0x69, 0xFE, 0x22, 0x7D], [0.482_143, -3.0, 0.001_046, 2.785_714]);
    check(ScaleFormat::Ue8m0, 0.007_812_5, [0x68, 0xFC, 0x20, 0x7B], [0.5, -3.0, 0.000_977, 2.75]);
}

#[test]
fn every_code_survives_a_round_trip() {
    for code in 0..=255u8 {
        if code & 0x7F != 0x7F {
            assert_eq!(encode(decode(code)), code);
            assert_eq!(from_bf16(E4M3_TO_BF16[usize::from(code)]).to_bits(), decode(code).to_bits());
        }
    }
    assert!(from_bf16(E4M3_TO_BF16[0x7F]).is_nan());
}

/// `encode` picks a nearest code, and the even one on a tie: checked against a search over all codes.
#[test]
fn encode_is_nearest_even() {
    for a in 0..0x7Eu8 {
        let (low, high) = (decode(a), decode(a + 1));
        let middle = (low + high) / 2.0;
        let even = if a % 2 == 0 { a } else { a + 1 };
        assert_eq!(encode(middle), even, "between {low} and {high}");
        assert_eq!(encode(f32::from_bits(middle.to_bits() - 1)), a);
        assert_eq!(encode(f32::from_bits(middle.to_bits() + 1)), a + 1);
        assert_eq!(encode(-middle), even | 0x80);
    }
}

#[test]
fn ue8m0_scale_is_the_next_power_of_two() {
    for (amax, expected) in [(448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (0.0, 2f32.powi(-22))] {
        assert_eq!(scale(amax, ACTIVATION_AMAX_MIN, ScaleFormat::Ue8m0), expected, "{amax}");
    }
}
