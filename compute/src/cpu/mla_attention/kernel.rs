//! The four phases of a step over 64 tokens: decode, score, weigh, sum.

use super::super::vector::Vector;
use super::{PAD, Scratch, TOKENS, Walk, padded};
use crate::KvFormat;
use crate::fp8::BLOCK;

/// Channels of the value sum that are in registers at a time, in vectors.
const SUM_VECTORS: usize = 4;

impl Walk<'_> {
    /// Decodes the rows of the block that starts at `token`, of `tokens` in all, and asks for those of the next.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    #[inline(always)]
    pub(super) unsafe fn decode<V: Vector>(&self, scratch: &mut Scratch<'_>, token: usize, tokens: usize) {
        let count = TOKENS.min(tokens - token);
        let geometry = &self.view.geometry;
        let (latent_padded, width) = padded(self.shape);
        let mut t = 0;
        while t < count {
            if token + TOKENS + t < tokens {
                let next = self.stored_row(token + TOKENS + t);
                let mut line = 0;
                while line < next.len() {
                    V::prefetch(next.as_ptr().wrapping_add(line));
                    line += 64;
                }
            }
            let stored = self.stored_row(token + t);
            let (front, rope) = stored.split_at(geometry.rope_offset());
            let out = &mut scratch.cache[t * width..][..width];
            let (latent_out, rope_out) = out.split_at_mut(latent_padded);
            // SAFETY: the machine has the instruction set.
            unsafe {
                match geometry.format {
                    KvFormat::F32 => {
                        copy_f32(front, latent_out);
                        copy_f32(rope, rope_out);
                    }
                    KvFormat::Bf16 => {
                        decode_bf16::<V>(front, latent_out);
                        decode_bf16::<V>(rope, rope_out);
                    }
                    KvFormat::Fp8 => {
                        let (codes, scales) = front.split_at(geometry.latent);
                        decode_e4m3::<V>(codes, scales, latent_out);
                        decode_bf16::<V>(rope, rope_out);
                    }
                }
            }
            t += 1;
        }
    }

    /// Scores of all queries for the block that starts at `token`. Groups of four tokens are computed whole; what lies
    /// past a query's context is not looked at afterwards.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    #[inline(always)]
    pub(super) unsafe fn score<V: Vector>(&self, scratch: &mut Scratch<'_>, token: usize) {
        let width = padded(self.shape).1;
        // Four tokens are outermost: their rows stay in the level-1 cache for all queries.
        let mut t = 0;
        while t < TOKENS {
            let mut i = 0;
            while i < self.queries {
                let alike = self.alike(i, token, 4);
                if t < self.visible(i, token) {
                    // SAFETY: `alike` queries from `i` on and four tokens from `t` on are inside the scratch.
                    unsafe {
                        let queries = scratch.queries.as_ptr().add(i * width);
                        let cache = scratch.cache.as_ptr().add(t * width);
                        let scores = scratch.scores.as_mut_ptr().add(i * TOKENS + t);
                        let scale = self.shape.scale;
                        match alike {
                            4 if V::LANES == PAD => dot::<V, 4>(queries, cache, width, scale, scores),
                            4 => {
                                dot::<V, 2>(queries, cache, width, scale, scores);
                                let (queries, scores) = (queries.add(2 * width), scores.add(2 * TOKENS));
                                dot::<V, 2>(queries, cache, width, scale, scores);
                            }
                            3 => {
                                dot::<V, 2>(queries, cache, width, scale, scores);
                                let (queries, scores) = (queries.add(2 * width), scores.add(2 * TOKENS));
                                dot::<V, 1>(queries, cache, width, scale, scores);
                            }
                            2 => dot::<V, 2>(queries, cache, width, scale, scores),
                            _ => dot::<V, 1>(queries, cache, width, scale, scores),
                        }
                    }
                }
                i += alike;
            }
            t += 4;
        }
    }

    /// Scores to probabilities relative to the largest score so far, zero past the context; corrections for what was
    /// relative to an earlier one.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    #[inline(always)]
    pub(super) unsafe fn weigh<V: Vector>(&self, scratch: &mut Scratch<'_>, token: usize) {
        let mut i = 0;
        while i < self.queries {
            let visible = self.visible(i, token);
            if visible > 0 {
                let scores = &mut scratch.scores[i * TOKENS..][..TOKENS];
                scores[visible..].fill(f32::NEG_INFINITY);
                // SAFETY: the machine has the instruction set; 64 scores are whole vectors.
                unsafe {
                    let scores = scores.as_mut_ptr();
                    let mut largest = V::splat(scratch.largest[i]);
                    let mut t = 0;
                    while t < TOKENS {
                        largest = V::load(scores.add(t)).max(largest);
                        t += V::LANES;
                    }
                    let largest = largest.largest();
                    let correction = V::splat(scratch.largest[i] - largest).exp().first();
                    let mut total = V::splat(0.0);
                    t = 0;
                    while t < TOKENS {
                        let p = V::load(scores.add(t)).sub(V::splat(largest)).exp();
                        p.store(scores.add(t));
                        t += V::LANES;
                    }
                    t = visible;
                    while t < TOKENS {
                        *scores.add(t) = 0.0;
                        t += 1;
                    }
                    t = 0;
                    while t < TOKENS {
                        total = total.add(V::load(scores.add(t)));
                        t += V::LANES;
                    }
                    scratch.totals[i] = scratch.totals[i] * correction + total.sum();
                    scratch.largest[i] = largest;
                    scratch.corrections[i] = correction;
                }
            }
            i += 1;
        }
    }

    /// Adds the block's latents, weighed, to the corrected sums.
    ///
    /// # Safety
    /// The machine has `V`'s instruction set.
    #[inline(always)]
    pub(super) unsafe fn sum<V: Vector>(&self, scratch: &mut Scratch<'_>, token: usize) {
        let (latent_padded, width) = padded(self.shape);
        // A few channels are outermost: theirs of 64 rows stay in the level-1 cache for all queries.
        let mut channel = 0;
        while channel < latent_padded {
            let wide = latent_padded - channel >= SUM_VECTORS * V::LANES;
            let mut i = 0;
            while i < self.queries {
                let visible = self.visible(i, token);
                let alike = self.alike(i, token, if V::LANES == PAD { 4 } else { 1 });
                // SAFETY: `alike` queries from `i` on, and the channels, are inside the scratch.
                unsafe {
                    let cache = scratch.cache.as_ptr().add(channel);
                    let weights = scratch.scores.as_ptr().add(i * TOKENS);
                    let corrections = scratch.corrections.as_ptr().add(i);
                    let sums = scratch.sums.as_mut_ptr().add(i * latent_padded + channel);
                    let step = Sum { cache, width, weights, corrections, sums, latent_padded, visible };
                    match (visible, wide, alike) {
                        (0, _, _) => {}
                        (_, true, 4) => step.add::<V, 4, SUM_VECTORS>(),
                        (_, true, 3) => {
                            step.add::<V, 2, SUM_VECTORS>();
                            step.query(2).add::<V, 1, SUM_VECTORS>();
                        }
                        (_, true, 2) => step.add::<V, 2, SUM_VECTORS>(),
                        (_, true, _) => step.add::<V, 1, SUM_VECTORS>(),
                        (_, false, _) => {
                            let mut q = 0;
                            while q < alike {
                                step.query(q).add::<V, 1, 1>();
                                q += 1;
                            }
                        }
                    }
                }
                i += alike;
            }
            channel += if wide { SUM_VECTORS * V::LANES } else { V::LANES };
        }
    }

    /// How many queries from `i` on, at most `most`, see as much of the block as query `i`.
    #[inline(always)]
    fn alike(&self, i: usize, token: usize, most: usize) -> usize {
        let visible = self.visible(i, token);
        let mut count = 1;
        while count < most && i + count < self.queries && self.visible(i + count, token) == visible {
            count += 1;
        }
        count
    }
}

