//! MLA in its absorbed form over FP8 cache rows: decode steps, verification rows, prompt chunks.

use compute::cuda::{CacheRows, CudaError, Device, MlaParts, MlaQueries, MlaRows};
use compute::{KvFormat, KvGeometry, MlaShape};

use super::{Bench, Work};

const LATENT: usize = 512;
const ROPE: usize = 64;
const BLOCK_TOKENS: usize = 64;
const ROW_BYTES: usize = 656;
const STRIDE: usize = BLOCK_TOKENS * ROW_BYTES;
const GEOMETRY: KvGeometry = KvGeometry {
    format: KvFormat::Fp8,
    latent: LATENT,
    rope: ROPE,
    row_bytes: ROW_BYTES,
    layer_stride: STRIDE,
    block_stride: STRIDE,
    block_tokens: BLOCK_TOKENS,
};

/// Sequences, context, query rows a sequence, heads, and FlashMLA's microseconds over BF16 rows (16 heads: sglang's over FP8).
const STEPS: [(usize, usize, usize, usize, f64); 7] = [
    (1, 4096, 1, 128, 0.0),
    (8, 4096, 1, 128, 0.0),
    (64, 1024, 1, 128, 36.0),
    (64, 4096, 1, 128, 113.6),
    (64, 4096, 2, 128, 211.0),
    (128, 4096, 1, 128, 224.0),
    (128, 4096, 1, 16, 111.0),
];
/// Prompts that are computed whole: sequences and tokens.
const PROMPTS: [(usize, usize); 2] = [(4, 1024), (1, 4096)];

pub(super) fn all(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    for (sequences, context, rows, heads, peer_us) in STEPS {
        let contexts = vec![(context - rows + 1..=context).collect(); sequences];
        let name = format!("mla fp8 {sequences} × {context}, {rows} query rows, {heads} heads");
        attend(bench, name, &contexts, heads, peer_us)?;
    }
    for (sequences, tokens) in PROMPTS {
        let contexts = vec![(1..=tokens).collect(); sequences];
        attend(bench, format!("mla fp8 prompts {sequences} × {tokens}, 128 heads"), &contexts, 128, 0.0)?;
    }
    Ok(())
}

/// `contexts`: of each sequence the context of each of its query rows, ascending.
fn attend(
    bench: &mut Bench<'_>,
    name: String,
    contexts: &[Vec<usize>],
    heads: usize,
    peer_us: f64,
) -> Result<(), CudaError> {
    let device = bench.device;
    let longest = contexts.iter().flatten().copied().max().unwrap_or(0);
    let table = longest.div_ceil(BLOCK_TOKENS);
    let mut pool = device.alloc::<u8>(contexts.len() * table * STRIDE)?;
    let mut normal = |len: usize| {
        let mut values = device.alloc(len)?;
        device.fill_normal(&mut values.view_mut(), bench.seed(), 0.0, 1.0)?;
        Ok::<_, CudaError>(values)
    };
    // Written by the operator itself, a sequence at a time.
    let (latent, rope) = (normal(longest * LATENT)?, normal(longest * ROPE)?);
    for sequence in 0..contexts.len() {
        let slots: Vec<u32> = (0..longest)
            .flat_map(|t| [(sequence * table + t / BLOCK_TOKENS) as u32, (t % BLOCK_TOKENS) as u32])
            .collect();
        let slots = device.upload(&slots)?;
        let rows =
            CacheRows { pool: &mut pool.view_mut(), geometry: &GEOMETRY, layer: 0, slots: slots.view() };
        device.kv_write(rows, latent.view(), rope.view())?;
    }
    let begins = |(sequence, rows): (usize, &Vec<usize>)| vec![(sequence * table) as u32; rows.len()];
    let starts: Vec<u32> = contexts.iter().enumerate().flat_map(begins).collect();
    let seen: Vec<u32> = contexts.iter().flatten().map(|&context| context as u32).collect();
    let queries = seen.len() * heads;
    let unpack = MlaRows::worth_unpacking(
        contexts.len() * table,
        BLOCK_TOKENS,
        seen.iter().map(|&c| c as usize).sum(),
    );
    let pairs: f64 = seen.iter().map(|&context| f64::from(context) * heads as f64).sum();
    let tables = device.upload(&(0..(contexts.len() * table) as u32).collect::<Vec<_>>())?;
    let (starts, seen) = (device.upload(&starts)?, device.upload(&seen)?);
    let (q_latent, q_rope) =
        (bf16(device, normal(queries * LATENT)?)?, bf16(device, normal(queries * ROPE)?)?);
    let mut out = device.alloc(queries * LATENT)?;
    let mut parts = MlaParts::new(device, queries.min(1 << 19), longest)?;
    // 0.05: scores of these values then differ by some units, as a model's do.
    let shape = MlaShape { heads, latent: LATENT, rope: ROPE, scale: 0.05, first: 0 };
    let work = Work {
        bytes: contexts.len() * longest * ROW_BYTES + 2 * queries * (2 * LATENT + ROPE),
        operations: 2.0 * pairs * (2 * LATENT + ROPE) as f64,
        fp8: false,
        peer_us,
    };
    bench.time(name, work, |_| {
        let rows = MlaRows {
            tables: tables.view(),
            starts: starts.view(),
            contexts: seen.view(),
            context_max: longest,
            unpacked: if unpack { contexts.len() * table } else { 0 },
        };
        let (latent, rope, out) = (q_latent.view(), q_rope.view(), &mut out.view_mut());
        let queries = MlaQueries::Bf16 { latent, rope, out, parts: &mut parts };
        device.mla_attention(pool.view(), &GEOMETRY, 0, shape, rows, queries)
    })
}

fn bf16(
    device: &Device,
    values: compute::cuda::Buffer<f32>,
) -> Result<compute::cuda::Buffer<u16>, CudaError> {
    let mut bits = device.alloc(values.len())?;
    device.round_bf16(values.view(), &mut bits.view_mut())?;
    Ok(bits)
}
