// bf16 matrix products on Hopper's matrix unit: y[m, h, n] = sum over k of x[m, h, k] * w[h, n, k], for k in whole
// 64-blocks and n in whole tiles of 64; blockIdx.z is the head. One matrix, two whose outputs lie side by side, or one (or
// two) for each expert.
//
// Tiles and pipeline are those of linear_wgmma.cu. The unit's sums are added up in f32 every 128 of K.
//
// With PARTS = 3 an input is the sum of three bf16 values, which an f32 is to its last bits, and each part is multiplied
// by the same weights: an f32 product of bf16 weights. x is then [m, 3, k]; blockIdx.z is a slice of SLICE channels, and
// y [slices, m, n] holds the slices' sums, for the reader to add in order.
//
// Attention's products of up to 16 rows do more than multiply, with the same bits: one splits its queries on their way to the unit, one
// rounds its outputs for the next product.

#define CHANNELS 64u
#define THREADS 128u
#define STEP 64u
#define SLICE 512u

// Where outputs of 128 channels go that are rounded for the next product at once.
struct Rounded {
    u8 *codes;
    float *scales;
    u32 power_of_two;
    float amax_min;
};

// Projected queries [m, heads, k + rope_dim] in f32, of which the first k are multiplied and the others rotated by their row's
// position's angles, to `rope` [m, heads, rope_dim].
struct Queries {
    const float *q;
    const u32 *positions;
    const float *table;
    u16 *rope;
    u32 rope_dim, positions_max;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile's sums by way of shared memory, so that a row's outputs are stored side by side.
template <u32 TILE>
__device__ __forceinline__ void store_rows(const Product &p, const float *sums, u32 base, u32 first, u32 end, u32 out, u32 head) {
    // Four more, so that no two threads of a warp meet in a bank.
    constexpr u32 STRIDE = CHANNELS + 4;
    extern __shared__ u8 memory[];
    float *rows = (float *)(memory + (base - (u32)__cvta_generic_to_shared(memory)));
    u32 thread = threadIdx.x, own = thread / 32 * 16 + thread % 32 / 4;
    // The last of the operands has been read.
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        rows[(i / 4 * 8 + thread % 4 * 2 + i % 2) * STRIDE + own + i % 4 / 2 * 8] = sums[i];
    }
    __syncthreads();
    u32 piece = thread % 8 * 8;
    for (u32 line = thread / 8; line < TILE && first + line < end; line += THREADS / 8) {
        u32 row = p.out_rows ? p.out_rows[first + line] : first + line;
        u64 at = ((u64)row * p.heads + head) * p.n + out + piece;
        const float *from = rows + line * STRIDE + piece;
        float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
        if (p.y_bf16) {
            u32 bits[4] = {to_bf16(low.x) | (u32)to_bf16(low.y) << 16, to_bf16(low.z) | (u32)to_bf16(low.w) << 16,
                           to_bf16(high.x) | (u32)to_bf16(high.y) << 16, to_bf16(high.z) | (u32)to_bf16(high.w) << 16};
            *(uint4 *)((u16 *)p.y + at) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
        } else {
            *(float4 *)((float *)p.y + at) = low, *(float4 *)((float *)p.y + at + 4) = high;
        }
    }
}

// Two warpgroups' sums for the same 16 rows, 64 channels each, as quantise.cu rounds them: one scale for all.
__device__ __forceinline__ void store_rounded(const Product &p, const Rounded &r, const float (&sums)[8], u32 first, u32 end, u32 head) {
    __shared__ float largest[8][16];
    u32 thread = threadIdx.x % THREADS, lane = thread % WARP;
    // Rows of a thread: 2 * (lane % 4), the next, and the eighth after either; channels: one and the eighth after it.
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        u32 i = j / 2 * 4 + j % 2;
        float amax = fmaxf(fabsf(sums[i]), fabsf(sums[i + 2]));
#pragma unroll
        for (u32 step = 4; step < WARP; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, step));
        if (lane < 4) largest[threadIdx.x / WARP][j / 2 * 8 + lane * 2 + j % 2] = amax;
    }
    __syncthreads();
    u32 channel = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        u32 i = j / 2 * 4 + j % 2, line = j / 2 * 8 + lane % 4 * 2 + j % 2, row = first + line;
        float amax = largest[0][line];
#pragma unroll
        for (u32 warp = 1; warp < 8; warp++) amax = fmaxf(amax, largest[warp][line]);
        float scale = block_scale(amax, r.amax_min, r.power_of_two);
        if (row >= end) continue;
        u64 at = (u64)row * p.heads + head;
        u8 *codes = r.codes + at * BLOCK + channel;
        codes[0] = to_e4m3(sums[i] / scale), codes[8] = to_e4m3(sums[i + 2] / scale);
        if (channel == 0) r.scales[at] = scale;
    }
}

