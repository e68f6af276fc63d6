//! Every operator at a model's shapes.

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use compute::{
    ActivationFormat, Activations, Arena, Cpu, InputRows, KvFormat, KvGeometry, KvSlot, KvView, KvViewMut,
    LinearJob, Matrix, MlaRow, MlaShape, RopeRows, RopeTable, RoutingRule, ScaleFormat, Scoring, Selection,
};
use engine::SequenceSampler;
use model::{SamplingParams, TokenId};

use super::machine::Arithmetic;
use super::shapes::Shapes;
use super::timing::{self, Effort, Figure, Work};

/// Rows of a product: decode batches, a verification, a prefill chunk.
const PRODUCT_ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 256];
/// Rows of what is done to each row by itself.
const ROWS: [usize; 3] = [1, 16, 256];
/// Rows of the head that are timed: V3's whole head is 1.9 GB, and every row is like the next.
const HEAD_ROWS_MAX: usize = 32_768;
/// Sequences, rows each, and context: decode alone and in a batch, and the last chunk of a prompt.
const ATTENTION: [(usize, usize, usize); 6] =
    [(1, 1, 512), (1, 1, 4096), (1, 1, 16_384), (8, 1, 4096), (16, 1, 1024), (1, 64, 1024)];
const BLOCK_TOKENS: usize = 64;
const FP8: ActivationFormat = ActivationFormat::Fp8(ScaleFormat::F32);

/// Everything, in the order of a step.
pub fn all(cpu: &Cpu, shapes: &Shapes, effort: Effort) -> anyhow::Result<Vec<Figure>> {
    let weights = weights(effort.weight_bytes);
    let mut bench = Bench { cpu, shapes, effort, weights, figures: Vec::new() };
    bench.by_row();
    bench.products()?;
    bench.attention();
    bench.route();
    bench.expert_ffn()?;
    bench.sampler();
    Ok(bench.figures)
}

struct Bench<'a> {
    cpu: &'a Cpu,
    shapes: &'a Shapes,
    effort: Effort,
    /// Bytes that are sound weights in FP8 and in BF16; matrices are cut from them.
    weights: Bytes,
    figures: Vec<Figure>,
}

