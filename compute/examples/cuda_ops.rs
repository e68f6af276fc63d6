//! Times the operators on a GPU: `cargo run --release -p compute --example cuda_ops [ordinal]`.
//!
//! Each figure is the median of several rounds of many launches between two events, weights rotated so that the level-2
//! cache is cold. The floor is the larger of bytes over 4.2 TB/s (the H200's measured copy bandwidth) and operations
//! over the machine's matrix rate; `peer` is the best existing kernel of docs/kernels.md where there is one. Small operators are bounded
//! by how fast a host launches (2.3 µs), not by the device.

use compute::cuda::{Buffer, CacheRows, CudaError, Device, Inputs, Matrix, MlaParts, MlaQueries, MlaRows};
use compute::{KvFormat, KvGeometry, MlaShape, RoutingRule, ScaleFormat, Scoring, Selection};

/// Bytes of weights that a round goes through: twice the cache.
const ROUND_BYTES: usize = 120 << 20;

/// Dense matrix rate of the H200 for bf16, measured through a library.
const MATRIX_FLOPS: f64 = 790e12;

fn main() -> Result<(), CudaError> {
    let ordinal = std::env::args().nth(1).and_then(|o| o.parse().ok()).unwrap_or(0);
    let start = std::time::Instant::now();
    let device = Device::open(ordinal)?;
    println!("{} {}, opened in {:.2} s", device.name(), device.architecture(), start.elapsed().as_secs_f64());
    let mut bench = Bench { device: &device, bandwidth: 4.2e12, random: 0x9E37_79B9 };
    println!(
        "{:<42} {:>9} {:>9} {:>8} {:>7} {:>7}",
        "operator", "us", "floor us", "TB/s", "x floor", "x peer"
    );
    bench.linears()?;
    bench.rows()?;
    bench.attention()
}

struct Bench<'a> {
    device: &'a Device,
    /// Bytes per second, read plus written.
    bandwidth: f64,
    random: u32,
}

