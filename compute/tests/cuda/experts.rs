//! Rows by their experts' matrices, and back to tokens.

use compute::cuda::{
    Activations, ExpertMatrices, Groups, InputFormat, LinearKernel, Matrix, Outputs, Results,
};
use compute::{Cpu, ScaleFormat, WeightFormat, fp8};
use rand::RngExt;

use super::products::matrix;
use super::support::{bits, device, floats, fresh, output, small};

/// Gate and up fit the matrix unit, down does not: rows are sorted once for all of them, so all take the plain kernel.
#[test]
#[ignore = "needs a CUDA device"]
fn experts_of_widths_that_need_two_kernels_take_the_plain_one() {
    let device = device();
    let mut rng = fresh();
    let (tokens, n, k) = (20, 192, 384);
    let format = InputFormat::Fp8(ScaleFormat::F32);
    let mut one = |n: usize, k: usize| {
        let w = matrix(&mut rng, WeightFormat::Fp8, n, k);
        let mut stack = ExpertMatrices::alloc(device, 1, (n, k), WeightFormat::Fp8).expect("room");
        stack.set(device, 0, &w).expect("weights");
        (stack, Matrix::new(device, &w).expect("weights"))
    };
    let ((gate, gate_alone), (up, _), (down, down_alone)) = (one(n, k), one(n, k), one(k, n));
    let kernel = device.experts_kernel([&gate, &up, &down]);
    assert_eq!((kernel, device.linear_kernel(&down_alone)), (LinearKernel::Plain, LinearKernel::Plain));
    let ids = device.upload(&vec![0u16; tokens]).expect("ids");
    let mut groups = Groups::new(device, tokens, 1).expect("groups");
    device.group_rows(ids.view(), kernel, &mut groups).expect("grouped");
    // Rows are sorted in any order: they are all alike.
    let x_there = device.upload(&floats(&mut rng, k).repeat(tokens)).expect("x");
    let mut x = Activations::new(device, format, tokens, k).expect("x");
    device.prepare(x_there.view(), &mut x).expect("x");
    let sorted: Vec<f32> = output(device, tokens * 2 * n, |y| {
        device.experts_in(&gate, Some(&up), x.inputs(tokens), &groups, 1, &mut y.view_mut())
    });
    let alone: Vec<f32> =
        output(device, tokens * n, |y| device.linear(&gate_alone, x.inputs(tokens), &mut y.view_mut()));
    let largest = alone.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for row in sorted.chunks_exact(2 * n) {
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-2 * largest;
        assert!(row[..n].iter().zip(&alone[..n]).all(close), "the matrix unit's sums, about");
    }
    let inside_there = device.upload(&floats(&mut rng, tokens * n)).expect("rows");
    let mut inside = Activations::new(device, format, tokens, n).expect("rows");
    device.prepare(inside_there.view(), &mut inside).expect("rows");
    let back: Vec<f32> = output(device, tokens * k, |y| {
        device.experts_sorted(&down, inside.inputs(tokens), &groups, Outputs::F32(&mut y.view_mut()))
    });
    let alone: Vec<f32> =
        output(device, tokens * k, |y| device.linear(&down_alone, inside.inputs(tokens), &mut y.view_mut()));
    assert!(bits(&back) == bits(&alone), "the plain kernel's bits");
}

