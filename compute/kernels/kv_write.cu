// Encodes one cache row a block: latent, then (FP8) a scale per 128 channels, then rope, then zeros up to the row's end.

// Storage of a row, as the host numbers it.
#define KV_F32 0u
#define KV_BF16 1u
#define KV_FP8 2u

// What a row is written to, and how.
struct Cache {
    u8 *pool;
    // [m, (block, row)]; a block of 0xFFFFFFFF is padding: nothing is written.
    const u32 *slots;
    u64 layer_offset, block_stride;
    u32 format, latent_dim, rope_dim, row_bytes, payload_bytes, blocks, block_tokens;
    float amax_min;
};

// By the block's first 128 threads, and all of them come by. `latent(i)` is channel i, for the thread that has i % 128;
// `rope` all can read. Shared: 32 floats.
template <class Latent>
__device__ __forceinline__ void encode(const Cache &c, u32 block, u32 row, Latent latent, const float *rope, float *shared) {
    require(block < c.blocks && row < c.block_tokens);
    u8 *out = c.pool + block * c.block_stride + c.layer_offset + (u64)row * c.row_bytes;
    u32 rope_offset = c.latent_dim * (c.format == KV_F32 ? 4 : 2), thread = threadIdx.x;
    if (c.format == KV_FP8) {
        rope_offset = c.latent_dim + 4 * div_up(c.latent_dim, BLOCK);
        // Four scales at a time, a block of 128 channels each: 4 x 4 warps' maxima.
        for (u32 start = 0; start < c.latent_dim; start += 4 * BLOCK) {
            float values[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 channel = start + j * BLOCK + thread;
                values[j] = thread < BLOCK && channel < c.latent_dim ? latent(channel) : 0.0f;
                float amax = warp_max(fabsf(values[j]));
                if (thread < BLOCK && thread % WARP == 0) shared[4 * j + thread / WARP] = amax;
            }
            __syncthreads();
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 channel = start + j * BLOCK + thread;
                float amax = fmaxf(fmaxf(shared[4 * j], shared[4 * j + 1]), fmaxf(shared[4 * j + 2], shared[4 * j + 3]));
                float scale = block_scale(amax, c.amax_min, false);
                if (thread >= BLOCK || channel >= c.latent_dim) continue;
                out[channel] = to_e4m3(values[j] / scale);
                if (thread == 0) store_float(out + c.latent_dim + 4 * (channel / BLOCK), scale);
            }
            __syncthreads();
        }
    } else {
        for (u32 i = thread; i < c.latent_dim && thread < BLOCK; i += BLOCK) {
            if (c.format == KV_F32) store_float(out + 4 * i, latent(i));
            else store_bf16(out + 2 * i, latent(i));
        }
    }
    if (thread >= BLOCK) return;
    for (u32 i = thread; i < c.rope_dim; i += BLOCK) {
        if (c.format == KV_F32) store_float(out + rope_offset + 4 * i, rope[i]);
        else store_bf16(out + rope_offset + 2 * i, rope[i]);
    }
    for (u32 i = c.payload_bytes + thread; i < c.row_bytes; i += BLOCK) out[i] = 0;
}

extern "C" __global__ void __launch_bounds__(128)
kv_write(const __grid_constant__ Cache c, const float *latent, const float *rope) {
    previous_done();
    __shared__ float shared[32];
    u32 block = c.slots[2 * (u64)blockIdx.x], row = c.slots[2 * (u64)blockIdx.x + 1];
    if (block == ALL) return;
    latent += (u64)blockIdx.x * c.latent_dim;
    encode(c, block, row, [&](u32 i) { return latent[i]; }, rope + (u64)blockIdx.x * c.rope_dim, shared);
}

// Where latents and keys come from: the projection's rows [m, stride], which start with both.
struct Latents {
    const float *x, *w;
    const u32 *positions;
    const float *table;
    u32 stride, positions_max;
    float eps;
    u32 unused;
};

// Norms a row's latent, rotates its key, writes both. Shared memory: a latent and a key; `shared` 32 floats more. The first
// 128 threads do it.
__device__ __forceinline__ void write_latent(const Cache &c, const Latents &l, u32 index, float *row_values, float *shared) {
    u32 thread = threadIdx.x;
    u32 block = c.slots[2 * (u64)index], row = c.slots[2 * (u64)index + 1], position = l.positions[index];
    const float *x = l.x + (u64)index * l.stride;
    float *latent = row_values, *rope = row_values + c.latent_dim, squares = 0.0f;
    if (thread < BLOCK) {
        for (u32 start = thread; start < c.latent_dim; start += 4 * BLOCK) {
            float values[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) values[j] = start + j * BLOCK < c.latent_dim ? x[start + j * BLOCK] : 0.0f;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                if (start + j * BLOCK >= c.latent_dim) continue;
                latent[start + j * BLOCK] = values[j], squares = fmaf(values[j], values[j], squares);
            }
        }
    }
    if (block == ALL) return;
    require(position < l.positions_max);
    // The other warps have the time.
    u32 rotating = blockDim.x > BLOCK ? BLOCK : 0;
    for (u32 i = thread - rotating; i < c.rope_dim / 2; i += blockDim.x - rotating) {
        const float *angle = l.table + (u64)position * c.rope_dim + 2 * i;
        float a = x[c.latent_dim + 2 * i], b = x[c.latent_dim + 2 * i + 1];
        rope[2 * i] = a * angle[0] - b * angle[1];
        rope[2 * i + 1] = a * angle[1] + b * angle[0];
    }
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)c.latent_dim + l.eps);
    __syncthreads();
    encode(c, block, row, [&](u32 i) { return latent[i] * factor * l.w[i]; }, rope, shared);
}

extern "C" __global__ void __launch_bounds__(128)
latent_write(const __grid_constant__ Cache c, const __grid_constant__ Latents l) {
    __shared__ float shared[32];
    extern __shared__ float row_values[];
    for (u32 i = 32 * threadIdx.x; i < c.latent_dim; i += 32 * 128) prefetch(l.w + i);
    previous_done();
    write_latent(c, l, blockIdx.x, row_values, shared);
}

// The same for every row, and the norm of the query's latent for every row: two small kernels' work at the same time.
extern "C" __global__ void __launch_bounds__(THREADS)
latent_write_norm(const __grid_constant__ Cache c, const __grid_constant__ Latents l, const __grid_constant__ Norm n) {
    __shared__ float shared[32];
    extern __shared__ float row_values[];
    u32 rows = gridDim.x / 2;
    if (blockIdx.x < rows) {
        norm_row<1>(n, blockIdx.x, 0, shared, previous_done);
    } else {
        for (u32 i = 32 * threadIdx.x; i < c.latent_dim; i += 32 * THREADS) prefetch(l.w + i);
        previous_done();
        write_latent(c, l, blockIdx.x - rows, row_values, shared);
    }
}
