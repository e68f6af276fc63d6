//! Norm, SwiGLU's product, rotation, quantisation and the router, on every instruction set against the scalar
//! reference; and the same bits for a row whatever rows and threads share the call.

use compute::{
    ActivationFormat, Activations, Cpu, Isa, RopeRows, RopeTable, RoutingRule, ScaleFormat, Scoring,
    Selection, fp8, reference,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn floats(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-4.0f32..4.0)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn assert_close(what: &str, got: &[f32], expected: &[f32], relative: f32) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= relative * expected.abs() + 1e-30,
            "{what} [{i}]: {got} for {expected}"
        );
    }
}

#[test]
fn rms_norm() {
    let mut rng = StdRng::seed_from_u64(11);
    for isa in Isa::available() {
        let (one, two) = (Cpu::with_isa(1, isa), Cpu::with_isa(2, isa));
        for (m, dim) in [(0, 4), (1, 1), (3, 48), (2, 160), (5, 513), (300, 1000)] {
            let (x, w) = (floats(&mut rng, m * dim), floats(&mut rng, dim));
            let (mut y, mut expected) = (vec![f32::NAN; m * dim], vec![f32::NAN; m * dim]);
            two.rms_norm(&x, &w, 1e-6, &mut y);
            reference::rms_norm(&x, &w, 1e-6, &mut expected);
            assert_close(&format!("{isa:?} [{m}, {dim}]"), &y, &expected, 1e-6);
            for (x, y) in x.chunks(dim).zip(y.chunks(dim)) {
                let mut alone = vec![f32::NAN; dim];
                one.rms_norm(x, &w, 1e-6, &mut alone);
                assert_eq!(bits(&alone), bits(y));
            }
        }
    }
}

#[test]
fn silu_mul() {
    let mut rng = StdRng::seed_from_u64(12);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for len in [0, 1, 7, 48, 1000, 200_001] {
            let gate: Vec<f32> = floats(&mut rng, len).iter().map(|x| x * 5.0).collect();
            let up = floats(&mut rng, len);
            let (mut out, mut expected) = (vec![f32::NAN; len], vec![f32::NAN; len]);
            cpu.silu_mul(&gate, &up, &mut out);
            reference::silu_mul(&gate, &up, &mut expected);
            assert_close(&format!("{isa:?} {len}"), &out, &expected, 1e-6);
            // A value's bits depend on nothing but itself: start anywhere.
            let mut shifted = vec![f32::NAN; len.saturating_sub(3)];
            cpu.silu_mul(&gate[len.min(3)..], &up[len.min(3)..], &mut shifted);
            assert_eq!(bits(&shifted), bits(&out[len.min(3)..]));
        }
        let mut extremes = [f32::NAN; 3];
        cpu.silu_mul(&[-200.0, 200.0, 0.0], &[1.0; 3], &mut extremes);
        assert!(extremes[0].abs() < 1e-30 && extremes[1] == 200.0 && extremes[2] == 0.0, "{extremes:?}");
    }
}

#[test]
fn sums_and_rounding() {
    let mut rng = StdRng::seed_from_u64(17);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for len in [0, 1, 37, 150_001] {
            let (a, b) = (floats(&mut rng, len), floats(&mut rng, len));
            let mut sum = a.clone();
            cpu.add_in_place(&mut sum, &b);
            let mut scaled = a.clone();
            cpu.add_scaled(&mut scaled, 0.3, &b);
            let mut rounded = a.clone();
            cpu.round_to_bf16(&mut rounded);
            for i in 0..len {
                assert_eq!(sum[i].to_bits(), (a[i] + b[i]).to_bits());
                let product = 0.3 * b[i];
                assert_eq!(scaled[i].to_bits(), (a[i] + product).to_bits());
                assert_eq!(rounded[i].to_bits(), fp8::from_bf16(fp8::to_bf16(a[i])).to_bits(), "{isa:?}");
            }
        }
    }
}

