//! Matrix products and lookups.

use compute::cuda::{Buffer, CudaError, Device, HeadMatrices, Inputs, LinearKernel, Matrix, Outputs};
use compute::{ActivationFormat, Activations, Cpu, ScaleFormat, WeightFormat, fp8, reference};
use rand::RngExt;
use rand::rngs::StdRng;

use super::support::{assert_close, bits, compared, device, floats, fresh, output, small};

pub fn matrix(rng: &mut StdRng, format: WeightFormat, n: usize, k: usize) -> compute::Matrix {
    match format {
        WeightFormat::F32 => compute::Matrix::f32(n, k, floats(rng, n * k)),
        WeightFormat::Bf16 => {
            let bytes: Vec<u8> =
                floats(rng, n * k).iter().flat_map(|&w| fp8::to_bf16(w).to_le_bytes()).collect();
            compute::Matrix::bf16(n, k, bytes.into())
        }
        WeightFormat::Fp8 => {
            let codes: Vec<u8> =
                (0..n * k).map(|_| rng.random_range(0..0x7Fu8) | (rng.random_range(0..2u8) << 7)).collect();
            let scales = n.div_ceil(128) * k.div_ceil(128);
            let scales = (0..scales).map(|_| rng.random_range(1e-4f32..1e-2)).collect();
            compute::Matrix::fp8(n, k, codes.into(), scales)
        }
    }
    .expect("lengths fit")
}

/// Input rows on the device, prepared there.
struct Prepared {
    f32: Buffer<f32>,
    bf16: Buffer<u16>,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    k: usize,
    format: ActivationFormat,
}

impl Prepared {
    fn new(device: &Device, x: &[f32], k: usize, format: ActivationFormat) -> Result<Self, CudaError> {
        let f32 = device.upload(x)?;
        let mut bf16 = device.alloc(x.len())?;
        let mut codes = device.alloc(x.len())?;
        let mut scales = device.alloc(x.len() / k * k.div_ceil(128))?;
        device.round_bf16(f32.view(), &mut bf16.view_mut())?;
        if let ActivationFormat::Fp8(format) = format {
            device.quantise(f32.view(), k, format, &mut codes.view_mut(), &mut scales.view_mut())?;
        }
        Ok(Self { f32, bf16, codes, scales, k, format })
    }

    fn rows(&self, first: usize, end: usize) -> Inputs<'_> {
        let (values, blocks) = (first * self.k..end * self.k, self.k.div_ceil(128));
        match self.format {
            ActivationFormat::F32 => Inputs::F32(self.f32.slice(values)),
            ActivationFormat::Bf16 => Inputs::Bf16(self.bf16.slice(values)),
            ActivationFormat::Fp8(_) => Inputs::Fp8 {
                codes: self.codes.slice(values),
                scales: self.scales.slice(first * blocks..end * blocks),
            },
        }
    }
}

const PAIRS: [(WeightFormat, ActivationFormat); 6] = [
    (WeightFormat::F32, ActivationFormat::F32),
    (WeightFormat::Bf16, ActivationFormat::F32),
    (WeightFormat::Fp8, ActivationFormat::F32),
    (WeightFormat::Bf16, ActivationFormat::Bf16),
    (WeightFormat::Fp8, ActivationFormat::Fp8(ScaleFormat::F32)),
    (WeightFormat::Fp8, ActivationFormat::Fp8(ScaleFormat::Ue8m0)),
];

