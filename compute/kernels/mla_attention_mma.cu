// MLA in its absorbed form over the paged cache, for FP8 rows of 512 + 64 channels: DeepSeek-V2's and V3's widths.
//
// A block of 8 warps has one query row and 64 of its heads (fewer are padded with zeros). It walks the context in tiles of
// 64 tokens from the first on: rows are decoded to bf16 in shared memory once for all heads, scores and weighted sums run
// on the matrix unit (bf16 operands, f32 sums), the online softmax in f32. What a head gets does not depend on the heads or
// rows beside it. Rows past the context are never read.

#define LATENT 512u
#define ROPE 64u
#define TOKENS 64u
#define HEADS 64u
#define THREADS 256u
// Bytes from row to row in shared memory: an odd number of 16-byte units, so that 8 rows of a fragment lie in different banks.
#define ROW_STRIDE (2 * (LATENT + ROPE) + 16)
#define P_STRIDE (2 * TOKENS + 16)

// As in mla_attention.cu.
struct Attention {
    const u8 *pool;
    const u32 *tables, *sequences, *contexts;
    const float *q_latent, *q_rope;
    float *out;
    u64 layer_offset, block_stride;
    u32 row_bytes, block_tokens, blocks, table_stride;
    u32 heads, latent, rope;
    float scale;
    u32 first;
};

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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

extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_attention_mma(const __grid_constant__ Attention a) {
    extern __shared__ __align__(16) u8 memory[];
    u8 *queries = memory, *cache = queries + HEADS * ROW_STRIDE, *weights = cache + TOKENS * ROW_STRIDE;
    float *maxima = (float *)(weights + HEADS * P_STRIDE), *totals = maxima + 2 * HEADS;
    float *corrections = totals + 2 * HEADS;
    u32 queries_at = (u32)__cvta_generic_to_shared(queries), cache_at = (u32)__cvta_generic_to_shared(cache);
    u32 weights_at = (u32)__cvta_generic_to_shared(weights);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 row = blockIdx.x, first = blockIdx.y * HEADS, heads = min(HEADS, a.heads - first);
    u64 query = (u64)row * a.heads + first;
    for (u32 i = thread; i < HEADS * (LATENT / 4); i += THREADS) {
        u32 head = i / (LATENT / 4), channel = i % (LATENT / 4) * 4;
        const float *q = a.q_latent + (query + head) * LATENT + channel;
        uint2 bits = head < heads ? make_uint2(pack(q[0], q[1]), pack(q[2], q[3])) : make_uint2(0, 0);
        *(uint2 *)(queries + head * ROW_STRIDE + 2 * channel) = bits;
    }
    for (u32 i = thread; i < HEADS * (ROPE / 4); i += THREADS) {
        u32 head = i / (ROPE / 4), channel = i % (ROPE / 4) * 4;
        const float *q = a.q_rope + (query + head) * ROPE + channel;
        uint2 bits = head < heads ? make_uint2(pack(q[0], q[1]), pack(q[2], q[3])) : make_uint2(0, 0);
        *(uint2 *)(queries + head * ROW_STRIDE + 2 * (LATENT + channel)) = bits;
    }
    const u32 *table = a.tables + (u64)a.sequences[row] * a.table_stride;
    u32 context = a.contexts[row];
    require(context <= (u64)a.table_stride * a.block_tokens);

    // Scores: warp w has heads 16 (w % 4).. and half w / 4 of the tokens. Sums: channels 64 w.. of all heads.
    u32 strip = warp % 4 * 16, half = warp / 4;
    float largest[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};
    float sums[4][8][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 k = 0; k < 4; k++) sums[i][j][k] = 0.0f;

    for (u32 start = a.first; start < context; start += TOKENS) {
        u32 count = min(TOKENS, context - start);
        __syncthreads();
        // A quarter of a row a thread: 128 latent channels, which share a scale, and 16 of rope.
        {
            u32 token = thread / 4, part = thread % 4;
            u8 *to = cache + token * ROW_STRIDE;
            const u8 *from = a.pool;
            if (token < count) {
                u32 position = start + token, block = table[position / a.block_tokens];
                require(block < a.blocks);
                from += block * a.block_stride + a.layer_offset + (u64)(position % a.block_tokens) * a.row_bytes;
            }
            float scale = token < count ? *(const float *)(from + LATENT + 4 * part) : 0.0f;
            uint4 codes[8], ropes[2];
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                codes[i] = token < count ? *(const uint4 *)(from + 16 * (part + 4 * i)) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const uint4 *rope = (const uint4 *)(from + LATENT + 16 + 16 * (part + 4 * i));
                ropes[i] = token < count ? *rope : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                // Chunk part + 4 i of 16 channels lies in scale group (part + 4 i) / 8 = i / 2, which thread i / 2 of the
                // token's four has.
                float own = __shfl_sync(ALL, scale, (lane & ~3u) + i / 2);
                uint2 low = decode(codes[i].x, own), high = decode(codes[i].y, own);
                u8 *at = to + 32 * (part + 4 * i);
                *(uint4 *)at = make_uint4(low.x, low.y, high.x, high.y);
                low = decode(codes[i].z, own), high = decode(codes[i].w, own);
                *(uint4 *)(at + 16) = make_uint4(low.x, low.y, high.x, high.y);
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) *(uint4 *)(to + 2 * LATENT + 16 * (part + 4 * i)) = ropes[i];
        }
        __syncthreads();

        float scores[4][4];
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 k = 0; k < 4; k++) scores[j][k] = 0.0f;
        u32 q_at = queries_at + (strip + lane % 16) * ROW_STRIDE + lane / 16 * 16;
        u32 k_at = cache_at + (half * 32 + lane / 16 * 8 + lane % 8) * ROW_STRIDE + lane / 8 % 2 * 16;