#[test]
fn gathered_and_weighted_rows() {
    let mut rng = StdRng::seed_from_u64(19);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for (rows, count, width) in [(1, 1, 1), (3, 4, 37), (70, 8, 512)] {
            let (vectors, weights) = (floats(&mut rng, rows * count * width), floats(&mut rng, rows * count));
            let before = floats(&mut rng, rows * width);
            let mut out = before.clone();
            cpu.add_weighted(&vectors, &weights, count, &mut out);
            for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                let (row, column) = (i / width, i % width);
                let terms = (0..count)
                    .map(|j| weights[row * count + j] * vectors[(row * count + j) * width + column]);
                let sum = terms.reduce(|sum, term| sum + term).expect("one term at least");
                assert_eq!(out.to_bits(), (before + sum).to_bits(), "{isa:?}");
            }
            let index: Vec<u32> = (0..rows * count).rev().map(|row| row as u32).collect();
            let mut gathered = vec![f32::NAN; vectors.len()];
            cpu.gather_rows(&vectors, width, &index, &mut gathered);
            assert!(gathered.chunks(width).eq(vectors.chunks(width).rev()));
        }
        cpu.add_weighted(&[], &[], 4, &mut []);
    }
}

#[test]
fn rope() {
    let mut rng = StdRng::seed_from_u64(13);
    let frequencies: Vec<f64> = (0..8).map(|i| 10000f64.powf(-2.0 * f64::from(i) / 16.0)).collect();
    let table = RopeTable::new(&frequencies, 1.0, 163_840);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        for rows in [
            RopeRows { per_position: 3, stride: 48, offset: 32 },
            RopeRows { per_position: 1, stride: 16, offset: 0 },
        ] {
            cpu.rope_interleaved(&mut [], rows, &[], &table);
            let positions = [0, 1, 4095, 163_839];
            let x = floats(&mut rng, positions.len() * rows.per_position * rows.stride);
            let (mut y, mut expected) = (x.clone(), x.clone());
            cpu.rope_interleaved(&mut y, rows, &positions, &table);
            reference::rope_interleaved(&mut expected, rows, &positions, &table);
            for (y, expected) in y.iter().zip(&expected) {
                assert!((y - expected).abs() <= 1e-6, "{isa:?}: {y} for {expected}");
            }
            assert_eq!(bits(&y[..rows.offset]), bits(&x[..rows.offset]), "the rest of a row stays");
            assert_eq!(bits(&y[..rows.stride]), bits(&x[..rows.stride]), "position zero rotates nothing");
        }
    }
    let (sin, cos) = (163_839.0f64 * frequencies[1]).sin_cos();
    assert_eq!(table.at(163_839)[2..4], [cos as f32, sin as f32]);
}

/// One pair by hand: (1, 2) turned by an angle of 1 rad at position 1.
#[test]
fn rope_pairs_are_interleaved() {
    let table = RopeTable::new(&[1.0, 0.0], 1.0, 2);
    let mut x = [1.0, 2.0, 3.0, 4.0];
    Cpu::new(1).rope_interleaved(&mut x, RopeRows { per_position: 1, stride: 4, offset: 0 }, &[1], &table);
    let (sin, cos) = 1f32.sin_cos();
    assert!((x[0] - (cos - 2.0 * sin)).abs() < 1e-6 && (x[1] - (sin + 2.0 * cos)).abs() < 1e-6);
    assert_eq!(x[2..], [3.0, 4.0]);
}