// Warpgroup `group` of those that work side by side, each with its own CHANNELS; `rounded`: where the outputs of two go.
template <u32 TILE, u32 STAGES, u32 PARTS, u32 GROUPS = 1>
__device__ __forceinline__ void product(const Product &p, const Rounded *rounded = nullptr) {
    constexpr u32 WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128;
    extern __shared__ u8 memory[];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 group = GROUPS == 1 ? 0 : __shfl_sync(ALL, threadIdx.x / THREADS, 0);
    u32 thread = threadIdx.x % THREADS, chunk = thread % 8, out = (blockIdx.x * GROUPS + group) * CHANNELS;
    base += group * STAGES * (WEIGHTS + INPUTS);
    // Where it does not depend on the rows which weights are read, the first of them are asked for while the rows are being made.
    bool early = !p.tiles;
    if (!early) previous_done();
    Rows tile_rows;
    if (!find_rows(p, TILE, tile_rows)) return;
    u32 first = tile_rows.first, end = tile_rows.end;
    u32 head = PARTS == 1 ? blockIdx.z : 0, start = PARTS == 1 ? 0 : blockIdx.z * SLICE;
    u32 steps = PARTS == 1 ? p.k / STEP : (min(p.k, start + SLICE) - start) / STEP;
    Weights matrix = find_weights<2>(p, tile_rows.expert + head, out);
    const u8 *w = matrix.w + ((u64)(matrix.channel + thread / 8) * p.k + start) * 2 + chunk * 16;
    auto load_weights = [&](u32 step) {
        u32 weights = base + step % STAGES * (WEIGHTS + INPUTS), channel = step / PARTS * STEP;
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 16; i++) {
            copy16(weights + swizzled(thread / 8 + 16 * i, chunk), w + ((u64)(16 * i) * p.k + channel) * 2, 16);
        }
    };
    if (early) {
        for (u32 step = 0; step < STAGES - 1 && step < PARTS * steps; step++) load_weights(step);
        previous_done();
    }
    const u8 *inputs[TILE / 16];
    u32 there[TILE / 16];
#pragma unroll
    for (u32 i = 0; i < TILE / 16; i++) {
        u32 row = first + thread / 8 + 16 * i;
        there[i] = row < end ? 16 : 0;
        u64 at = (u64)(there[i] ? input_row(p, row) : 0) * p.x_stride + (u64)head * p.x_head + start;
        inputs[i] = (const u8 *)p.x + 2 * at + chunk * 16;
    }
    // A step is 64 channels of one part: all parts of 64 channels, then the next.
    auto load_inputs = [&](u32 step) {
        u32 rows = base + step % STAGES * (WEIGHTS + INPUTS) + WEIGHTS;
        u32 channel = step / PARTS * STEP, part = step % PARTS;
#pragma unroll
        for (u32 i = 0; i < TILE / 16; i++) {
            copy16(rows + swizzled(thread / 8 + 16 * i, chunk), inputs[i] + (channel + part * p.k) * 2, there[i]);
        }
    };
    float sums[TILE / 2], d[TILE / 2];
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) sums[i] = d[i] = 0.0f;
    for (u32 step = 0; step < STAGES - 1; step++) {
        // Weights that were asked for early are of the first group.
        if (step < PARTS * steps && !early) load_weights(step);
        if (step < PARTS * steps) load_inputs(step);
        copies_commit();
    }
    for (u32 step = 0; step < PARTS * steps; step++) {
        copies_wait<STAGES - 2>();
        written_for_matrix_unit();
        // Also: everybody is done with the stage that is filled next.
        __syncthreads();
        if (step + STAGES - 1 < PARTS * steps) load_weights(step + STAGES - 1), load_inputs(step + STAGES - 1);
        copies_commit();
        u32 at = base + step % STAGES * (WEIGHTS + INPUTS);
        u64 a = tile(at), b = tile(at + WEIGHTS);
        bool fresh = step % (2 * PARTS) == 0;
        mma_begin();
#pragma unroll
        for (u32 i = 0; i < 4; i++) MmaBf16<TILE>::run(d, a + 2 * i, b + 2 * i, i > 0 || !fresh);
        mma_commit();
        mma_wait<0>();
        if (step % (2 * PARTS) == 2 * PARTS - 1 || step + 1 == PARTS * steps) {
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) sums[i] += d[i];
        }
    }
    if constexpr (GROUPS == 2) {
        store_rounded(p, *rounded, sums, first, end, head);
        return;
    }
    if (PARTS == 1 && TILE > 16 && (u64)p.y % 16 == 0) {
        store_rows<TILE>(p, sums, base, first, end, out, head);
        return;
    }
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        u32 row = first + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (row >= end) continue;
        if (PARTS == 1) store_output(p, row, channel + i % 4 / 2 * 8, sums[i], head);
        else ((float *)p.y)[((u64)blockIdx.z * p.m + row) * p.n + channel + i % 4 / 2 * 8] = sums[i];
    }
}

