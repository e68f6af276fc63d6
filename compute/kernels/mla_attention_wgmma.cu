// Attention of decode steps and verification rows over FP8 cache rows: a block has one query row, 64 of its heads and one or
// several parts of its context (mla_wgmma.cu says what these are). Four warpgroups: one decodes cache rows into shared memory, a
// tile ahead; one scores; two sum up while the next tile is scored. Where a context has several parts, mla_combine adds them.
// Rows past the context are never read.

// So many of a tile's pieces the scoring warpgroup multiplies by queries in its registers, the last ones in its order: what it
// has registers for. The pipe to shared memory is the bound, and each takes 64 of some 3,460 wavefronts a tile off it.
#define HELD 3u

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_attention_wgmma(const __grid_constant__ Attention a) {
    extern __shared__ u8 memory[];
    // Of each head: how far a tile scales its sums down; at the end of a part its sum of weights, of two parts by turns.
    __shared__ float corrections[HEADS], totals[2][HEADS];
    // Of the two stages: decoded; of both halves of their tokens: summed up. Of the weights and corrections: written, used; who
    // writes or reads corrections arrives himself. Of a part's means: stored, by whoever did it.
    __shared__ u64 barriers[9];
    __shared__ volatile u32 span[2];
    // The blocks of its parts.
    __shared__ u32 table[PARTS_MAX * SPLIT / BLOCK_TOKENS_MIN + 1];
    u32 first = blockIdx.x * HEADS, heads = min(HEADS, a.heads - first), row = blockIdx.y;
    // No kernel writes contexts and tables: they are read before the kernel in front is done.
    // What is seen, and this block's parts of it.
    u32 context = a.contexts[row], seen = context > a.first ? context - a.first : 0, span_max = a.block_parts * SPLIT;
    if (blockIdx.z > 0 && blockIdx.z * span_max >= seen) {
        previous_done();
        return;
    }
    u32 start = a.first + blockIdx.z * span_max, end = min(a.first + seen, start + span_max);
    u32 listed = a.starts[row], first_block = start / a.block_tokens;
    require((u64)listed + div_up(context, a.block_tokens) <= a.table_len && seen <= a.splits * SPLIT);
    require(a.block_parts <= PARTS_MAX && (u64)context * a.block_tokens < (u64)1 << 32);
    for (u32 i = threadIdx.x; start < end && i <= (end - 1) / a.block_tokens - first_block; i += THREADS) {
        table[i] = a.tables[listed + first_block + i];
        require(table[i] < a.blocks);
    }
    u32 shift = (1024 - ((u32)__cvta_generic_to_shared(memory) & 1023)) & 1023;
    u8 *queries = memory + shift, *weights = queries + PIECES * PIECE, *cache = weights + PIECE;
    u32 queries_at = (u32)__cvta_generic_to_shared(queries), weights_at = queries_at + PIECES * PIECE;
    u32 cache_at = weights_at + PIECE;
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 16, weighed = full + 48, used = full + 56;
    u32 stored = full + 64;
    u32 thread = threadIdx.x, lane = thread % WARP;
    // Read back by each role: kept across their parting, these would cost registers that a role has not got.
    if (thread == 0) span[0] = start, span[1] = end;
    if (thread < 2) barrier_init(full + 8 * thread, 4);
    if (thread < 4) barrier_init(empty + 8 * thread, 8);
    if (thread == 2) barrier_init(weighed, 4 * 8), barrier_init(used, 8 * 8), barrier_init(stored, 256);
    __syncthreads();
    if (thread < TOKENS / 8) {
        // The first two tiles' rows into the level-2 cache, where the kernel in front may still write one.
        for (u32 at = start + thread * 16, to = min(at + 16, end); at < to;) {
            u32 block = at / a.block_tokens, line = at % a.block_tokens, count = min(to - at, a.block_tokens - line);
            const u8 *rows = a.pool + a.layer_offset + table[block - first_block] * a.block_stride;
            prefetch_rows(rows + line * a.row_bytes, count * a.row_bytes);
            at += count;
        }
    }
    previous_done();
    u32 query = row * a.heads + first;

    // A thread's heads are `head` and eight more.
    u32 head = thread % 128 / WARP * 16 + lane / 4;
    // By all but those that decode; 8 channels at a time.
    auto load_queries = [&]() {
        // Six threads a head copy 12 chunks each and then make f16 of their own.
        u32 own = thread - 128, line = own / 6, from = own % 6, present = line < heads ? 16 : 0;
        const u16 *latents = a.q_latent + (u64)(query + (present ? line : 0)) * LATENT;
        const u16 *keys = a.q_rope + (u64)(query + (present ? line : 0)) * ROPE;
#pragma unroll
        for (u32 i = 0; i < 12; i++) {
            u32 chunk = from + 6 * i;
            const u16 *q = chunk < LATENT / 8 ? latents + 8 * chunk : keys + 8 * chunk - LATENT;
            copy16(queries_at + chunk / 8 * PIECE + swizzled(line, chunk % 8), q, present);
        }
        copies_commit();
        copies_wait<0>();
#pragma unroll
        for (u32 i = 0; i < 12; i++) {
            u32 chunk = from + 6 * i;
            uint4 *at = (uint4 *)(queries + chunk / 8 * PIECE + swizzled(line, chunk % 8)), bits = *at;
            *at = chunk < LATENT / 8
                      ? make_uint4(to_f16(bits.x), to_f16(bits.y), to_f16(bits.z), to_f16(bits.w))
                      : make_uint4(stretch(bits.x), stretch(bits.y), stretch(bits.z), stretch(bits.w));
        }
        written_for_matrix_unit();
        some_sync(QUERIES, THREADS - 128);
    };

    if (thread < 128) {
        registers_down<72>();
        u32 start = span[0], end = span[1], tiles = div_up(end - start, TOKENS);
        // A warp decodes 8 tokens of each half of a tile, a lane 16 channels of each; keys are copied as they are. A token's codes
        // are asked for as soon as those of the half before are decoded.
        u32 warp = thread / WARP, last = end - 1;
        // Of a lane's two chunks of 8 channels the odd fours store the second first: eight lanes then store to eight banks of
        // 16 bytes.
        bool second = lane & 4;
        u32 to_codes = cache_at + lane / 4 * PIECE + warp * 1024 + (lane % 4 * 2 + second) * 16;
        u32 to_key = cache_at + 8 * PIECE + warp * 1024;
        // Divides positions by it: exact while their product is below 2^32.
        u32 inverse = ~0u / a.block_tokens + 1;
        uint4 codes[8];
        float scales;
        // Where a warp's tokens of half a tile lie: in one block of the cache or, from the `split`th, in another. Past the last
        // token its row stands in: it weighs nothing there.
        struct Lines {
            const u8 *low, *high;
            u32 split, count;
        };
        auto find = [&](u32 tile, u32 half) {
            u32 position = min(start + tile * TOKENS + half * 32 + warp * 8, last);
            u32 block = __umulhi(position, inverse), line = position - block * a.block_tokens;
            Lines lines;
            lines.split = a.block_tokens - line, lines.count = min(8u, end - position);
            lines.low = a.pool + a.layer_offset + table[block - first_block] * a.block_stride + line * a.row_bytes;
            u32 next = lines.split < lines.count ? table[block + 1 - first_block] : 0;
            lines.high = a.pool + a.layer_offset + next * a.block_stride - lines.split * a.row_bytes;
            return lines;
        };
        auto row = [&](const Lines &lines, u32 token) {
            token = min(token, lines.count - 1);
            return (token < lines.split ? lines.low : lines.high) + token * a.row_bytes;
        };
        auto fetch_scales = [&](const Lines &lines) {
            scales = load4(row(lines, lane % 8) + LATENT + lane / 8 * 4);
        };
        // A tile's rows into the level-2 cache, a block of the cache a lane.
        auto prefetch = [&](u32 tile) {
            u32 position = start + tile * TOKENS, to = min(position + TOKENS, end);
            if (warp > 0 || position >= to) return;
            u32 block = __umulhi(position, inverse) + lane, from = max(position, block * a.block_tokens);
            to = min(to, (block + 1) * a.block_tokens);
            if (from >= to) return;
            const u8 *rows = a.pool + a.layer_offset + table[block - first_block] * a.block_stride;
            prefetch_rows(rows + (from - block * a.block_tokens) * a.row_bytes, (to - from) * a.row_bytes);
        };
        Lines lines;
        if (tiles > 0) {
            lines = find(0, 0);
#pragma unroll
            for (u32 t = 0; t < 8; t++) codes[t] = load16(row(lines, t) + 16 * lane);
            fetch_scales(lines);
        }
        for (u32 i = 0; i < tiles; i++) {
            u32 stage = i % 2 * PIECES * PIECE;
            prefetch(i + 2);
            if (i >= 2 && ends_part(i - 2, tiles)) barrier_wait(stored, (i - 2) / PART_TILES & 1);
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                if (i >= 2) barrier_wait(empty + (i % 2 * 2 + half) * 8, (i / 2 - 1) & 1);
#pragma unroll
                for (u32 four = 0; four < 2; four++) {
                    u32 token = 4 * four + lane / 8;
                    const u8 *key = row(lines, token) + LATENT + 16 + lane % 8 * 16;
                    copy16(to_key + stage + half * 4096 + swizzled(token, lane % 8), key, 16);
                }
                copies_commit();
                lines = find(i + half, half ^ 1);
                u32 own = stretched(scales);
#pragma unroll
                for (u32 t = 0; t < 8; t++) {
                    u32 scale = __shfl_sync(ALL, own, t, 8), at = ((to_codes + stage) ^ t * 16) + half * 4096 + t * 128;
                    uint4 now = codes[t];
                    store16(at, decode(second ? now.z : now.x, scale), decode(second ? now.w : now.y, scale));
                    store16(at ^ 16, decode(second ? now.x : now.z, scale), decode(second ? now.y : now.w, scale));
                    codes[t] = load16(row(lines, t) + 16 * lane);
                    // Not to be moved behind the next tokens: then all of a tile would be asked for at its end.
                    if (t % 4 == 3) __syncwarp();
                }
                fetch_scales(lines);
            }
            // The fence between these stores and the matrix unit is the readers': here it would wait for the loads under way.
            copies_wait<0>();
            __syncwarp();
            if (lane == 0) barrier_arrive(full + i % 2 * 8);
        }
    } else if (thread < 256) {
        registers_down<120>();
        u32 start = span[0], end = span[1], tiles = div_up(end - start, TOKENS);
        load_queries();
        float scale = a.scale * (1.4426950408889634f / STRETCH);
        u32 held[4 * HELD][4];
#pragma unroll
        for (u32 i = 0; i < 4 * HELD; i++) {
            u32 piece = piece_of(PIECES - HELD + i / 4);
            load_rows(held[i], queries_at + piece * PIECE + swizzled(thread % 128 / WARP * 16 + lane % 16, i % 4 * 2 + lane / 16));
        }
        Softmax softmax = no_weights();
        for (u32 i = 0; i < tiles; i++) {
            u32 stage = i % 2, tile_at = cache_at + stage * PIECES * PIECE, left = end - start - i * TOKENS;
            barrier_wait(full + 8 * stage, i / 2 & 1);
            written_for_matrix_unit();
            float scores[32];
            mma_begin();
#pragma unroll
            for (u32 k = 0; k < PIECES; k++) {
                u32 piece = piece_of(k);
                u64 q = tile(queries_at) + piece * (PIECE >> 4), v = tile(tile_at) + piece * (PIECE >> 4);
#pragma unroll
                for (u32 step = 0; step < 4; step++) {
                    if (k >= PIECES - HELD) score_held(scores, held[4 * (k + HELD - PIECES) + step], v + 2 * step);
                    else if (k > 0) MmaF16<64>::run(scores, q + 2 * step, v + 2 * step, 1);
                    else MmaBf16<64>::run(scores, q + 2 * step, v + 2 * step, step > 0);
                }
            }
            mma_commit();
            mma_wait<0>();
            float correction[2];
            u32 bits[16];
            weigh(scores, left, scale, softmax, correction, bits);
            // The weights of the tile before have been used, its corrections and totals too.
            if (i > 0) barrier_wait(used, (i - 1) & 1);
            if (lane % 4 == 0) corrections[head] = correction[0], corrections[head + 8] = correction[1];
            store_weights(weights, head, bits);
            if (ends_part(i, tiles)) {
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    u32 own = head + 8 * j;
                    float total = all_weights(softmax.total[j]);
                    if (lane % 4 == 0) {
                        totals[i / PART_TILES % 2][own] = total;
                        u64 to = (u64)(query + own) * a.splits + blockIdx.z * a.block_parts + i / PART_TILES;
                        if (a.splits > 1 && own < heads) a.part_sums[to] = make_float2(softmax.reference[j], total);
                    }
                }
                softmax = no_weights();
            }
            written_for_matrix_unit();
            __syncwarp();
            if (lane % 4 == 0) barrier_arrive(weighed);
        }
    } else {
        registers_up<160>();
        u32 start = span[0], end = span[1], tiles = div_up(end - start, TOKENS);
        load_queries();
        u32 half = thread / 128 - 2;
        bool whole = seen <= SPLIT;
        // 128 channels each: an instruction's registers must fit what a thread starts with.
        float sums[2][64];
        // Means of a part, by way of shared memory that this warpgroup alone still reads.
        auto store_means = [&](u32 own, u8 *staged) {
            u32 part = blockIdx.z * a.block_parts + own;
            float low = 1.0f / (STRETCH * first_of_four(totals[own % 2], head));
            float high = 1.0f / (STRETCH * first_of_four(totals[own % 2], head + 8));
            some_sync(STAGED + half, 128);
#pragma unroll
            for (u32 i = 0; i < 64; i++) {
                float share = i % 2 ? high : low, x = sums[i / 32][2 * i % 64] * share, y = sums[i / 32][2 * i % 64 + 1] * share;
                u32 at = swizzled(head + 8 * (i % 2), i / 2 % 8) + lane % 4 * 4;
                *(u32 *)(staged + i / 16 * PIECE + at) = whole ? pack_bf16(x, y) : pack_f16(x, y);
            }
            some_sync(STAGED + half, 128);
            for (u32 i = thread % 128; i < heads * 32; i += 128) {
                u32 own = i / 32, chunk = i % 32;
                uint4 bits = *(const uint4 *)(staged + chunk / 8 * PIECE + swizzled(own, chunk % 8));
                u64 to = whole ? query + own : (u64)(query + own) * a.splits + part;
                *(uint4 *)((whole ? a.out : a.parts) + to * LATENT + half * 256 + 8 * chunk) = bits;
            }
            barrier_arrive(stored);
        };
        if (tiles == 0) {
            for (u32 i = thread % 128; i < heads * 32; i += 128) {
                *(uint4 *)(a.out + (u64)(query + i / 32) * LATENT + half * 256 + 8 * (i % 32)) = make_uint4(0, 0, 0, 0);
            }
        }
        for (u32 i = 0; i < tiles; i++) {
            u32 stage = i % 2, tile_at = cache_at + stage * PIECES * PIECE;
            barrier_wait(weighed, i & 1);
            float low = first_of_four(corrections, head), high = first_of_four(corrections, head + 8);
            bool fresh = i % PART_TILES == 0;
            if (!fresh && __any_sync(ALL, low != 1.0f || high != 1.0f)) scale_sums(sums, low, high);
            barrier_wait(full + 8 * stage, i / 2 & 1);
            written_for_matrix_unit();
            mma_begin();
#pragma unroll
            for (u32 step = 0; step < 4; step++) {
                u64 v = tile_across(tile_at + half * 4 * PIECE) + step * 128, w = tile(weights_at) + 2 * step;
                MmaF16<128>::across(sums[0], w, v, step > 0 || !fresh);
                MmaF16<128>::across(sums[1], w, v + 2 * (PIECE >> 4), step > 0 || !fresh);
                if (step == 1) mma_commit();
            }
            mma_commit();
            // The first half of its rows may be overwritten.
            mma_wait<1>();
            if (lane == 0) barrier_arrive(empty + 16 * stage);
            mma_wait<0>();
            if (lane % 4 == 0) barrier_arrive(used);
            if (ends_part(i, tiles)) store_means(i / PART_TILES, cache + stage * PIECES * PIECE + half * 4 * PIECE);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 16 * stage + 8);
        }
    }
}

