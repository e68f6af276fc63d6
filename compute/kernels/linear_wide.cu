// FP8 matrix products of many rows on Hopper's matrix unit: as linear_wgmma.cu, with the same chain of operations behind every
// output and hence the same bits, in tiles of 256 output channels and 128 rows.
//
// What bounds a tile is how often its operands come from the level-2 cache: an SM gets some 28 bytes a cycle from there, and
// 48 KB for 1,024 cycles of the matrix unit are 47. One warpgroup copies; two multiply, 128 channels each as two chains of
// 64 into the same accumulators, so that while one scales the other keeps the unit busy.

#define CHANNELS 256u
#define TILE 128u
#define STAGES 4u
#define THREADS 384u
#define WEIGHTS (CHANNELS * 128)
#define INPUTS (TILE * 128)
// The rows' scales, then those of the two halves of the channels.
#define SCALES (4 * (TILE + 4))

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_fp8_wide(const __grid_constant__ Product p) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    Rows rows;
    if (!find_rows(p, TILE, rows)) return;
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 scales_at = base + STAGES * (WEIGHTS + INPUTS);
    const u8 *aligned = memory + (scales_at - (u32)__cvta_generic_to_shared(memory));
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    u32 thread = threadIdx.x, out = blockIdx.x * CHANNELS, blocks = p.k / BLOCK;
    if (thread < STAGES) barrier_init(full + 8 * thread, 128), barrier_init(empty + 8 * thread, 8);
    __syncthreads();
    if (thread < 128) {
        registers_down<88>();
        u32 chunk = thread % 8, line = thread / 8;
        // Channels line, + 16, ...: 64 at a time lie in one of the two matrices, or past them.
        const u8 *w[CHANNELS / 64];
        u32 w_there[CHANNELS / 64];
        const float *w_scales[2];
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 64; i++) {
            u32 channel = out + 64 * i;
            w_there[i] = channel < p.n ? 16 : 0;
            Weights matrix = find_weights(p, rows.expert, w_there[i] ? channel : out);
            w[i] = matrix.w + (u64)(matrix.channel + line) * p.k + chunk * 16;
            if (i % 2 == 0) w_scales[i / 2] = matrix.scales + (u64)(matrix.channel / BLOCK) * blocks;
        }
        const u8 *x[TILE / 16];
        u32 there[TILE / 16];
#pragma unroll
        for (u32 i = 0; i < TILE / 16; i++) {
            u32 row = rows.first + line + 16 * i;
            there[i] = row < rows.end ? 16 : 0;
            x[i] = (const u8 *)p.x + (u64)(there[i] ? input_row(p, row) : 0) * p.k + chunk * 16;
        }
        u32 scaled = rows.first + thread < rows.end ? 4 : 0;
        const float *x_scales = p.x_scales + (u64)(scaled ? input_row(p, rows.first + thread) : 0) * blocks;
        for (u32 block = 0; block < blocks; block++) {
            u32 stage = block % STAGES, at = base + stage * (WEIGHTS + INPUTS), scales = scales_at + stage * SCALES;
            if (block >= STAGES) barrier_wait(empty + 8 * stage, (block / STAGES - 1) & 1);
#pragma unroll
            for (u32 i = 0; i < CHANNELS / 16; i++) {
                copy16(at + swizzled(line + 16 * i, chunk), w[i / 4] + (u64)(16 * (i % 4)) * p.k + block * BLOCK,
                       w_there[i / 4]);
            }
#pragma unroll
            for (u32 i = 0; i < TILE / 16; i++) {
                copy16(at + WEIGHTS + swizzled(line + 16 * i, chunk), x[i] + block * BLOCK, there[i]);
            }
            copy4(scales + 4 * thread, x_scales + block, scaled);
            if (thread < 2) copy4(scales + 4 * (TILE + thread), (thread ? w_scales[1] : w_scales[0]) + block, 4);
            barrier_arrive_copied(full + 8 * stage);
        }
        // Copies must not outlive the block.
        copies_wait<0>();
    } else {
        registers_up<208>();
        u32 half = thread / 128 - 1, own = thread % 128;
        float sums[2][TILE / 2];
#pragma unroll
        for (u32 part = 0; part < 2; part++)
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) sums[part][i] = 0.0f;
        for (u32 block = 0; block < blocks; block++) {
            u32 stage = block % STAGES, at = base + stage * (WEIGHTS + INPUTS);
            barrier_wait(full + 8 * stage, block / STAGES & 1);
            written_for_matrix_unit();
            const float *scales = (const float *)(aligned + stage * SCALES);
            float w_scale = scales[TILE + half];
            u64 b = tile(at + WEIGHTS);
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
                u64 a = tile(at + half * 16384 + part * 8192);
                float d[TILE / 2];
                mma_begin();
#pragma unroll
                for (u32 step = 0; step < 4; step++) MmaFp8<TILE>::run(d, a + 2 * step, b + 2 * step, step);
                mma_commit();
                mma_wait<0>();
#pragma unroll
                for (u32 i = 0; i < TILE / 8; i++) {
                    float2 x_scale = *(const float2 *)(scales + 8 * i + thread % 4 * 2);
                    float low = x_scale.x * w_scale, high = x_scale.y * w_scale;
                    sums[part][4 * i] = fmaf(d[4 * i], low, sums[part][4 * i]);
                    sums[part][4 * i + 1] = fmaf(d[4 * i + 1], high, sums[part][4 * i + 1]);
                    sums[part][4 * i + 2] = fmaf(d[4 * i + 2], low, sums[part][4 * i + 2]);
                    sums[part][4 * i + 3] = fmaf(d[4 * i + 3], high, sums[part][4 * i + 3]);
                }
            }
            __syncwarp();
            if (thread % WARP == 0) barrier_arrive(empty + 8 * stage);
        }
#pragma unroll
        for (u32 part = 0; part < 2; part++) {
            u32 channel = out + half * 128 + part * 64 + own / 32 * 16 + own % 32 / 4;
            if (out + half * 128 + part * 64 >= p.n) continue;
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) {
                u32 row = rows.first + i / 4 * 8 + thread % 4 * 2 + i % 2;
                if (row < rows.end) store_output(p, row, channel + i % 4 / 2 * 8, sums[part][i]);
            }
        }
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
extern "C" __global__ void linear_fp8_wide(const __grid_constant__ Product) { require(false); }

#endif
