// FP8 matrix products of many rows on Hopper's matrix unit: as linear_wgmma.cu, with the same chain of operations behind every
// output and hence the same bits, in tiles that a resident block takes one after another.
//
// One warpgroup copies, into the next tile while this one is stored: weights by the tensor copy unit, rows too unless they are
// picked one by one. The others multiply, each 64 rows by all channels of the tile, in chains of 128 channels: while one scales
// the sums of its chain the others keep the unit busy. Rows are the M side of wgmma here: a thread's sums then share two rows'
// scales and one of the weights. A sum, its chain's and their scale should not lie in one register bank: two reads at once
// take the unit's place there (10 % of the time, when half of them did), and .ci/kernels looks.

// A tile: 64 rows for each of GROUPS multiplying warpgroups, 128 channels for each of PARTS chains.
#define TILE (64 * GROUPS)
#define CHANNELS (128 * PARTS)
#define WEIGHTS (CHANNELS * 128)
#define STAGE (WEIGHTS + TILE * 128)
// Scales of four blocks of K, or what a tile has, are copied at once: a panel, for a warp's 16 rows and then for the parts. Four have
// room, one after another also from tile to tile: the stages' last blocks of K, which may still be in use when a panel is
// copied, lie in three at most.
#define PANEL 4u
#define PANELS 4u
#define PANEL_BYTES (4 * PANEL * (16 + PARTS))
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
template <u32 GROUPS, u32 PARTS> __device__ __forceinline__ bool find_tile(const Product &p, u32 index, Place &place) {
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

// A thread's share in copying scales: those of one row, or of the weights of one part.
struct Scales {
    // Null: none.
    const float *from;
    u32 blocks;
    bool by_four;

    __device__ __forceinline__ Scales(const Product &p) : from(nullptr), blocks(p.k / BLOCK) {
        by_four = blocks % PANEL == 0 && (((u64)p.x_scales | (u64)p.w_scales | (u64)p.w2_scales) & 15) == 0;
    }

    // `row` of the inputs; past the end of a tile none.
    __device__ __forceinline__ void of_row(const Product &p, const Place &place, u32 position) {
        from = nullptr;
        if (position >= place.rows.end) return;
        u32 row = p.rows ? p.rows[position] / p.rows_per : position;
        from = p.x_scales + (u64)min(row, p.x_rows - 1) * blocks;
    }

    __device__ __forceinline__ void of_weights(const Product &p, const Place &place, u32 part) {
        u32 channel = place.out + 128 * part;
        Weights found = find_weights(p, place.rows.expert, channel < p.n ? channel : place.out);
        from = found.scales + (u64)(found.channel / BLOCK) * blocks;
    }

    // Those of the blocks of K from `block` on.
    __device__ __forceinline__ void copy(u32 to, u32 block) const {
        if (!from || block >= blocks) return;
        if (by_four) {
            copy16(to, from + block, 16);
        } else {
#pragma unroll 1
            for (u32 i = 0; i < PANEL; i++) copy4(to + 4 * i, from + min(block + i, blocks - 1), 4);
        }
    }
};

// So that the compiler holds on to a value instead of computing it anew in every round.
__device__ __forceinline__ void keep(u32 &value) { asm volatile("mov.b32 %0, %0;" : "+r"(value)); }

__device__ __forceinline__ float shared_float(u32 at) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
    return value;
}