#[test]
#[ignore = "needs a CUDA device"]
fn linear() {
    let device = device();
    let mut rng = fresh();
    let cpu = Cpu::new(1);
    let shapes = [
        (0, 5, 8),
        (1, 1, 1),
        (1, 0, 16),
        (3, 7, 5),
        (2, 160, 64),
        (9, 130, 131),
        (17, 64, 160),
        (8, 256, 1024),
        (33, 129, 384),
        (17, 64, 128),
        (65, 192, 256),
        (150, 128, 640),
    ];
    for (weights, format) in PAIRS {
        for (m, n, k) in shapes {
            let what = format!("{weights:?} x {format:?} [{m}, {n}, {k}]");
            let (w, x) = (matrix(&mut rng, weights, n, k), floats(&mut rng, m * k));
            let mut activations = Activations::new();
            activations.prepare(&cpu, &x, m, k, format);
            let mut expected = vec![f32::NAN; m * n];
            reference::linear(&w, &activations, &mut expected);
            let there = Matrix::new(device, &w).expect("weights");
            let x = Prepared::new(device, &x, k, format).expect("inputs");
            let y = output(device, m * n, |y| device.linear(&there, x.rows(0, m), &mut y.view_mut()));
            let own_format = format != ActivationFormat::F32;
            let kernel = if own_format { device.linear_kernel(&there) } else { LinearKernel::Plain };
            let tolerance = match (kernel, format) {
                (LinearKernel::Wgmma, ActivationFormat::Fp8(_)) => WGMMA_TOLERANCE,
                (LinearKernel::Wgmma, _) => BF16_TOLERANCE,
                (LinearKernel::Plain, _) => 2e-6,
            };
            assert_close(&what, &y, &expected, tolerance);
            for row in compared(m) {
                let alone =
                    output(device, n, |y| device.linear(&there, x.rows(row, row + 1), &mut y.view_mut()));
                assert_eq!(bits(&alone), bits(&y[row * n..][..n]), "{what}: row {row}");
            }
            let index: Vec<u32> = if m == 0 { vec![] } else { (0..11).map(|i| i * 7 % m as u32).collect() };
            let index_there = device.upload(&index).expect("index");
            let gathered = output(device, index.len() * n, |y| {
                device.linear_rows(&there, x.rows(0, m), index_there.view(), &mut y.view_mut())
            });
            for (i, &row) in index.iter().enumerate() {
                let (got, whole) = (&gathered[i * n..][..n], &y[row as usize * n..][..n]);
                assert_eq!(bits(got), bits(whole), "{what}: gathered {i}");
            }
        }
    }
}

/// What the matrix unit's adder may lose within a 128-block (2.5e-4 seen).
const WGMMA_TOLERANCE: f64 = 1e-3;

/// And when it adds products of bf16.
const BF16_TOLERANCE: f64 = 1e-5;

/// The two kernels' outputs, checked apart: right within the tolerance, and every output of every tile the same bits.
#[test]
#[ignore = "needs a CUDA device"]
fn tiles_of_the_matrix_unit_agree_in_every_bit() {
    let device = device();
    let mut rng = fresh();
    // Enough tiles for the kernels of many rows, whose last tile is not whole: of 192 rows, and of 128 for 1,600.
    let (n, k, most) = (320 + 2048, if small() { 256 } else { 1536 }, 2048);
    let w = matrix(&mut rng, WeightFormat::Fp8, n, k);
    let there = Matrix::new(device, &w).expect("weights");
    println!("kernel {:?}", device.linear_kernel(&there));
    let format = ActivationFormat::Fp8(ScaleFormat::F32);
    let values = floats(&mut rng, most * k);
    let x = Prepared::new(device, &values, k, format).expect("inputs");
    let whole = output(device, most * n, |y| device.linear(&there, x.rows(0, most), &mut y.view_mut()));
    let mut activations = Activations::new();
    activations.prepare(&Cpu::new(1), &values[..4 * k], 4, k, format);
    let mut expected = vec![f32::NAN; 4 * n];
    reference::linear(&w, &activations, &mut expected);
    assert_close("first rows", &whole[..4 * n], &expected, WGMMA_TOLERANCE);
    for m in [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 300, 511, 1600, 1664, 1900, 2047] {
        if small() && ![1, 17, 129, 1600, 1900].contains(&m) {
            continue;
        }
        for first in [0, 1, most - m] {
            let part =
                output(device, m * n, |y| device.linear(&there, x.rows(first, first + m), &mut y.view_mut()));
            assert!(bits(&part) == bits(&whole[first * n..(first + m) * n]), "rows {first} and {m} more");
        }
    }
}

