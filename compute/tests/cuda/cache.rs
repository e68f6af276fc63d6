//! The paged cache: writing rows, attending over them.

use compute::cuda::{AttentionKernel, CacheRows, MlaParts, MlaQueries, MlaRows};
use compute::{Cpu, KvFormat, KvGeometry, KvSlot, KvView, KvViewMut, MlaRow, MlaShape, fp8, reference};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::support::{assert_close, bits, compared, device, floats, fresh, output, read, small};

const LAYERS: usize = 2;
const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8];

fn geometry(format: KvFormat, latent: usize, rope: usize, block_tokens: usize) -> KvGeometry {
    let mut geometry =
        KvGeometry { format, latent, rope, row_bytes: 0, layer_stride: 0, block_stride: 0, block_tokens };
    geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
    geometry.layer_stride = block_tokens * geometry.row_bytes;
    geometry.block_stride = LAYERS * geometry.layer_stride;
    geometry
}

#[test]
#[ignore = "needs a CUDA device"]
fn kv_write_has_the_bytes_of_the_cpu() {
    let device = device();
    let mut rng = fresh();
    let cpu = Cpu::new(1);
    let blocks = 5u32;
    for format in FORMATS {
        for (latent, rope, block_tokens) in
            [(1, 2, 3), (5, 2, 64), (130, 6, 16), (160, 32, 64), (512, 64, 64)]
        {
            let geometry = geometry(format, latent, rope, block_tokens);
            let mut slots: Vec<KvSlot> = (0..blocks)
                .flat_map(|block| (0..block_tokens as u32).map(move |row| KvSlot { block, row }))
                .collect();
            slots.shuffle(&mut rng);
            for m in [0, 1, slots.len() / 2] {
                // Latents of every size: their scales are clamped far below those of activations.
                let latents: Vec<f32> = floats(&mut rng, m * latent)
                    .iter()
                    .map(|x| x * 10f32.powi(rng.random_range(-30..3)))
                    .collect();
                let ropes = floats(&mut rng, m * rope);
                let mut expected = vec![0xFF; blocks as usize * geometry.block_stride];
                let mut there = device.upload(&expected).expect("pool");
                let mut view = KvViewMut { bytes: &mut expected, geometry };
                for (i, &slot) in slots[..m].iter().enumerate() {
                    cpu.kv_write(
                        &mut view,
                        1,
                        slot,
                        &latents[i * latent..][..latent],
                        &ropes[i * rope..][..rope],
                    );
                }
                // One row of padding, whose values must go nowhere.
                let mut flat: Vec<u32> = slots[..m].iter().flat_map(|slot| [slot.block, slot.row]).collect();
                flat.extend([u32::MAX, 0]);
                let pad = |x: &[f32], width| [x, &vec![7.0; width]].concat();
                let slots = device.upload(&flat).expect("slots");
                let latents = device.upload(&pad(&latents, latent)).expect("latents");
                let ropes = device.upload(&pad(&ropes, rope)).expect("ropes");
                let pool = &mut there.view_mut();
                let rows = CacheRows { pool, geometry: &geometry, layer: 1, slots: slots.view() };
                device.kv_write(rows, latents.view(), ropes.view()).expect("written");
                assert!(read(device, there.view()) == expected, "{format:?} [{m}, {latent} + {rope}]");
            }
        }
    }
}