#[test]
fn quantised_rows_are_those_of_the_scalar_rule() {
    let mut rng = StdRng::seed_from_u64(14);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for (m, k) in [(0, 128), (1, 1), (3, 48), (2, 160), (200, 1000)] {
            let x: Vec<f32> =
                floats(&mut rng, m * k).iter().map(|x| x * 10f32.powi(rng.random_range(-6..3))).collect();
            for scale_format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
                let mut activations = Activations::new();
                let format = ActivationFormat::Fp8(scale_format);
                // A buffer that held something else before.
                activations.prepare(&cpu, &[f32::NAN; 6000], 2, 3000, ActivationFormat::F32);
                activations.prepare(&cpu, &x, m, k, format);
                let mut wire = Vec::new();
                activations.encode_rows(0..m, &mut wire);
                let mut expected = Vec::new();
                for row in x.chunks(k) {
                    let mut scales = Vec::new();
                    for block in row.chunks(128) {
                        let amax = block.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                        let scale = fp8::scale(amax, fp8::ACTIVATION_AMAX_MIN, scale_format);
                        expected.extend(block.iter().map(|x| fp8::encode(x / scale)));
                        scales.extend(scale.to_le_bytes());
                    }
                    expected.extend(scales);
                }
                assert!(wire == expected, "{isa:?} [{m}, {k}] {scale_format:?}");
                let back = Activations::from_wire(format, m, k, &wire).expect("its own bytes");
                for row in 0..m {
                    for channel in 0..k {
                        assert_eq!(
                            back.value(row, channel).to_bits(),
                            activations.value(row, channel).to_bits()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn activations_of_every_format_survive_the_wire() {
    let mut rng = StdRng::seed_from_u64(15);
    let cpu = Cpu::new(1);
    let (m, k) = (3, 200);
    let x = floats(&mut rng, m * k);
    for format in [ActivationFormat::F32, ActivationFormat::Bf16, ActivationFormat::Fp8(ScaleFormat::F32)] {
        let mut activations = Activations::new();
        activations.prepare(&cpu, &x, m, k, format);
        let mut wire = Vec::new();
        activations.encode_rows(0..m, &mut wire);
        assert_eq!(wire.len(), m * format.wire_row_bytes(k));
        let back = Activations::from_wire(format, m, k, &wire).expect("its own bytes");
        let mut again = Vec::new();
        back.encode_rows(0..m, &mut again);
        assert_eq!(wire, again);
        assert!(Activations::from_wire(format, m, k, &wire[1..]).is_err());
        assert!(Activations::from_wire(format, usize::MAX, k, &wire).is_err());
        // Any bytes of the right length are numbers of some kind.
        let noise: Vec<u8> = (0..wire.len()).map(|_| rng.random()).collect();
        assert!(Activations::from_wire(format, m, k, &noise).is_ok());
    }
}

fn v3_toy() -> RoutingRule {
    RoutingRule {
        scoring: Scoring::Sigmoid,
        selection: Selection::NoauxTc,
        top_k: 3,
        groups: 4,
        groups_kept: 2,
        normalise: true,
        scale: 2.5,
    }
}

/// Semantics note, section 1.7: expert 2 has the best unbiased score and is not selected.
#[test]
fn golden_route() {
    let logits = [0.1, -0.5, 2.0, 0.3, -1.0, 1.5, 0.9, 0.0];
    let bias = [0.0, 0.0, -1.0, 0.0, 0.5, 0.0, -0.2, 0.4];
    for isa in Isa::available() {
        let (mut ids, mut weights) = ([0; 3], [f32::NAN; 3]);
        Cpu::with_isa(1, isa).route(&logits, 8, Some(&bias), &v3_toy(), &mut ids, &mut weights);
        assert_eq!(ids, [7, 5, 4]);
        assert_close("weights", &weights, &[0.787_890, 1.288_317, 0.423_793], 2e-6);
    }
}

#[test]
fn ties_go_to_the_lowest_expert() {
    let (mut ids, mut weights) = ([0; 3], [f32::NAN; 3]);
    Cpu::new(1).route(&[0.0; 8], 8, None, &v3_toy(), &mut ids, &mut weights);
    assert_eq!(ids, [0, 1, 2]);
}

#[test]
fn routes_agree_with_the_reference() {
    let mut rng = StdRng::seed_from_u64(16);
    let v3 = RoutingRule { top_k: 8, groups: 8, groups_kept: 4, ..v3_toy() };
    let rules = [
        v3,
        RoutingRule {
            scoring: Scoring::Softmax,
            selection: Selection::GroupLimitedGreedy,
            normalise: false,
            scale: 16.0,
            top_k: 6,
            groups_kept: 3,
            ..v3
        },
        RoutingRule {
            scoring: Scoring::Softmax,
            selection: Selection::Greedy,
            groups: 1,
            groups_kept: 1,
            top_k: 6,
            normalise: false,
            scale: 1.0,
        },
    ];
    let experts = 160;
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        for rule in rules {
            for m in [0, 1, 33] {
                let logits = floats(&mut rng, m * experts);
                // Negative enough that masking with zero instead of minus infinity would show.
                let bias: Vec<f32> = floats(&mut rng, experts).iter().map(|b| b * 0.1 - 2.0).collect();
                let (mut ids, mut weights) = (vec![0; m * rule.top_k], vec![f32::NAN; m * rule.top_k]);
                let (mut ids_expected, mut expected) = (ids.clone(), weights.clone());
                cpu.route(&logits, experts, Some(&bias), &rule, &mut ids, &mut weights);
                reference::route(&logits, experts, Some(&bias), &rule, &mut ids_expected, &mut expected);
                assert_eq!(ids, ids_expected, "{isa:?} {rule:?}");
                assert_close("weights", &weights, &expected, 2e-6);
            }
        }
    }
}