/// V3's widths, every number of rows up to a warp's 8 and one past it: bits of a row never change.
#[test]
#[ignore = "needs a CUDA device"]
fn rows_of_a_wide_product_do_not_know_each_other() {
    let device = device();
    let mut rng = fresh();
    let (n, k, most) = (2112, 7168, if small() { 2 } else { 9 });
    let w = Matrix::new(device, &matrix(&mut rng, WeightFormat::Fp8, n, k)).expect("weights");
    let format = ActivationFormat::Fp8(ScaleFormat::F32);
    let x = Prepared::new(device, &floats(&mut rng, most * k), k, format).expect("inputs");
    let whole = output(device, most * n, |y| device.linear(&w, x.rows(0, most), &mut y.view_mut()));
    for first in 0..most {
        for end in first + 1..=most {
            let part = output(device, (end - first) * n, |y| {
                device.linear(&w, x.rows(first, end), &mut y.view_mut())
            });
            assert!(bits(&part) == bits(&whole[first * n..end * n]), "rows {first}..{end}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn head_matmul() {
    let device = device();
    let mut rng = fresh();
    for (m, heads, out, ins) in [(0, 2, 3, 4), (1, 1, 1, 1), (3, 5, 7, 9), (9, 4, 64, 32), (2, 16, 512, 128)]
    {
        let values = floats(&mut rng, heads * out * ins);
        let exact: Vec<f32> = values.iter().map(|&w| fp8::from_bf16(fp8::to_bf16(w))).collect();
        for values in [values, exact] {
            let w = compute::HeadMatrices::new(heads, out, ins, values).expect("lengths fit");
            let x = floats(&mut rng, m * heads * ins);
            let mut expected = vec![f32::NAN; m * heads * out];
            reference::head_matmul(&w, &x, m, &mut expected);
            let (w, x) = (HeadMatrices::new(device, &w).expect("w"), device.upload(&x).expect("x"));
            let y = output(device, m * heads * out, |y| {
                device.head_matmul(&w, Inputs::F32(x.view()), m, Outputs::F32(&mut y.view_mut()))
            });
            let what = format!("[{m}, {heads}, {out}, {ins}]");
            assert_close(&what, &y, &expected, 2e-6);
            for row in compared(m) {
                let alone = output(device, heads * out, |y| {
                    let x = x.slice(row * heads * ins..(row + 1) * heads * ins);
                    device.head_matmul(&w, Inputs::F32(x), 1, Outputs::F32(&mut y.view_mut()))
                });
                assert_eq!(bits(&alone), bits(&y[row * heads * out..][..heads * out]), "{what}: row {row}");
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn embed() {
    let device = device();
    let mut rng = fresh();
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Fp8] {
        for (vocab, width, count) in [(1, 1, 1), (7, 5, 0), (300, 160, 33), (129, 1024, 5)] {
            let w = matrix(&mut rng, format, vocab, width);
            let tokens: Vec<u32> = (0..count).map(|_| rng.random_range(0..vocab as u32)).collect();
            let mut expected = vec![f32::NAN; count * width];
            for (&token, out) in tokens.iter().zip(expected.chunks_exact_mut(width)) {
                w.row_f32(token as usize, out);
            }
            let (w, tokens) = (Matrix::new(device, &w).expect("w"), device.upload(&tokens).expect("tokens"));
            let out =
                output(device, count * width, |out| device.embed(&w, tokens.view(), &mut out.view_mut()));
            assert_eq!(bits(&out), bits(&expected), "{format:?} [{vocab}, {width}]");
        }
    }
}

/// V3's heads on the matrix unit: bf16 in, f32 or bf16 out.
#[test]
#[ignore = "needs a CUDA device"]
fn head_matmul_of_bf16() {
    let device = device();
    let mut rng = fresh();
    for (m, heads, out, ins) in [(1, 3, 512, 128), (70, 2, 128, 512), (9, 4, 64, 64), (150, 2, 512, 128)] {
        let w = compute::HeadMatrices::new(heads, out, ins, floats(&mut rng, heads * out * ins)).expect("w");
        let there = HeadMatrices::new_bf16(device, &w).expect("w");
        if device.head_kernel(&there) == LinearKernel::Plain {
            continue;
        }
        let bits_of_x: Vec<u16> =
            floats(&mut rng, m * heads * ins).iter().map(|&x| fp8::to_bf16(x)).collect();
        let x: Vec<f32> = bits_of_x.iter().map(|&x| fp8::from_bf16(x)).collect();
        let mut expected = vec![f32::NAN; m * heads * out];
        reference::head_matmul(&w, &x, m, &mut expected);
        let x = device.upload(&bits_of_x).expect("x");
        let run = |first: usize, end: usize| {
            output(device, (end - first) * heads * out, |y| {
                let x = Inputs::Bf16(x.slice(first * heads * ins..end * heads * ins));
                device.head_matmul(&there, x, end - first, Outputs::F32(&mut y.view_mut()))
            })
        };
        let y = run(0, m);
        // Weights rounded to bf16.
        assert_close(&format!("[{m}, {heads}, {out}, {ins}]"), &y, &expected, 3e-3);
        for row in compared(m) {
            assert_eq!(bits(&run(row, row + 1)), bits(&y[row * heads * out..][..heads * out]), "row {row}");
        }
        let short: Vec<u16> = output(device, m * heads * out, |y| {
            device.head_matmul(&there, Inputs::Bf16(x.view()), m, Outputs::Bf16(&mut y.view_mut()))
        });
        assert_eq!(short, y.iter().map(|&y| fp8::to_bf16(y)).collect::<Vec<_>>());
    }
}
