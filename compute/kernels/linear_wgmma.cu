// FP8 matrix products on Hopper's matrix unit: y[m, n] = sum over k of x[m, k] * w[n, k], for k in whole 128-blocks and n
// in whole tiles of 64. One matrix, two whose outputs lie side by side, or one (or two) for each expert.
//
// A block is one warpgroup and has 64 output channels (the M side of wgmma, so that few rows waste little) and a tile of
// 16, 64 or 128 rows (its N side). Each 128-block of K is one chain of four wgmma into fresh accumulators, which are then
// scaled and added to f32 sums (two-level accumulation: the unit's own adder keeps some 14 bits). An output element sees
// the same chain whatever its tile, hence the tiles agree in every bit; a test holds them to it.

#define CHANNELS 64u
#define THREADS 128u

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <u32 TILE, u32 STAGES> __device__ __forceinline__ void product(const Product &p) {
    constexpr u32 WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128, SCALES = 4 * (TILE + 4);
    extern __shared__ u8 memory[];
    previous_done();
    Rows tile_rows;
    if (!find_rows(p, TILE, tile_rows)) return;
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    // Tiles first, each at a multiple of 1,024; then the scales of every stage: the rows', then the weights'.
    u32 scales_at = base + STAGES * (WEIGHTS + INPUTS);
    const u8 *aligned = memory + (scales_at - (u32)__cvta_generic_to_shared(memory));
    u32 thread = threadIdx.x, chunk = thread % 8, first = tile_rows.first, out = blockIdx.x * CHANNELS;
    u32 blocks = p.k / BLOCK;
    Weights matrix = find_weights(p, tile_rows.expert, out);
    const u8 *w = (const u8 *)matrix.w + (u64)(matrix.channel + thread / 8) * p.k + chunk * 16;
    const float *w_scales = matrix.scales + (u64)(matrix.channel / BLOCK) * blocks;
    // Rows thread / 8, + 16, ...; rows past the last are zeros.
    const u8 *inputs[TILE / 16];
    u32 there[TILE / 16];
#pragma unroll
    for (u32 i = 0; i < TILE / 16; i++) {
        u32 row = first + thread / 8 + 16 * i;
        there[i] = row < tile_rows.end ? 16 : 0;
        inputs[i] = (const u8 *)p.x + (u64)(there[i] ? input_row(p, row) : 0) * p.k + chunk * 16;
    }
    u32 scaled = first + thread < tile_rows.end && thread < TILE ? 4 : 0;
    const float *x_scales = p.x_scales + (u64)(scaled ? input_row(p, first + thread) : 0) * blocks;

    auto load = [&](u32 block) {
        u32 stage = block % STAGES, weights = base + stage * (WEIGHTS + INPUTS), rows = weights + WEIGHTS;
        u32 scales = scales_at + stage * SCALES;
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 16; i++) {
            copy16(weights + swizzled(thread / 8 + 16 * i, chunk), w + (u64)(16 * i) * p.k + block * BLOCK, 16);
        }
#pragma unroll
        for (u32 i = 0; i < TILE / 16; i++) {
            copy16(rows + swizzled(thread / 8 + 16 * i, chunk), inputs[i] + block * BLOCK, there[i]);
        }
        if (thread < TILE) copy4(scales + 4 * thread, x_scales + block, scaled);
        if (thread == 0) copy4(scales + 4 * TILE, w_scales + block, 4);
    };

    float sums[TILE / 2];
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) sums[i] = 0.0f;
    auto finish = [&](const float(&d)[TILE / 2], u32 block) {
        const float *scales = (const float *)(aligned + block % STAGES * SCALES);
        float w_scale = scales[TILE];
#pragma unroll
        for (u32 i = 0; i < TILE / 8; i++) {
            float2 x_scale = *(const float2 *)(scales + 8 * i + thread % 4 * 2);
            float low = x_scale.x * w_scale, high = x_scale.y * w_scale;
            sums[4 * i] = fmaf(d[4 * i], low, sums[4 * i]);
            sums[4 * i + 1] = fmaf(d[4 * i + 1], high, sums[4 * i + 1]);
            sums[4 * i + 2] = fmaf(d[4 * i + 2], low, sums[4 * i + 2]);
            sums[4 * i + 3] = fmaf(d[4 * i + 3], high, sums[4 * i + 3]);
        }
    };
    if constexpr (TILE > 16) {
        for (u32 block = 0; block < STAGES - 1; block++) {
            if (block < blocks) load(block);
            copies_commit();
        }
        for (u32 block = 0; block < blocks; block++) {
            copies_wait<STAGES - 2>();
            written_for_matrix_unit();
            // Also: everybody is done with the stage that is filled next.
            __syncthreads();
            if (block + STAGES - 1 < blocks) load(block + STAGES - 1);
            copies_commit();
            u32 stage = block % STAGES, at = base + stage * (WEIGHTS + INPUTS);
            u64 a = tile(at), b = tile(at + WEIGHTS);
            float d[TILE / 2];
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) d[i] = 0.0f;
            mma_begin();
#pragma unroll
            for (u32 step = 0; step < 4; step++) MmaFp8<TILE>::run(d, a + 2 * step, b + 2 * step, step);
            mma_commit();
            mma_wait<0>();
            finish(d, block);
        }
    } else {
        // A chain of few columns takes longer to wait for than to run: the next block's products run while the last one's sums are scaled.
        for (u32 block = 0; block < STAGES - 2; block++) {
            if (block < blocks) load(block);
            copies_commit();
        }
        float d[2][TILE / 2];
#pragma unroll
        for (u32 i = 0; i < TILE / 2; i++) d[0][i] = d[1][i] = 0.0f;
        auto begin = [&](float(&d)[TILE / 2], u32 block) {
            copies_wait<STAGES - 3>();
            written_for_matrix_unit();
            // Also: everybody is done with the stage that is filled next, the last but one's.
            __syncthreads();
            u32 stage = block % STAGES, at = base + stage * (WEIGHTS + INPUTS);
            u64 a = tile(at), b = tile(at + WEIGHTS);
            mma_begin();
#pragma unroll
            for (u32 step = 0; step < 4; step++) MmaFp8<TILE>::run(d, a + 2 * step, b + 2 * step, step);
            mma_commit();
            if (block + STAGES - 2 < blocks) load(block + STAGES - 2);
            copies_commit();
        };
        begin(d[0], 0);
        u32 block = 0;
        for (; block + 2 < blocks; block += 2) {
            begin(d[1], block + 1);
            mma_wait<1>();
            finish(d[0], block);
            begin(d[0], block + 2);
            mma_wait<1>();
            finish(d[1], block + 1);
        }
        if (blocks - block == 2) {
            begin(d[1], block + 1);
            mma_wait<1>();
            finish(d[0], block);
            mma_wait<0>();
            finish(d[1], block + 1);
        } else {
            mma_wait<0>();
            finish(d[0], block);
        }
    }
    // Channels of a thread: one and the eighth after it; rows: pairs, eight apart.
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        u32 row = first + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (row < tile_rows.end) store_output(p, row, channel + i % 4 / 2 * 8, sums[i]);
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32 TILE, u32 STAGES> __device__ __forceinline__ void product(const Product &) { require(false); }

#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)

ENTRY linear_fp8_wgmma_16(const __grid_constant__ Product p) { product<16, 8>(p); }
ENTRY linear_fp8_wgmma_64(const __grid_constant__ Product p) { product<64, 6>(p); }
ENTRY linear_fp8_wgmma_128(const __grid_constant__ Product p) { product<128, 4>(p); }