#[inline(always)]
fn copy_f32(stored: &[u8], out: &mut [f32]) {
    let values = stored.as_chunks::<4>().0;
    let mut i = 0;
    while i < values.len() {
        out[i] = f32::from_le_bytes(values[i]);
        i += 1;
    }
}

#[inline(always)]
unsafe fn decode_bf16<V: Vector>(stored: &[u8], out: &mut [f32]) {
    let values = stored.as_chunks::<2>().0;
    let mut i = 0;
    // SAFETY: whole vectors inside both slices.
    unsafe {
        while i + V::LANES <= values.len() {
            V::load_bf16(stored.as_ptr().add(2 * i)).store(out.as_mut_ptr().add(i));
            i += V::LANES;
        }
    }
    while i < values.len() {
        out[i] = crate::fp8::from_bf16(u16::from_le_bytes(values[i]));
        i += 1;
    }
}

#[inline(always)]
unsafe fn decode_e4m3<V: Vector>(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    let scales = scales.as_chunks::<4>().0;
    let mut block = 0;
    while block < scales.len() {
        let scale = f32::from_le_bytes(scales[block]);
        let end = codes.len().min((block + 1) * BLOCK);
        let mut i = block * BLOCK;
        // SAFETY: whole vectors inside both slices.
        unsafe {
            while i + 64 <= end {
                V::scale_e4m3_64(codes.as_ptr().add(i), V::splat(scale), out.as_mut_ptr().add(i));
                i += 64;
            }
            while i + V::LANES <= end {
                V::load_e4m3(codes.as_ptr().add(i)).mul(V::splat(scale)).store(out.as_mut_ptr().add(i));
                i += V::LANES;
            }
        }
        while i < end {
            out[i] = crate::fp8::decode(codes[i]) * scale;
            i += 1;
        }
        block += 1;
    }
}