#pragma unroll 4
        for (u32 step = 0; step < (LATENT + ROPE) / 16; step++) {
            u32 q[4], low[4], high[4];
            load_matrices(q, q_at + 32 * step);
            load_matrices(low, k_at + 32 * step);
            load_matrices(high, k_at + 16 * ROW_STRIDE + 32 * step);
            multiply(scores[0], q, low[0], low[1]);
            multiply(scores[1], q, low[2], low[3]);
            multiply(scores[2], q, high[0], high[1]);
            multiply(scores[3], q, high[2], high[3]);
        }
        // A thread's heads are strip + lane / 4 and eight more, its tokens pairs, eight apart.
        float most[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
                u32 token = half * 32 + 8 * j + lane % 4 * 2 + k % 2;
                scores[j][k] = token < count ? scores[j][k] * a.scale : -INFINITE;
                most[k / 2] = fmaxf(most[k / 2], scores[j][k]);
            }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], __shfl_xor_sync(ALL, most[i], 1));
            most[i] = fmaxf(most[i], __shfl_xor_sync(ALL, most[i], 2));
            if (lane % 4 == 0) maxima[half * HEADS + strip + lane / 4 + 8 * i] = most[i];
        }
        __syncthreads();
        float correction[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 head = strip + lane / 4 + 8 * i;
            float next = fmaxf(largest[i], fmaxf(maxima[head], maxima[HEADS + head]));
            correction[i] = expf(largest[i] - next);
            largest[i] = next;
            if (half == 0 && lane % 4 == 0) corrections[head] = correction[i];
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 bits = pack(expf(scores[j][2 * i] - largest[i]), expf(scores[j][2 * i + 1] - largest[i]));
                // What is summed is what weighs: the rounded value.
                sum[i] += from_bf16((u16)bits) + from_bf16((u16)(bits >> 16));
                u32 head = strip + lane / 4 + 8 * i, token = half * 32 + 8 * j + lane % 4 * 2;
                *(u32 *)(weights + head * P_STRIDE + 2 * token) = bits;
            }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            sum[i] += __shfl_xor_sync(ALL, sum[i], 1);
            sum[i] += __shfl_xor_sync(ALL, sum[i], 2);
            if (lane % 4 == 0) totals[half * HEADS + strip + lane / 4 + 8 * i] = sum[i];
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 head = strip + lane / 4 + 8 * i;
            total[i] = total[i] * correction[i] + (totals[head] + totals[HEADS + head]);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float low = corrections[16 * i + lane / 4], high = corrections[16 * i + lane / 4 + 8];
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                sums[i][j][0] *= low, sums[i][j][1] *= low;
                sums[i][j][2] *= high, sums[i][j][3] *= high;
            }
        }
        u32 p_at = weights_at + lane % 16 * P_STRIDE + lane / 16 * 16;
        u32 v_at = cache_at + lane % 16 * ROW_STRIDE + lane / 16 * 16 + warp * 128;
#pragma unroll
        for (u32 step = 0; step < TOKENS / 16; step++) {
            u32 v[4][4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) load_transposed(v[j], v_at + step * 16 * ROW_STRIDE + 32 * j);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 p[4];
                load_matrices(p, p_at + 16 * i * P_STRIDE + 32 * step);
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    multiply(sums[i][2 * j], p, v[j][0], v[j][1]);
                    multiply(sums[i][2 * j + 1], p, v[j][2], v[j][3]);
                }
            }
        }
    }
    __syncthreads();
    if (half == 0 && lane % 4 == 0) {
        corrections[strip + lane / 4] = total[0];
        corrections[strip + lane / 4 + 8] = total[1];
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 k = 0; k < 2; k++) {
                u32 head = 16 * i + lane / 4 + 8 * k, channel = warp * 64 + 8 * j + lane % 4 * 2;
                if (head >= heads) continue;
                float divisor = corrections[head];
                float2 value = make_float2(sums[i][j][2 * k] / divisor, sums[i][j][2 * k + 1] / divisor);
                if (context <= a.first) value = make_float2(0.0f, 0.0f);
                *(float2 *)(a.out + (query + head) * LATENT + channel) = value;
            }
}
