use crate::samples::{Samples, bits};
use crate::{Cpu, Isa, KvFormat, KvGeometry, KvSlot, KvView, KvViewMut, MlaRow, MlaShape, fp8, reference};

const LAYERS: usize = 2;
const LAYER: usize = 1;

fn geometry(format: KvFormat, latent: usize, rope: usize) -> KvGeometry {
    let mut geometry =
        KvGeometry { format, latent, rope, row_bytes: 0, layer_stride: 0, block_stride: 0, block_tokens: 64 };
    geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
    geometry.layer_stride = geometry.row_bytes * geometry.block_tokens;
    geometry.block_stride = geometry.layer_stride * LAYERS;
    geometry
}

/// A pool full of NaN in which the given sequences' rows are written.
struct Pool {
    bytes: Vec<u8>,
    geometry: KvGeometry,
}

impl Pool {
    fn new(geometry: KvGeometry, blocks: usize) -> Self {
        Self { bytes: vec![0xFF; blocks * geometry.block_stride], geometry }
    }

    fn write(&mut self, cpu: &Cpu, table: &[u32], tokens: usize, samples: &mut Samples) {
        for token in 0..tokens {
            let slot = KvSlot { block: table[token / 64], row: (token % 64) as u32 };
            let (latent, rope) = (samples.floats(self.geometry.latent), samples.floats(self.geometry.rope));
            let mut view = KvViewMut { bytes: &mut self.bytes, geometry: self.geometry };
            cpu.kv_write(&mut view, LAYER, slot, &latent, &rope);
        }
    }

    fn view(&self) -> KvView<'_> {
        KvView { bytes: &self.bytes, geometry: self.geometry }
    }
}

struct Queries {
    latent: Vec<f32>,
    rope: Vec<f32>,
}

impl Queries {
    fn new(shape: MlaShape, rows: usize, samples: &mut Samples) -> Self {
        let latent = samples.floats(rows * shape.heads * shape.latent);
        let rope = samples.floats(rows * shape.heads * shape.rope);
        Self { latent, rope }
    }

    fn attend(&self, cpu: &Cpu, pool: &Pool, shape: MlaShape, rows: &[MlaRow<'_>], first: usize) -> Vec<f32> {
        let (latent, rope) = (shape.heads * shape.latent, shape.heads * shape.rope);
        let mut out = vec![f32::NAN; rows.len() * latent];
        let q_lat = &self.latent[first * latent..][..out.len()];
        let q_rope = &self.rope[first * rope..][..rows.len() * rope];
        cpu.mla_attention(&pool.view(), LAYER, shape, rows, q_lat, q_rope, &mut out);
        out
    }
}

/// Three sequences in scattered blocks: a prefill chunk that crosses blocks, and two decoding rows.
fn rows(tables: &[Vec<u32>; 3]) -> Vec<MlaRow<'_>> {
    let mut rows: Vec<_> =
        (50..150).map(|last| MlaRow { block_table: &tables[0], context: last + 1 }).collect();
    rows.push(MlaRow { block_table: &tables[1], context: 1 });
    rows.push(MlaRow { block_table: &tables[2], context: 128 });
    rows.push(MlaRow { block_table: &tables[2], context: 0 });
    rows
}

fn tables() -> [Vec<u32>; 3] {
    [vec![5, 0, 3], vec![4], vec![1, 2]]
}

fn pool(cpu: &Cpu, geometry: KvGeometry, tables: &[Vec<u32>; 3], samples: &mut Samples) -> Pool {
    let mut pool = Pool::new(geometry, 6);
    for (table, tokens) in tables.iter().zip([150, 1, 128]) {
        pool.write(cpu, table, tokens, samples);
    }
    pool
}

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8];

/// Heads, latent and rope width: odd ones, and some of V3's.
const SHAPES: [(usize, usize, usize); 5] =
    [(1, 64, 16), (4, 128, 64), (3, 160, 32), (6, 72, 8), (65, 512, 64)];

