//! Matrix products: dense, by expert, by head, bf16.

use compute::cuda::{
    Activations, CudaError, ExpertMatrices, Groups, HeadMatrices, InputFormat, Matrix, NormRows, Outputs,
};
use compute::{ScaleFormat, WeightFormat};

use super::{Bench, ROUND_BYTES, Work};

const FP8: InputFormat = InputFormat::Fp8(ScaleFormat::F32);

/// N, K, rows and the microseconds of the best of DeepGEMM and cuBLASLt's block-scaled product at each.
const DENSE: [(usize, usize, [f64; 5]); 5] = [
    (2112, 7168, [13.0, 11.3, 10.0, 10.8, 93.5]),
    (24576, 1536, [15.3, 15.2, 14.3, 15.0, 235.0]),
    (7168, 16384, [40.0, 38.6, 37.4, 40.8, 668.0]),
    (4096, 7168, [14.3, 12.3, 11.6, 12.6, 169.0]),
    (7168, 2048, [7.8, 7.7, 7.2, 8.7, 91.6]),
];
const DENSE_ROWS: [usize; 5] = [1, 16, 64, 128, 4096];

/// Experts of a worker, and the best of DeepGEMM's masked product and Triton's fused_moe at each number of rows an expert.
struct Experts {
    count: usize,
    gate_up_us: [f64; 5],
    /// 0 where none was measured.
    down_us: [f64; 5],
}

const EXPERTS: [Experts; 2] = [
    Experts {
        count: 32,
        gate_up_us: [219.0, 225.0, 236.0, 265.0, 395.0],
        down_us: [116.0, 118.0, 128.0, 143.0, 214.0],
    },
    Experts { count: 8, gate_up_us: [62.0, 63.0, 62.0, 67.0, 102.0], down_us: [0.0; 5] },
];
const EXPERT_ROWS: [usize; 5] = [1, 16, 64, 128, 256];
const TOP_K: usize = 8;

/// About normal rows, rounded.
fn inputs(
    bench: &mut Bench<'_>,
    format: InputFormat,
    rows: usize,
    k: usize,
) -> Result<Activations, CudaError> {
    let seed = bench.seed();
    let device = bench.device;
    let mut plain = device.alloc(rows * k)?;
    device.fill_normal(&mut plain.view_mut(), seed, 0.0, 1.0)?;
    let mut rounded = Activations::new(device, format, rows, k)?;
    if format == InputFormat::Parts {
        // Only a norm makes parts.
        let mut w = device.alloc(k)?;
        device.fill_normal(&mut w.view_mut(), seed, 1.0, 0.0)?;
        let x = NormRows { x: &mut plain.view_mut(), stride: k, add: None, index: None };
        device.norm(x, w.view(), 1e-6, None, &mut [&mut rounded])?;
    } else {
        device.prepare(plain.view(), &mut rounded)?;
    }
    device.synchronize()?;
    Ok(rounded)
}

fn matrices(
    bench: &mut Bench<'_>,
    n: usize,
    k: usize,
    format: WeightFormat,
) -> Result<Vec<Matrix>, CudaError> {
    let bytes = n * k * if format == WeightFormat::Fp8 { 1 } else { 2 };
    let mut all = Vec::new();
    for _ in 0..ROUND_BYTES.div_ceil(bytes).max(2) {
        let mut matrix = Matrix::alloc(bench.device, n, k, format)?;
        let seed = bench.seed();
        bench.device.fill_matrix(&mut matrix, seed)?;
        all.push(matrix);
    }
    Ok(all)
}

pub(super) fn dense(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    for (n, k, peers) in DENSE {
        let all = matrices(bench, n, k, WeightFormat::Fp8)?;
        for (m, peer_us) in DENSE_ROWS.into_iter().zip(peers) {
            let x = inputs(bench, FP8, m, k)?;
            let mut y = bench.device.alloc(m * n)?;
            let work = Work {
                bytes: n * k + m * k + 4 * m * n,
                operations: 2.0 * (m * n * k) as f64,
                fp8: true,
                peer_us,
            };
            let device = bench.device;
            bench.time(format!("linear fp8 [{n}, {k}] × {m}"), work, |i| {
                device.linear(&all[i % all.len()], x.inputs(m), &mut y.view_mut())
            })?;
        }
    }
    Ok(())
}

