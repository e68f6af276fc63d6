use super::*;
use crate::samples::Samples;

const LENGTHS: [usize; 8] = [0, 1, 15, 64, 65, 511, 513, 1300];

#[test]
fn the_first_of_the_largest() {
    let mut samples = Samples::new(31);
    for isa in Isa::available() {
        for len in LENGTHS {
            let mut x = samples.floats(len);
            for at in [len / 3, len / 2, len.saturating_sub(1)] {
                if let Some(value) = x.get_mut(at) {
                    *value = 1e6;
                }
            }
            let expected = x.iter().position(|&value| value == 1e6).unwrap_or(0);
            assert_eq!(isa.argmax(&x), expected, "{isa:?} {len}");
        }
        assert_eq!(isa.argmax(&[f32::NAN, -3.0, f32::NAN, -2.0]), 3);
        assert_eq!(isa.argmax(&[f32::NEG_INFINITY; 40]), 0);
        assert_eq!(isa.argmax(&[f32::NAN; 600]), 0);
    }
}

#[test]
fn weights_and_their_sums() {
    let mut samples = Samples::new(32);
    for isa in Isa::available() {
        let (mut weights, mut blocks) = (Vec::new(), Vec::new());
        for len in LENGTHS {
            let x = samples.floats(len);
            let peak = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for temperature in [1.0, 0.6, 3.0] {
                isa.softmax_weights(&x, peak, temperature, &mut weights, &mut blocks);
                for (&x, &weight) in x.iter().zip(&weights) {
                    let distance = (x - peak) / temperature;
                    let expected = if distance <= EXP_MIN { 0.0 } else { f64::from(distance).exp() };
                    assert!(
                        (f64::from(weight) - expected).abs() <= 1e-6 * expected,
                        "{isa:?} {distance}: {weight}"
                    );
                }
                for (block, weights) in blocks.iter().zip(weights.chunks(WEIGHT_BLOCK)) {
                    assert_eq!(block.max, weights.iter().copied().fold(0.0, f32::max));
                    let sum: f64 = weights.iter().copied().map(f64::from).sum();
                    assert!((f64::from(block.sum) - sum).abs() <= 1e-5 * sum, "{isa:?}");
                }
            }
            let expected: f64 = x.iter().map(|&x| f64::from(x - peak).exp()).sum();
            assert!((isa.sum_exp(&x, peak) - expected).abs() <= 1e-6 * expected, "{isa:?} {len}");
        }
        let odd = [f32::NAN, 0.0, f32::NEG_INFINITY, -1e30, -88.0, 1.0];
        isa.softmax_weights(&odd, 1.0, 1.0, &mut weights, &mut blocks);
        assert!(weights[0] == 0.0 && weights[2..5] == [0.0; 3] && weights[5] == 1.0, "{isa:?} {weights:?}");
    }
}
