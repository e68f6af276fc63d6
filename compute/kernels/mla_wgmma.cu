// What the attention kernels of Hopper's matrix unit share, put before their text: MLA in its absorbed form over FP8 cache rows of
// 512 + 64 channels, DeepSeek-V2's and V3's widths. Queries and results are bf16, sums f32; latents, weights and latent queries
// are multiplied as f16, which holds a cached code exactly and its product with a scale to 11 bits, keys of the rotation as the
// bf16 they are.
//
// A query row's 64 heads (fewer are padded with zeros) walk its context in parts of SPLIT tokens, in each in tiles of 64 with an
// online softmax that begins anew with each part. One warpgroup scores and weighs a tile, two sum up, half of the channels each.
// Where a context is longer than SPLIT, its parts are stored and then added in order. Parts lie at fixed positions, and every
// kernel does the same operations in the same order: what a head gets does not depend on the heads, rows or contexts beside it.

#define LATENT 512u
#define ROPE 64u
#define TOKENS 64u
#define HEADS 64u
#define THREADS 512u
#define SPLIT 1024u
#define PART_TILES (SPLIT / TOKENS)
// A block has so many parts at most; as many are asked for at once where parts are added.
#define PARTS_MAX 4u
// Fewer tokens in a block of the cache are not for this kernel.
#define BLOCK_TOKENS_MIN 16u
// 64 rows of 64 channels: what the matrix unit's 128-byte swizzle spans.
#define PIECE 8192u
#define PIECES ((LATENT + ROPE) / 64)
// A row's sums are scaled down only when its largest score has grown by more than this (a power of two): weights stay below
// 2^8, far from f16's largest.
#define GROWTH 8.0f
// Latents are held so many times as large: f16 has more room above them than below.
#define STRETCH 16.0f

// Barriers among some of the warpgroups (0 is everybody's): queries are there; a half's means are staged (two).
enum { QUERIES = 1, STAGED = 2 };

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats as bf16 or f16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ float2 unpack_f16(u32 bits) {
    float2 x;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(x.x), "=f"(x.y) : "r"(bits));
    return x;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Two bf16 as f16; what is too large for one becomes the largest.
__device__ __forceinline__ u32 to_f16(u32 bits) {
    float x = __uint_as_float(bits << 16), y = __uint_as_float(bits & 0xFFFF0000u), most = 65504.0f;
    x = x > most ? most : x < -most ? -most : x;
    y = y > most ? most : y < -most ? -most : y;
    return pack_f16(x, y);
}

// Two bf16 STRETCH times as large.
__device__ __forceinline__ u32 stretch(u32 bits) {
    return pack_bf16(__uint_as_float(bits << 16) * STRETCH, __uint_as_float(bits & 0xFFFF0000u) * STRETCH);
}

__device__ __forceinline__ u32 times(u32 x, u32 y) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
    return product;
}

// A scale as f16 twice, STRETCH times as large. Latents beyond 4,000 are cut off; where none of a group reaches 0.002, its
// scale has fewer than 11 bits.
__device__ __forceinline__ u32 stretched(float scale) {
    float x = fminf(scale * STRETCH, 142.0f);
    return pack_f16(x, x);
}

// Four E4M3 codes times such a scale.
__device__ __forceinline__ uint2 decode(u32 codes, u32 scale) {
    uint2 v;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(v.x), "=r"(v.y)
        : "r"(codes));
    return make_uint2(times(v.x, scale), times(v.y, scale));
}

// What the first of four lanes finds, which alone reads it.
__device__ __forceinline__ float first_of_four(const float *values, u32 at) {
    return __shfl_sync(ALL, threadIdx.x % 4 == 0 ? values[at] : 0.0f, 0, 4);
}

// Asked for where it stands, between what is stored before and after.
__device__ __forceinline__ uint4 load16(const u8 *from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ float load4(const u8 *from) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}

