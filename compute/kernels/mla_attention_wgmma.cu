// MLA in its absorbed form over the paged cache on Hopper's matrix unit, for FP8 rows of 512 + 64 channels: DeepSeek-V2's
// and V3's widths. Queries and results are bf16, sums f32.
//
// A block has one query row, 64 of its heads (fewer are padded with zeros) and SPLIT tokens of its context, which it walks
// in tiles of 64 with an online softmax. One warpgroup decodes cache rows to bf16 in shared memory, a tile ahead; two
// multiply: each scores half of a tile's tokens and sums up half of the channels. Where a context is longer than SPLIT, its
// parts are stored in f32 and mla_combine adds them in order. Splits lie at fixed positions, so that what a head gets does
// not depend on the heads, rows or contexts beside it. Rows past the context are never read.

#define LATENT 512u
#define ROPE 64u
#define TOKENS 64u
#define HEADS 64u
#define THREADS 384u
#define SPLIT 1024u
// 64 rows of 64 channels: what the matrix unit's 128-byte swizzle spans.
#define PIECE 8192u
#define PIECES ((LATENT + ROPE) / 64)

// As in mla_attention.cu; q_latent, q_rope and out are bf16.
struct Attention {
    const u8 *pool;
    const u32 *tables, *starts, *contexts;
    const u16 *q_latent, *q_rope;
    u16 *out;
    u64 layer_offset, block_stride;
    u32 row_bytes, block_tokens, blocks, table_len;
    u32 heads, latent, rope;
    float scale;
    u32 first, splits;
    // [rows, heads, splits, 512] and their (largest score, sum of weights).
    float *parts;
    float2 *part_sums;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Two floats as bf16, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Four E4M3 codes times a scale, as bf16.
__device__ __forceinline__ uint2 decode(u32 codes, float scale) {
    float v[4];
    from_e4m3x2((u16)codes, v[0], v[1]);
    from_e4m3x2((u16)(codes >> 16), v[2], v[3]);
    return make_uint2(pack(v[0] * scale, v[1] * scale), pack(v[2] * scale, v[3] * scale));
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A quarter of a cache row: 128 latent codes, in 16-byte chunks 64 apart, a scale, and 16 channels of the key.
struct Raw {
    uint4 codes[8], key[2];
    float scale;
};

// The block of a position, 0 for one past the end: asked for a tile before it is needed, since the rows wait for it.
__device__ __forceinline__ u32 block_of(const Attention &a, const u32 *table, u32 position, u32 end) {
    return position < end ? table[position / a.block_tokens] : 0;
}

__device__ __forceinline__ void fetch(const Attention &a, u32 block, u32 position, u32 end, u32 part, Raw &raw) {
    if (position >= end) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) raw.codes[i] = make_uint4(0, 0, 0, 0);
        raw.key[0] = raw.key[1] = make_uint4(0, 0, 0, 0);
        raw.scale = 0.0f;
        return;
    }
    require(block < a.blocks);
    const u8 *row = a.pool + block * a.block_stride + a.layer_offset + (u64)(position % a.block_tokens) * a.row_bytes;
#pragma unroll
    for (u32 i = 0; i < 8; i++) raw.codes[i] = *(const uint4 *)(row + 16 * (part + 4 * i));
#pragma unroll
    for (u32 i = 0; i < 2; i++) raw.key[i] = *(const uint4 *)(row + LATENT + 16 + 16 * (part + 4 * i));
    raw.scale = *(const float *)(row + LATENT + 4 * part);
}

__device__ __forceinline__ void spread(u8 *tiles, u32 token, u32 part, const Raw &raw) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        // Chunk part + 4 i of 16 channels lies in scale group i / 2, which thread i / 2 of the token's four has.
        float scale = __shfl_sync(ALL, raw.scale, (lane & ~3u) + i / 2);
        uint2 low = decode(raw.codes[i].x, scale), high = decode(raw.codes[i].y, scale);
        *(uint4 *)(tiles + i * PIECE + swizzled(token, 2 * part)) = make_uint4(low.x, low.y, high.x, high.y);
        low = decode(raw.codes[i].z, scale), high = decode(raw.codes[i].w, scale);
        *(uint4 *)(tiles + i * PIECE + swizzled(token, 2 * part + 1)) = make_uint4(low.x, low.y, high.x, high.y);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) *(uint4 *)(tiles + 8 * PIECE + swizzled(token, part + 4 * i)) = raw.key[i];
}