// `PICKED`: whether rows are named one by one.
template <u32 GROUPS, u32 PARTS, u32 STAGES, bool PICKED>
__device__ __forceinline__ void product(const Product &p, const Map &w_map, const Map &w2_map, const Map &x_map) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    previous_done();
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u, panels = base + STAGES * STAGE;
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    u32 thread = threadIdx.x, blocks = p.k / BLOCK;
    if (thread < STAGES) {
        barrier_init(full + 8 * thread, PICKED ? 129 : 1), barrier_init(empty + 8 * thread, 4 * GROUPS);
        barrier_init_done();
    }
    __syncthreads();
    if (thread < 128) {
        registers_down<GROUPS == 3 ? 56 : PICKED ? 80 : 40>();
        Place place;
        u32 count = 0, panel = 0;
        for (u32 index = blockIdx.x; (PICKED || thread == 0) && find_tile<GROUPS, PARTS>(p, index, place); index += gridDim.x) {
            const Rows &rows = place.rows;
            // Rows picked one by one: thread / 8, + 16, ..., a chunk of 16 bytes each; scales of one row, and of a part for
            // one of the multiplying warps.
            const u8 *x[TILE / 16];
            u32 bytes[TILE / 16];
            Scales x_scales(p), w_scales(p);
            u32 x_panel = 0, w_panel = 0;
            if (PICKED) {
#pragma unroll
                for (u32 i = 0; i < TILE / 16; i++) {
                    u32 at = rows.first + thread / 8 + 16 * i;
                    bytes[i] = at < rows.end ? 16 : 0;
                    x[i] = (const u8 *)p.x + (u64)(bytes[i] ? input_row(p, at) : 0) * p.k + thread % 8 * 16;
                }
                x_scales.of_row(p, place, rows.first + thread);
                if (thread < 4 * GROUPS * PARTS) w_scales.of_weights(p, place, thread % PARTS);
                x_panel = panels + thread / 16 * (PANELS * PANEL_BYTES) + 4 * PANEL * (thread % 16);
                w_panel = panels + thread / PARTS * (PANELS * PANEL_BYTES) + 4 * PANEL * (16 + thread % PARTS);
            }
            u32 boxes = min(CHANNELS, p.n - place.out) / 64;
            for (u32 block = 0; block < blocks; block++, count++) {
                u32 stage = count % STAGES, at = base + stage * STAGE;
                if (count >= STAGES) barrier_wait(empty + 8 * stage, (count / STAGES - 1) & 1);
                if (thread == 0) {
                    barrier_expect(full + 8 * stage, boxes * 8192 + (PICKED ? 0 : TILE * 128));
                    if (!PICKED) copy_box(at + WEIGHTS, &x_map, block * BLOCK, rows.first, full + 8 * stage);
#pragma unroll
                    for (u32 box = 0; box < CHANNELS / 64; box++) {
                        if (box >= boxes) continue;
                        u32 channel = place.out + 64 * box;
                        bool second = channel >= p.n1;
                        u32 line = second ? rows.expert * (p.n - p.n1) + channel - p.n1 : rows.expert * p.n1 + channel;
                        copy_box(at + box * 8192, second ? &w2_map : &w_map, block * BLOCK, line, full + 8 * stage);
                    }
                }
                if (PICKED) {
#pragma unroll
                    for (u32 i = 0; i < TILE / 16; i++) {
                        copy16(at + WEIGHTS + swizzled(thread / 8 + 16 * i, thread % 8), x[i] + block * BLOCK, bytes[i]);
                    }
                    if (block % PANEL == 0) {
                        u32 slot = panel++ % PANELS * PANEL_BYTES;
                        x_scales.copy(x_panel + slot, block), w_scales.copy(w_panel + slot, block);
                    }
                    barrier_arrive_copied(full + 8 * stage);
                }
            }
        }
        // Copies must not outlive the block.
        copies_wait<0>();
    } else {
        registers_up<GROUPS == 3 ? 152 : PICKED ? 208 : 232>();
        u32 group = __shfl_sync(ALL, thread / 128 - 1, 0), lane = thread % WARP, warp = thread / WARP - 4, odd = lane % 2;
        // This warp's panels; where this lane copies to and reads from.
        u32 own = panels + warp * (PANELS * PANEL_BYTES), to = own + 4 * PANEL * lane, mine = own + PANEL * (lane & ~3u);
        keep(to), keep(mine), keep(own), keep(base), keep(full), keep(empty), keep(lane);
        u32 stage = 0, phase = 0, panel = PANELS - 1;
        auto slot_of = [&](u32 ahead) { return (panel + ahead) % PANELS * PANEL_BYTES; };
        Place place;
        for (u32 index = blockIdx.x; find_tile<GROUPS, PARTS>(p, index, place); index += gridDim.x) {
            float sums[PARTS][64];
#pragma unroll
            for (u32 part = 0; part < PARTS; part++)
#pragma unroll
                for (u32 i = 0; i < 64; i++) sums[part][i] = 0.0f;
            u32 first = place.rows.first + 16 * warp;
            Scales scales(p);
            if (!PICKED) {
                if (lane < 16) scales.of_row(p, place, first + lane);
                else if (lane < 16 + PARTS) scales.of_weights(p, place, lane - 16);
                __syncwarp();
                scales.copy(to + slot_of(1), 0), copies_commit();
                scales.copy(to + slot_of(2), PANEL), copies_commit();
            }
            for (u32 block = 0; block < blocks; block++) {
                if (block % PANEL == 0) {
                    panel = (panel + 1) % PANELS;
                    if (!PICKED) {
                        // This panel has landed, and all lanes are done with those before it.
                        copies_wait<1>();
                        __syncwarp();
                        scales.copy(to + slot_of(2), block + 2 * PANEL), copies_commit();
                    }
                }
                u32 at = base + stage * STAGE, in_panel = slot_of(0) + 4 * (block % PANEL);
                if (PICKED) barrier_wait(full + 8 * stage, phase);
                float w_scales[PARTS], low = shared_float(mine + in_panel), high = shared_float(mine + in_panel + 32 * PANEL);
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) w_scales[part] = shared_float(own + in_panel + 4 * PANEL * (16 + part));
                if (PICKED) written_for_matrix_unit();
                else barrier_wait(full + 8 * stage, phase);
                u64 a = tile(at + WEIGHTS + 8192 * group), b = tile(at);
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) {
                    float d[64];
                    mma_begin();
#pragma unroll
                    for (u32 step = 0; step < 4; step++) MmaFp8<128>::run(d, a + 2 * step, b + 1024 * part + 2 * step, step);
                    mma_commit();
                    float x = low * w_scales[part], y = high * w_scales[part];
                    mma_wait<0>();
                    if (part == PARTS - 1) {
                        __syncwarp();
                        if (lane == 0) barrier_arrive(empty + 8 * stage);
                    }
#pragma unroll
                    for (u32 i = 0; i < 64; i++) sums[part][i] = fmaf(d[i], i % 4 / 2 ? y : x, sums[part][i]);
                }
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            if (!PICKED) copies_wait<0>();
            u32 channels = min(CHANNELS, p.n - place.out);
#pragma unroll
            for (u32 side = 0; side < 2; side++) {
                u32 position = first + lane / 4 + 8 * side;
                bool there = position < place.rows.end;
                u32 row = there && p.out_rows ? p.out_rows[position] : position;
                u64 start = (u64)row * p.n + place.out;
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) {
                    // Neighbours exchange pairs of channels, so that each has four in a row.
#pragma unroll
                    for (u32 i = 0; i < 16; i += 2) {
                        const float *even = &sums[part][4 * i + 2 * side], *next = &sums[part][4 * i + 4 + 2 * side];
                        float x = __shfl_xor_sync(ALL, odd ? even[0] : next[0], 1);
                        float y = __shfl_xor_sync(ALL, odd ? even[1] : next[1], 1);
                        float4 v = odd ? make_float4(x, y, next[0], next[1]) : make_float4(even[0], even[1], x, y);
                        u32 channel = 128 * part + 8 * (i + odd) + lane % 4 / 2 * 4;
                        if (!there || channel >= channels) continue;
                        if (p.y_bf16) {
                            u32 low = to_bf16(v.x) | (u32)to_bf16(v.y) << 16, high = to_bf16(v.z) | (u32)to_bf16(v.w) << 16;
                            *(uint2 *)((u16 *)p.y + start + channel) = make_uint2(low, high);
                        } else {
                            *(float4 *)((float *)p.y + start + channel) = v;
                        }
                    }
                }
            }
        }
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32, u32, u32, bool>
__device__ __forceinline__ void product(const Product &, const Map &, const Map &, const Map &) {
    require(false);
}

#endif

#define ENTRY(THREADS) extern "C" __global__ void __launch_bounds__(THREADS, 1)
#define PARAMETERS \
    const __grid_constant__ Product p, const __grid_constant__ Map w, const __grid_constant__ Map w2, const __grid_constant__ Map x

ENTRY(384) linear_fp8_wide(PARAMETERS) { product<2, 2, 4, false>(p, w, w2, x); }
ENTRY(384) linear_fp8_wide_picked(PARAMETERS) { product<2, 2, 4, true>(p, w, w2, x); }
ENTRY(512) linear_fp8_high(PARAMETERS) { product<3, 1, 5, false>(p, w, w2, x); }
