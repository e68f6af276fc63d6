// MLA in its absorbed form over the paged cache, any widths: a block of 128 threads per (query row, head).
//
// The context is walked in tiles of 64 tokens from the first on with an online softmax. A score is a warp's: lane l has
// channels l, l + 32, ... in order, the lanes are added in a fixed tree. A weighted sum is a thread's: its channel over the
// tokens in order. Rows past the context are never read.

#define TOKENS 64u
#define THREADS 128u

struct F32Row {
    static __device__ float latent(const u8 *row, u32, u32 i) { return float_at(row + 4 * i); }
    static __device__ float rope(const u8 *row, u32 width, u32 i) { return float_at(row + 4 * (width + i)); }
};

struct Bf16Row {
    static __device__ float latent(const u8 *row, u32, u32 i) { return bf16_at(row + 2 * i); }
    static __device__ float rope(const u8 *row, u32 width, u32 i) { return bf16_at(row + 2 * (width + i)); }
};

struct Fp8Row {
    static __device__ float latent(const u8 *row, u32 width, u32 i) {
        return from_e4m3(row[i]) * float_at(row + width + 4 * (i / BLOCK));
    }
    static __device__ float rope(const u8 *row, u32 width, u32 i) {
        return bf16_at(row + width + 4 * div_up(width, BLOCK) + 2 * i);
    }
};

template <class Row> __device__ __forceinline__ void attention(const Attention &a) {
    previous_done();
    extern __shared__ float memory[];
    __shared__ float scores[TOKENS];
    __shared__ const u8 *tokens[TOKENS];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 row = blockIdx.x / a.heads;
    float *query = memory, *sums = memory + a.latent + a.rope;
    for (u32 i = threadIdx.x; i < a.latent; i += THREADS) {
        query[i] = ((const float *)a.q_latent)[(u64)blockIdx.x * a.latent + i];
        sums[i] = 0.0f;
    }
    for (u32 i = threadIdx.x; i < a.rope; i += THREADS) {
        query[a.latent + i] = ((const float *)a.q_rope)[(u64)blockIdx.x * a.rope + i];
    }
    const u32 *table = a.tables + a.starts[row];
    u32 context = a.contexts[row];
    require((u64)a.starts[row] + div_up(context, a.block_tokens) <= a.table_len);
    float largest = -INFINITE, total = 0.0f;
    for (u32 start = a.first; start < context; start += TOKENS) {
        u32 count = min(TOKENS, context - start);
        __syncthreads();
        if (threadIdx.x < count) {
            u32 position = start + threadIdx.x, block = table[position / a.block_tokens];
            require(block < a.blocks);
            tokens[threadIdx.x] = a.pool + block * a.block_stride + a.layer_offset
                + (u64)(position % a.block_tokens) * a.row_bytes;
        }
        __syncthreads();
        for (u32 t = warp; t < count; t += THREADS / WARP) {
            float score = 0.0f;
            for (u32 i = lane; i < a.latent; i += WARP) {
                score = fmaf(query[i], Row::latent(tokens[t], a.latent, i), score);
            }
            for (u32 i = lane; i < a.rope; i += WARP) {
                score = fmaf(query[a.latent + i], Row::rope(tokens[t], a.latent, i), score);
            }
            score = warp_sum(score) * a.scale;
            if (lane == 0) scores[t] = score;
        }
        __syncthreads();
        // Every warp has the same 64 scores, two a lane.
        float low = lane < count ? scores[lane] : -INFINITE;
        float high = lane + WARP < count ? scores[lane + WARP] : -INFINITE;
        float next = fmaxf(largest, warp_max(fmaxf(low, high)));
        float correction = expf(largest - next);
        low = lane < count ? expf(low - next) : 0.0f;
        high = lane + WARP < count ? expf(high - next) : 0.0f;
        total = total * correction + warp_sum(low + high);
        largest = next;
        __syncthreads();
        if (warp == 0) scores[lane] = low, scores[lane + WARP] = high;
        __syncthreads();
        for (u32 i = threadIdx.x; i < a.latent; i += THREADS) {
            float sum = sums[i] * correction;
            for (u32 t = 0; t < count; t++) sum = fmaf(scores[t], Row::latent(tokens[t], a.latent, i), sum);
            sums[i] = sum;
        }
    }
    for (u32 i = threadIdx.x; i < a.latent; i += THREADS) {
        ((float *)a.out)[(u64)blockIdx.x * a.latent + i] = context > a.first ? sums[i] / total : 0.0f;
    }
}

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)

ENTRY mla_attention_f32(const __grid_constant__ Attention a) { attention<F32Row>(a); }
ENTRY mla_attention_bf16(const __grid_constant__ Attention a) { attention<Bf16Row>(a); }
ENTRY mla_attention_fp8(const __grid_constant__ Attention a) { attention<Fp8Row>(a); }
