//! Times the operators that a step is made of: `cargo run --release -p compute --example op_times [threads]`.
//!
//! Each figure is the best call of several rounds over matrices that together exceed the last-level cache, as the layers
//! of a model do: best of single calls, so that other load on the machine shows as little as possible. GB/s counts weights (or cache rows) read once; GFLOP/s counts a multiply-add as two.

use std::hint::black_box;
use std::time::{Duration, Instant};

use compute::{ActivationFormat, Activations, Cpu, Matrix, ScaleFormat};

/// Bytes of weights that a round goes through.
const ROUND_BYTES: usize = 256 << 20;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let cpu = Cpu::new(threads);
    println!("{} threads, {}", cpu.pool().threads(), cpu.isa().name());
    linear(&cpu, 4096, 1024);
    linear(&cpu, 512, 1024);
    linear(&cpu, 1536, 7168);
}

fn linear(cpu: &Cpu, n: usize, k: usize) {
    let matrices: Vec<Matrix> = (0..ROUND_BYTES / (n * k))
        .map(|i| {
            let codes: Vec<u8> = (0..n * k).map(|j| ((i * 31 + j * 7) % 0x77) as u8).collect();
            let scales = vec![1e-3; n.div_ceil(128) * k.div_ceil(128)];
            Matrix::fp8(n, k, codes.into(), scales).expect("lengths fit")
        })
        .collect();
    for m in [1, 2, 4, 8, 16, 64, 256] {
        let x: Vec<f32> = (0..m * k).map(|i| ((i * 13 % 101) as f32 - 50.0) / 10.0).collect();
        let mut activations = Activations::new();
        let format = ActivationFormat::Fp8(ScaleFormat::F32);
        let prepare = best(|_| activations.prepare(cpu, black_box(&x), m, k, format));
        let mut y = vec![0.0; m * n];
        let time = best(|round| cpu.linear(&matrices[round % matrices.len()], &activations, &mut y));
        println!(
            "linear fp8 [{n}, {k}] m={m:<3} {:>8.1} us {:>6.1} GB/s {:>7.1} GFLOP/s   quantise {:>6.1} us",
            micros(time),
            (n * k) as f64 / time.as_secs_f64() / 1e9,
            (2 * m * n * k) as f64 / time.as_secs_f64() / 1e9,
            micros(prepare),
        );
    }
}

fn best(mut body: impl FnMut(usize)) -> Duration {
    let mut best = Duration::MAX;
    let end = Instant::now() + Duration::from_millis(500);
    for round in 0.. {
        let start = Instant::now();
        if start > end {
            break;
        }
        body(round);
        best = best.min(start.elapsed());
    }
    best
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
