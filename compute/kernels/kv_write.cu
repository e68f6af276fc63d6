// Encodes one cache row a block: latent, then (FP8) a scale per 128 channels, then rope, then zeros up to the row's end.

// Storage of a row, as the host numbers it.
#define KV_F32 0u
#define KV_BF16 1u
#define KV_FP8 2u

// slots [m, (block, row)]; a block of 0xFFFFFFFF is padding: nothing is written.
extern "C" __global__ void __launch_bounds__(128)
kv_write(u8 *pool, u32 format, u32 latent_dim, u32 rope_dim, u32 row_bytes, u32 payload_bytes, u64 layer_offset,
         u64 block_stride, u32 blocks, u32 block_tokens, const u32 *slots, float amax_min, const float *latent,
         const float *rope) {
    __shared__ float shared[32];
    u32 block = slots[2 * (u64)blockIdx.x], row = slots[2 * (u64)blockIdx.x + 1];
    if (block == ALL) return;
    require(block < blocks && row < block_tokens);
    u8 *out = pool + block * block_stride + layer_offset + (u64)row * row_bytes;
    latent += (u64)blockIdx.x * latent_dim;
    rope += (u64)blockIdx.x * rope_dim;
    u32 rope_offset = latent_dim * (format == KV_F32 ? 4 : 2);
    if (format == KV_FP8) {
        rope_offset = latent_dim + 4 * div_up(latent_dim, BLOCK);
        for (u32 start = 0; start < latent_dim; start += BLOCK) {
            u32 channel = start + threadIdx.x;
            float value = channel < latent_dim ? latent[channel] : 0.0f;
            float scale = block_scale(block_max(fabsf(value), shared), amax_min, false);
            if (channel < latent_dim) out[channel] = to_e4m3(value / scale);
            if (threadIdx.x == 0) store_float(out + latent_dim + 4 * (start / BLOCK), scale);
        }
    } else {
        for (u32 i = threadIdx.x; i < latent_dim; i += 128) {
            if (format == KV_F32) store_float(out + 4 * i, latent[i]);
            else store_bf16(out + 2 * i, latent[i]);
        }
    }
    for (u32 i = threadIdx.x; i < rope_dim; i += 128) {
        if (format == KV_F32) store_float(out + rope_offset + 4 * i, rope[i]);
        else store_bf16(out + rope_offset + 2 * i, rope[i]);
    }
    for (u32 i = payload_bytes + threadIdx.x; i < row_bytes; i += 128) out[i] = 0;
}