// b with its columns contiguous: 64 of them a piece, pieces PIECE apart, 8 of K 1,024 bytes apart.
__device__ __forceinline__ u64 tile_across(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(PIECE >> 4) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_attention_wgmma(const __grid_constant__ Attention a) {
    extern __shared__ u8 memory[];
    __shared__ float maxima[2][HEADS];
    __shared__ u64 barriers[4];
    u32 first = blockIdx.x * HEADS, heads = min(HEADS, a.heads - first), row = blockIdx.y;
    // What is seen, and this block's part of it.
    u32 context = a.contexts[row], seen = context > a.first ? context - a.first : 0;
    if (blockIdx.z > 0 && blockIdx.z * SPLIT >= seen) return;
    u32 start = a.first + blockIdx.z * SPLIT, end = min(a.first + seen, start + SPLIT);
    const u32 *table = a.tables + a.starts[row];
    require((u64)a.starts[row] + div_up(context, a.block_tokens) <= a.table_len && seen <= a.splits * SPLIT);
    u32 shift = (1024 - ((u32)__cvta_generic_to_shared(memory) & 1023)) & 1023;
    u8 *queries = memory + shift, *weights = queries + PIECES * PIECE, *cache = weights + PIECE;
    u32 queries_at = (u32)__cvta_generic_to_shared(queries), weights_at = queries_at + PIECES * PIECE;
    u32 cache_at = weights_at + PIECE, full = (u32)__cvta_generic_to_shared(barriers), empty = full + 16;
    u32 thread = threadIdx.x, lane = thread % WARP, tiles = div_up(end - start, TOKENS);
    if (thread < 2) barrier_init(full + 8 * thread, 4), barrier_init(empty + 8 * thread, 8);
    // Queries, 8 channels at a time.
    u64 query = (u64)row * a.heads + first;
    for (u32 i = thread; i < HEADS * PIECES * 8; i += THREADS) {
        u32 head = i / (PIECES * 8), chunk = i % (PIECES * 8);
        const u16 *q = chunk < LATENT / 8 ? a.q_latent + (query + head) * LATENT + 8 * chunk
                                          : a.q_rope + (query + head) * ROPE + 8 * (chunk - LATENT / 8);
        uint4 bits = head < heads ? *(const uint4 *)q : make_uint4(0, 0, 0, 0);
        *(uint4 *)(queries + chunk / 8 * PIECE + swizzled(head, chunk % 8)) = bits;
    }
    written_for_matrix_unit();
    __syncthreads();

    if (thread < 128) {
        // Three warpgroups start with 168 registers a thread: what one gives up the others may take.
        registers_down<120>();
        u32 token = thread / 4, part = thread % 4;
        u32 at = start + token;
        Raw low, high;
        fetch(a, block_of(a, table, at, end), at, end, part, low);
        u32 high_block = block_of(a, table, at + 32, end), low_block = block_of(a, table, at + TOKENS, end);
        for (u32 i = 0; i < tiles; i++, at += TOKENS) {
            u32 stage = i % 2;
            u32 next_high = block_of(a, table, at + TOKENS + 32, end), next_low = block_of(a, table, at + 2 * TOKENS, end);
            fetch(a, high_block, at + 32, end, part, high);
            if (i >= 2) barrier_wait(empty + 8 * stage, (i / 2 - 1) & 1);
            spread(cache + stage * PIECES * PIECE, token, part, low);
            fetch(a, low_block, at + TOKENS, end, part, low);
            spread(cache + stage * PIECES * PIECE, token + 32, part, high);
            high_block = next_high, low_block = next_low;
            written_for_matrix_unit();
            __syncwarp();
            if (lane == 0) barrier_arrive(full + 8 * stage);
        }
    } else {
        registers_up<192>();
        // Which half of a tile's tokens it scores, and of the channels it sums up.
        u32 half = thread / 128 - 1, head = thread % 128 / WARP * 16 + lane / 4;
        float scale = a.scale * 1.4426950408889634f;
        float largest[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f}, sums[128];
#pragma unroll
        for (u32 i = 0; i < 128; i++) sums[i] = 0.0f;
        for (u32 i = 0; i < tiles; i++) {
            u32 stage = i % 2, tile_at = cache_at + stage * PIECES * PIECE, left = end - start - i * TOKENS;
            barrier_wait(full + 8 * stage, i / 2 & 1);
            float scores[16];
            mma_begin();
#pragma unroll
            for (u32 piece = 0; piece < PIECES; piece++) {
                u64 q = tile(queries_at + piece * PIECE), k = tile(tile_at + piece * PIECE + half * 4096);
#pragma unroll
                for (u32 step = 0; step < 4; step++) {
                    MmaBf16<32>::run(scores, q + 2 * step, k + 2 * step, piece + step > 0);
                }
            }
            mma_commit();
            mma_wait<0>();
            // A thread's heads are `head` and eight more, its tokens pairs, eight apart.
            float most[2] = {-INFINITE, -INFINITE};
#pragma unroll
            for (u32 j = 0; j < 16; j++) {
                u32 token = half * 32 + j / 4 * 8 + lane % 4 * 2 + j % 2;
                scores[j] = token < left ? scores[j] * scale : -INFINITE;
                most[j % 4 / 2] = fmaxf(most[j % 4 / 2], scores[j]);
            }
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                most[j] = fmaxf(most[j], __shfl_xor_sync(ALL, most[j], 1));
                most[j] = fmaxf(most[j], __shfl_xor_sync(ALL, most[j], 2));
                if (lane % 4 == 0) maxima[half][head + 8 * j] = most[j];
            }
            some_sync(1, 256);
            float correction[2];
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                float next = fmaxf(largest[j], fmaxf(maxima[0][head + 8 * j], maxima[1][head + 8 * j]));
                correction[j] = exp2_of(largest[j] - next);
                largest[j] = next;
                total[j] *= correction[j];
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                u32 which = j % 2;
                u32 bits = pack(exp2_of(scores[2 * j] - largest[which]), exp2_of(scores[2 * j + 1] - largest[which]));
                // What is summed is what weighs: the rounded value.
                total[which] += from_bf16((u16)bits) + from_bf16((u16)(bits >> 16));
                u32 chunk = half * 4 + j / 2;
                *(u32 *)(weights + swizzled(head + 8 * which, chunk) + lane % 4 * 4) = bits;
            }
            if (correction[0] != 1.0f || correction[1] != 1.0f) {
#pragma unroll
                for (u32 j = 0; j < 128; j++) sums[j] *= correction[j % 4 / 2];
            }
            written_for_matrix_unit();
            some_sync(1, 256);
            mma_begin();
#pragma unroll
            for (u32 step = 0; step < 4; step++) {
                u64 v = tile_across(tile_at + half * 4 * PIECE + step * 2048);
                MmaBf16<256>::across(sums, tile(weights_at) + 2 * step, v, 1);
            }
            mma_commit();
            mma_wait<0>();
            if (lane == 0) barrier_arrive(empty + 8 * stage);
        }
        some_sync(1, 256);
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            total[j] += __shfl_xor_sync(ALL, total[j], 1);
            total[j] += __shfl_xor_sync(ALL, total[j], 2);
            if (lane % 4 == 0) maxima[half][head + 8 * j] = total[j];
        }
        some_sync(1, 256);
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            u32 own = head + 8 * j;
            if (own >= heads) continue;
            total[j] = maxima[0][own] + maxima[1][own];
            u64 part = (query + own) * a.splits + blockIdx.z;
            if (seen > SPLIT && half == 0 && lane % 4 == 0) a.part_sums[part] = make_float2(largest[j], total[j]);
