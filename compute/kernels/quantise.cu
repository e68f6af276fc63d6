// Rows to what a matrix product takes: E4M3 with a scale per 128 channels, or bf16.

// One block of 128 threads per (row, 128 channels): a channel a thread. x [m, k] to codes [m, k], scales [m, ceil(k/128)].
extern "C" __global__ void __launch_bounds__(128)
quantise_e4m3(const float *x, u32 k, float amax_min, u32 power_of_two, u8 *codes, float *scales) {
    __shared__ float shared[32];
    u32 blocks = div_up(k, BLOCK);
    u64 row = blockIdx.x / blocks;
    u32 channel = blockIdx.x % blocks * BLOCK + threadIdx.x;
    float value = channel < k ? x[row * k + channel] : 0.0f;
    float scale = block_scale(block_max(fabsf(value), shared), amax_min, power_of_two);
    // Division, not multiplication by the reciprocal: the codes are then those of the scalar rule.
    if (channel < k) codes[row * k + channel] = to_e4m3(value / scale);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

extern "C" __global__ void __launch_bounds__(256) round_bf16(const float *x, u64 len, u16 *out) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) out[i] = to_bf16(x[i]);
}

// What a value suffers that goes over the wire as bf16.
extern "C" __global__ void __launch_bounds__(256) round_bf16_in_place(float *x, u64 len) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) x[i] = from_bf16(to_bf16(x[i]));
}
