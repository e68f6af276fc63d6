use crate::samples::{Samples, bits};
use crate::{
    ActivationFormat, Activations, Arena, Cpu, HeadMatrices, InputRows, Isa, LinearJob, Matrix, ScaleFormat,
    WeightFormat, reference,
};

const PAIRS: [(WeightFormat, ActivationFormat); 6] = [
    (WeightFormat::F32, ActivationFormat::F32),
    (WeightFormat::Bf16, ActivationFormat::F32),
    (WeightFormat::Fp8, ActivationFormat::F32),
    (WeightFormat::Bf16, ActivationFormat::Bf16),
    (WeightFormat::Fp8, ActivationFormat::Fp8(ScaleFormat::F32)),
    (WeightFormat::Fp8, ActivationFormat::Fp8(ScaleFormat::Ue8m0)),
];

/// Relative to Σ|x·w|, what 128-blocks of f32 sums over the K of these tests may be off by.
const TOLERANCE: f64 = 1e-6;

fn activations(cpu: &Cpu, x: &[f32], m: usize, k: usize, format: ActivationFormat) -> Activations {
    let mut activations = Activations::new();
    activations.prepare(cpu, x, m, k, format);
    activations
}

fn product(cpu: &Cpu, w: &Matrix, x: &Activations) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.rows() * w.rows()];
    cpu.linear(w, x, &mut y);
    y
}