impl Bench<'_> {
    /// Times `work(i)` for i = 0.., and prints a line. `peer_us` is zero where there is none.
    fn report(
        &self,
        name: &str,
        bytes: usize,
        flops: f64,
        peer_us: f64,
        mut work: impl FnMut(usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let first = self.device.time_ms(|| work(0))?;
        let launches = ((10.0 / first.max(1e-3)) as usize).clamp(1, 100);
        let mut times = Vec::new();
        for _ in 0..7 {
            times.push(self.device.time_ms(|| (0..launches).try_for_each(&mut work))? / launches as f32);
        }
        times.sort_by(f32::total_cmp);
        let us = f64::from(times[times.len() / 2]) * 1e3;
        let floor = (bytes as f64 / self.bandwidth).max(flops / MATRIX_FLOPS) * 1e6;
        let peer = if peer_us > 0.0 { format!("{:.2}", us / peer_us) } else { "-".to_owned() };
        let rate = bytes as f64 / us / 1e6;
        println!("{name:<42} {us:>9.1} {floor:>9.1} {rate:>8.3} {:>7.1} {peer:>7}", us / floor);
        Ok(())
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|_| {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 17;
                self.random ^= self.random << 5;
                // Any code but NaN.
                (self.random as u8 & 0x80) | ((self.random >> 8) as u8 % 0x7F)
            })
            .collect()
    }

    fn floats(&mut self, len: usize) -> Result<Buffer<f32>, CudaError> {
        let values: Vec<f32> = self.bytes(len).into_iter().map(|b| (f32::from(b) - 127.5) / 64.0).collect();
        self.device.upload(&values)
    }

    fn linears(&mut self) -> Result<(), CudaError> {
        // N, K, and the best of DeepGEMM and cuBLASLt (block scaled) at M = 1, 16, 64, 128, 4096.
        let shapes = [
            (2112, 7168, [13.0, 11.3, 10.0, 10.8, 93.5]),
            (24576, 1536, [15.3, 15.2, 14.3, 15.0, 235.0]),
            (7168, 16384, [40.0, 38.6, 37.4, 40.8, 668.0]),
            (4096, 7168, [14.3, 12.3, 11.6, 12.6, 169.0]),
            (7168, 2048, [7.8, 7.7, 7.2, 8.7, 91.6]),
        ];
        for (n, k, peers) in shapes {
            let mut matrices = Vec::new();
            for _ in 0..ROUND_BYTES.div_ceil(n * k).max(2) {
                let codes = self.bytes(n * k);
                let scales = vec![1e-3; n.div_ceil(128) * k.div_ceil(128)];
                let matrix = compute::Matrix::fp8(n, k, codes.into(), scales).expect("lengths fit");
                matrices.push(Matrix::new(self.device, &matrix)?);
            }
            for (m, peer) in [1, 16, 64, 128, 4096].into_iter().zip(peers) {
                let x = self.floats(m * k)?;
                let (mut codes, mut scales) =
                    (self.device.alloc(m * k)?, self.device.alloc(m * k.div_ceil(128))?);
                let (codes_out, scales_out) = (&mut codes.view_mut(), &mut scales.view_mut());
                self.device.quantise(x.view(), k, ScaleFormat::F32, codes_out, scales_out)?;
                let inputs = Inputs::Fp8 { codes: codes.view(), scales: scales.view() };
                let mut y = self.device.alloc(m * n)?;
                let name = format!("linear fp8 [{n}, {k}] m={m}");
                // FP8 runs at twice the rate of bf16: half of the two operations a multiply-add has.
                self.report(&name, n * k + m * k + 4 * m * n, (m * n * k) as f64, peer, |i| {
                    self.device.linear(&matrices[i % matrices.len()], inputs, &mut y.view_mut())
                })?;
            }
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<(), CudaError> {
        let device = self.device;
        let (m, k) = (128, 7168);
        let (x, w) = (self.floats(m * k)?, self.floats(k)?);
        let (mut y, mut codes, mut scales) =
            (device.alloc(m * k)?, device.alloc(m * k)?, device.alloc(m * k / 128)?);
        self.report("rms_norm [128, 7168]", 8 * m * k, 0.0, 2.8, |_| {
            device.rms_norm(x.view(), w.view(), 1e-6, &mut y.view_mut())
        })?;
        self.report("quantise [128, 7168]", 5 * m * k, 0.0, 2.2, |_| {
            device.quantise(x.view(), k, ScaleFormat::F32, &mut codes.view_mut(), &mut scales.view_mut())
        })?;
        self.report("silu_mul [128, 7168]", 12 * m * k, 0.0, 0.0, |_| {
            device.silu_mul(x.view(), x.view(), &mut y.view_mut())
        })?;
        let rule = RoutingRule {
            scoring: Scoring::Sigmoid,
            selection: Selection::NoauxTc,
            top_k: 8,
            groups: 8,
            groups_kept: 4,
            normalise: true,
            scale: 2.5,
        };
        let (mut ids, mut weights) = (device.alloc(m * 8)?, device.alloc(m * 8)?);
        self.report("route [128, 256]", 4 * m * 256, 0.0, 14.9, |_| {
            let logits = x.slice(0..m * 256);
            device.route(logits, 1, 256, None, None, &rule, &mut ids.view_mut(), &mut weights.view_mut())
        })
    }

    fn attention(&mut self) -> Result<(), CudaError> {
        let device = self.device;
        for (sequences, context, heads, peer) in
            [(1, 4096, 128, 0.0), (64, 1024, 128, 36.0), (64, 4096, 128, 113.6), (128, 4096, 16, 111.0)]
        {
            let shape = MlaShape { heads, latent: 512, rope: 64, scale: 0.1, first: 0 };
            let stride = 64 * 656;
            let geometry = KvGeometry {
                format: KvFormat::Fp8,
                latent: 512,
                rope: 64,
                row_bytes: 656,
                layer_stride: stride,
                block_stride: stride,
                block_tokens: 64,
            };
            let table_stride = context / 64;
            let blocks = sequences * table_stride;
            // Written by the operator itself, a sequence at a time.
            let mut pool = device.alloc::<u8>(blocks * stride)?;
            let (latent, rope) = (self.floats(context * 512)?, self.floats(context * 64)?);
            for sequence in 0..sequences {
                let slots: Vec<u32> = (0..context)
                    .flat_map(|t| [(sequence * table_stride + t / 64) as u32, (t % 64) as u32])
                    .collect();
                let slots = device.upload(&slots)?;
                let pool = &mut pool.view_mut();
                let rows = CacheRows { pool, geometry: &geometry, layer: 0, slots: slots.view() };
                device.kv_write(rows, latent.view(), rope.view())?;
            }
            let tables = device.upload(&(0..blocks as u32).collect::<Vec<_>>())?;
            let starts: Vec<u32> = (0..sequences).map(|sequence| (sequence * table_stride) as u32).collect();
            let starts = device.upload(&starts)?;
            let contexts = device.upload(&vec![context as u32; sequences])?;
            let queries = sequences * heads;
            let mut bf16 = |len: usize| -> Result<Buffer<u16>, CudaError> {
                let (values, mut bits) = (self.floats(len)?, device.alloc(len)?);
                device.round_bf16(values.view(), &mut bits.view_mut())?;
                Ok(bits)
            };
            let (q_latent, q_rope) = (bf16(queries * 512)?, bf16(queries * 64)?);
            let mut out = device.alloc(queries * 512)?;
            let mut parts = MlaParts::new(device, queries, context)?;
            let rows = MlaRows {
                tables: tables.view(),
                starts: starts.view(),
                contexts: contexts.view(),
                context_max: context,
            };
            let name = format!("mla fp8 batch {sequences} context {context} heads {heads}");
            let flops = 2.0 * (queries * context * (2 * 512 + 64)) as f64;
            self.report(&name, blocks * stride + 2 * queries * (2 * 512 + 64), flops, peer, |_| {
                let (latent, rope, out) = (q_latent.view(), q_rope.view(), &mut out.view_mut());
                let queries = MlaQueries::Bf16 { latent, rope, out, parts: &mut parts };
                device.mla_attention(pool.view(), &geometry, 0, shape, rows, queries)
            })?;
        }
        Ok(())
    }
}
