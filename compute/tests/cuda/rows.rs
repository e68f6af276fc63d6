//! Operators on rows and single values.

use compute::cuda::{NormHalf, RopeTable};
use compute::{ActivationFormat, Activations, Cpu, RopeRows, ScaleFormat, fp8, reference};
use rand::RngExt;

use super::support::{assert_close, bits, device, floats, fresh, output, read};

#[test]
#[ignore = "needs a CUDA device"]
fn rms_norm() {
    let device = device();
    let mut rng = fresh();
    for (m, dim) in [(0, 8), (1, 1), (3, 7), (5, 160), (2, 513), (33, 1536), (4, 7168)] {
        let (x, w) = (floats(&mut rng, m * dim), floats(&mut rng, dim));
        let (x_there, w_there) = (device.upload(&x).expect("x"), device.upload(&w).expect("w"));
        let y = output(device, m * dim, |y| {
            device.rms_norm(x_there.view(), w_there.view(), 1e-6, &mut y.view_mut())
        });
        let mut expected = vec![f32::NAN; m * dim];
        reference::rms_norm(&x, &w, 1e-6, &mut expected);
        assert_close(&format!("[{m}, {dim}]"), &y, &expected, 1e-6);
        for row in 0..m {
            let range = row * dim..(row + 1) * dim;
            let alone = output(device, dim, |y| {
                device.rms_norm(x_there.slice(range.clone()), w_there.view(), 1e-6, &mut y.view_mut())
            });
            assert_eq!(bits(&alone), bits(&y[range]), "row {row} of [{m}, {dim}]");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn pairs_of_norms() {
    let device = device();
    let mut rng = fresh();
    for (m, dim) in [(0, 8), (1, 1), (3, 7), (2, 513), (33, 1536), (4, 7168)] {
        let [a, b] = [(); 2].map(|()| floats(&mut rng, m * dim));
        let [wa, wb] = [(); 2].map(|()| floats(&mut rng, dim));
        let there = [&a, &b, &wa, &wb].map(|values| device.upload(values).expect("upload"));
        let half = |x: usize, eps| NormHalf { x: there[x].view(), weight: there[2 + x].view(), eps };
        let y = output(device, 2 * m * dim, |y| {
            device.norm_pair(half(0, 1e-6), half(1, 1e-3), &mut y.view_mut())
        });
        let [mut left, mut right] = [(); 2].map(|()| vec![f32::NAN; m * dim]);
        reference::rms_norm(&a, &wa, 1e-6, &mut left);
        reference::rms_norm(&b, &wb, 1e-3, &mut right);
        let halves = left.chunks(dim).zip(right.chunks(dim));
        let expected: Vec<f32> = halves.flat_map(|(left, right)| [left, right].concat()).collect();
        assert_close(&format!("[{m}, 2 x {dim}]"), &y, &expected, 1e-6);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn silu_mul_and_sums() {
    let device = device();
    let mut rng = fresh();
    for len in [0, 1, 7, 48, 1000, 200_001] {
        let (a, b) = (floats(&mut rng, len), floats(&mut rng, len));
        let (a_there, b_there) = (device.upload(&a).expect("a"), device.upload(&b).expect("b"));
        let out = output(device, len, |y| device.silu_mul(a_there.view(), b_there.view(), &mut y.view_mut()));
        let mut expected = vec![f32::NAN; len];
        reference::silu_mul(&a, &b, &mut expected);
        assert_close(&format!("silu_mul {len}"), &out, &expected, 1e-6);
        let mut sum = device.upload(&a).expect("a");
        device.add_in_place(&mut sum.view_mut(), b_there.view()).expect("add");
        let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(bits(&read(device, sum.view())), bits(&expected));
        let mut sum = device.upload(&a).expect("a");
        device.add_scaled(&mut sum.view_mut(), 0.3, b_there.view()).expect("add");
        let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + 0.3 * b).collect();
        assert_eq!(bits(&read(device, sum.view())), bits(&expected));
    }
    let gate = device.upload(&[-200.0, 200.0, 0.0]).expect("gate");
    let up = device.upload(&[1.0; 3]).expect("up");
    let extremes = output(device, 3, |y| device.silu_mul(gate.view(), up.view(), &mut y.view_mut()));
    assert!(extremes[0].abs() < 1e-30 && extremes[1] == 200.0 && extremes[2] == 0.0, "{extremes:?}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn weighted_sums_are_in_order() {
    let device = device();
    let mut rng = fresh();
    for (tokens, top_k, dim) in [(0, 8, 16), (1, 1, 1), (3, 8, 77), (5, 6, 512)] {
        let (x, w) = (floats(&mut rng, tokens * top_k * dim), floats(&mut rng, tokens * top_k));
        let (x_there, w_there) = (device.upload(&x).expect("x"), device.upload(&w).expect("w"));
        let out = output(device, tokens * dim, |y| {
            device.weighted_sum(x_there.view(), w_there.view(), top_k, &mut y.view_mut())
        });
        let mut expected = vec![0.0; tokens * dim];
        let cpu = Cpu::new(1);
        for i in 0..tokens * top_k {
            let out = &mut expected[i / top_k * dim..][..dim];
            cpu.add_scaled(out, w[i], &x[i * dim..][..dim]);
        }
        assert_eq!(bits(&out), bits(&expected), "[{tokens}, {top_k}, {dim}]");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn quantised_and_rounded_rows_have_the_bits_of_the_cpu() {
    let device = device();
    let mut rng = fresh();
    let cpu = Cpu::new(1);
    for (m, k) in [(0, 128), (1, 1), (3, 48), (2, 160), (200, 1000), (7, 7168)] {
        let x: Vec<f32> =
            floats(&mut rng, m * k).iter().map(|x| x * 10f32.powi(rng.random_range(-6..3))).collect();
        let there = device.upload(&x).expect("x");
        let blocks = k.div_ceil(128);
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let mut scales = Vec::new();
            let codes = output(device, m * k, |codes| {
                let mut scales_there = super::support::poisoned(device, m * blocks);
                let (codes, out) = (&mut codes.view_mut(), &mut scales_there.view_mut());
                device.quantise(there.view(), k, format, codes, out)?;
                scales = read(device, scales_there.view());
                Ok(())
            });
            let mut activations = Activations::new();
            activations.prepare(&cpu, &x, m, k, ActivationFormat::Fp8(format));
            let (mut wire, mut got) = (Vec::new(), Vec::new());
            activations.encode_rows(0..m, &mut wire);
            for row in 0..m {
                got.extend_from_slice(&codes[row * k..][..k]);
                got.extend(scales[row * blocks..][..blocks].iter().flat_map(|s| s.to_le_bytes()));
            }
            assert!(wire == got, "[{m}, {k}] {format:?}");
        }
        let rounded = output(device, m * k, |y| device.round_bf16(there.view(), &mut y.view_mut()));
        let expected: Vec<u16> = x.iter().map(|&x| fp8::to_bf16(x)).collect();
        assert_eq!(rounded, expected);
        let mut in_place = device.upload(&x).expect("x");
        device.round_to_bf16(&mut in_place.view_mut()).expect("round");
        let expected: Vec<f32> = expected.into_iter().map(fp8::from_bf16).collect();
        assert_eq!(bits(&read(device, in_place.view())), bits(&expected));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn rope() {
    let device = device();
    let mut rng = fresh();
    let frequencies: Vec<f64> = (0..8).map(|i| 10000f64.powf(-2.0 * f64::from(i) / 16.0)).collect();
    let table = compute::RopeTable::new(&frequencies, 1.0, 4096);
    let there = RopeTable::new(device, &table, 4096).expect("table");
    for rows in [
        RopeRows { per_position: 3, stride: 48, offset: 32 },
        RopeRows { per_position: 1, stride: 16, offset: 0 },
    ] {
        for positions in [vec![], vec![0], vec![0, 1, 4095, 17, 17]] {
            let x = floats(&mut rng, positions.len() * rows.per_position * rows.stride);
            let mut y = device.upload(&x).expect("x");
            let positions_there = device.upload(&positions).expect("positions");
            device
                .rope_interleaved(&mut y.view_mut(), rows, positions_there.view(), &there)
                .expect("rotated");
            let y = read(device, y.view());
            let mut expected = x.clone();
            reference::rope_interleaved(&mut expected, rows, &positions, &table);
            assert_close(&format!("{rows:?} {positions:?}"), &y, &expected, 1e-6);
            if !x.is_empty() {
                assert_eq!(bits(&y[..rows.stride]), bits(&x[..rows.stride]), "position zero rotates nothing");
                let kept = |x: &[f32]| bits(&x[x.len() - rows.stride..][..rows.offset]);
                assert_eq!(kept(&y), kept(&x), "the rest of a row stays");
            }
        }
    }
}