/// Every row has the bits that a plain product by its expert's matrix gives it, in both directions, whatever the tile.
#[test]
#[ignore = "needs a CUDA device"]
fn experts_have_the_bits_of_their_own_products() {
    let device = device();
    let mut rng = fresh();
    // Tokens, top-k, experts, intermediate width, hidden width.
    for (tokens, top_k, experts, n, k) in [
        (1, 2, 4, 48, 160),
        (33, 4, 16, 48, 160),
        (9, 8, 32, 128, 256),
        (300, 4, 6, 192, 384),
        (700, 2, 3, 64, 128),
        // Tiles one after another in a block, the next one's scales copied beside the last one's: panels that are full, or not.
        (2500, 2, 4, 512, 2048),
        (2500, 2, 4, 512, 128),
    ] {
        if small() && tokens > 9 {
            continue;
        }
        for (weights, format) in [
            (WeightFormat::F32, InputFormat::F32),
            (WeightFormat::Bf16, InputFormat::Bf16),
            (WeightFormat::Fp8, InputFormat::Fp8(ScaleFormat::F32)),
        ] {
            let what = format!("{weights:?} {tokens} x {top_k} of {experts}, [{n}, {k}]");
            let stack = |rng: &mut _, n: usize, k: usize| {
                let mut stack = ExpertMatrices::alloc(device, experts, (n, k), weights).expect("room");
                let mut alone = Vec::new();
                for expert in 0..experts {
                    let w = matrix(rng, weights, n, k);
                    stack.set(device, expert, &w).expect("weights");
                    alone.push(Matrix::new(device, &w).expect("weights"));
                }
                (stack, alone)
            };
            let (gate, gate_alone) = stack(&mut rng, n, k);
            let (up, up_alone) = stack(&mut rng, n, k);
            let (down, down_alone) = stack(&mut rng, k, n);
            // The last token is padding.
            let mut ids: Vec<u16> =
                (0..tokens * top_k).map(|_| rng.random_range(0..experts as u16)).collect();
            if tokens > 1 {
                ids[(tokens - 1) * top_k..].fill(u16::MAX);
            }
            let ids_there = device.upload(&ids).expect("ids");
            let mut groups = Groups::new(device, ids.len(), experts).expect("groups");
            let kernel = device.experts_kernel([&gate, &up, &down]);
            if kernel != device.linear_kernel(&gate_alone[0]) {
                // `experts_of_widths_that_need_two_kernels_take_the_plain_one` has these.
                continue;
            }
            device.group_rows(ids_there.view(), kernel, &mut groups).expect("grouped");

            let x_there = device.upload(&floats(&mut rng, tokens * k)).expect("x");
            let mut x = Activations::new(device, format, tokens, k).expect("x");
            device.prepare(x_there.view(), &mut x).expect("x");
            let sorted: Vec<f32> = output(device, ids.len() * 2 * n, |y| {
                device.experts_in(&gate, Some(&up), x.inputs(tokens), &groups, top_k, &mut y.view_mut())
            });
            // Each expert's rows lie together, in any order: compared as sets of rows.
            let mut expected = Vec::new();
            for (assignment, &expert) in ids.iter().enumerate().filter(|(_, id)| **id != u16::MAX) {
                let token = (assignment / top_k) as u32;
                let index = device.upload(&[token]).expect("index");
                let mut row: Vec<u32> = vec![u32::from(expert)];
                for w in [&gate_alone, &up_alone] {
                    let y: Vec<f32> = output(device, n, |y| {
                        device.linear_rows(
                            &w[usize::from(expert)],
                            x.inputs(tokens),
                            index.view(),
                            &mut y.view_mut(),
                        )
                    });
                    row.extend(bits(&y));
                }
                expected.push(row);
            }
            let mut got: Vec<Vec<u32>> = sorted.chunks_exact(2 * n).take(expected.len()).map(bits).collect();
            let mut in_order: Vec<Vec<u32>> = expected.iter().map(|row| row[1..].to_vec()).collect();
            got.sort();
            in_order.sort();
            assert!(got == in_order, "{what}: rows by their experts");

            // Back: what is put in is the sorted rows' first half, so that each can be recognised.
            let halves: Vec<f32> = sorted.chunks_exact(2 * n).flat_map(|row| row[..n].to_vec()).collect();
            let halves: Vec<f32> = halves.iter().map(|x| if x.is_nan() { 0.0 } else { x / 1e3 }).collect();
            let halves_there = device.upload(&halves).expect("rows");
            let mut inside = Activations::new(device, format, ids.len(), n).expect("rows");
            device.prepare(halves_there.view(), &mut inside).expect("rows");
            let back: Vec<f32> = output(device, ids.len() * k, |y| {
                device.experts_out(&down, inside.inputs(ids.len()), &groups, Outputs::F32(&mut y.view_mut()))
            });
            let short: Vec<u16> = output(device, ids.len() * k, |y| {
                device.experts_out(&down, inside.inputs(ids.len()), &groups, Outputs::Bf16(&mut y.view_mut()))
            });
            let mut seen = 0;
            for (assignment, &expert) in ids.iter().enumerate() {
                let row = &back[assignment * k..][..k];
                if expert == u16::MAX {
                    assert!(row.iter().all(|x| x.is_nan()), "{what}: padding was written");
                    continue;
                }
                // The sorted row that came from this assignment's token and expert.
                let token_row = &expected[seen][1..=n];
                seen += 1;
                let at =
                    sorted.chunks_exact(2 * n).position(|row| bits(&row[..n]) == token_row).expect("sorted");
                let index = device.upload(&[at as u32]).expect("index");
                let alone: Vec<f32> = output(device, k, |y| {
                    let w = &down_alone[usize::from(expert)];
                    device.linear_rows(w, inside.inputs(ids.len()), index.view(), &mut y.view_mut())
                });
                assert!(bits(&alone) == bits(row), "{what}: assignment {assignment}");
                let rounded: Vec<u16> = row.iter().map(|&x| fp8::to_bf16(x)).collect();
                assert!(rounded == short[assignment * k..][..k], "{what}: rounded");
            }
            println!("{what}: {kernel:?}");
            assert!(kernel == LinearKernel::Plain || weights != WeightFormat::F32);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn results_are_added_in_order() {
    let device = device();
    let mut rng = fresh();
    let cpu = Cpu::new(1);
    for (tokens, top_k, dim) in [(1, 1, 4), (3, 8, 160), (5, 6, 1028)] {
        let x = floats(&mut rng, tokens * top_k * dim);
        let weights = floats(&mut rng, tokens * top_k);
        let (hidden, shared) = (floats(&mut rng, tokens * dim), floats(&mut rng, tokens * dim));
        let mut ids = vec![3u16; tokens * top_k];
        if tokens > 1 {
            ids[top_k..2 * top_k].fill(u16::MAX);
        }
        let bf16: Vec<u16> = x.iter().map(|&x| fp8::to_bf16(x)).collect();
        let rounded: Vec<f32> = bf16.iter().map(|&x| fp8::from_bf16(x)).collect();
        let (x_there, bf16) = (device.upload(&x).expect("x"), device.upload(&bf16).expect("x"));
        let (ids_there, weights_there) =
            (device.upload(&ids).expect("ids"), device.upload(&weights).expect("w"));
        let shared_there = device.upload(&shared).expect("shared");
        for (results, x) in [(Results::F32(x_there.view()), &x), (Results::Bf16(bf16.view()), &rounded)] {
            for with_shared in [false, true] {
                let mut expected = hidden.clone();
                for token in (0..tokens).filter(|token| ids[token * top_k] != u16::MAX) {
                    let mut sum = vec![0.0; dim];
                    for j in token * top_k..(token + 1) * top_k {
                        cpu.add_scaled(&mut sum, weights[j], &x[j * dim..][..dim]);
                    }
                    for (i, sum) in (token * dim..).zip(sum) {
                        expected[i] += (if with_shared { shared[i] } else { 0.0 }) + sum;
                    }
                }
                let mut there = device.upload(&hidden).expect("hidden");
                let shared = with_shared.then(|| shared_there.view());
                let (ids, weights) = (ids_there.view(), weights_there.view());
                device
                    .combine(&mut there.view_mut(), shared, results, ids, weights, top_k)
                    .expect("combined");
                assert_eq!(bits(&super::support::read(device, there.view())), bits(&expected));
            }
        }
    }
}