// Adds the parts of contexts longer than SPLIT: a warp per (head, row), 16 channels a lane.
extern "C" __global__ void __launch_bounds__(128) mla_combine(const __grid_constant__ Attention a) {
    u32 head = blockIdx.x * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    previous_done();
    if (head >= a.heads) return;
    u64 query = (u64)blockIdx.y * a.heads + head;
    const float2 *part_sums = a.part_sums + query * a.splits;
    const u16 *parts = a.parts + query * a.splits * LATENT + 8 * lane;
    // There is room for all parts, written or not: the first ones are asked for before it is known how many there are.
    uint4 low[PARTS_MAX], high[PARTS_MAX];
#pragma unroll
    for (u32 i = 0; i < PARTS_MAX; i++) {
        if (i >= a.splits) continue;
        low[i] = *(const uint4 *)(parts + (u64)i * LATENT), high[i] = *(const uint4 *)(parts + (u64)i * LATENT + 256);
    }
    float2 own = lane < a.splits ? part_sums[lane] : make_float2(-INFINITE, 0.0f);
    u32 context = a.contexts[blockIdx.y], seen = context > a.first ? context - a.first : 0, splits = div_up(seen, SPLIT);
    if (splits <= 1) return;
    float largest = warp_max(lane < splits ? own.x : -INFINITE), total = 0.0f, sums[16];
    for (u32 i = WARP + lane; i < splits; i += WARP) largest = fmaxf(largest, part_sums[i].x);
    largest = warp_max(largest);
#pragma unroll
    for (u32 j = 0; j < 16; j++) sums[j] = 0.0f;
    auto add = [&](float weight, uint4 low, uint4 high) {
        u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        total += weight;
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            float2 x = unpack_f16(bits[j]);
            sums[2 * j] = fmaf(weight, x.x, sums[2 * j]), sums[2 * j + 1] = fmaf(weight, x.y, sums[2 * j + 1]);
        }
    };
    float weight = exp2_of(own.x - largest) * own.y;
#pragma unroll
    for (u32 i = 0; i < PARTS_MAX; i++) {
        float now = __shfl_sync(ALL, weight, i);
        if (i < splits) add(now, low[i], high[i]);
    }
#pragma unroll 4
    for (u32 i = PARTS_MAX; i < splits; i++) {
        float2 sum = part_sums[i];
        add(exp2_of(sum.x - largest) * sum.y, *(const uint4 *)(parts + (u64)i * LATENT), *(const uint4 *)(parts + (u64)i * LATENT + 256));
    }
    u32 bits[8];
    float share = 1.0f / total;
#pragma unroll
    for (u32 j = 0; j < 8; j++) bits[j] = pack_bf16(sums[2 * j] * share, sums[2 * j + 1] * share);
    u16 *out = a.out + query * LATENT + 8 * lane;
    *(uint4 *)out = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    *(uint4 *)(out + 256) = make_uint4(bits[4], bits[5], bits[6], bits[7]);
}

#else

// Other architectures have no wgmma, and the host never launches this there.
extern "C" __global__ void mla_attention_wgmma(const __grid_constant__ Attention) { require(false); }
extern "C" __global__ void mla_combine(const __grid_constant__ Attention) { require(false); }

#endif
