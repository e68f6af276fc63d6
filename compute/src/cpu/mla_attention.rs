//! MLA in its absorbed form over the paged cache.
//!
//! A *query* is one head of one row. A query's context is walked in blocks of 64 tokens from the first on, with an
//! online softmax: its operations depend on its own values, its context and the cached bytes, not on which queries share
//! the walk. Sharing is all the same what makes it fast: a block of cache rows is decoded to f32 once for all queries of
//! the sequence in a task, and scores and sums are computed for several queries at a time.
//!
//! Rows past a query's context are never read for it, so that whatever lies there, NaN included, stays without effect.

mod kernel;

use super::disjoint::Disjoint;
use super::vector::{self, Operation, Vector};
use super::{Cpu, part, scratch};
use crate::{KvSlot, KvView, MlaRow, MlaShape};

/// Tokens of a softmax step; also what the pool keeps in a block, though nothing here depends on it.
const TOKENS: usize = 64;

/// Queries of a task: with V3's widths their state and a decoded block take half a 1 MB level-2 cache, and decoding is
/// a twentieth of the work.
const QUERIES_MAX: usize = 64;

/// Widths are padded with zeros to this, a multiple of every vector.
const PAD: usize = vector::LANES_MAX;

impl Cpu {
    /// `out[r, h, :] = softmax((q_lat[r, h]·c + q_rope[r, h]·k) · scale) · c` over the cache rows that query row `r`
    /// sees. `q_lat` and `out` are `[rows, heads, latent]`, `q_rope` `[rows, heads, rope]`. An empty context
    /// gives zeros.
    ///
    /// # Panics
    /// If a length or width does not fit, or a block table is too short or leads outside the pool.
    #[allow(clippy::too_many_arguments)] // Six buffers of one operator; a struct would only rename them.
    pub fn mla_attention(
        &self,
        view: &KvView<'_>,
        layer: usize,
        shape: MlaShape,
        rows: &[MlaRow<'_>],
        q_lat: &[f32],
        q_rope: &[f32],
        out: &mut [f32],
    ) {
        let geometry = &view.geometry;
        let queries = rows.len() * shape.heads;
        assert!(
            shape.latent == geometry.latent && shape.rope == geometry.rope,
            "widths of queries and cache"
        );
        assert_eq!(q_lat.len(), queries * shape.latent, "latent queries");
        assert_eq!(q_rope.len(), queries * shape.rope, "rope queries");
        assert_eq!(out.len(), queries * shape.latent, "output");
        assert!(geometry.block_tokens > 0, "tokens in a block");
        if queries == 0 {
            return;
        }
        let per_task = queries_per_task(queries, shape.heads, self.pool.threads());
        let out = Disjoint::new(out);
        let tokens: usize = rows.iter().map(|row| row.context as usize).sum();
        self.divide(queries.div_ceil(per_task), tokens * shape.heads * shape.latent, &|task| {
            let queries = part(task, per_task, queries);
            let mut first = queries.start;
            while first < queries.end {
                let end = sequence_end(rows, shape.heads, first, queries.end);
                // SAFETY: tasks, and walks of a task, have different queries.
                let out = unsafe { out.part(first * shape.latent..end * shape.latent) };
                scratch::with_f32(Scratch::len(shape), |scratch| {
                    vector::run(
                        self.isa,
                        Walk {
                            view,
                            layer,
                            shape,
                            rows,
                            q_lat,
                            q_rope,
                            first,
                            queries: end - first,
                            out,
                            scratch,
                        },
                    );
                });
                first = end;
            }
        });
    }
}

/// Whole rows where they fit a task, and something to do for every thread: two tasks each where there are so many rows,
/// so that a slow thread delays nobody; heads of a row apart where there are not even as many rows as threads, though
/// each task then decodes the same cache rows.
fn queries_per_task(queries: usize, heads: usize, threads: usize) -> usize {
    let rows = QUERIES_MAX / heads;
    let most = if rows > 0 { rows * heads } else { QUERIES_MAX };
    if queries < threads * heads {
        return most.min(queries.div_ceil(threads));
    }
    most.min((queries / heads).div_ceil(2 * threads) * heads)
}

/// End of the queries from `first` on, before `end`, that read the same sequence.
fn sequence_end(rows: &[MlaRow<'_>], heads: usize, first: usize, end: usize) -> usize {
    let table = rows[first / heads].block_table;
    let same = |row: &MlaRow<'_>| std::ptr::eq(row.block_table, table);
    let rows_alike = rows[first / heads..].iter().take_while(|row| same(row)).count();
    end.min((first / heads + rows_alike) * heads)
}

/// The parts of a task's working memory.
struct Scratch<'a> {
    /// Decoded rows `[TOKENS, latent | rope]`, both padded.
    cache: &'a mut [f32],
    /// Queries in the same layout.
    queries: &'a mut [f32],
    /// Scores, then probabilities `[queries, TOKENS]`.
    scores: &'a mut [f32],
    /// Weighted sums so far `[queries, latent padded]`.
    sums: &'a mut [f32],
    /// Largest score so far, sum of probabilities so far, and what the last step multiplies the sums by.
    largest: &'a mut [f32],
    totals: &'a mut [f32],
    corrections: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn len(shape: MlaShape) -> usize {
        let (latent, width) = padded(shape);
        TOKENS * width + QUERIES_MAX * (width + TOKENS + latent + 3)
    }

    fn split(memory: &'a mut [f32], shape: MlaShape) -> Self {
        let (latent, width) = padded(shape);
        let (cache, memory) = memory.split_at_mut(TOKENS * width);
        let (queries, memory) = memory.split_at_mut(QUERIES_MAX * width);
        let (scores, memory) = memory.split_at_mut(QUERIES_MAX * TOKENS);
        let (sums, memory) = memory.split_at_mut(QUERIES_MAX * latent);
        let (largest, memory) = memory.split_at_mut(QUERIES_MAX);
        let (totals, corrections) = memory.split_at_mut(QUERIES_MAX);
        Self { cache, queries, scores, sums, largest, totals, corrections }
    }
}

/// Padded widths of a latent, and of latent and rope together.
fn padded(shape: MlaShape) -> (usize, usize) {
    let latent = shape.latent.next_multiple_of(PAD);
    (latent, latent + shape.rope.next_multiple_of(PAD))
}

/// One sequence's cache walked for some of its queries.
struct Walk<'a> {
    view: &'a KvView<'a>,
    layer: usize,
    shape: MlaShape,
    rows: &'a [MlaRow<'a>],
    q_lat: &'a [f32],
    q_rope: &'a [f32],
    /// The first query, and how many.
    first: usize,
    queries: usize,
    out: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Walk<'_> {
    /// Cache rows that query `first + i` sees.
    #[inline(always)]
    fn context(&self, i: usize) -> usize {
        self.rows[(self.first + i) / self.shape.heads].context as usize
    }

    /// Of the block that starts at `token`, the rows that query `first + i` sees.
    #[inline(always)]
    fn visible(&self, i: usize, token: usize) -> usize {
        self.context(i).saturating_sub(token).min(TOKENS)
    }

    /// The stored row of `token`.
    fn stored_row(&self, token: usize) -> &[u8] {
        let block_tokens = self.view.geometry.block_tokens;
        let block = self.rows[self.first / self.shape.heads].block_table[token / block_tokens];
        self.view.row(self.layer, KvSlot { block, row: (token % block_tokens) as u32 })
    }

    /// Copies queries into the layout of decoded rows and starts their sums.
    fn start(&self, scratch: &mut Scratch<'_>) {
        let MlaShape { latent, rope, .. } = self.shape;
        let (latent_padded, width) = padded(self.shape);
        for i in 0..self.queries {
            let query = &mut scratch.queries[i * width..][..width];
            query.fill(0.0);
            query[..latent].copy_from_slice(&self.q_lat[(self.first + i) * latent..][..latent]);
            query[latent_padded..][..rope].copy_from_slice(&self.q_rope[(self.first + i) * rope..][..rope]);
        }
        scratch.sums[..self.queries * latent_padded].fill(0.0);
        scratch.largest[..self.queries].fill(f32::NEG_INFINITY);
        scratch.totals[..self.queries].fill(0.0);
    }

    /// Divides the sums and hands them out.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    #[inline(always)]
    unsafe fn finish<V: Vector>(&mut self, scratch: &Scratch<'_>) {
        let latent = self.shape.latent;
        let latent_padded = padded(self.shape).0;
        let mut i = 0;
        while i < self.queries {
            let empty = self.context(i) <= self.shape.first;
            let out = &mut self.out[i * latent..(i + 1) * latent];
            let sums = &scratch.sums[i * latent_padded..(i + 1) * latent_padded];
            if empty {
                out.fill(0.0);
            } else {
                // SAFETY: the machine has the instruction set; as many sums as outputs, padded to whole vectors.
                unsafe {
                    let total = V::splat(scratch.totals[i]);
                    let mut channel = 0;
                    while channel < latent {
                        let value = V::load(sums.as_ptr().add(channel)).div(total);
                        value.store_partial(out.as_mut_ptr().add(channel), latent - channel);
                        channel += V::LANES;
                    }
                }
            }
            i += 1;
        }
    }
}

impl Operation for Walk<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(mut self) {
        let memory = std::mem::take(&mut self.scratch);
        let mut scratch = Scratch::split(memory, self.shape);
        self.start(&mut scratch);
        let mut tokens = 0;
        let mut i = 0;
        while i < self.queries {
            tokens = tokens.max(self.context(i));
            i += 1;
        }
        let mut token = self.shape.first;
        // Scores are computed for four tokens at a time, also past the context; those must not be signalling NaN or
        // subnormal leftovers of another operator that cost time. Later blocks find rows of the first there.
        let first = TOKENS.min(tokens.saturating_sub(token));
        let width = padded(self.shape).1;
        scratch.cache[first * width..first.next_multiple_of(4) * width].fill(0.0);
        while token < tokens {
            // SAFETY: the machine has the instruction set; the scratch is split by the same shape.
            unsafe {
                self.decode::<V>(&mut scratch, token, tokens);
                self.score::<V>(&mut scratch, token);
                self.weigh::<V>(&mut scratch, token);
                self.sum::<V>(&mut scratch, token);
            }
            token += TOKENS;
        }
        // SAFETY: the machine has the instruction set.
        unsafe { self.finish::<V>(&scratch) };
    }
}

#[cfg(test)]
mod tests;