/// Sequences with random blocks of a pool in which everything but their rows is NaN.
struct Cache {
    geometry: KvGeometry,
    bytes: Vec<u8>,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    fn new(rng: &mut StdRng, geometry: KvGeometry, lengths: &[usize]) -> Self {
        let needed: usize = lengths.iter().map(|len| len.div_ceil(geometry.block_tokens)).sum();
        let mut free: Vec<u32> = (0..needed as u32 + 2).collect();
        free.shuffle(rng);
        let mut bytes = vec![0xFF; free.len() * geometry.block_stride];
        let mut view = KvViewMut { bytes: &mut bytes, geometry };
        let cpu = Cpu::new(1);
        let tables = lengths.iter().map(|&len| {
            let table: Vec<u32> = free.split_off(free.len() - len.div_ceil(geometry.block_tokens));
            for token in 0..len {
                let slot = KvSlot {
                    block: table[token / geometry.block_tokens],
                    row: (token % geometry.block_tokens) as u32,
                };
                let row = floats(rng, geometry.latent + geometry.rope);
                cpu.kv_write(&mut view, 1, slot, &row[..geometry.latent], &row[geometry.latent..]);
            }
            table
        });
        let tables = tables.collect();
        Self { geometry, bytes, tables }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn mla_attention() {
    let device = device();
    let mut rng = fresh();
    let shapes = [
        (1, 1, 2, 3),
        (3, 5, 2, 7),
        (2, 160, 32, 64),
        (4, 64, 16, 64),
        (16, 512, 64, 64),
        (70, 512, 64, 16),
        (128, 512, 64, 64),
    ];
    for format in FORMATS {
        for (heads, latent, rope, block_tokens) in shapes {
            if small() && latent == 512 && (heads, format) != (16, KvFormat::Fp8) {
                continue;
            }
            // Longer than two parts of the matrix kernel, and once only a little longer than one.
            let long = match heads {
                128 => 2500,
                16 => 1030,
                _ => 200,
            };
            let lengths = [long, 64, 1, 0];
            let cache = Cache::new(&mut rng, geometry(format, latent, rope, block_tokens), &lengths);
            // (sequence, context): decode rows, a chunk of a prompt, an empty context.
            let rows = [
                (0, 200),
                (1, 64),
                (2, 1),
                (3, 0),
                (0, 60),
                (0, 63),
                (0, 64),
                (0, 65),
                (0, long as u32),
                (0, long as u32 - 3),
            ];
            let scale = 1.0 / (4.0 * ((latent + rope) as f32).sqrt());
            // One head count of each kernel leaves the first row out.
            let first = usize::from(matches!(heads, 4 | 16));
            let shape = MlaShape { heads, latent, rope, scale, first };
            // No outliers against outliers of the cache: a score's own rounding would decide the softmax.
            let mut queries = |width| -> Vec<f32> {
                floats(&mut rng, rows.len() * heads * width).iter().map(|q| q.clamp(-4.0, 4.0)).collect()
            };
            let (q_latent, q_rope) = (queries(latent), queries(rope));
            let width = heads * latent;
            let mut expected = vec![f32::NAN; rows.len() * width];
            let view = KvView { bytes: &cache.bytes, geometry: cache.geometry };
            let host_rows: Vec<MlaRow<'_>> = rows
                .iter()
                .map(|&(sequence, context)| MlaRow { block_table: &cache.tables[sequence as usize], context })
                .collect();
            reference::mla_attention(&view, 1, shape, &host_rows, &q_latent, &q_rope, &mut expected);

            let mut tables = Vec::new();
            let begins: Vec<u32> = cache
                .tables
                .iter()
                .map(|table| {
                    let begin = tables.len() as u32;
                    tables.extend(table);
                    begin
                })
                .collect();
            let pool = device.upload(&cache.bytes).expect("pool");
            let tables = device.upload(&tables).expect("tables");
            let starts = device.upload(&rows.map(|row| begins[row.0 as usize])).expect("starts");
            let contexts = device.upload(&rows.map(|row| row.1)).expect("contexts");
            let short = |x: &[f32]| {
                device.upload(&x.iter().map(|&x| fp8::to_bf16(x)).collect::<Vec<_>>()).expect("q")
            };
            let (q_latent_bf16, q_rope_bf16) = (short(&q_latent), short(&q_rope));
            let (q_latent, q_rope) =
                (device.upload(&q_latent).expect("q"), device.upload(&q_rope).expect("q"));
            let kernel = device.attention_kernel(&cache.geometry);
            // Room for two rows' parts, so that more rows are computed in turns.
            let mut few_parts = MlaParts::new(device, 2 * heads, long).expect("parts");
            // Room to decode cache rows once, and for the parts of every block then.
            let mut many_parts = MlaParts::new(device, 4096, long).expect("parts");
            let entries = tables.len();
            let mut attend = |first: usize, end: usize, unpacked: usize| {
                let rows = MlaRows {
                    tables: tables.view(),
                    starts: starts.slice(first..end),
                    contexts: contexts.slice(first..end),
                    context_max: long,
                    unpacked,
                };
                let (latents, ropes) = (first * width..end * width, first * heads * rope..end * heads * rope);
                let geometry = &cache.geometry;
                if kernel == AttentionKernel::Wgmma {
                    let (latent, rope) = (q_latent_bf16.slice(latents), q_rope_bf16.slice(ropes));
                    let out: Vec<u16> = output(device, (end - first) * width, |out| {
                        let out = &mut out.view_mut();
                        let parts = if unpacked > 0 { &mut many_parts } else { &mut few_parts };
                        let queries = MlaQueries::Bf16 { latent, rope, out, parts };
                        device.mla_attention(pool.view(), geometry, 1, shape, rows, queries)
                    });
                    return out.into_iter().map(fp8::from_bf16).collect::<Vec<f32>>();
                }
                let (latent, rope) = (q_latent.slice(latents), q_rope.slice(ropes));
                output(device, (end - first) * width, |out| {
                    let out = &mut out.view_mut();
                    let queries = MlaQueries::F32 { latent, rope, out };
                    device.mla_attention(pool.view(), geometry, 1, shape, rows, queries)
                })
            };
            let out = attend(0, rows.len(), 0);
            let what = format!("{format:?} {heads} x ({latent} + {rope})");
            let tolerance = match kernel {
                AttentionKernel::Plain => 5e-5,
                // Queries rounded to bf16, cache rows and weights to f16 (2e-3 seen).
                AttentionKernel::Wgmma => 5e-3,
            };
            assert_close(&what, &out, &expected, tolerance);
            for row in compared(rows.len()) {
                let alone = attend(row, row + 1, 0);
                assert_eq!(bits(&alone), bits(&out[row * width..][..width]), "{what}: row {row}");
            }
            let unpacked = attend(0, rows.len(), entries);
            assert_eq!(bits(&unpacked), bits(&out), "{what}: cache rows decoded once");
            assert!(attend(0, 0, entries).is_empty());
        }
    }
}

/// A context's parts may be one block's or several blocks', cache rows decoded by each or once: enough rows that a block takes three
/// parts, and several rows where rows are decoded once, and each of them alone.
#[test]
#[ignore = "needs a CUDA device"]
fn a_row_does_not_know_how_many_parts_a_block_has() {
    let device = device();
    let mut rng = fresh();
    let (latent, rope, long) = (512, 64, 2500);
    let heads: usize = if small() { 16 } else { 128 };
    let cache = Cache::new(&mut rng, geometry(KvFormat::Fp8, latent, rope, 64), &[long]);
    if device.attention_kernel(&cache.geometry) == AttentionKernel::Plain {
        return;
    }
    // One block for each row and 64 heads is what the multiprocessors take at once.
    let rows = 130 * 64 / heads.next_multiple_of(64);
    let contexts: Vec<u32> =
        (0..rows as u32).map(|row| (long as u32).saturating_sub(37 * row).max(row)).collect();
    let shape = MlaShape { heads, latent, rope, scale: 0.02, first: 0 };
    let mut queries = |width| {
        let bits: Vec<u16> =
            floats(&mut rng, rows * heads * width).iter().map(|q| fp8::to_bf16(q.clamp(-4.0, 4.0))).collect();
        device.upload(&bits).expect("queries")
    };
    let (q_latent, q_rope) = (queries(latent), queries(rope));
    let pool = device.upload(&cache.bytes).expect("pool");
    let tables = device.upload(&cache.tables[0]).expect("tables");
    let (starts, there) =
        (device.upload(&vec![0; rows]).expect("starts"), device.upload(&contexts).expect("contexts"));
    // Also to decode cache rows once.
    let mut parts = MlaParts::new(device, rows * heads + 4096, long).expect("parts");
    let width = heads * latent;
    let mut attend = |first: usize, end: usize, unpacked: usize| -> Vec<u16> {
        output(device, (end - first) * width, |out| {
            let rows = MlaRows {
                tables: tables.view(),
                starts: starts.slice(first..end),
                contexts: there.slice(first..end),
                context_max: long,
                unpacked,
            };
            let latent = q_latent.slice(first * width..end * width);
            let rope = q_rope.slice(first * heads * rope..end * heads * rope);
            let queries = MlaQueries::Bf16 { latent, rope, out: &mut out.view_mut(), parts: &mut parts };
            device.mla_attention(pool.view(), &cache.geometry, 1, shape, rows, queries)
        })
    };
    let whole = attend(0, rows, 0);
    assert!(attend(0, rows, tables.len()) == whole, "cache rows decoded once");
    for row in compared(rows) {
        assert!(
            attend(row, row + 1, 0) == whole[row * width..][..width],
            "row {row} of context {}",
            contexts[row]
        );
    }
}
