// Weights made from a seed, for measurements without a checkpoint: about normal, of the same value wherever and whenever they
// are made.

__device__ __forceinline__ u32 mixed(u64 x) {
    x ^= x >> 33, x *= 0xFF51AFD7ED558CCDull, x ^= x >> 33, x *= 0xC4CEB9FE1A85EC53ull, x ^= x >> 33;
    return (u32)x;
}

// The sum of four uniform numbers has the variance 1/3.
__device__ __forceinline__ float value_at(u64 seed, u64 i) {
    u32 bits = mixed(seed + i);
    float sum = (float)(bits & 255) + (float)(bits >> 8 & 255) + (float)(bits >> 16 & 255) + (float)(bits >> 24);
    return (sum / 256.0f - 1.9921875f) * 1.7320508f;
}

extern "C" __global__ void __launch_bounds__(256) synthetic_f32(float *out, u64 len, u64 seed, float mean, float deviation) {
    previous_done();
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < len; i += (u64)gridDim.x * 256) {
        out[i] = mean + deviation * value_at(seed, i);
    }
}

extern "C" __global__ void __launch_bounds__(256) synthetic_bf16(u16 *out, u64 len, u64 seed, float deviation) {
    previous_done();
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < len; i += (u64)gridDim.x * 256) {
        out[i] = to_bf16(deviation * value_at(seed, i));
    }
}

// `len` in fours.
extern "C" __global__ void __launch_bounds__(256) synthetic_e4m3(u32 *out, u64 len, u64 seed, float deviation) {
    previous_done();
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < len / 4; i += (u64)gridDim.x * 256) {
        u32 codes = 0;
        for (u32 j = 0; j < 4; j++) codes |= (u32)to_e4m3(deviation * value_at(seed, 4 * i + j)) << 8 * j;
        out[i] = codes;
    }
}
