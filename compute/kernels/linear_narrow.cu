// FP8 matrix products of few rows on Hopper's matrix unit: as linear_wgmma.cu, with the same chain of operations behind every
// output and hence the same bits, fed by the tensor copy unit. Few rows make few tiles, so that what counts is how soon a
// multiprocessor is through with a block of K: two warps copy many blocks ahead, one the weights and one the rows, KB blocks at a
// time (asking the copy unit is what takes their time), the others begin with the next block while the last one's sums are
// scaled. A tile has ROWS rows, the M side of wgmma, and WIDE output channels; the host takes the
// tile that suits the number of multiprocessors.

// Where the copy unit finds rows of 128 channels: the host's CUtensorMap.
struct alignas(64) Map {
    u64 words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A box of a matrix of 128-byte blocks [blocks, rows, 128]: rows from `row`, blocks from `block`.
__device__ __forceinline__ void copy_box3(u32 to, const void *map, u32 row, u32 block, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(row), "r"(block), "r"(barrier)
                 : "memory");
}

// The scales of AHEAD blocks of K, asked for so many blocks ahead.
template <u32 AHEAD> struct Scales {
    float low[AHEAD], high[AHEAD], weights[AHEAD];
};

// A warpgroup has 64 rows and N channels, within one block of 128 of the weights. A stage holds KB blocks of K of each.
template <u32 ROWS, u32 WIDE, u32 N, u32 STAGES, u32 KB, u32 AHEAD>
__device__ __forceinline__ void product(const Product &p, const Map &w_map, const Map &w2_map, const Map &x_map, u32 box_rows) {
    constexpr u32 GROUPS = ROWS / 64 * (WIDE / N), WEIGHTS = WIDE * KB * 128, INPUTS = ROWS * KB * 128;
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    u32 thread = threadIdx.x, lane = thread % WARP, blocks = p.k / BLOCK;
    u32 row_tiles = div_up(p.m, ROWS), tiles = row_tiles * div_up(p.n, WIDE);
    if (thread < STAGES) {
        barrier_init(full + 8 * thread, 2), barrier_init(empty + 8 * thread, GROUPS * 4);
        barrier_init_done();
    }
    __syncthreads();
    u32 bundles = div_up(blocks, KB);
    if (thread >= GROUPS * 128 + WARP) {
        // The first weights are asked for while the rows are being made.
        u32 count = 0;
        bool waited = false;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            u32 out = index / row_tiles * WIDE, boxes = div_up(min(WIDE, p.n - out), N);
            for (u32 bundle = 0; bundle < bundles; bundle++, count++) {
                u32 stage = count % STAGES, at = base + stage * (WEIGHTS + INPUTS);
                if (count >= STAGES) {
                    if (!waited) previous_done(), waited = true;
                    barrier_wait(empty + 8 * stage, (count / STAGES - 1) & 1);
                }
                if (lane > 0) continue;
                barrier_expect(full + 8 * stage, boxes * N * KB * 128);
#pragma unroll
                for (u32 box = 0; box < WIDE / N; box++) {
                    u32 channel = out + N * box;
                    if (box >= boxes) continue;
                    bool second = channel >= p.n1;
                    copy_box3(at + box * N * KB * 128, second ? &w2_map : &w_map, second ? channel - p.n1 : channel, bundle * KB,
                             full + 8 * stage);
                }
            }
        }
        if (!waited) previous_done();
    } else if (thread >= GROUPS * 128) {
        previous_done();
        if (lane > 0) return;
        u32 count = 0;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            u32 row = index % row_tiles * ROWS;
            for (u32 bundle = 0; bundle < bundles; bundle++, count++) {
                u32 stage = count % STAGES, at = base + stage * (WEIGHTS + INPUTS);
                if (count >= STAGES) barrier_wait(empty + 8 * stage, (count / STAGES - 1) & 1);
                barrier_expect(full + 8 * stage, ROWS / 64 * box_rows * KB * 128);
#pragma unroll
                for (u32 box = 0; box < ROWS / 64; box++) {
                    copy_box3(at + WEIGHTS + box * 8192 * KB, &x_map, row + 64 * box, bundle * KB, full + 8 * stage);
                }
            }
        }
    } else {
        previous_done();
        // Known to be the same in all of a warp, so that what describes operands is worked out beside the threads' own numbers.
        u32 group = __shfl_sync(ALL, thread / 128, 0), warp = thread % 128 / WARP;
        // Where its rows and channels begin.
        u32 line = group % (ROWS / 64) * 64, side = group / (ROWS / 64) * N;
        u32 count = 0;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x, count += bundles) {
            // A thread's rows are `row` and the eighth after it; past the last its scales stand in.
            u32 row = index % row_tiles * ROWS + line + warp * 16 + lane / 4, out = index / row_tiles * WIDE + side;
            Weights matrix = find_weights(p, 0, out < p.n ? out : 0);
            const float *w_scales = matrix.scales + (u64)(matrix.channel / BLOCK) * blocks;
            const float *low_scales = p.x_scales + (u64)min(row, p.m - 1) * blocks;
            const float *high_scales = p.x_scales + (u64)min(row + 8, p.m - 1) * blocks;
            float sums[N / 2], d[2][N / 2];
#pragma unroll
            for (u32 i = 0; i < N / 2; i++) sums[i] = 0.0f;
            auto fetch = [&](Scales<AHEAD> &scales, u32 block) {
                if (blocks % 4 == 0) {
#pragma unroll
                    for (u32 i = 0; i < AHEAD; i += 4) {
                        if (block + i >= blocks) continue;
                        *(float4 *)(scales.low + i) = *(const float4 *)(low_scales + block + i);
                        *(float4 *)(scales.high + i) = *(const float4 *)(high_scales + block + i);
                        *(float4 *)(scales.weights + i) = *(const float4 *)(w_scales + block + i);
                    }
                } else {
#pragma unroll
                    for (u32 i = 0; i < AHEAD; i++) {
                        u32 own = min(block + i, blocks - 1);
                        scales.low[i] = low_scales[own], scales.high[i] = high_scales[own], scales.weights[i] = w_scales[own];
                    }
                }
            };
            auto begin = [&](float(&d)[N / 2], u32 block) {
                u32 bundle = count + block / KB, part = block % KB, stage = bundle % STAGES, at = base + stage * (WEIGHTS + INPUTS);
                barrier_wait(full + 8 * stage, bundle / STAGES & 1);
                u64 a = tile(at + WEIGHTS + (line * KB + part * box_rows) * 128), b = tile(at + (side * KB + part * N) * 128);
                mma_begin();
#pragma unroll
                for (u32 step = 0; step < 4; step++) MmaFp8<N>::run(d, a + 2 * step, b + 2 * step, step);
                mma_commit();
            };
            auto finish = [&](float(&d)[N / 2], u32 block, const Scales<AHEAD> &scales, u32 own) {
                if (lane == 0 && (block % KB == KB - 1 || block + 1 == blocks)) barrier_arrive(empty + 8 * ((count + block / KB) % STAGES));
                float low = scales.low[own] * scales.weights[own], high = scales.high[own] * scales.weights[own];
#pragma unroll
                for (u32 i = 0; i < N / 2; i++) sums[i] = fmaf(d[i], i % 4 / 2 ? high : low, sums[i]);
            };
            Scales<AHEAD> scales, next;
            fetch(scales, 0);
            begin(d[0], 0);
            u32 block = 0;
            for (; block + AHEAD < blocks; block += AHEAD) {
                fetch(next, block + AHEAD);
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    begin(d[(i + 1) % 2], block + i + 1);
                    mma_wait<1>();
                    finish(d[i % 2], block + i, scales, i);
                }
                scales = next;
            }
            // One to AHEAD blocks are left. (A way of its own for each number: products under way where ways part are waited for.)
            auto step = [&](u32 i) {
                begin(d[(i + 1) % 2], block + i + 1);
                mma_wait<1>();
                finish(d[i % 2], block + i, scales, i);
            };
            auto end = [&](u32 i) {
                mma_wait<0>();
                finish(d[i % 2], block + i, scales, i);
            };
            if (AHEAD == 4) {
                switch (blocks - block) {
                case 1: end(0); break;
                case 2: step(0), end(1); break;
                case 3: step(0), step(1), end(2); break;
                default: step(0), step(1), step(2), end(3);
                }
            } else {
                switch (blocks - block) {
                case 1: end(0); break;
                case 2: step(0), end(1); break;
                case 3: step(0), step(1), end(2); break;
                case 4: step(0), step(1), step(2), end(3); break;
                case 5: step(0), step(1), step(2), step(3), end(4 % AHEAD); break;
                case 6: step(0), step(1), step(2), step(3), step(4 % AHEAD), end(5 % AHEAD); break;
                case 7: step(0), step(1), step(2), step(3), step(4 % AHEAD), step(5 % AHEAD), end(6 % AHEAD); break;
                default: step(0), step(1), step(2), step(3), step(4 % AHEAD), step(5 % AHEAD), step(6 % AHEAD), end(7 % AHEAD);
                }
            }
            if (out >= p.n) continue;
