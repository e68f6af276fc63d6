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

__device__ __forceinline__ void encode(const Cache &c, u32 block, u32 row, const float *latent, const float *rope,
                                       float *shared) {
    require(block < c.blocks && row < c.block_tokens);
    u8 *out = c.pool + block * c.block_stride + c.layer_offset + (u64)row * c.row_bytes;
    u32 rope_offset = c.latent_dim * (c.format == KV_F32 ? 4 : 2);
    if (c.format == KV_FP8) {
        rope_offset = c.latent_dim + 4 * div_up(c.latent_dim, BLOCK);
        for (u32 start = 0; start < c.latent_dim; start += BLOCK) {
            u32 channel = start + threadIdx.x;
            float value = channel < c.latent_dim ? latent[channel] : 0.0f;
            float scale = block_scale(block_max(fabsf(value), shared), c.amax_min, false);
            if (channel < c.latent_dim) out[channel] = to_e4m3(value / scale);
            if (threadIdx.x == 0) store_float(out + c.latent_dim + 4 * (start / BLOCK), scale);
        }
    } else {
        for (u32 i = threadIdx.x; i < c.latent_dim; i += 128) {
            if (c.format == KV_F32) store_float(out + 4 * i, latent[i]);
            else store_bf16(out + 2 * i, latent[i]);
        }
    }
    for (u32 i = threadIdx.x; i < c.rope_dim; i += 128) {
        if (c.format == KV_F32) store_float(out + rope_offset + 4 * i, rope[i]);
        else store_bf16(out + rope_offset + 2 * i, rope[i]);
    }
    for (u32 i = c.payload_bytes + threadIdx.x; i < c.row_bytes; i += 128) out[i] = 0;
}

extern "C" __global__ void __launch_bounds__(128)
kv_write(const __grid_constant__ Cache c, const float *latent, const float *rope) {
    previous_done();
    __shared__ float shared[32];
    u32 block = c.slots[2 * (u64)blockIdx.x], row = c.slots[2 * (u64)blockIdx.x + 1];
    if (block == ALL) return;
    encode(c, block, row, latent + (u64)blockIdx.x * c.latent_dim, rope + (u64)blockIdx.x * c.rope_dim, shared);
}

// From the projection [m, stride], which starts with latent and key: norms the latent, rotates the key, writes both.
// Shared memory: a latent and a key.
extern "C" __global__ void __launch_bounds__(128)
latent_write(const __grid_constant__ Cache c, const float *x, u32 stride, const float *w, float eps, const u32 *positions,
             const float *table, u32 positions_max) {
    previous_done();
    __shared__ float shared[32];
    extern __shared__ float row_values[];
    u32 block = c.slots[2 * (u64)blockIdx.x], row = c.slots[2 * (u64)blockIdx.x + 1];
    if (block == ALL) return;
    x += (u64)blockIdx.x * stride;
    float *latent = row_values, *rope = row_values + c.latent_dim, squares = 0.0f;
    for (u32 i = threadIdx.x; i < c.latent_dim; i += 128) squares = fmaf(x[i], x[i], squares);
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)c.latent_dim + eps);
    for (u32 i = threadIdx.x; i < c.latent_dim; i += 128) latent[i] = x[i] * factor * w[i];
    u32 position = positions[blockIdx.x];
    require(position < positions_max);
    for (u32 i = threadIdx.x; i < c.rope_dim / 2; i += 128) {
        const float *angle = table + (u64)position * c.rope_dim + 2 * i;
        float a = x[c.latent_dim + 2 * i], b = x[c.latent_dim + 2 * i + 1];
        rope[2 * i] = a * angle[0] - b * angle[1];
        rope[2 * i + 1] = a * angle[1] + b * angle[0];
    }
    __syncthreads();
    encode(c, block, row, latent, rope, shared);
}
