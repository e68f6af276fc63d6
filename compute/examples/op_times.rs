//! Times the operators that a step is made of: `cargo run --release -p compute --example op_times [threads]`.
//!
//! Each figure is the best call of several rounds over matrices that together exceed the last-level cache, as the layers
//! of a model do: best of single calls, so that other load on the machine shows as little as possible. GB/s counts weights (or cache rows) read once; GFLOP/s counts a multiply-add as two.

use std::hint::black_box;
use std::time::{Duration, Instant};

use compute::{
    ActivationFormat, Activations, Arena, Cpu, KvFormat, KvGeometry, KvSlot, KvView, KvViewMut, Matrix,
    MlaRow, MlaShape, ScaleFormat,
};

/// Bytes of weights that a round goes through.
const ROUND_BYTES: usize = 256 << 20;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let cpu = Cpu::new(threads);
    println!("{} threads, {}", cpu.pool().threads(), cpu.isa().name());
    println!("reads {:.1} GB/s, f32 {:.0} GFLOP/s", cpu.memory_read_bandwidth() / 1e9, cpu.peak_f32() / 1e9);
    for (heads, latent) in [(16, 512), (6, 128)] {
        attention(&cpu, MlaShape { heads, latent, rope: 64, scale: 0.1, first: 0 });
    }
    for (n, k) in [(4096, 1024), (512, 1024), (1536, 7168)] {
        linear(&cpu, n, k);
    }
}

fn linear(cpu: &Cpu, n: usize, k: usize) {
    let mut arena = Arena::new();
    let matrices: Vec<Matrix> = (0..ROUND_BYTES / (n * k))
        .map(|i| {
            let codes: Vec<u8> = (0..n * k).map(|j| ((i * 31 + j * 7) % 0x77) as u8).collect();
            let scales = vec![1e-3; n.div_ceil(128) * k.div_ceil(128)];
            let matrix = Matrix::fp8(n, k, codes.into(), scales).expect("lengths fit");
            matrix.arranged(&mut arena).expect("memory")
        })
        .collect();
    for m in [1, 2, 4, 8, 16, 32, 256] {
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

fn attention(cpu: &Cpu, shape: MlaShape) {
    let mut geometry = KvGeometry {
        format: KvFormat::Fp8,
        latent: shape.latent,
        rope: shape.rope,
        row_bytes: 0,
        layer_stride: 0,
        block_stride: 0,
        block_tokens: 64,
    };
    geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
    geometry.layer_stride = 64 * geometry.row_bytes;
    geometry.block_stride = geometry.layer_stride;
    let blocks: u32 = 256;
    let mut bytes = vec![0; blocks as usize * geometry.block_stride];
    let mut view = KvViewMut { bytes: &mut bytes, geometry };
    let latent: Vec<f32> = (0..shape.latent).map(|i| (i % 17) as f32 / 17.0).collect();
    for token in 0..blocks * 64 {
        let slot = KvSlot { block: token / 64, row: token % 64 };
        cpu.kv_write(&mut view, 0, slot, &latent, &latent[..shape.rope]);
    }
    let table: Vec<u32> = (0..blocks).collect();
    let view = KvView { bytes: &bytes, geometry };
    // One row over a long context, a batch of sequences, and the last chunk of a prompt.
    for (name, sequences, chunk, context) in
        [("decode 1", 1, 1, 4096), ("decode 16", 16, 1, 1024), ("chunk 64", 1, 64, 1024)]
    {
        let rows: Vec<MlaRow<'_>> = (0..sequences)
            .flat_map(|s| {
                let table = &table[s * blocks as usize / sequences..];
                (0..chunk).map(move |i| MlaRow { block_table: table, context: context - chunk + i + 1 })
            })
            .collect();
        let queries = rows.len() * shape.heads;
        let (q_lat, q_rope) = (vec![0.1; queries * shape.latent], vec![0.1; queries * shape.rope]);
        let mut out = vec![0.0; queries * shape.latent];
        let time = best(|_| cpu.mla_attention(&view, 0, shape, &rows, &q_lat, &q_rope, &mut out));
        let tokens = rows.iter().map(|row| row.context as usize).sum::<usize>();
        println!(
            "mla fp8 {} heads x {} {name:<9} context {context:<5} {:>9.1} us {:>7.1} GFLOP/s",
            shape.heads,
            shape.latent,
            micros(time),
            (2 * tokens * shape.heads * (2 * shape.latent + shape.rope)) as f64 / time.as_secs_f64() / 1e9,
        );
    }
}

fn best(mut body: impl FnMut(usize)) -> Duration {
    let mut best = Duration::MAX;
    let end = Instant::now() + Duration::from_millis(300);
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