// Into the level-2 cache.
__device__ __forceinline__ void prefetch_rows(const u8 *from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Whether a block's `i`th tile is the last of a part.
__device__ __forceinline__ bool ends_part(u32 i, u32 tiles) { return i % PART_TILES == PART_TILES - 1 || i + 1 == tiles; }

__device__ __forceinline__ void store16(u32 to, uint2 low, uint2 high) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(low.x), "r"(low.y), "r"(high.x), "r"(high.y) : "memory");
}

// The same; what follows from it is computed again instead of being kept in registers.
__device__ __forceinline__ u32 afresh(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// b with its columns contiguous: 64 of them a piece, pieces PIECE apart, 8 of K 1,024 bytes apart.
__device__ __forceinline__ u64 tile_across(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(PIECE >> 4) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// A tile's pieces in the order in which they are scored: the key, then pairs that are summed up first by one half and the other.
__device__ __forceinline__ constexpr u32 piece_of(u32 k) {
    return k == 0 ? 8 : ((k - 1) & 1) + ((k - 1) >> 1 & 1) * 4 + ((k - 1) >> 2 & 1) * 2;
}

// A warp's 16 rows of 16 channels of a tile, as wgmma takes its first operand from registers.
__device__ __forceinline__ void load_rows(u32 (&a)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from)
                 : "memory");
}

// One instruction of scores, of queries in registers.
__device__ __forceinline__ void score_held(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" REGISTERS_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : SUMS_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Of a thread's two heads, eight apart: the score that weights are relative to, and the sum of its own weights.
struct Softmax {
    float reference[2], total[2];
};

__device__ __forceinline__ Softmax no_weights() { return {{-INFINITE, -INFINITE}, {0.0f, 0.0f}}; }

// Weights of a tile's scores as f16, pairs of tokens of its two heads by turns; `left` tokens are there. Scores times `scale` are
// exponents of two. `correction`: what sums so far are to be multiplied by.
__device__ __forceinline__ void weigh(
    float (&scores)[32], u32 left, float scale, Softmax &softmax, float (&correction)[2], u32 (&weights)[16]) {
    // A thread's tokens are pairs, eight apart.
    if (left < TOKENS) {
#pragma unroll
        for (u32 j = 0; j < 32; j++) {
            if (j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2 >= left) scores[j] = -INFINITE;
        }
    }
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        float most = -INFINITE;
#pragma unroll
        for (u32 k = 0; k < 16; k++) most = fmaxf(most, scores[k / 2 * 4 + 2 * j + k % 2]);
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2)) * scale;
        float next = most > softmax.reference[j] + GROWTH ? most : softmax.reference[j];
        correction[j] = next == softmax.reference[j] ? 1.0f : exp2_of(softmax.reference[j] - next);
        softmax.reference[j] = next;
        softmax.total[j] *= correction[j];
    }
#pragma unroll
    for (u32 j = 0; j < 16; j++) {
        u32 which = j % 2;
        float x = exp2_of(fmaf(scores[2 * j], scale, -softmax.reference[which]));
        float y = exp2_of(fmaf(scores[2 * j + 1], scale, -softmax.reference[which]));
        weights[j] = pack_f16(x, y);
        softmax.total[which] += x + y;
    }
}

// Such weights to a tile in shared memory, of heads `head` and eight more.
__device__ __forceinline__ void store_weights(u8 *to, u32 head, const u32 (&weights)[16]) {
#pragma unroll
    for (u32 j = 0; j < 16; j++) *(u32 *)(to + swizzled(head + 8 * (j % 2), j / 2) + threadIdx.x % 4 * 4) = weights[j];
}

// The sum of all of a head's weights, in all four lanes that have some.
__device__ __forceinline__ float all_weights(float total) {
    total += __shfl_xor_sync(ALL, total, 1);
    return total + __shfl_xor_sync(ALL, total, 2);
}

__device__ __forceinline__ void scale_sums(float (&sums)[2][64], float low, float high) {
#pragma unroll
    for (u32 j = 0; j < 128; j++) sums[j / 64][j % 64] *= j % 4 / 2 ? high : low;
}

#endif