#pragma unroll
            for (u32 i = 0; i < 32; i++) {
                float x = sums[4 * i + 2 * j], y = sums[4 * i + 2 * j + 1];
                u32 channel = half * 256 + 8 * i + lane % 4 * 2;
                if (seen > SPLIT) *(float2 *)(a.parts + part * LATENT + channel) = make_float2(x, y);
                else *(u32 *)(a.out + (query + own) * LATENT + channel) =
                    seen == 0 ? 0 : pack(x / total[j], y / total[j]);
            }
        }
    }
}

// Adds the parts of contexts longer than SPLIT: a block of 128 threads per (head, row), four channels a thread.
extern "C" __global__ void __launch_bounds__(128) mla_combine(const __grid_constant__ Attention a) {
    u32 context = a.contexts[blockIdx.y], seen = context > a.first ? context - a.first : 0;
    if (seen <= SPLIT) return;
    u32 splits = div_up(seen, SPLIT);
    u64 query = (u64)blockIdx.y * a.heads + blockIdx.x;
    const float2 *part_sums = a.part_sums + query * a.splits;
    const float *parts = a.parts + query * a.splits * LATENT + 4 * threadIdx.x;
    float largest = -INFINITE;
    for (u32 i = 0; i < splits; i++) largest = fmaxf(largest, part_sums[i].x);
    float total = 0.0f;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 i = 0; i < splits; i++) {
        float weight = exp2_of(part_sums[i].x - largest);
        float4 part = *(const float4 *)(parts + (u64)i * LATENT);
        total = fmaf(weight, part_sums[i].y, total);
        sum.x = fmaf(weight, part.x, sum.x), sum.y = fmaf(weight, part.y, sum.y);
        sum.z = fmaf(weight, part.z, sum.z), sum.w = fmaf(weight, part.w, sum.w);
    }
    uint2 bits = make_uint2(pack(sum.x / total, sum.y / total), pack(sum.z / total, sum.w / total));
    *(uint2 *)(a.out + query * LATENT + 4 * threadIdx.x) = bits;
}

#else

// Other architectures have no wgmma, and the host never launches this there.
extern "C" __global__ void mla_attention_wgmma(const __grid_constant__ Attention) { require(false); }
extern "C" __global__ void mla_combine(const __grid_constant__ Attention) { require(false); }

#endif
