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
    // Any of them null; all start at multiples of 16 bytes.
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

// Two values at a time: rounding is what the multiprocessor of a single row has to do most.
__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
__device__ __forceinline__ void store_bf16s(u16 *p, u32 left, bool vector, const float *v) {
    if (vector) {
        *(uint2 *)p = make_uint2(pack2(v[0], v[1]), pack2(v[2], v[3]));
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++)
        if (j < left) p[j] = to_bf16(v[j]);
}

// Four channels of a thread each: as many as it keeps in registers from the first pass for the second.
#define KEPT 4u

__device__ __forceinline__ void emit(const Norm &n, u32 row, u32 block, float factor, float4 v, float4 w) {
    u32 lane = threadIdx.x % WARP, i = block + 4 * lane, left = i < n.dim ? n.dim - i : 0;
    u64 out = (u64)row * n.dim;
    v = make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
    float values[4] = {v.x, v.y, v.z, v.w};
    bool vector = n.vector && left >= 4;
    if (n.y) store(n.y + out + i, left, n.vector, v);
    if (n.y_bf16) store_bf16s(n.y_bf16 + out + i, left, vector, values);
    if (n.y_parts) {
        float rests[4], lasts[4];
#pragma unroll
        for (u32 j = 0; j < 4; j += 2) {
            u32 high = pack2(values[j], values[j + 1]);
            rests[j] = values[j] - __uint_as_float(high << 16), rests[j + 1] = values[j + 1] - __uint_as_float(high & 0xFFFF0000u);
            u32 middle = pack2(rests[j], rests[j + 1]);
            lasts[j] = rests[j] - __uint_as_float(middle << 16), lasts[j + 1] = rests[j + 1] - __uint_as_float(middle & 0xFFFF0000u);
        }
        store_bf16s(n.y_parts + 3 * out + i, left, vector, values);
        store_bf16s(n.y_parts + 3 * out + n.dim + i, left, vector, rests);
        store_bf16s(n.y_parts + 3 * out + 2 * n.dim + i, left, vector, lasts);
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
        for (u32 j = 0; j < 4; j += 2) {
            u16 two;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(values[j + 1] / scale), "f"(values[j] / scale));
            code |= (u32)two << 8 * j;
        }
        if (vector) {
            *(u32 *)(n.codes + out + i) = code;
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                if (j < left) n.codes[out + i + j] = (u8)(code >> 8 * j);
        }
        if (lane == 0) n.scales[(u64)row * div_up(n.dim, BLOCK) + block / BLOCK] = scale;
    }
}

// Row `row` of the outputs, by 512 threads. `ready` says when the inputs may be read. With SHARES blocks in a cluster, all of them add up
// the row and each hands out the channels that its threads keep in one of their places; a row has no others then.
template <u32 SHARES, class Ready> __device__ __forceinline__ void norm_row(const Norm &n, u32 row, u32 share, float *shared, Ready ready) {
    u32 lane = threadIdx.x % WARP, start = threadIdx.x / WARP * BLOCK;
    auto left_at = [&](u32 block) { return block + 4 * lane < n.dim ? n.dim - block - 4 * lane : 0; };
    float4 values[KEPT], others[KEPT], weights[KEPT];
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        u32 block = start + 4 * THREADS * k;
        weights[k] = load(n.w + block + 4 * lane, left_at(block), n.vector);
    }
    ready();
    u32 from = n.rows ? n.rows[row] : row;
    require(from < n.x_rows);
    float *x = n.x + (u64)from * n.stride;
    const float *add = n.add ? n.add + (u64)from * n.stride : nullptr;
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        u32 block = start + 4 * THREADS * k, i = block + 4 * lane;
        values[k] = load(x + i, left_at(block), n.vector);
        if (add) others[k] = load(add + i, left_at(block), n.vector);
    }
    float squares = 0.0f;
    auto take = [&](float4 &v, float4 other, u32 block) {
        if (add) {
            v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
            if (SHARES == 1) store(x + block + 4 * lane, left_at(block), n.vector, v);
        }
        squares = fmaf(v.x, v.x, squares);
        squares = fmaf(v.y, v.y, squares);
        squares = fmaf(v.z, v.z, squares);
        squares = fmaf(v.w, v.w, squares);
    };
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        u32 block = start + 4 * THREADS * k;
        if (block < n.dim) take(values[k], others[k], block);
    }
    for (u32 block = start + 4 * THREADS * KEPT; block < n.dim; block += 4 * THREADS) {
        u32 i = block + 4 * lane, left = left_at(block);
        float4 v = load(x + i, left, n.vector), other = v;
        if (add) other = load(add + i, left, n.vector);
        take(v, other, block);
    }
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)n.dim + n.eps);
    if constexpr (SHARES > 1) {
        // The sum takes its place when all have read the row.
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#pragma unroll
        for (u32 k = 0; k < KEPT; k++) {
            u32 block = start + 4 * THREADS * k;
            if (k == share && block < n.dim) emit(n, row, block, factor, values[k], weights[k]);
        }
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#pragma unroll
        for (u32 k = 0; k < KEPT; k++) {
            u32 block = start + 4 * THREADS * k;
            if (add && k == share && block < n.dim) store(x + block + 4 * lane, left_at(block), n.vector, values[k]);
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < KEPT; k++) {
            u32 block = start + 4 * THREADS * k;
            if (block < n.dim) emit(n, row, block, factor, values[k], weights[k]);
        }
        for (u32 block = start + 4 * THREADS * KEPT; block < n.dim; block += 4 * THREADS) {
            u32 i = block + 4 * lane, left = left_at(block);
            emit(n, row, block, factor, load(x + i, left, n.vector), load(n.w + i, left, n.vector));
        }
    }
}
