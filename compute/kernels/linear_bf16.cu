// bf16 matrix products on Hopper's matrix unit: y[m, h, n] = sum over k of x[m, h, k] * w[h, n, k], for k in whole
// 64-blocks and n in whole tiles of 64; blockIdx.z is the head. One matrix, two whose outputs lie side by side, or one (or
// two) for each expert.
//
// Tiles and pipeline are those of linear_wgmma.cu. The unit's sums are added up in f32 every 128 of K.
//
// With PARTS = 3 an input is the sum of three bf16 values, which an f32 is to its last bits, and each part is multiplied
// by the same weights: an f32 product of bf16 weights. x is then [m, 3, k]; blockIdx.z is a slice of SLICE channels, and
// y [slices, m, n] holds the slices' sums, for the reader to add in order.

#define CHANNELS 64u
#define THREADS 128u
#define STEP 64u
#define SLICE 512u

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <u32 TILE, u32 STAGES, u32 PARTS> __device__ __forceinline__ void product(const Product &p) {
    constexpr u32 WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128;
    extern __shared__ u8 memory[];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 thread = threadIdx.x, chunk = thread % 8, out = blockIdx.x * CHANNELS;
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
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        u32 row = first + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (row >= end) continue;
        if (PARTS == 1) store_output(p, row, channel + i % 4 / 2 * 8, sums[i], head);
        else ((float *)p.y)[((u64)blockIdx.z * p.m + row) * p.n + channel + i % 4 / 2 * 8] = sums[i];
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32 TILE, u32 STAGES, u32 PARTS> __device__ __forceinline__ void product(const Product &) { require(false); }

#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)

ENTRY linear_bf16_wgmma_16(const __grid_constant__ Product p) { product<16, 8, 1>(p); }
ENTRY linear_bf16_wgmma_64(const __grid_constant__ Product p) { product<64, 6, 1>(p); }
ENTRY linear_bf16_wgmma_128(const __grid_constant__ Product p) { product<128, 4, 1>(p); }
ENTRY linear_parts_wgmma_16(const __grid_constant__ Product p) { product<16, 8, 3>(p); }
ENTRY linear_parts_wgmma_64(const __grid_constant__ Product p) { product<64, 6, 3>(p); }
