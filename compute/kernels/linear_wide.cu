// FP8 matrix products of many rows on Hopper's matrix unit: as linear_wgmma.cu, with the same chain of operations behind every
// output and hence the same bits, in tiles of 128 rows and 256 output channels that a resident block takes one after another.
//
// Weights come by the tensor copy unit, rows too unless they are picked one by one. One warpgroup copies, into the next tile
// while this one is stored; two multiply, 128 channels each as two chains of 64 rows, so that while one scales the other
// keeps the unit busy. Rows are the M side of wgmma here: a thread's sums then share two rows' scales and one of the weights.

#define CHANNELS 256u
#define TILE 128u
#define STAGES 4u
#define THREADS 384u
#define WEIGHTS (CHANNELS * 128)
#define INPUTS (TILE * 128)
// The rows' scales, then those of the two halves of the channels.
#define SCALES (4 * (TILE + 4))
// Row tiles that are walked through before the next channels, so that what they read stays in the level-2 cache.
#define GROUP 32u

// Where the copy unit finds rows of 128 channels: the host's CUtensorMap.
struct alignas(64) Map {
    u64 words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Place {
    Rows rows;
    u32 out;
};

// The `index`th tile of this block; false past the last.
__device__ __forceinline__ bool find_tile(const Product &p, u32 index, Place &place) {
    u32 wide = div_up(p.n, CHANNELS);
    if (p.tiles) {
        if (index >= *p.tile_count * wide) return false;
        uint4 tile = p.tiles[index / wide];
        place.rows.expert = tile.x, place.rows.first = tile.y, place.rows.end = tile.y + tile.z;
        place.out = index % wide * CHANNELS;
        return true;
    }
    u32 high = div_up(p.m, TILE);
    if (index >= high * wide) return false;
    u32 group = index / (GROUP * wide), rows = min(GROUP, high - group * GROUP), in_group = index - group * GROUP * wide;
    place.rows.expert = 0;
    place.rows.first = (group * GROUP + in_group % rows) * TILE;
    place.rows.end = min(place.rows.first + TILE, p.m);
    place.out = in_group / rows * CHANNELS;
    return true;
}

// `PICKED`: whether rows are named one by one.
template <bool PICKED>
__device__ __forceinline__ void product(const Product &p, const Map &w_map, const Map &w2_map, const Map &x_map) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    previous_done();
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    u32 scales_at = base + STAGES * (WEIGHTS + INPUTS);
    const u8 *aligned = memory + (scales_at - (u32)__cvta_generic_to_shared(memory));
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    u32 thread = threadIdx.x, blocks = p.k / BLOCK;
    if (thread < STAGES) {
        barrier_init(full + 8 * thread, 129), barrier_init(empty + 8 * thread, 8);
        barrier_init_done();
    }
    __syncthreads();
    if (thread < 128) {
        registers_down<88>();
        Place place;
        u32 count = 0;
        for (u32 index = blockIdx.x; find_tile(p, index, place); index += gridDim.x) {
            const Rows &rows = place.rows;
            u32 position = rows.first + thread;
            bool there = position < rows.end;
            u32 row = there ? input_row(p, position) : 0;
            const float *x_scales = p.x_scales + (u64)row * blocks;
            Weights halves[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 channel = place.out + 128 * i;
                halves[i] = find_weights(p, rows.expert, channel < p.n ? channel : place.out);
            }
            const float *w_scales = (thread ? halves[1] : halves[0]).scales;
            w_scales += (u64)((thread ? halves[1] : halves[0]).channel / BLOCK) * blocks;
            // Rows picked one by one: thread / 8, + 16, ..., a chunk of 16 bytes each.
            const u8 *x[TILE / 16];
            u32 bytes[TILE / 16];
            if (PICKED) {
#pragma unroll
                for (u32 i = 0; i < TILE / 16; i++) {
                    u32 at = rows.first + thread / 8 + 16 * i;
                    bytes[i] = at < rows.end ? 16 : 0;
                    x[i] = (const u8 *)p.x + (u64)(bytes[i] ? input_row(p, at) : 0) * p.k + thread % 8 * 16;
                }
            }
            u32 boxes = min(CHANNELS, p.n - place.out) / 64;
            for (u32 block = 0; block < blocks; block++, count++) {
                u32 stage = count % STAGES, at = base + stage * (WEIGHTS + INPUTS), scales = scales_at + stage * SCALES;
                if (count >= STAGES) barrier_wait(empty + 8 * stage, (count / STAGES - 1) & 1);
                if (thread == 0) {
                    barrier_expect(full + 8 * stage, boxes * 8192 + (PICKED ? 0 : INPUTS));
#pragma unroll
                    for (u32 box = 0; box < CHANNELS / 64; box++) {
                        if (box >= boxes) continue;
                        u32 channel = place.out + 64 * box;
                        bool second = channel >= p.n1;
                        u32 line = second ? rows.expert * (p.n - p.n1) + channel - p.n1 : rows.expert * p.n1 + channel;
                        copy_box(at + box * 8192, second ? &w2_map : &w_map, block * BLOCK, line, full + 8 * stage);
                    }
                    if (!PICKED) copy_box(at + WEIGHTS, &x_map, block * BLOCK, rows.first, full + 8 * stage);
                }
                if (PICKED) {
#pragma unroll
                    for (u32 i = 0; i < TILE / 16; i++) {
                        copy16(at + WEIGHTS + swizzled(thread / 8 + 16 * i, thread % 8), x[i] + block * BLOCK, bytes[i]);
                    }
                }
                copy4(scales + 4 * thread, x_scales + block, there ? 4 : 0);
                if (thread < 2) copy4(scales + 4 * (TILE + thread), w_scales + block, 4);
                barrier_arrive_copied(full + 8 * stage);
            }
        }
        // Copies must not outlive the block.
        copies_wait<0>();
    } else {
        registers_up<208>();
        u32 half = thread / 128 - 1, lane = thread % WARP, warp = thread % 128 / WARP, odd = lane % 2;
        Place place;
        u32 count = 0;
        for (u32 index = blockIdx.x; find_tile(p, index, place); index += gridDim.x) {
            float sums[2][TILE / 2];
#pragma unroll
            for (u32 part = 0; part < 2; part++)
#pragma unroll
                for (u32 i = 0; i < TILE / 2; i++) sums[part][i] = 0.0f;
            for (u32 block = 0; block < blocks; block++, count++) {
                u32 stage = count % STAGES, at = base + stage * (WEIGHTS + INPUTS);
                barrier_wait(full + 8 * stage, count / STAGES & 1);
                if (PICKED) written_for_matrix_unit();
                const float *scales = (const float *)(aligned + stage * SCALES);
                float w_scale = scales[TILE + half];
                u64 b = tile(at + half * 16384);
#pragma unroll
                for (u32 part = 0; part < 2; part++) {
                    u64 a = tile(at + WEIGHTS + part * 8192);
                    float d[TILE / 2];
                    mma_begin();
#pragma unroll
                    for (u32 step = 0; step < 4; step++) MmaFp8<128>::run(d, a + 2 * step, b + 2 * step, step);
                    mma_commit();
                    u32 row = part * 64 + warp * 16 + lane / 4;
                    float low = scales[row] * w_scale, high = scales[row + 8] * w_scale;
                    mma_wait<0>();
#pragma unroll
                    for (u32 i = 0; i < TILE / 2; i++) {
                        sums[part][i] = fmaf(d[i], i % 4 / 2 ? high : low, sums[part][i]);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * stage);
            }
            if (place.out + half * 128 >= p.n) continue;
            u32 channels = min(128u, p.n - place.out - half * 128);
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
#pragma unroll
                for (u32 side = 0; side < 2; side++) {
                    u32 position = place.rows.first + part * 64 + warp * 16 + lane / 4 + 8 * side;
                    bool there = position < place.rows.end;
                    u32 row = there && p.out_rows ? p.out_rows[position] : position;
                    u64 to = (u64)row * p.n + place.out + half * 128;
                    // Neighbours exchange pairs of channels, so that each has four in a row.
#pragma unroll
                    for (u32 i = 0; i < 16; i += 2) {
                        const float *even = &sums[part][4 * i + 2 * side], *next = &sums[part][4 * i + 4 + 2 * side];
                        float x = __shfl_xor_sync(ALL, odd ? even[0] : next[0], 1);
                        float y = __shfl_xor_sync(ALL, odd ? even[1] : next[1], 1);
                        float4 v = odd ? make_float4(x, y, next[0], next[1]) : make_float4(even[0], even[1], x, y);
                        u32 channel = 8 * (i + odd) + lane % 4 / 2 * 4;
                        if (!there || channel >= channels) continue;
                        if (p.y_bf16) {
                            u32 first = to_bf16(v.x) | (u32)to_bf16(v.y) << 16, last = to_bf16(v.z) | (u32)to_bf16(v.w) << 16;
                            *(uint2 *)((u16 *)p.y + to + channel) = make_uint2(first, last);
                        } else {
                            *(float4 *)((float *)p.y + to + channel) = v;
                        }
                    }
                }
            }
        }
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <bool> __device__ __forceinline__ void product(const Product &, const Map &, const Map &, const Map &) {
    require(false);
}

#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS, 1)
#define PARAMETERS \
    const __grid_constant__ Product p, const __grid_constant__ Map w, const __grid_constant__ Map w2, const __grid_constant__ Map x

ENTRY linear_fp8_wide(PARAMETERS) { product<false>(p, w, w2, x); }
ENTRY linear_fp8_wide_picked(PARAMETERS) { product<true>(p, w, w2, x); }
