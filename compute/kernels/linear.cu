// Matrix products of any shape and format: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// A warp has one output channel and up to 8 rows. Lane l has channels 4l..4l+3 of every 128-block of K; a lane's sum runs
// over the blocks in order, FP8 blocks scaled as they are added, and the lanes are added once, at the end, in a fixed
// tree. Which rows share a warp changes none of these operations.

#define WARPS 4u
#define ROWS 8u

__device__ __forceinline__ void load4(const float *p, bool vector, u32 left, float v[4]) {
    if (vector && left >= 4) {
        float4 all = *(const float4 *)p;
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
        return;
    }
    for (u32 i = 0; i < 4; i++) v[i] = i < left ? p[i] : 0.0f;
}

__device__ __forceinline__ void load4(const u16 *p, bool vector, u32 left, float v[4]) {
    if (vector && left >= 4) {
        ushort4 all = *(const ushort4 *)p;
        v[0] = from_bf16(all.x), v[1] = from_bf16(all.y), v[2] = from_bf16(all.z), v[3] = from_bf16(all.w);
        return;
    }
    for (u32 i = 0; i < 4; i++) v[i] = i < left ? from_bf16(p[i]) : 0.0f;
}

__device__ __forceinline__ void load4(const u8 *p, bool vector, u32 left, float v[4]) {
    if (vector && left >= 4) {
        u32 all = *(const u32 *)p;
        from_e4m3x2((u16)all, v[0], v[1]);
        from_e4m3x2((u16)(all >> 16), v[2], v[3]);
        return;
    }
    for (u32 i = 0; i < 4; i++) v[i] = i < left ? from_e4m3(p[i]) : 0.0f;
}

// blockIdx.z is the head.
template <class W, class X, bool W_SCALED, bool X_SCALED>
__device__ __forceinline__ void product(const Product &p) {
    previous_done();
    u32 lane = threadIdx.x % WARP, out = blockIdx.x * WARPS + threadIdx.x / WARP;
    u32 head = blockIdx.z, blocks = div_up(p.k, BLOCK);
    Rows rows;
    if (!find_rows(p, ROWS, rows) || out >= p.n) return;
    Weights matrix = find_weights<sizeof(W)>(p, rows.expert + head, out);
    const W *w = (const W *)matrix.w + (u64)matrix.channel * p.k;
    const float *w_scales = matrix.scales + (u64)(matrix.channel / BLOCK) * blocks;
    u32 count = rows.end - rows.first;
    u64 inputs[ROWS];
    float sums[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        sums[r] = 0.0f;
        inputs[r] = r < count ? input_row(p, rows.first + r) : 0;
    }
#pragma unroll 2
    for (u32 block = 0; block < blocks; block++) {
        u32 i = block * BLOCK + 4 * lane, left = i < p.k ? p.k - i : 0;
        float weights[4];
        load4(w + i, p.w_vector, left, weights);
        float w_scale = W_SCALED ? w_scales[block] : 1.0f;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            if (r >= count) continue;
            float values[4];
            load4((const X *)p.x + inputs[r] * p.x_stride + head * p.x_head + i, p.x_vector, left, values);
            float sum = values[0] * weights[0];
            sum = fmaf(values[1], weights[1], sum);
            sum = fmaf(values[2], weights[2], sum);
            sum = fmaf(values[3], weights[3], sum);
            if (X_SCALED) sums[r] = fmaf(sum, w_scale * p.x_scales[inputs[r] * blocks + block], sums[r]);
            else if (W_SCALED) sums[r] = fmaf(sum, w_scale, sums[r]);
            else sums[r] += sum;
        }
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        if (r >= count) continue;
        float sum = warp_sum(sums[r]);
        if (lane == 0) store_output(p, rows.first + r, out, sum, head);
    }
}

#define ENTRY extern "C" __global__ void __launch_bounds__(WARPS * WARP)

ENTRY linear_f32(const __grid_constant__ Product p) { product<float, float, false, false>(p); }
ENTRY linear_bf16_f32(const __grid_constant__ Product p) { product<u16, float, false, false>(p); }
ENTRY linear_fp8_f32(const __grid_constant__ Product p) { product<u8, float, true, false>(p); }
ENTRY linear_bf16(const __grid_constant__ Product p) { product<u16, u16, false, false>(p); }
ENTRY linear_fp8(const __grid_constant__ Product p) { product<u8, u8, true, true>(p); }