impl Bench<'_> {
    fn record(
        &mut self,
        operator: &'static str,
        shape: String,
        rows: usize,
        work: Work,
        call: impl FnMut(usize),
    ) {
        let times: Vec<Duration> = timing::times(self.effort, call);
        self.figures.push(Figure::new(operator, shape, rows, work, &times));
    }

    /// Norm, quantisation, SwiGLU's product, rotation and cache write.
    fn by_row(&mut self) {
        eprintln!("measuring rows …");
        let (cpu, Shapes { hidden, inner, .. }) = (self.cpu, *self.shapes);
        for rows in ROWS {
            let x = values(rows * hidden);
            let (weight, mut y) = (values(hidden), vec![0.0; rows * hidden]);
            let bytes = |per_value: usize, width: usize| Work {
                bytes: (rows * width * per_value) as f64,
                operations: 0.0,
                arithmetic: Arithmetic::F32,
                from_memory: false,
            };
            let shape = format!("{hidden}");
            self.record("rms_norm", shape.clone(), rows, bytes(8, hidden), |_| {
                cpu.rms_norm(black_box(&x), &weight, 1e-6, &mut y);
            });
            let mut activations = Activations::new();
            self.record("quantise fp8", shape, rows, bytes(5, hidden), |_| {
                activations.prepare(cpu, black_box(&x), rows, hidden, FP8);
            });
            let (gate, up) = (values(rows * inner), values(rows * inner));
            let mut product = vec![0.0; rows * inner];
            self.record("silu_mul", format!("{inner}"), rows, bytes(12, inner), |_| {
                cpu.silu_mul(black_box(&gate), &up, &mut product);
            });
        }
        for rows in ROWS {
            self.rope_and_cache(rows);
        }
    }

    fn rope_and_cache(&mut self, rows: usize) {
        let (cpu, Shapes { heads, nope, rope, latent, .. }) = (self.cpu, *self.shapes);
        let frequencies: Vec<f64> =
            (0..rope / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / rope as f64)).collect();
        let table = RopeTable::new(&frequencies, 1.0, 4096);
        let positions: Vec<u32> = (0..rows as u32).collect();
        let (mut queries, mut keys) = (values(rows * heads * (nope + rope)), values(rows * rope));
        let latents = values(rows * latent);
        let geometry = geometry(latent, rope);
        let mut bytes = vec![0; rows.div_ceil(BLOCK_TOKENS) * geometry.block_stride];
        let work = Work {
            bytes: (rows * (8 * rope * (heads + 1) + 4 * latent + geometry.row_bytes)) as f64,
            operations: 0.0,
            arithmetic: Arithmetic::F32,
            from_memory: false,
        };
        let query_rows = RopeRows { per_position: heads, stride: nope + rope, offset: nope };
        let key_rows = RopeRows { per_position: 1, stride: rope, offset: 0 };
        self.record("rope + kv_write", format!("{heads} heads, {latent}+{rope} fp8"), rows, work, |_| {
            cpu.rope_interleaved(&mut queries, query_rows, &positions, &table);
            cpu.rope_interleaved(&mut keys, key_rows, &positions, &table);
            let mut view = KvViewMut { bytes: &mut bytes, geometry };
            for row in 0..rows {
                let slot = KvSlot { block: (row / BLOCK_TOKENS) as u32, row: (row % BLOCK_TOKENS) as u32 };
                cpu.kv_write(
                    &mut view,
                    0,
                    slot,
                    &latents[row * latent..][..latent],
                    &keys[row * rope..][..rope],
                );
            }
        });
    }

    /// Projections in FP8, one of them and the head in BF16, the router in f32.
    fn products(&mut self) -> anyhow::Result<()> {
        eprintln!("measuring products …");
        let Shapes { hidden, heads, value, vocab, experts, .. } = *self.shapes;
        for (name, n, k) in self.shapes.projections() {
            self.product("linear fp8", name, n, k, FP8)?;
        }
        self.product("linear bf16", "o", hidden, heads * value, ActivationFormat::Bf16)?;
        self.product("linear bf16", "head", vocab.min(HEAD_ROWS_MAX), hidden, ActivationFormat::Bf16)?;
        self.product("linear f32", "router", experts, hidden, ActivationFormat::F32)
    }

    fn product(
        &mut self,
        operator: &'static str,
        name: &str,
        n: usize,
        k: usize,
        format: ActivationFormat,
    ) -> anyhow::Result<()> {
        let cpu = self.cpu;
        let matrices = self.matrices(n, k, format)?;
        for rows in PRODUCT_ROWS {
            let mut x = Activations::new();
            x.prepare(cpu, &values(rows * k), rows, k, format);
            let mut y = vec![0.0; rows * n];
            let (arithmetic, weight_bytes) = match format {
                ActivationFormat::F32 => (Arithmetic::F32, 4),
                ActivationFormat::Bf16 => (Arithmetic::Bf16, 2),
                ActivationFormat::Fp8(_) => (Arithmetic::Bf16, 1),
            };
            let work = Work {
                bytes: (n * k * weight_bytes) as f64,
                operations: (2 * rows * n * k) as f64,
                arithmetic,
                from_memory: true,
            };
            self.record(operator, format!("{name} [{n}, {k}]"), rows, work, |call| {
                cpu.linear(&matrices[call % matrices.len()], black_box(&x), &mut y);
            });
        }
        Ok(())
    }

    /// As many matrices as the weights give, one at least.
    fn matrices(&self, n: usize, k: usize, format: ActivationFormat) -> anyhow::Result<Vec<Matrix>> {
        let width = match format {
            ActivationFormat::F32 => {
                let (one, count) = (values(n * k), (self.weights.len() / (n * k * 4)).max(1));
                return (0..count).map(|_| Ok(Matrix::f32(n, k, one.clone())?)).collect();
            }
            ActivationFormat::Bf16 => 2,
            ActivationFormat::Fp8(_) => 1,
        };
        let size = n * k * width;
        let (weights, count) = match self.weights.len() / size {
            0 => (weights(size), 1),
            count => (self.weights.clone(), count),
        };
        let mut arena = Arena::new();
        let matrix = |i: usize| {
            let bytes = weights.slice(i * size..(i + 1) * size);
            let matrix = match format {
                ActivationFormat::Fp8(_) => {
                    Matrix::fp8(n, k, bytes, vec![1e-3; n.div_ceil(128) * k.div_ceil(128)])?
                }
                _ => Matrix::bf16(n, k, bytes)?,
            };
            Ok(matrix.arranged(&mut arena)?)
        };
        (0..count).map(matrix).collect()
    }

    /// MLA over FP8 blocks.
    fn attention(&mut self) {
        eprintln!("measuring attention …");
        let (cpu, Shapes { heads, latent, rope, nope, .. }) = (self.cpu, *self.shapes);
        let geometry = geometry(latent, rope);
        let most = ATTENTION.iter().map(|(sequences, _, context)| sequences * context).max().unwrap_or(0);
        // A fraction of the weights' bytes: a step reads a layer of the cache between two layers of weights.
        let blocks = (self.effort.weight_bytes / 4 / geometry.block_stride).max(most / BLOCK_TOKENS);
        let mut bytes = Vec::with_capacity(blocks * geometry.block_stride);
        bytes.resize(geometry.block_stride, 0);
        let (latents, keys) = (values(BLOCK_TOKENS * latent), values(BLOCK_TOKENS * rope));
        let mut view = KvViewMut { bytes: &mut bytes, geometry };
        for row in 0..BLOCK_TOKENS {
            let slot = KvSlot { block: 0, row: row as u32 };
            cpu.kv_write(&mut view, 0, slot, &latents[row * latent..][..latent], &keys[row * rope..][..rope]);
        }
        for _ in 1..blocks {
            bytes.extend_from_within(..geometry.block_stride);
        }
        let view = KvView { bytes: &bytes, geometry };
        // Twice around, so that a table may begin anywhere.
        let table: Vec<u32> = (0..blocks as u32).chain(0..blocks as u32).collect();
        let shape = MlaShape { heads, latent, rope, scale: ((nope + rope) as f32).powf(-0.5), first: 0 };
        for (sequences, chunk, context) in ATTENTION {
            let queries = sequences * chunk * heads;
            let (q_latent, q_rope) = (values(queries * latent), values(queries * rope));
            let mut out = vec![0.0; queries * latent];
            let of_sequence = context / BLOCK_TOKENS;
            let seen: usize = (0..chunk).map(|i| context - chunk + i + 1).sum::<usize>() * sequences;
            let work = Work {
                bytes: (sequences * context * geometry.row_bytes) as f64,
                operations: (2 * seen * heads * (2 * latent + rope)) as f64,
                arithmetic: Arithmetic::F32,
                from_memory: true,
            };
            let name = format!("{sequences} × {chunk} rows, context {context}");
            self.record("mla fp8", name, sequences * chunk, work, |call| {
                let first = call * sequences * of_sequence % blocks;
                let rows: Vec<MlaRow<'_>> = (0..sequences)
                    .flat_map(|sequence| {
                        let start = (first + sequence * of_sequence) % blocks;
                        let block_table = &table[start..start + of_sequence];
                        let row = move |i| MlaRow { block_table, context: (context - chunk + i + 1) as u32 };
                        (0..chunk).map(row)
                    })
                    .collect();
                cpu.mla_attention(&view, 0, shape, &rows, black_box(&q_latent), &q_rope, &mut out);
            });
        }
    }

    fn route(&mut self) {
        let (cpu, Shapes { experts, topk, groups: (groups, kept), .. }) = (self.cpu, *self.shapes);
        let rule = rule(topk, groups, kept);
        let bias = vec![0.0; experts];
        for rows in ROWS {
            let logits = values(rows * experts);
            let (mut ids, mut weights) = (vec![0; rows * topk], vec![0.0; rows * topk]);
            let work = Work {
                bytes: (rows * experts * 4) as f64,
                operations: 0.0,
                arithmetic: Arithmetic::F32,
                from_memory: false,
            };
            self.record("route", format!("top-{topk} of {experts}"), rows, work, |_| {
                cpu.route(black_box(&logits), experts, Some(&bias), &rule, &mut ids, &mut weights);
            });
        }
    }

    /// The routed experts of a step: only those that some token chose, each over its own tokens.
    fn expert_ffn(&mut self) -> anyhow::Result<()> {
        eprintln!("measuring experts …");
        let cpu = self.cpu;
        let Shapes { hidden, expert_inner: inner, experts, topk, groups: (groups, kept), .. } = *self.shapes;
        // Experts that lie in memory once; the others borrow theirs, 512 MB further on.
        let held = (self.effort.weight_bytes / (3 * hidden * inner)).clamp(1, experts);
        let up = self.matrices(inner, hidden, FP8)?;
        let down = self.matrices(hidden, inner, FP8)?;
        let bias = vec![0.0; experts];
        for rows in PRODUCT_ROWS {
            let (mut ids, mut weights) = (vec![0; rows * topk], vec![0.0; rows * topk]);
            let logits = values(rows * experts);
            cpu.route(&logits, experts, Some(&bias), &rule(topk, groups, kept), &mut ids, &mut weights);
            let chosen: Vec<(usize, Vec<u32>)> = (0..experts)
                .map(|expert| {
                    let rows = ids.chunks_exact(topk).zip(0u32..);
                    let rows = rows.filter(|(ids, _)| ids.contains(&(expert as u16)));
                    (expert, rows.map(|(_, row)| row).collect::<Vec<u32>>())
                })
                .filter(|(_, rows)| !rows.is_empty())
                .collect();
            let mut x = Activations::new();
            x.prepare(cpu, &values(rows * hidden), rows, hidden, FP8);
            let mut inner_x = Activations::new();
            let assigned = rows * topk;
            let (mut gates, mut ups) = (vec![0.0; assigned * inner], vec![0.0; assigned * inner]);
            let (mut products, mut out) = (vec![0.0; assigned * inner], vec![0.0; assigned * hidden]);
            let work = Work {
                bytes: (chosen.len() * 3 * hidden * inner) as f64,
                operations: (2 * rows * topk * 3 * hidden * inner) as f64,
                arithmetic: Arithmetic::Bf16,
                from_memory: true,
            };
            let name = format!("{} of {experts} × [{inner}, {hidden}]", chosen.len());
            self.record("expert ffn fp8", name, rows, work, |call| {
                let at = |expert: usize| 2 * (call * chosen.len() + expert) % (2 * held);
                // One loop over all experts for each half, as the engine does it.
                let halves = gates_and_ups(&mut gates, &mut ups, &chosen, inner);
                cpu.linear_all(halves.map(|(half, expert, rows, out)| LinearJob {
                    weights: &up[(at(expert) + half) % up.len()],
                    input: black_box(&x),
                    rows: InputRows::Index(rows),
                    out,
                }));
                cpu.silu_mul(&gates, &ups, &mut products);
                inner_x.prepare(cpu, &products, assigned, inner, FP8);
                let (mut first, mut rest) = (0, &mut out[..]);
                cpu.linear_all(chosen.iter().map(|(expert, rows)| {
                    let (out, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * hidden);
                    (first, rest) = (first + rows.len(), others);
                    let rows = InputRows::Range { first: first - rows.len(), count: rows.len() };
                    LinearJob {
                        weights: &down[(at(*expert) + held) % down.len()],
                        input: &inner_x,
                        rows,
                        out,
                    }
                }));
            });
        }
        Ok(())
    }

    fn sampler(&mut self) {
        let vocab = self.shapes.vocab;
        let logits = values(vocab);
        let usual = SamplingParams { temperature: 0.6, top_p: 0.95, ..SamplingParams::default() };
        let plain = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        for (name, params) in
            [("greedy", SamplingParams::greedy()), ("top-p 0.95", usual), ("temperature 1", plain)]
        {
            let mut sampler = SequenceSampler::new(&params, 0, &[TokenId(1)]);
            let mut row = logits.clone();
            let work = Work {
                bytes: (vocab * 4) as f64,
                operations: 0.0,
                arithmetic: Arithmetic::F32,
                from_memory: false,
            };
            self.record("sampler", format!("{name} of {vocab}"), 1, work, |call| {
                row.copy_from_slice(&logits);
                black_box(sampler.sample(&mut row, call, &[]));
            });
        }
    }
}

