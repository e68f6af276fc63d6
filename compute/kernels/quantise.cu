// Rows to what a matrix product takes: E4M3 with a scale per 128 channels, or bf16.

// A warp per (row, 128 channels), four channels a lane. x [m, k] to codes [m, k], scales [m, ceil(k/128)]; `vector` says that
// every row starts at a multiple of four values in x and in codes.
extern "C" __global__ void __launch_bounds__(256)
quantise_e4m3(const float *x, u32 k, u32 scale_count, u32 vector, float amax_min, u32 power_of_two, u8 *codes,
              float *scales) {
    previous_done();
    u32 at = blockIdx.x * 8 + threadIdx.x / WARP, blocks = div_up(k, BLOCK);
    if (at >= scale_count) return;
    u64 row = at / blocks;
    u32 channel = at % blocks * BLOCK + threadIdx.x % WARP * 4, left = channel < k ? k - channel : 0;
    x += row * k + channel;
    codes += row * k + channel;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (vector && left >= 4) {
        v = *(const float4 *)x;
    } else {
        if (left > 0) v.x = x[0];
        if (left > 1) v.y = x[1];
        if (left > 2) v.z = x[2];
        if (left > 3) v.w = x[3];
    }
    float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    float scale = block_scale(warp_max(amax), amax_min, power_of_two);
    // Division, not multiplication by the reciprocal: the codes are then those of the scalar rule.
    u8 a = to_e4m3(v.x / scale), b = to_e4m3(v.y / scale), c = to_e4m3(v.z / scale), d = to_e4m3(v.w / scale);
    if (vector && left >= 4) {
        *(u32 *)codes = (u32)a | (u32)b << 8 | (u32)c << 16 | (u32)d << 24;
    } else {
        if (left > 0) codes[0] = a;
        if (left > 1) codes[1] = b;
        if (left > 2) codes[2] = c;
        if (left > 3) codes[3] = d;
    }
    if (threadIdx.x % WARP == 0) scales[at] = scale;
}

extern "C" __global__ void __launch_bounds__(256) round_bf16(const float *x, u64 len, u16 *out) {
    previous_done();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) out[i] = to_bf16(x[i]);
}

// What a value suffers that goes over the wire as bf16.
extern "C" __global__ void __launch_bounds__(256) round_bf16_in_place(float *x, u64 len) {
    previous_done();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) x[i] = from_bf16(to_bf16(x[i]));
}
