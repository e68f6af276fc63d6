// silu(gate) * up and what the next matrix product takes, in one pass; x [m, 2 * dim] holds gate, then up. A warp per
// (row, 128 channels), four channels a lane.

struct Swiglu {
    const float *x;
    // Rows that there are, where the host does not know: rows past it are left alone; null: all.
    const u32 *row_count;
    // Any of them null.
    float *y;
    u16 *y_bf16;
    u8 *codes;
    float *scales;
    u32 warps, dim, power_of_two;
    float amax_min;
};

extern "C" __global__ void __launch_bounds__(256) swiglu(const __grid_constant__ Swiglu s) {
    previous_done();
    u32 at = blockIdx.x * 8 + threadIdx.x / WARP, blocks = div_up(s.dim, BLOCK), row = at / blocks;
    if (at >= s.warps) return;
    // There is room for every row, whether it is there or not: it is asked for at the same time as their number.
    u32 rows = s.row_count ? *s.row_count : ALL;
    u32 channel = at % blocks * BLOCK + threadIdx.x % WARP * 4, left = channel < s.dim ? s.dim - channel : 0;
    const float *gate = s.x + (u64)row * 2 * s.dim + channel, *up = gate + s.dim;
    u64 out = (u64)row * s.dim + channel;
    float g[4], u[4], v[4], amax = 0.0f;
    bool vector = s.dim % 4 == 0 && left >= 4;
    if (vector) {
        *(float4 *)g = *(const float4 *)gate, *(float4 *)u = *(const float4 *)up;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) g[i] = i < left ? gate[i] : 0.0f, u[i] = i < left ? up[i] : 0.0f;
    }
    if (row >= rows) return;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        v[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
        amax = fmaxf(amax, fabsf(v[i]));
    }
    if (s.y) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (i < left) s.y[out + i] = v[i];
    }
    if (s.y_bf16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (i < left) s.y_bf16[out + i] = to_bf16(v[i]);
    }
    if (s.codes) {
        float scale = block_scale(warp_max(amax), s.amax_min, s.power_of_two);
        u32 code = 0;
#pragma unroll
        for (u32 i = 0; i < 4; i++) code |= (u32)to_e4m3(v[i] / scale) << 8 * i;
        if (vector) {
            *(u32 *)(s.codes + out) = code;
        } else {
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                if (i < left) s.codes[out + i] = (u8)(code >> 8 * i);
        }
        if (threadIdx.x % WARP == 0) s.scales[at] = scale;
    }
}