fn rule(top_k: usize, groups: usize, groups_kept: usize) -> RoutingRule {
    RoutingRule {
        scoring: Scoring::Sigmoid,
        selection: Selection::NoauxTc,
        top_k,
        groups,
        groups_kept,
        normalise: true,
        scale: 2.5,
    }
}

/// One layer of blocks of FP8 rows.
fn geometry(latent: usize, rope: usize) -> KvGeometry {
    let mut geometry = KvGeometry {
        format: KvFormat::Fp8,
        latent,
        rope,
        row_bytes: 0,
        layer_stride: 0,
        block_stride: 0,
        block_tokens: BLOCK_TOKENS,
    };
    geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
    geometry.layer_stride = BLOCK_TOKENS * geometry.row_bytes;
    geometry.block_stride = geometry.layer_stride;
    geometry
}

/// Values between -1 and 1 that are no pattern for any of the operators.
fn values(count: usize) -> Vec<f32> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        values.push((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0);
    }
    values
}

/// Bytes that are finite as E4M3 and, two by two, as BF16 between 1e-4 and 1: neither NaN nor subnormal in either.
fn weights(bytes: usize) -> Bytes {
    let pattern: Vec<u8> = (0..1usize << 16)
        .map(|i| if i % 2 == 0 { (i * 31 % 0x78) as u8 } else { 0x39 + (i * 7 % 6) as u8 })
        .collect();
    let mut weights = Vec::with_capacity(bytes.next_multiple_of(pattern.len()));
    while weights.len() < bytes {
        weights.extend_from_slice(&pattern);
    }
    weights.truncate(bytes);
    weights.into()
}

/// For each half of the first two projections, and each expert: which half, the expert, its rows, their outputs.
fn gates_and_ups<'a>(
    gates: &'a mut [f32],
    ups: &'a mut [f32],
    chosen: &'a [(usize, Vec<u32>)],
    width: usize,
) -> impl Iterator<Item = (usize, usize, &'a [u32], &'a mut [f32])> {
    [gates, ups].into_iter().enumerate().flat_map(move |(half, mut rest)| {
        chosen.iter().map(move |(expert, rows)| {
            let (out, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * width);
            rest = others;
            (half, *expert, &rows[..], out)
        })
    })
}