#[test]
fn agrees_with_the_reference() {
    let mut samples = Samples::new(20);
    let tables = tables();
    let rows = rows(&tables);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for format in FORMATS {
            for ((heads, latent, rope), first) in SHAPES.into_iter().zip([0, 1, 0, 1, 64]) {
                let shape = MlaShape { heads, latent, rope, scale: 0.003, first };
                let pool = pool(&cpu, geometry(format, latent, rope), &tables, &mut samples);
                let rows = if heads > 8 { &rows[95..] } else { &rows[..] };
                let queries = Queries::new(shape, rows.len(), &mut samples);
                let out = queries.attend(&cpu, &pool, shape, rows, 0);
                let mut expected = vec![f32::NAN; out.len()];
                let (q_lat, q_rope) = (&queries.latent, &queries.rope);
                reference::mla_attention(&pool.view(), LAYER, shape, rows, q_lat, q_rope, &mut expected);
                for (i, (out, expected)) in out.iter().zip(&expected).enumerate() {
                    // Values reach 100, and scores are sums of products of such.
                    assert!(
                        (out - expected).abs() < 2e-3,
                        "{isa:?} {format:?} {shape:?} [{i}]: {out} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_company() {
    let mut samples = Samples::new(21);
    let tables = tables();
    let rows = rows(&tables);
    for isa in Isa::available() {
        let (one, two) = (Cpu::with_isa(1, isa), Cpu::with_isa(2, isa));
        for format in FORMATS {
            for (heads, latent, rope) in [(4, 128, 64), (3, 72, 16)] {
                let shape = MlaShape { heads, latent, rope, scale: 0.05, first: 0 };
                let pool = pool(&one, geometry(format, latent, rope), &tables, &mut samples);
                let queries = Queries::new(shape, rows.len(), &mut samples);
                let together = bits(&queries.attend(&two, &pool, shape, &rows, 0));
                let row_values = heads * latent;
                for chunk in [1, 2, 7, 64] {
                    for (i, part) in rows.chunks(chunk).enumerate() {
                        let out = bits(&queries.attend(&one, &pool, shape, part, i * chunk));
                        let expected = &together[i * chunk * row_values..][..out.len()];
                        assert!(out == expected, "{isa:?} {format:?} {shape:?}: rows from {} on", i * chunk);
                    }
                }
            }
        }
    }
}

/// Later rows of a block may hold anything, also for a query that shares its walk with one that reads them.
#[test]
fn rows_past_the_context_have_no_effect() {
    let mut samples = Samples::new(22);
    let shape = MlaShape { heads: 5, latent: 128, rope: 32, scale: 0.05, first: 0 };
    let table = vec![0];
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let mut pool = Pool::new(geometry(KvFormat::Fp8, 128, 32), 1);
        pool.write(&cpu, &table, 9, &mut samples);
        let rows = [9, 10].map(|context| MlaRow { block_table: &table, context });
        let queries = Queries::new(shape, 2, &mut samples);
        // The tenth row is NaN.
        let out = queries.attend(&cpu, &pool, shape, &rows, 0);
        assert!(out[..5 * 128].iter().all(|x| x.is_finite()), "{isa:?}");
        assert!(out[5 * 128..].iter().all(|x| x.is_nan()), "{isa:?}");
        assert_eq!(bits(&out[..5 * 128]), bits(&queries.attend(&cpu, &pool, shape, &rows[..1], 0)));
    }
}

/// The rows before the first may hold anything, and leaving them out is what a sequence without them gets.
#[test]
fn rows_before_the_first_have_no_effect() {
    let mut samples = Samples::new(24);
    let shape = MlaShape { heads: 5, latent: 128, rope: 32, scale: 0.05, first: 1 };
    let cpu = Cpu::new(1);
    // The second sequence is the first without its first row, in 1-token blocks so that both can share the bytes.
    let mut geometry = geometry(KvFormat::Fp8, 128, 32);
    (geometry.block_tokens, geometry.layer_stride) = (1, geometry.row_bytes);
    geometry.block_stride = LAYERS * geometry.layer_stride;
    let mut pool = Pool { bytes: vec![0xFF; 140 * geometry.block_stride], geometry };
    for block in 1..140 {
        let (latent, rope) = (samples.floats(128), samples.floats(32));
        let mut view = KvViewMut { bytes: &mut pool.bytes, geometry };
        cpu.kv_write(&mut view, LAYER, KvSlot { block, row: 0 }, &latent, &rope);
    }
    let table: Vec<u32> = (0..140).collect();
    let rows = [1, 2, 65, 66, 140].map(|context| MlaRow { block_table: &table, context });
    let whole = rows.map(|row| MlaRow { block_table: &table[1..], context: row.context - 1 });
    let queries = Queries::new(shape, rows.len(), &mut samples);
    let out = queries.attend(&cpu, &pool, shape, &rows, 0);
    let expected = queries.attend(&cpu, &pool, MlaShape { first: 0, ..shape }, &whole, 0);
    assert_eq!(bits(&out), bits(&expected));
    assert!(out[..5 * 128].iter().all(|&x| x == 0.0), "a context that ends before the first row is empty");
}

#[test]
fn no_rows() {
    let shape = MlaShape { heads: 5, latent: 128, rope: 32, scale: 0.05, first: 0 };
    let pool = Pool::new(geometry(KvFormat::Fp8, 128, 32), 0);
    Cpu::new(1).mla_attention(&pool.view(), LAYER, shape, &[], &[], &[], &mut []);
}

/// A written row holds codes, scales and bf16 where the layout says, and touches nothing else.
#[test]
fn kv_write_lays_out_a_row() {
    let mut samples = Samples::new(23);
    let geometry = geometry(KvFormat::Fp8, 160, 20);
    assert_eq!((geometry.payload_bytes(), geometry.row_bytes), (160 + 8 + 40, 208));
    let mut latent = samples.floats(160);
    latent[..128].iter_mut().for_each(|x| *x *= 1e-9);
    let rope = samples.floats(20);
    for isa in Isa::available() {
        let mut pool = Pool::new(geometry, 2);
        let slot = KvSlot { block: 1, row: 7 };
        let mut view = KvViewMut { bytes: &mut pool.bytes, geometry };
        Cpu::with_isa(1, isa).kv_write(&mut view, LAYER, slot, &latent, &rope);
        let start = geometry.block_stride + geometry.layer_stride + 7 * geometry.row_bytes;
        let (row, end) = (&pool.bytes[start..], start + geometry.row_bytes);
        for (i, block) in latent.chunks(128).enumerate() {
            let amax = block.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            assert_eq!(row[160 + 4 * i..][..4], (amax / 448.0).to_le_bytes());
            for (j, x) in block.iter().enumerate() {
                assert_eq!(
                    row[i * 128 + j],
                    fp8::encode(x / (amax / 448.0)),
                    "{isa:?} channel {}",
                    i * 128 + j
                );
            }
        }
        for (i, x) in rope.iter().enumerate() {
            assert_eq!(row[168 + 2 * i..][..2], fp8::to_bf16(*x).to_le_bytes());
        }
        assert!(pool.bytes[..start].iter().chain(&pool.bytes[end..]).all(|&b| b == 0xFF), "{isa:?}");
    }
}

#[test]
fn an_all_zero_latent_stays_zero() {
    for format in FORMATS {
        let geometry = geometry(format, 64, 16);
        let mut pool = Pool::new(geometry, 1);
        let slot = KvSlot { block: 0, row: 0 };
        let mut view = KvViewMut { bytes: &mut pool.bytes, geometry };
        Cpu::new(1).kv_write(&mut view, LAYER, slot, &[0.0; 64], &[0.0; 16]);
        let row = reference::decode_row(pool.view().row(LAYER, slot), &geometry);
        assert_eq!(row, [0.0; 80]);
    }
}