// The product of parts by four warpgroups: each has 128 of the slice's channels, which the unit adds up anyway, and what it
// loads is all under way at once. The same bits as one warpgroup that takes them in turn.
template <u32 TILE> __device__ __forceinline__ void parts_product(const Product &p) {
    constexpr u32 GROUPS = SLICE / BLOCK, WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128, SHARE = 2 * WEIGHTS + 6 * INPUTS;
    extern __shared__ u8 memory[];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 group = __shfl_sync(ALL, threadIdx.x / THREADS, 0), thread = threadIdx.x % THREADS, chunk = thread % 8;
    u32 out = blockIdx.x * CHANNELS, start = blockIdx.z * SLICE + group * BLOCK, own = base + group * SHARE;
    // Steps of 64 channels: two, but at the matrix's end.
    u32 steps = start < p.k ? min(p.k - start, BLOCK) / STEP : 0;
    const u8 *w = (const u8 *)p.w + ((u64)(out + thread / 8) * p.k + start) * 2 + chunk * 16;
    for (u32 step = 0; step < steps; step++) {
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 16; i++) {
            copy16(own + step * WEIGHTS + swizzled(thread / 8 + 16 * i, chunk), w + ((u64)(16 * i) * p.k + step * STEP) * 2, 16);
        }
    }
    previous_done();
    u32 first = blockIdx.y * TILE, end = min(first + TILE, p.m);
#pragma unroll
    for (u32 i = 0; i < TILE / 16; i++) {
        u32 row = first + thread / 8 + 16 * i, there = row < end ? 16 : 0;
        const u8 *x = (const u8 *)p.x + 2 * ((u64)(there ? row : 0) * p.x_stride + start) + chunk * 16;
        for (u32 step = 0; step < 3 * steps; step++) {
            u32 to = own + 2 * WEIGHTS + step * INPUTS + swizzled(thread / 8 + 16 * i, chunk);
            copy16(to, x + (step / 3 * STEP + step % 3 * p.k) * 2, there);
        }
    }
    copies_commit();
    copies_wait<0>();
    written_for_matrix_unit();
    some_sync(1 + group, THREADS);
    float d[TILE / 2];
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) d[i] = 0.0f;
    for (u32 step = 0; step < 3 * steps; step++) {
        u64 a = tile(own + step / 3 * WEIGHTS), b = tile(own + 2 * WEIGHTS + step * INPUTS);
        mma_begin();
#pragma unroll
        for (u32 i = 0; i < 4; i++) MmaBf16<TILE>::run(d, a + 2 * i, b + 2 * i, i > 0 || step > 0);
        mma_commit();
        mma_wait<0>();
    }
    // All are done with what they have read before sums take its place; then each adds up its share of the outputs.
    __syncthreads();
    float *sums = (float *)(memory + (base - (u32)__cvta_generic_to_shared(memory)));
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) sums[(i * GROUPS + group) * THREADS + thread] = d[i];
    __syncthreads();
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 j = 0; j < TILE / 2 / GROUPS; j++) {
        u32 i = group * (TILE / 2 / GROUPS) + j, row = first + i / 4 * 8 + thread % 4 * 2 + i % 2;
        float sum = 0.0f;
#pragma unroll
        for (u32 from = 0; from < GROUPS; from++) sum += sums[(i * GROUPS + from) * THREADS + thread];
        if (row < end) ((float *)p.y)[((u64)blockIdx.z * p.m + row) * p.n + channel + i % 4 / 2 * 8] = sum;
    }
}

