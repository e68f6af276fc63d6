// RMS norm and what a matrix product takes, in one pass: y = x / sqrt(mean(x^2) + eps) * w, handed out as f32, as bf16, as
// E4M3 with a scale per 128 channels, or as three bf16 parts whose sum is the f32. A block of 512 threads per row; a warp
// has 128 channels of every 2,048.
//
// The row may be the sum of two, which is then stored in the place of the first.
#define THREADS 512u

struct Norm {
    float *x;
    const float *add;
    // Row i is row rows[i] of x; null: row i.
    const u32 *rows;
    const float *w;
    // Any of them null.
    float *y;
    u16 *y_bf16, *y_parts;
    u8 *codes;
    float *scales;
    u32 x_rows, stride, dim, vector, power_of_two;
    float eps, amax_min;
};

__device__ __forceinline__ float4 load(const float *p, u32 left, bool vector) {
    if (vector && left >= 4) return *(const float4 *)p;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (left > 0) v.x = p[0];
    if (left > 1) v.y = p[1];
    if (left > 2) v.z = p[2];
    if (left > 3) v.w = p[3];
    return v;
}

__device__ __forceinline__ void store(float *p, u32 left, bool vector, float4 v) {
    if (vector && left >= 4) {
        *(float4 *)p = v;
        return;
    }
    if (left > 0) p[0] = v.x;
    if (left > 1) p[1] = v.y;
    if (left > 2) p[2] = v.z;
    if (left > 3) p[3] = v.w;
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ Norm n) {
    __shared__ float shared[32];
    // A line of 128 bytes each.
    for (u32 i = 32 * threadIdx.x; i < n.dim; i += 32 * THREADS) prefetch(n.w + i);
    previous_done();
    u32 row = n.rows ? n.rows[blockIdx.x] : blockIdx.x, lane = threadIdx.x % WARP;
    require(row < n.x_rows);
    float *x = n.x + (u64)row * n.stride;
    u64 out = (u64)blockIdx.x * n.dim;
    u32 start = threadIdx.x / WARP * BLOCK;
    float squares = 0.0f;
#pragma unroll 4
    for (u32 block = start; block < n.dim; block += 4 * THREADS) {
        u32 i = block + 4 * lane, left = i < n.dim ? n.dim - i : 0;
        float4 v = load(x + i, left, n.vector);
        if (n.add) {
            float4 other = load(n.add + (u64)row * n.stride + i, left, n.vector);
            v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
            store(x + i, left, n.vector, v);
        }
        squares = fmaf(v.x, v.x, squares);
        squares = fmaf(v.y, v.y, squares);
        squares = fmaf(v.z, v.z, squares);
        squares = fmaf(v.w, v.w, squares);
    }
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)n.dim + n.eps);
#pragma unroll 4
    for (u32 block = start; block < n.dim; block += 4 * THREADS) {
        u32 i = block + 4 * lane, left = i < n.dim ? n.dim - i : 0;
        float4 v = load(x + i, left, n.vector), w = load(n.w + i, left, n.vector);
        v = make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
        float values[4] = {v.x, v.y, v.z, v.w};
        if (n.y) store(n.y + out + i, left, n.vector, v);
        if (n.y_bf16) {
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                if (j < left) n.y_bf16[out + i + j] = to_bf16(values[j]);
        }
        if (n.y_parts) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                if (j >= left) continue;
                u16 high = to_bf16(values[j]);
                float rest = values[j] - from_bf16(high);
                u16 middle = to_bf16(rest);
                n.y_parts[3 * out + i + j] = high;
                n.y_parts[3 * out + n.dim + i + j] = middle;
                n.y_parts[3 * out + 2 * n.dim + i + j] = to_bf16(rest - from_bf16(middle));
            }
        }
        if (n.codes) {
            float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
            if (left < 4) {
                amax = 0.0f;
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    if (j < left) amax = fmaxf(amax, fabsf(values[j]));
            }
            float scale = block_scale(warp_max(amax), n.amax_min, n.power_of_two);
            u32 code = 0;
#pragma unroll
            for (u32 j = 0; j < 4; j++) code |= (u32)to_e4m3(values[j] / scale) << 8 * j;
            if (n.vector && left >= 4) {
                *(u32 *)(n.codes + out + i) = code;
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    if (j < left) n.codes[out + i + j] = (u8)(code >> 8 * j);
            }
            if (lane == 0) n.scales[(u64)blockIdx.x * div_up(n.dim, BLOCK) + block / BLOCK] = scale;
        }
    }
}