#pragma unroll
            for (u32 i = 0; i < N / 4; i++) {
                u32 to_row = row + i % 2 * 8;
                if (to_row >= p.m) continue;
                u64 to = (u64)to_row * p.n + out + i / 2 * 8 + lane % 4 * 2;
                float x = sums[2 * i], y = sums[2 * i + 1];
                if (p.y_bf16) *(u32 *)((u16 *)p.y + to) = to_bf16(x) | (u32)to_bf16(y) << 16;
                else *(float2 *)((float *)p.y + to) = make_float2(x, y);
            }
        }
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32, u32, u32, u32, u32, u32> __device__ __forceinline__ void product(const Product &, const Map &, const Map &, const Map &, u32) {
    require(false);
}

#endif

#define ENTRY(NAME, ROWS, WIDE, N, STAGES, KB, AHEAD) \
    extern "C" __global__ void __launch_bounds__(ROWS * 2 * (WIDE / N) + 2 * WARP, 1) linear_fp8_narrow_##NAME( \
        const __grid_constant__ Product p, const __grid_constant__ Map w, const __grid_constant__ Map w2, const __grid_constant__ Map x, \
        u32 box_rows) { \
        product<ROWS, WIDE, N, STAGES, KB, AHEAD>(p, w, w2, x, box_rows); \
    }


ENTRY(64x16, 64, 16, 16, 8, 2, 8)
ENTRY(64x32, 64, 32, 32, 7, 2, 8)
ENTRY(64x64, 64, 64, 64, 6, 2, 4)
ENTRY(128x64, 128, 64, 64, 8, 1, 4)
ENTRY(64x128, 64, 128, 64, 8, 1, 4)