/// Scores of `Q` queries for four tokens, each a sum over the channels in lanes.
///
/// # Safety
/// `Q` queries and four rows of `width` values, a multiple of the lanes; room for four scores per query, `TOKENS` apart.
#[inline(always)]
unsafe fn dot<V: Vector, const Q: usize>(
    queries: *const f32,
    cache: *const f32,
    width: usize,
    scale: f32,
    scores: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); 4]; Q];
        let mut channel = 0;
        while channel < width {
            let mut rows = [V::splat(0.0); 4];
            let mut t = 0;
            while t < 4 {
                rows[t] = V::load(cache.add(t * width + channel));
                t += 1;
            }
            let mut q = 0;
            while q < Q {
                let query = V::load(queries.add(q * width + channel));
                t = 0;
                while t < 4 {
                    sums[q][t] = query.mul_add(rows[t], sums[q][t]);
                    t += 1;
                }
                q += 1;
            }
            channel += V::LANES;
        }
        if let Some(sums) = four(&sums) {
            let values = V::sum4x4(*sums);
            let mut q = 0;
            while q < 4 {
                store_scores(values[q], scale, scores.add(q * TOKENS));
                q += 1;
            }
            return;
        }
        let mut q = 0;
        while q < Q {
            store_scores(V::sum4(sums[q]), scale, scores.add(q * TOKENS));
            q += 1;
        }
    }
}

/// All of them, if they are four.
#[inline(always)]
fn four<T>(of: &[T]) -> Option<&[T; 4]> {
    of.try_into().ok()
}

/// # Safety
/// Room for four scores.
#[inline(always)]
unsafe fn store_scores(values: [f32; 4], scale: f32, scores: *mut f32) {
    let mut t = 0;
    while t < 4 {
        // SAFETY: the caller's promise.
        unsafe { *scores.add(t) = values[t] * scale };
        t += 1;
    }
}

/// What a step of the weighted sum works on.
#[derive(Clone, Copy)]
struct Sum {
    cache: *const f32,
    width: usize,
    weights: *const f32,
    corrections: *const f32,
    sums: *mut f32,
    latent_padded: usize,
    visible: usize,
}

impl Sum {
    /// The same for the `q`-th query from here.
    ///
    /// # Safety
    /// There are so many queries.
    #[inline(always)]
    unsafe fn query(self, q: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                weights: self.weights.add(q * TOKENS),
                corrections: self.corrections.add(q),
                sums: self.sums.add(q * self.latent_padded),
                ..self
            }
        }
    }

    /// `sums = sums · correction + Σ_t weight_t · row_t` for `Q` queries and `C` vectors of channels, tokens in order.
    ///
    /// # Safety
    /// The pointers lead to so many queries, `visible` rows, and channels.
    #[inline(always)]
    unsafe fn add<V: Vector, const Q: usize, const C: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[V::splat(0.0); C]; Q];
            let mut q = 0;
            while q < Q {
                let correction = V::splat(*self.corrections.add(q));
                let mut c = 0;
                while c < C {
                    sums[q][c] =
                        V::load(self.sums.add(q * self.latent_padded + c * V::LANES)).mul(correction);
                    c += 1;
                }
                q += 1;
            }
            let mut t = 0;
            while t < self.visible {
                let mut row = [V::splat(0.0); C];
                let mut c = 0;
                while c < C {
                    row[c] = V::load(self.cache.add(t * self.width + c * V::LANES));
                    c += 1;
                }
                q = 0;
                while q < Q {
                    let weight = V::broadcast(self.weights.add(q * TOKENS + t));
                    c = 0;
                    while c < C {
                        sums[q][c] = weight.mul_add(row[c], sums[q][c]);
                        c += 1;
                    }
                    q += 1;
                }
                t += 1;
            }
            q = 0;
            while q < Q {
                let mut c = 0;
                while c < C {
                    sums[q][c].store(self.sums.add(q * self.latent_padded + c * V::LANES));
                    c += 1;
                }
                q += 1;
            }
        }
    }
}