#[test]
fn agrees_with_the_reference() {
    // Partial blocks, tiles, panels and task parts, on either side of each boundary.
    let shapes = [
        (1, 1, 1),
        (1, 5, 128),
        (2, 3, 127),
        (3, 4, 129),
        (4, 33, 48),
        (5, 130, 96),
        (1, 160, 160),
        (2, 31, 320),
        (7, 96, 257),
        (97, 35, 192),
        (3, 6, 1025),
        (4, 65, 1100),
        (100, 7, 1024),
        (0, 4, 128),
        (3, 0, 128),
        (3, 5, 0),
    ];
    let mut samples = Samples::new(1);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for (m, n, k) in shapes {
            for (weight_format, format) in PAIRS {
                let w = samples.matrix(weight_format, n, k);
                let x = activations(&cpu, &samples.floats(m * k), m, k, format);
                let y = product(&cpu, &w, &x);
                let mut expected = vec![f32::NAN; m * n];
                reference::linear(&w, &x, &mut expected);
                let weights = w.to_f32();
                for (i, (y, expected)) in y.iter().zip(&expected).enumerate() {
                    let (row, column) = (i / n, i % n);
                    let magnitude: f64 =
                        (0..k).map(|c| f64::from((x.value(row, c) * weights[column * k + c]).abs())).sum();
                    assert!(
                        f64::from((y - expected).abs()) <= TOLERANCE * magnitude,
                        "{isa:?} {weight_format:?}x{format:?} [{m},{n},{k}] ({row},{column}): {y} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_company() {
    let mut samples = Samples::new(2);
    let (n, k, rows) = (70, 1500, 205);
    for isa in Isa::available() {
        let (one, two) = (Cpu::with_isa(1, isa), Cpu::with_isa(2, isa));
        for (weight_format, format) in PAIRS {
            let w = samples.matrix(weight_format, n, k);
            let x = samples.floats(rows * k);
            let alone: Vec<u32> = x
                .chunks(k)
                .flat_map(|x| bits(&product(&one, &w, &activations(&one, x, 1, k, format))))
                .collect();
            for m in (1..=67).chain([96, 97, 192, rows]) {
                let y = product(&two, &w, &activations(&two, &x[..m * k], m, k, format));
                assert!(bits(&y) == alone[..m * n], "{isa:?} {weight_format:?}x{format:?} m={m}");
            }
            let all = activations(&one, &x, rows, k, format);
            let index: Vec<u32> = (0..50).map(|_| samples.below(rows as u32)).collect();
            let mut gathered = vec![f32::NAN; index.len() * n];
            two.linear_rows(&w, &all, &index, &mut gathered);
            for (y, &row) in gathered.chunks(n).zip(&index) {
                assert!(bits(y) == alone[row as usize * n..][..n], "{isa:?} {format:?} gathered row {row}");
            }
        }
    }
}

#[test]
fn an_output_does_not_depend_on_its_neighbours() {
    // The same weight row at every place of a tile and at the ragged end.
    let mut samples = Samples::new(3);
    let k = 300;
    let row = samples.floats(k);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        for m in [1, 4] {
            let x = activations(&cpu, &samples.floats(m * k), m, k, ActivationFormat::F32);
            let mut expected = None;
            for n in 1..=9 {
                let w = Matrix::f32(n, k, row.repeat(n)).expect("lengths fit");
                for y in product(&cpu, &w, &x).chunks(n) {
                    assert!(y.iter().all(|v| v.to_bits() == y[0].to_bits()), "{isa:?} n={n}");
                }
                let first = bits(&product(&cpu, &w, &x).iter().step_by(n).copied().collect::<Vec<_>>());
                assert_eq!(*expected.get_or_insert_with(|| first.clone()), first, "{isa:?} n={n}");
            }
        }
    }
}

#[test]
fn heads() {
    let mut samples = Samples::new(4);
    for isa in Isa::available() {
        let (one, two) = (Cpu::with_isa(1, isa), Cpu::with_isa(2, isa));
        for (m, heads, n, k) in
            [(0, 2, 3, 4), (1, 4, 64, 32), (3, 6, 128, 64), (5, 3, 48, 130), (99, 2, 35, 128)]
        {
            let weights = samples.floats(heads * n * k);
            for w in [
                HeadMatrices::new(heads, n, k, weights.clone()),
                HeadMatrices::rounded_to_bf16(heads, n, k, &weights),
            ] {
                let w = w.expect("lengths fit");
                let x = samples.floats(m * heads * k);
                let (mut y, mut expected) = (vec![f32::NAN; m * heads * n], vec![f32::NAN; m * heads * n]);
                two.head_matmul(&w, &x, m, &mut y);
                reference::head_matmul(&w, &x, m, &mut expected);
                for (y, expected) in y.iter().zip(&expected) {
                    // Sums of up to 130 products of up to 10⁴ each.
                    assert!(
                        (y - expected).abs() <= 1e-2,
                        "{isa:?} [{m},{heads},{n},{k}]: {y} for {expected}"
                    );
                }
                for (x, y) in x.chunks(heads * k).zip(y.chunks(heads * n)) {
                    let mut alone = vec![f32::NAN; heads * n];
                    one.head_matmul(&w, x, 1, &mut alone);
                    assert_eq!(bits(&alone), bits(y), "{isa:?} [{m},{heads},{n},{k}]");
                }
            }
        }
    }
}

#[test]
fn arranged_weights_give_the_same_bits() {
    let mut samples = Samples::new(5);
    let mut arena = Arena::new();
    let cpu = Cpu::new(2);
    for (m, n, k) in [
        (1, 1, 1),
        (2, 64, 128),
        (3, 65, 131),
        (5, 130, 257),
        (9, 200, 1100),
        (200, 70, 300),
        (0, 4, 8),
        (3, 0, 8),
        (3, 5, 0),
    ] {
        for (weight_format, format) in PAIRS {
            let w = samples.matrix(weight_format, n, k);
            let arranged = w.clone().arranged(&mut arena).expect("memory");
            assert_eq!(bits(&w.to_f32()), bits(&arranged.to_f32()), "{weight_format:?} [{n},{k}]");
            assert_eq!(w.format(), arranged.format());
            let x = activations(&cpu, &samples.floats(m * k), m, k, format);
            assert_eq!(
                bits(&product(&cpu, &w, &x)),
                bits(&product(&cpu, &arranged, &x)),
                "{weight_format:?}x{format:?} [{m},{n},{k}]"
            );
        }
    }
    for (m, heads, n, k) in [(1, 4, 64, 32), (3, 6, 128, 64), (7, 3, 48usize, 130usize), (5, 2, 35, 256)] {
        let scales = (0..heads * n.div_ceil(128) * k.div_ceil(128)).map(|i| 1e-3 * (i + 1) as f32).collect();
        let fp8 =
            HeadMatrices::fp8([heads, n, k], samples.codes(heads * n * k), scales).expect("lengths fit");
        let weights = samples.floats(heads * n * k);
        let bf16 = HeadMatrices::rounded_to_bf16(heads, n, k, &weights).expect("lengths fit");
        let x = samples.floats(m * heads * k);
        for w in [fp8, bf16] {
            let arranged = w.clone().arranged(&mut arena).expect("memory");
            assert_eq!(bits(&w.to_f32()), bits(&arranged.to_f32()));
            let mut y = [vec![f32::NAN; m * heads * n], vec![f32::NAN; m * heads * n]];
            cpu.head_matmul(&w, &x, m, &mut y[0]);
            cpu.head_matmul(&arranged, &x, m, &mut y[1]);
            assert_eq!(bits(&y[0]), bits(&y[1]), "[{m},{heads},{n},{k}]");
        }
    }
}

/// Several products in one loop, more of them than a loop takes.
#[test]
fn products_do_not_see_each_other() {
    let mut samples = Samples::new(6);
    let cpu = Cpu::new(2);
    let k = 256;
    let x = activations(&cpu, &samples.floats(9 * k), 9, k, ActivationFormat::Fp8(ScaleFormat::F32));
    let weights: Vec<Matrix> = (0..70).map(|i| samples.matrix(WeightFormat::Fp8, 30 + 7 * i, k)).collect();
    let index = [8, 0, 3];
    let rows = |i: usize| match i % 3 {
        0 => (InputRows::All, 9),
        1 => (InputRows::Range { first: i % 5, count: 4 }, 4),
        _ => (InputRows::Index(&index), 3),
    };
    let mut out: Vec<Vec<f32>> =
        weights.iter().enumerate().map(|(i, w)| vec![f32::NAN; rows(i).1 * w.rows()]).collect();
    let jobs = weights.iter().zip(&mut out).enumerate();
    cpu.linear_all(jobs.map(|(i, (weights, out))| LinearJob { weights, input: &x, rows: rows(i).0, out }));
    for (i, (w, out)) in weights.iter().zip(&out).enumerate() {
        let all = product(&cpu, w, &x);
        let expected: Vec<f32> = match rows(i).0 {
            InputRows::All => all,
            InputRows::Range { first, count } => all[first * w.rows()..(first + count) * w.rows()].to_vec(),
            InputRows::Index(rows) => {
                rows.iter().flat_map(|&row| all[row as usize * w.rows()..][..w.rows()].to_vec()).collect()
            }
        };
        assert_eq!(bits(out), bits(&expected), "product {i}");
    }
}

#[test]
fn nan_weights_stay_nan() {
    let (n, k) = (3, 40);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let mut codes = vec![0x38; n * k];
        codes[k + 7] = 0xFF;
        let w = Matrix::fp8(n, k, codes.into(), vec![1.0]).expect("lengths fit");
        for m in [1, 5] {
            let x = activations(&cpu, &vec![1.0; m * k], m, k, ActivationFormat::Fp8(ScaleFormat::F32));
            for y in product(&cpu, &w, &x).chunks(n) {
                assert!(!y[0].is_nan() && y[1].is_nan() && !y[2].is_nan(), "{isa:?} {y:?}");
            }
        }
    }
}
