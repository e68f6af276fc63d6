//! Operators that do several things in one pass, against those that do one.

use compute::cuda::{
    Activations, CacheRows, HeadMatrices, InputFormat, Inputs, LatentRows, LinearKernel, Matrix, NormRows,
    Outputs, QueryParts, QueryShape, RopeTable,
};
use compute::{KvFormat, KvGeometry, RopeRows, ScaleFormat, fp8, reference};
use rand::RngExt;

use super::support::{assert_close, bits, compared, device, floats, fresh, output, poisoned, read};

const FORMATS: [InputFormat; 4] = [
    InputFormat::F32,
    InputFormat::Bf16,
    InputFormat::Fp8(ScaleFormat::F32),
    InputFormat::Fp8(ScaleFormat::Ue8m0),
];

/// All that an [`Activations`] holds, as bytes.
fn bytes(device: &compute::cuda::Device, x: &Activations, rows: usize) -> Vec<u8> {
    match x.inputs(rows) {
        Inputs::F32(x) => read(device, x).iter().flat_map(|x| x.to_le_bytes()).collect(),
        Inputs::Bf16(x) => read(device, x).iter().flat_map(|x| x.to_le_bytes()).collect(),
        Inputs::Fp8 { codes, scales } => {
            let scales = read(device, scales);
            read(device, codes).into_iter().chain(scales.iter().flat_map(|x| x.to_le_bytes())).collect()
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn norm_adds_norms_and_rounds() {
    let device = device();
    let mut rng = fresh();
    for (rows, dim, stride) in [
        (1, 1, 1),
        (3, 48, 50),
        (2, 160, 160),
        (5, 131, 200),
        (33, 1536, 2112),
        (4, 7168, 7168),
        (2, 9000, 9000),
    ] {
        let (x, add) = (floats(&mut rng, rows * stride), floats(&mut rng, rows * stride));
        let w_host = floats(&mut rng, dim);
        let (add_there, w) = (device.upload(&add).expect("add"), device.upload(&w_host).expect("w"));
        for with_add in [false, true] {
            let sums: Vec<f32> =
                x.iter().zip(&add).map(|(x, add)| if with_add { x + add } else { *x }).collect();
            let normed: Vec<f32> = sums.chunks_exact(stride).flat_map(|row| row[..dim].to_vec()).collect();
            let mut expected = vec![f32::NAN; rows * dim];
            reference::rms_norm(&normed, &w_host, 1e-6, &mut expected);
            for format in FORMATS {
                let what = format!("[{rows}, {dim} of {stride}] {format:?}");
                let mut there = device.upload(&x).expect("x");
                let mut out = Activations::new(device, format, rows, dim).expect("out");
                let mut plain = poisoned::<f32>(device, rows * dim);
                let add = with_add.then(|| add_there.view());
                let same = format == InputFormat::F32;
                let rows_in = NormRows { x: &mut there.view_mut(), stride, add, index: None };
                let plain_out = &mut plain.view_mut();
                let plain_out = (!same).then_some(plain_out);
                device.norm(rows_in, w.view(), 1e-6, plain_out, &mut [&mut out]).expect("norm");
                let first: Vec<f32> = read(device, there.view())
                    .chunks_exact(stride)
                    .flat_map(|row| row[..dim].to_vec())
                    .collect();
                assert_eq!(bits(&first), bits(&normed), "{what}: the sum is kept");
                let plain = if same {
                    let Inputs::F32(out) = out.inputs(rows) else { unreachable!() };
                    read(device, out)
                } else {
                    read(device, plain.view())
                };
                assert_close(&what, &plain, &expected, 1e-6);
                let mut apart = Activations::new(device, format, rows, dim).expect("out");
                device.prepare(device.upload(&plain).expect("plain").view(), &mut apart).expect("rounded");
                assert!(
                    bytes(device, &out, rows) == bytes(device, &apart, rows),
                    "{what}: rounded otherwise"
                );
            }
        }
        // Rows by name.
        let index: Vec<u32> = (0..4).map(|i| (i * 5 % rows) as u32).collect();
        let index_there = device.upload(&index).expect("index");
        let mut there = device.upload(&x).expect("x");
        let all: Vec<f32> = output(device, rows * dim, |y| {
            let rows_in = NormRows { x: &mut there.view_mut(), stride, add: None, index: None };
            device.norm(rows_in, w.view(), 1e-6, Some(&mut y.view_mut()), &mut [])
        });
        let some: Vec<f32> = output(device, 4 * dim, |y| {
            let rows_in =
                NormRows { x: &mut there.view_mut(), stride, add: None, index: Some(index_there.view()) };
            device.norm(rows_in, w.view(), 1e-6, Some(&mut y.view_mut()), &mut [])
        });
        for (row, from) in some.chunks_exact(dim).zip(index) {
            assert_eq!(bits(row), bits(&all[from as usize * dim..][..dim]));
        }
    }
}

/// Three bf16 parts on the matrix unit are as good as f32.
#[test]
#[ignore = "needs a CUDA device"]
fn products_of_parts_are_products_of_f32() {
    let device = device();
    let mut rng = fresh();
    for (m, n, k) in [(1, 64, 64), (5, 256, 7168), (70, 128, 1088), (150, 64, 1088)] {
        let w = super::products::matrix(&mut rng, compute::WeightFormat::Bf16, n, k);
        let there = Matrix::new(device, &w).expect("w");
        if !device.takes_parts(&there) {
            continue;
        }
        let (x, ones) = (floats(&mut rng, m * k), vec![1.0; k]);
        let (mut x_there, ones_there) = (device.upload(&x).expect("x"), device.upload(&ones).expect("ones"));
        let mut parts = Activations::new(device, InputFormat::Parts, m, k).expect("parts");
        let mut plain = poisoned::<f32>(device, m * k);
        let rows = NormRows { x: &mut x_there.view_mut(), stride: k, add: None, index: None };
        device
            .norm(rows, ones_there.view(), 1e-6, Some(&mut plain.view_mut()), &mut [&mut parts])
            .expect("norm");
        let slices = device.parts_slices(k);
        let run = |first: usize, end: usize| -> Vec<f32> {
            let Inputs::Bf16(x) = parts.inputs(m) else { unreachable!() };
            let y: Vec<f32> = output(device, slices * (end - first) * n, |y| {
                device.linear_parts(&there, x.slice(3 * first * k..3 * end * k), &mut y.view_mut())
            });
            let len = (end - first) * n;
            (0..len).map(|i| (1..slices).fold(y[i], |sum, slice| sum + y[slice * len + i])).collect()
        };
        let y = run(0, m);
        let mut activations = compute::Activations::new();
        let normed = read(device, plain.view());
        activations.prepare(&compute::Cpu::new(1), &normed, m, k, compute::ActivationFormat::F32);
        let mut expected = vec![f32::NAN; m * n];
        reference::linear(&w, &activations, &mut expected);
        assert_close(&format!("[{m}, {n}, {k}]"), &y, &expected, 3e-6);
        for row in compared(m) {
            assert_eq!(bits(&run(row, row + 1)), bits(&y[row * n..][..n]), "row {row}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn swiglu_multiplies_and_rounds() {
    let device = device();
    let mut rng = fresh();
    for (rows, dim) in [(1, 1), (3, 48), (7, 130), (40, 2048)] {
        let x = device.upload(&floats(&mut rng, rows * 2 * dim)).expect("x");
        let values = read(device, x.view());
        let half = |second: usize| -> Vec<f32> {
            values.chunks_exact(2 * dim).flat_map(|row| row[second * dim..][..dim].to_vec()).collect()
        };
        let mut expected = vec![f32::NAN; rows * dim];
        reference::silu_mul(&half(0), &half(1), &mut expected);
        let mut plain = Activations::new(device, InputFormat::F32, rows, dim).expect("out");
        device.swiglu(x.view(), None, &mut plain).expect("swiglu");
        let Inputs::F32(plain) = plain.inputs(rows) else { unreachable!() };
        assert_close(&format!("[{rows}, {dim}]"), &read(device, plain), &expected, 1e-6);
        for format in FORMATS {
            let mut out = Activations::new(device, format, rows, dim).expect("out");
            device.swiglu(x.view(), None, &mut out).expect("swiglu");
            let mut apart = Activations::new(device, format, rows, dim).expect("out");
            device.prepare(plain, &mut apart).expect("rounded");
            assert!(bytes(device, &out, rows) == bytes(device, &apart, rows), "[{rows}, {dim}] {format:?}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn queries_are_split_and_rotated() {
    let device = device();
    let mut rng = fresh();
    for (rows, heads, nope, rope) in [(1, 1, 2, 2), (3, 4, 32, 16), (9, 16, 128, 64)] {
        let frequencies: Vec<f64> =
            (0..rope / 2).map(|i| 10000f64.powf(-2.0 * i as f64 / rope as f64)).collect();
        let table =
            RopeTable::new(device, &compute::RopeTable::new(&frequencies, 1.0, 512), 512).expect("table");
        let positions: Vec<u32> = (0..rows).map(|_| rng.random_range(0..512)).collect();
        let positions = device.upload(&positions).expect("positions");
        let q = floats(&mut rng, rows * heads * (nope + rope));
        let q_there = device.upload(&q).expect("q");
        let shape = QueryShape { heads, nope, rope };
        let mut rotated = poisoned::<f32>(device, rows * heads * rope);
        let kept: Vec<f32> = output(device, rows * heads * nope, |out| {
            let parts = QueryParts::F32(&mut out.view_mut(), &mut rotated.view_mut());
            device.split_queries(q_there.view(), shape, positions.view(), &table, parts)
        });
        let mut in_place = device.upload(&q).expect("q");
        let whole = RopeRows { per_position: heads, stride: nope + rope, offset: nope };
        device.rope_interleaved(&mut in_place.view_mut(), whole, positions.view(), &table).expect("rope");
        let in_place = read(device, in_place.view());
        let part = |from: usize, len: usize| -> Vec<f32> {
            in_place.chunks_exact(nope + rope).flat_map(|row| row[from..from + len].to_vec()).collect()
        };
        let rotated = read(device, rotated.view());
        assert_eq!(bits(&kept), bits(&part(0, nope)));
        assert_eq!(bits(&rotated), bits(&part(nope, rope)));
        let mut short_rope = poisoned::<u16>(device, rows * heads * rope);
        let short: Vec<u16> = output(device, rows * heads * nope, |out| {
            let parts = QueryParts::Bf16(&mut out.view_mut(), &mut short_rope.view_mut());
            device.split_queries(q_there.view(), shape, positions.view(), &table, parts)
        });
        let round = |x: &[f32]| x.iter().map(|&x| fp8::to_bf16(x)).collect::<Vec<_>>();
        assert_eq!(short, round(&kept));
        assert_eq!(read(device, short_rope.view()), round(&rotated));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn latents_are_normed_rotated_and_stored() {
    let device = device();
    let mut rng = fresh();
    for (format, latent, rope, stride) in
        [(KvFormat::F32, 64, 16, 80), (KvFormat::Bf16, 130, 6, 140), (KvFormat::Fp8, 512, 64, 2112)]
    {
        let mut geometry = KvGeometry {
            format,
            latent,
            rope,
            row_bytes: 0,
            layer_stride: 0,
            block_stride: 0,
            block_tokens: 8,
        };
        geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
        geometry.layer_stride = 8 * geometry.row_bytes;
        geometry.block_stride = 2 * geometry.layer_stride;
        let rows = 5;
        let frequencies: Vec<f64> =
            (0..rope / 2).map(|i| 10000f64.powf(-2.0 * i as f64 / rope as f64)).collect();
        let table =
            RopeTable::new(device, &compute::RopeTable::new(&frequencies, 1.0, 512), 512).expect("table");
        let positions = device.upload(&[0, 3, 511, 7, 7]).expect("positions");
        let slots = device.upload(&[0, 3, 1, 0, u32::MAX, 0, 1, 7, 0, 0]).expect("slots");
        let x = floats(&mut rng, rows * stride);
        let (x_there, w) =
            (device.upload(&x).expect("x"), device.upload(&floats(&mut rng, latent)).expect("w"));
        let pool_bytes = 2 * geometry.block_stride;
        let latents = LatentRows {
            x: x_there.view(),
            stride,
            first: 0,
            norm: (w.view(), 1e-6),
            positions: positions.view(),
            table: &table,
        };
        let together: Vec<u8> = output(device, pool_bytes, |pool| {
            let rows =
                CacheRows { pool: &mut pool.view_mut(), geometry: &geometry, layer: 1, slots: slots.view() };
            device.latent_write(rows, latents)
        });
        // A norm of the rows' first values beside it changes neither.
        let fp8 = InputFormat::Fp8(ScaleFormat::F32);
        let mut beside = Activations::new(device, fp8, rows, latent).expect("room");
        let with_norm: Vec<u8> = output(device, pool_bytes, |pool| {
            let rows =
                CacheRows { pool: &mut pool.view_mut(), geometry: &geometry, layer: 1, slots: slots.view() };
            device.latent_write_and_norm(rows, latents, (w.view(), 1e-6), &mut beside)
        });
        assert_eq!(together, with_norm, "{format:?}");
        let mut alone = Activations::new(device, fp8, rows, latent).expect("room");
        let mut x_mut = device.upload(&x).expect("x");
        let normed = NormRows { x: &mut x_mut.view_mut(), stride, add: None, index: None };
        device.norm(normed, w.view(), 1e-6, None, &mut [&mut alone]).expect("norm");
        assert_eq!(bytes(device, &beside, rows), bytes(device, &alone, rows), "{format:?}");
        let column = |from: usize, len: usize| -> Vec<f32> {
            x.chunks_exact(stride).flat_map(|row| row[from..from + len].to_vec()).collect()
        };
        let latents = device.upload(&column(0, latent)).expect("latents");
        let mut keys = device.upload(&column(latent, rope)).expect("keys");
        let normed: Vec<f32> = output(device, rows * latent, |y| {
            device.rms_norm(latents.view(), w.view(), 1e-6, &mut y.view_mut())
        });
        let whole = RopeRows { per_position: 1, stride: rope, offset: 0 };
        device.rope_interleaved(&mut keys.view_mut(), whole, positions.view(), &table).expect("rope");
        let normed = device.upload(&normed).expect("normed");
        let apart: Vec<u8> = output(device, pool_bytes, |pool| {
            let rows =
                CacheRows { pool: &mut pool.view_mut(), geometry: &geometry, layer: 1, slots: slots.view() };
            device.kv_write(rows, normed.view(), keys.view())
        });
        // The two norms add in another order, which may move a last bit or a code.
        let differ = together.iter().zip(&apart).filter(|(a, b)| a.abs_diff(**b) > 1).count();
        assert!(differ * 100 < pool_bytes, "{format:?}: {differ} of {pool_bytes} bytes differ");
        let untouched = |pool: &[u8]| pool[..geometry.layer_stride].iter().all(|&byte| byte == 0xFF);
        assert!(untouched(&together), "{format:?}: another layer was written");
    }
}

/// Values rounded by the product that makes them have the bits of values rounded afterwards.
#[test]
#[ignore = "needs a CUDA device"]
fn head_matmul_rounds() {
    let device = device();
    let mut rng = fresh();
    for (m, heads, out, ins) in
        [(0, 2, 128, 512), (1, 16, 128, 512), (16, 3, 128, 64), (17, 2, 128, 512), (3, 2, 64, 128)]
    {
        let w = compute::HeadMatrices::new(heads, out, ins, floats(&mut rng, heads * out * ins)).expect("w");
        let w = HeadMatrices::new_bf16(device, &w).expect("w");
        if device.head_kernel(&w) == LinearKernel::Plain {
            continue;
        }
        let x: Vec<u16> = floats(&mut rng, m * heads * ins).iter().map(|&x| fp8::to_bf16(x)).collect();
        let x = device.upload(&x).expect("x");
        for format in
            [InputFormat::Fp8(ScaleFormat::F32), InputFormat::Fp8(ScaleFormat::Ue8m0), InputFormat::Bf16]
        {
            let room = || Activations::new(device, format, m, heads * out).expect("room");
            let (mut together, mut apart) = (room(), room());
            let mut values = poisoned(device, m * heads * out);
            device
                .head_matmul_rounded(&w, x.view(), m, &mut values.view_mut(), &mut together)
                .expect("together");
            let mut values = poisoned(device, m * heads * out);
            device
                .head_matmul(&w, Inputs::Bf16(x.view()), m, Outputs::F32(&mut values.view_mut()))
                .expect("product");
            device.prepare(values.view(), &mut apart).expect("rounded");
            let what = format!("[{m}, {heads}, {out}, {ins}] {format:?}");
            assert_eq!(bytes(device, &together, m), bytes(device, &apart, m), "{what}");
        }
    }
}

/// Queries split by the product that takes them into the latent space have the bits of queries split before.
#[test]
#[ignore = "needs a CUDA device"]
fn queries_are_split_and_absorbed() {
    let device = device();
    let mut rng = fresh();
    let rope = 64;
    let frequencies: Vec<f64> =
        (0..rope / 2).map(|i| 10000f64.powf(-2.0 * f64::from(i) / f64::from(rope))).collect();
    let table = RopeTable::new(device, &compute::RopeTable::new(&frequencies, 1.0, 512), 512).expect("table");
    for (m, heads, nope, latent) in
        [(0, 2, 128, 512), (1, 16, 128, 512), (16, 3, 64, 64), (7, 5, 128, 128), (17, 2, 128, 512)]
    {
        let shape = QueryShape { heads, nope, rope: rope as usize };
        let w = compute::HeadMatrices::new(heads, latent, nope, floats(&mut rng, heads * latent * nope))
            .expect("w");
        let w = HeadMatrices::new_bf16(device, &w).expect("w");
        if device.head_kernel(&w) == LinearKernel::Plain {
            continue;
        }
        let positions: Vec<u32> = (0..m).map(|_| rng.random_range(0..512)).collect();
        let positions = device.upload(&positions).expect("positions");
        let q = device.upload(&floats(&mut rng, m * heads * (nope + shape.rope))).expect("q");
        let room = |width: usize| poisoned::<u16>(device, m * heads * width);
        let (mut kept, mut rotated, mut together) = (room(nope), room(shape.rope), room(latent));
        let parts = (&mut kept.view_mut(), &mut rotated.view_mut());
        device
            .absorb_queries(&w, q.view(), shape, (positions.view(), &table), parts, &mut together.view_mut())
            .expect("together");
        let (mut kept, mut expected, mut apart) = (room(nope), room(shape.rope), room(latent));
        let parts = QueryParts::Bf16(&mut kept.view_mut(), &mut expected.view_mut());
        device.split_queries(q.view(), shape, positions.view(), &table, parts).expect("split");
        let (x, y) = (Inputs::Bf16(kept.view()), &mut apart.view_mut());
        device.head_matmul(&w, x, m, Outputs::Bf16(y)).expect("product");
        let what = format!("[{m}, {heads}, {nope}] to {latent}");
        assert_eq!(read(device, rotated.view()), read(device, expected.view()), "{what}");
        assert_eq!(read(device, together.view()), read(device, apart.view()), "{what}");
    }
}