// Up to 16 rows of queries, split on their way to the matrix unit (query.cu does it for many), by each head's matrix of K up to 128.
__device__ __forceinline__ void absorb(const Product &p, const Queries &q) {
    constexpr u32 TILE = 16, WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128;
    extern __shared__ u8 memory[];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 thread = threadIdx.x, chunk = thread % 8, out = blockIdx.x * CHANNELS, head = blockIdx.z, steps = p.k / STEP;
    const u8 *w = (const u8 *)p.w + (((u64)head * p.n + out + thread / 8) * p.k) * 2 + chunk * 16;
    for (u32 step = 0; step < steps; step++) {
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 16; i++) {
            u32 to = base + step * (WEIGHTS + INPUTS) + swizzled(thread / 8 + 16 * i, chunk);
            copy16(to, w + ((u64)(16 * i) * p.k + step * STEP) * 2, 16);
        }
    }
    copies_commit();
    previous_done();
    u32 width = p.k + q.rope_dim;
    u8 *operands = memory + (base - (u32)__cvta_generic_to_shared(memory));
    // Row thread / 8, eight channels of each step; rows past the last are zeros.
    u32 row = thread / 8;
    const float *from = q.q + ((u64)(row < p.m ? row : 0) * p.heads + head) * width + chunk * 8;
    for (u32 step = 0; step < steps; step++) {
        float4 a = *(const float4 *)(from + step * STEP), b = *(const float4 *)(from + step * STEP + 4);
        uint4 bits = make_uint4(to_bf16(a.x) | (u32)to_bf16(a.y) << 16, to_bf16(a.z) | (u32)to_bf16(a.w) << 16,
                                to_bf16(b.x) | (u32)to_bf16(b.y) << 16, to_bf16(b.z) | (u32)to_bf16(b.w) << 16);
        if (row >= p.m) bits = make_uint4(0, 0, 0, 0);
        *(uint4 *)(operands + step * (WEIGHTS + INPUTS) + WEIGHTS + swizzled(row, chunk)) = bits;
    }
    if (blockIdx.x == 0) {
        for (u32 i = thread; i < p.m * q.rope_dim / 2; i += THREADS) {
            u32 line = i / (q.rope_dim / 2), channel = i % (q.rope_dim / 2) * 2, position = q.positions[line];
            require(position < q.positions_max);
            const float *x = q.q + ((u64)line * p.heads + head) * width + p.k + channel;
            const float *angle = q.table + (u64)position * q.rope_dim + channel;
            float a = x[0], b = x[1], cos = angle[0], sin = angle[1];
            u16 *to = q.rope + ((u64)line * p.heads + head) * q.rope_dim + channel;
            to[0] = to_bf16(a * cos - b * sin), to[1] = to_bf16(a * sin + b * cos);
        }
    }
    copies_wait<0>();
    written_for_matrix_unit();
    __syncthreads();
    float d[TILE / 2];
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) d[i] = 0.0f;
    for (u32 step = 0; step < steps; step++) {
        u64 a = tile(base + step * (WEIGHTS + INPUTS)), b = tile(base + step * (WEIGHTS + INPUTS) + WEIGHTS);
        mma_begin();
#pragma unroll
        for (u32 i = 0; i < 4; i++) MmaBf16<TILE>::run(d, a + 2 * i, b + 2 * i, i > 0 || step > 0);
        mma_commit();
        mma_wait<0>();
    }
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        u32 line = i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (line < p.m) store_output(p, line, channel + i % 4 / 2 * 8, 0.0f + d[i], head);
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32 TILE, u32 STAGES, u32 PARTS, u32 GROUPS = 1>
__device__ __forceinline__ void product(const Product &, const Rounded * = nullptr) { require(false); }
template <u32 TILE> __device__ __forceinline__ void parts_product(const Product &) { require(false); }
__device__ __forceinline__ void absorb(const Product &, const Queries &) { require(false); }

#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)

ENTRY linear_bf16_wgmma_16(const __grid_constant__ Product p) { product<16, 8, 1>(p); }
ENTRY linear_bf16_absorb_16(const __grid_constant__ Product p, const __grid_constant__ Queries q) { absorb(p, q); }
// A head's 128 outputs, rounded for the next product.
extern "C" __global__ void __launch_bounds__(2 * THREADS)
linear_bf16_rounded_16(const __grid_constant__ Product p, const __grid_constant__ Rounded r) { product<16, 8, 1, 2>(p, &r); }
ENTRY linear_bf16_wgmma_64(const __grid_constant__ Product p) { product<64, 6, 1>(p); }
ENTRY linear_bf16_wgmma_128(const __grid_constant__ Product p) { product<128, 4, 1>(p); }
extern "C" __global__ void __launch_bounds__(4 * THREADS, 1)
linear_parts_wgmma_16(const __grid_constant__ Product p) { parts_product<16>(p); }
extern "C" __global__ void __launch_bounds__(4 * THREADS, 1)
linear_parts_wgmma_32(const __grid_constant__ Product p) { parts_product<32>(p); }
ENTRY linear_parts_wgmma_64(const __grid_constant__ Product p) { product<64, 6, 3>(p); }