pub(super) fn experts(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    let device = bench.device;
    let (hidden, inner) = (7168, 2048);
    for Experts { count: experts, gate_up_us, down_us } in EXPERTS {
        let stack = |n, k| -> Result<ExpertMatrices, CudaError> {
            let mut stack = ExpertMatrices::alloc(device, experts, (n, k), WeightFormat::Fp8)?;
            device.fill_experts(&mut stack, (n * k) as u64)?;
            Ok(stack)
        };
        let (gate, up, down) = (stack(inner, hidden)?, stack(inner, hidden)?, stack(hidden, inner)?);
        for (i, rows) in EXPERT_ROWS.into_iter().enumerate() {
            // Every expert gets the same number of rows.
            let assignments = experts * rows;
            let ids: Vec<u16> = (0..assignments).map(|a| (a % experts) as u16).collect();
            let ids = device.upload(&ids)?;
            let mut groups = Groups::new(device, assignments, experts)?;
            device.group_rows(ids.view(), device.expert_kernel(&gate), &mut groups)?;
            let tokens = assignments / TOP_K;
            let x = inputs(bench, FP8, tokens, hidden)?;
            let inside = inputs(bench, FP8, assignments, inner)?;
            let mut gate_up = device.alloc(assignments * 2 * inner)?;
            let mut out = device.alloc(assignments * hidden)?;
            let product = |n: usize, k: usize, written: usize, peer_us| Work {
                bytes: experts * n * k + assignments * (k + written * n),
                operations: 2.0 * (assignments * n * k) as f64,
                fp8: true,
                peer_us,
            };
            let name = |n, k| format!("experts fp8 {experts} × [{n}, {k}] × {rows}");
            let work = product(2 * inner, hidden, 4, gate_up_us[i]);
            bench.time(name(2 * inner, hidden), work, |_| {
                device.experts_in(&gate, Some(&up), x.inputs(tokens), &groups, TOP_K, &mut gate_up.view_mut())
            })?;
            let work = product(hidden, inner, 2, down_us[i]);
            bench.time(name(hidden, inner), work, |_| {
                let out = &mut out.view_mut();
                device.experts_out(&down, inside.inputs(assignments), &groups, Outputs::Bf16(out))
            })?;
        }
    }
    Ok(())
}

/// The head, the router and the products by head: bf16 weights.
pub(super) fn bf16(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    let device = bench.device;
    let (vocab, hidden, experts) = (129_280, 7168, 256);
    let head = matrices(bench, vocab, hidden, WeightFormat::Bf16)?;
    for m in [1, 64, 128] {
        let x = inputs(bench, InputFormat::Bf16, m, hidden)?;
        let mut y = device.alloc(m * vocab)?;
        let bytes = 2 * (vocab + m) * hidden + 4 * m * vocab;
        let operations = 2.0 * (m * vocab * hidden) as f64;
        let work = Work { bytes, operations, fp8: false, peer_us: 0.0 };
        bench.time(format!("head bf16 [{vocab}, {hidden}] × {m}"), work, |i| {
            device.linear(&head[i % head.len()], x.inputs(m), &mut y.view_mut())
        })?;
    }
    drop(head);
    let router = matrices(bench, experts, hidden, WeightFormat::Bf16)?;
    let slices = device.parts_slices(hidden);
    for (m, peer_us) in [(1, 0.0), (128, 6.7)] {
        let x = inputs(bench, InputFormat::Parts, m, hidden)?;
        let compute::cuda::Inputs::Bf16(parts) = x.inputs(m) else { continue };
        let mut y = device.alloc(slices * m * experts)?;
        let bytes = 2 * experts * hidden + 6 * m * hidden + 4 * slices * m * experts;
        let work = Work { bytes, operations: 6.0 * (m * experts * hidden) as f64, fp8: false, peer_us };
        bench.time(format!("router parts [{experts}, {hidden}] × {m}"), work, |i| {
            device.linear_parts(&router[i % router.len()], parts, &mut y.view_mut())
        })?;
    }
    let (heads, latent, nope) = (128, 512, 128);
    for (name, out_dim, in_dim) in [("key_up", latent, nope), ("value_up", nope, latent)] {
        let mut w = HeadMatrices::alloc_bf16(device, heads, out_dim, in_dim)?;
        device.fill_heads(&mut w, 7)?;
        for m in [1, 128, 4096] {
            let x = inputs(bench, InputFormat::Bf16, m, heads * in_dim)?;
            let mut y = device.alloc(m * heads * out_dim)?;
            let work = Work {
                bytes: 2 * heads * (out_dim * in_dim + m * (in_dim + out_dim)),
                operations: 2.0 * (m * heads * out_dim * in_dim) as f64,
                fp8: false,
                peer_us: 0.0,
            };
            bench.time(format!("{name} bf16 {heads} × [{out_dim}, {in_dim}] × {m}"), work, |_| {
                device.head_matmul(&w, x.inputs(m), m, Outputs::Bf16(&mut y.view_mut()))
            })?;
        }
    }
    Ok(())
}
