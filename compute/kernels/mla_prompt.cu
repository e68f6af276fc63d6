// Attention of a prompt's rows over FP8 cache rows, with the bits of mla_attention_wgmma.cu: where many query rows read the same
// cache rows, these are decoded once, by mla_unpack, and come by the tensor copy unit from there on.
//
// Resident blocks take items (a query row and 64 of its heads) one after another, the last rows first. One warpgroup copies tiles,
// two ahead at most; one scores, and fetches the next item's queries when the last tile's scores are there; two sum up. A tile is
// summed up while the next one's scores are weighed, not while they are computed: the matrix unit is then busy in both. Of an
// item of several parts all but the last are stored, and added when the last one is there.

#define ROW_BYTES (2 * (LATENT + ROPE))
// Heads whose parts a thread asks for at once.
#define AT_ONCE 4u
// Tokens of a block of mla_unpack.
#define UNPACKED 16u

// Where the copy unit finds decoded rows: the host's CUtensorMap.
struct alignas(64) Map {
    u64 words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Decodes the rows behind a list of block tables to [entries * block_tokens, 512 + 64] of f16 and bf16; rows that nobody sees are
// zeros. A thread block has up to UNPACKED rows of an entry, a warp one at a time. Tables of two sequences have no entry in common.
extern "C" __global__ void __launch_bounds__(256) mla_unpack(const __grid_constant__ Attention a, u32 rows, u8 *to) {
    __shared__ u64 found[8];
    u32 entry = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // The last table that begins here or before, and the longest context that it has: of all pairs so far the largest. No kernel
    // writes contexts and tables: they are read before the kernel in front is done.
    u64 most = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < rows; i += 256) {
        u32 start = a.starts[i];
        u64 own = (u64)(start + 1) << 32 | a.contexts[i];
        if (start <= entry && own > most) most = own;
    }
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) {
        u64 other = __shfl_xor_sync(ALL, most, step);
        most = other > most ? other : most;
    }
    if (lane == 0) found[warp] = most;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 8; i++) most = found[i] > most ? found[i] : most;
    u32 context = (u32)most, position = most ? (entry + 1 - (u32)(most >> 32)) * a.block_tokens : 0;
    u32 block = a.tables[entry], end = min(a.block_tokens, (blockIdx.y + 1) * UNPACKED);
    previous_done();
    require(position >= context || block < a.blocks);
    const u8 *source = a.pool + a.layer_offset + (u64)block * a.block_stride;
    for (u32 token = blockIdx.y * UNPACKED + warp; token < end; token += 8) {
        uint4 low = make_uint4(0, 0, 0, 0), high = low, key = low;
        if (position + token < context) {
            const u8 *row = source + token * a.row_bytes;
            uint4 codes = load16(row + 16 * lane);
            u32 scale = stretched(load4(row + LATENT + lane / 8 * 4));
            if (lane < 8) key = load16(row + LATENT + 16 + lane * 16);
            uint2 x = decode(codes.x, scale), y = decode(codes.y, scale), z = decode(codes.z, scale), w = decode(codes.w, scale);
            low = make_uint4(x.x, x.y, y.x, y.y), high = make_uint4(z.x, z.y, w.x, w.y);
        }
        uint4 *out = (uint4 *)(to + ((u64)entry * a.block_tokens + token) * ROW_BYTES);
        out[2 * lane] = low, out[2 * lane + 1] = high;
        if (lane < 8) out[LATENT / 8 + lane] = key;
    }
}

// 8 channels of a head's first parts, all but the last one of `splits` (two or more), and what weighs them; asked for, whether
// there are so many or not.
struct Parts {
    uint4 means[PARTS_MAX];
    float2 sums[PARTS_MAX];
};

__device__ __forceinline__ Parts ask_parts(const float2 *part_sums, const u16 *parts, u32 splits) {
    Parts own;
#pragma unroll
    for (u32 i = 0; i < PARTS_MAX; i++) {
        own.means[i] = *(const uint4 *)(parts + min(i, splits - 2) * LATENT);
        own.sums[i] = part_sums[min(i, splits - 1)];
    }
    return own;
}

// These and the last one added in order, as in mla_combine.
__device__ __forceinline__ uint4 add_parts(const Parts &own, const float2 *part_sums, const u16 *parts, uint4 last, u32 splits) {
    float largest = -INFINITE, total = 0.0f, sums[8];
#pragma unroll
    for (u32 i = 0; i < PARTS_MAX; i++) largest = fmaxf(largest, own.sums[i].x);
#pragma unroll 1
    for (u32 i = PARTS_MAX; i < splits; i++) largest = fmaxf(largest, part_sums[i].x);
#pragma unroll
    for (u32 j = 0; j < 8; j++) sums[j] = 0.0f;
    auto add = [&](float2 sum, uint4 mean) {
        u32 bits[4] = {mean.x, mean.y, mean.z, mean.w};
        float weight = exp2_of(sum.x - largest) * sum.y;
        total += weight;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            float2 x = unpack_f16(bits[j]);
            sums[2 * j] = fmaf(weight, x.x, sums[2 * j]), sums[2 * j + 1] = fmaf(weight, x.y, sums[2 * j + 1]);
        }
    };
#pragma unroll
    for (u32 i = 0; i < PARTS_MAX; i++) {
        if (i < splits) add(own.sums[i], i + 1 == splits ? last : own.means[i]);
    }
#pragma unroll 1
    for (u32 i = PARTS_MAX; i < splits; i++) {
        add(part_sums[i], i + 1 == splits ? last : *(const uint4 *)(parts + i * LATENT));
    }
    float share = 1.0f / total;
    return make_uint4(pack_bf16(sums[0] * share, sums[1] * share), pack_bf16(sums[2] * share, sums[3] * share),
                      pack_bf16(sums[4] * share, sums[5] * share), pack_bf16(sums[6] * share, sums[7] * share));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mla_prompt(const __grid_constant__ Attention a, const __grid_constant__ Map map, u32 rows) {
    extern __shared__ u8 memory[];
    // As in mla_attention_wgmma.cu.
    __shared__ float corrections[HEADS], totals[2][HEADS];
    // Of the two stages, of both halves of their pieces in the order of scores: copied (four), summed up (four). Of a tile: weights
    // and corrections written, used; its scores are there. Of a part's means: stored.
    __shared__ u64 barriers[12];
    previous_done();
    u32 shift = (1024 - ((u32)__cvta_generic_to_shared(memory) & 1023)) & 1023;
    u8 *queries = memory + shift, *weights = queries + PIECES * PIECE, *cache = weights + PIECE;
    u32 queries_at = (u32)__cvta_generic_to_shared(queries), weights_at = queries_at + PIECES * PIECE;
    u32 cache_at = weights_at + PIECE;
    u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 32;
    u32 weighed = full + 64, used = full + 72, scored = full + 80, stored = full + 88;
    u32 thread = threadIdx.x, lane = thread % WARP;
    if (thread < 4) barrier_init(full + 8 * thread, 1), barrier_init(empty + 8 * thread, 8);
    if (thread == 4) {
        barrier_init(weighed, 4 * 8), barrier_init(used, 8 * 8), barrier_init(scored, 4), barrier_init(stored, 256);
    }
    barrier_init_done();
    __syncthreads();

    // Of its heads, the block takes one item of gridDim.y; a thread's heads are `head` and eight more.
    u32 first = blockIdx.x * HEADS, heads = min(HEADS, a.heads - first), head = thread % 128 / WARP * 16 + lane / 4;
    auto query_of = [&](u32 item) { return (u64)(rows - 1 - item) * a.heads + first; };
    auto seen_by = [&](u32 item) {
        u32 context = a.contexts[rows - 1 - item];
        return context > a.first ? context - a.first : 0;
    };
    if (thread < 128) {
        registers_down<24>();
        u32 n = 0, parts = 0, ended = 0;
        for (u32 item = blockIdx.y; thread == 0 && item < rows; item += gridDim.y) {
            u32 seen = seen_by(item), tiles = div_up(seen, TOKENS), next = item + gridDim.y;
            u32 from = a.starts[rows - 1 - item] * a.block_tokens + a.first;
            require(seen <= a.splits * SPLIT && (seen == 0 || from + seen <= a.table_len * a.block_tokens));
            if (next < rows) {
                prefetch_rows((const u8 *)(a.q_latent + query_of(next) * LATENT), heads * LATENT * 2);
                prefetch_rows((const u8 *)(a.q_rope + query_of(next) * ROPE), heads * ROPE * 2);
            }
            for (u32 i = 0; i < tiles; i++, n++) {
                u32 stage = n % 2, at = cache_at + stage * PIECES * PIECE;
                // Means are stored by way of the stage of their last tile.
                if (n >= 2 && (ended >> stage & 1)) barrier_wait(stored, parts++ & 1);
                ended = (ended & ~(1u << stage)) | (u32)ends_part(i, tiles) << stage;
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    u32 barrier = full + 16 * stage + 8 * half;
                    if (n >= 2) barrier_wait(empty + 16 * stage + 8 * half, (n / 2 - 1) & 1);
                    barrier_expect(barrier, (half ? 4 : 5) * PIECE);
#pragma unroll
                    for (u32 k = half ? 5 : 0; k < (half ? 9 : 5); k++) {
                        copy_box(at + piece_of(k) * PIECE, &map, piece_of(k) * 128, from + i * TOKENS, barrier);
                    }
                }
            }
        }
    } else if (thread < 256) {
        registers_down<120>();
        u32 warp = thread % 128 / WARP;
        // Each warp its own 16 heads: a row's 16-byte chunks of latents, half of them at a time, and of four rows the key's.
        auto latent_at = [&](u32 i) { return i % 2 * 4 * PIECE + lane / 8 * PIECE + swizzled(warp * 16 + i / 2, lane % 8); };
        auto key_at = [&](u32 i) { return 8 * PIECE + swizzled(warp * 16 + 4 * i + lane / 8, lane % 8); };
        auto ask_queries = [&](u32 item) {
            const u16 *latents = a.q_latent + query_of(item) * LATENT, *keys = a.q_rope + query_of(item) * ROPE;
#pragma unroll 4
            for (u32 i = 0; i < 32; i++) {
                u32 line = warp * 16 + i / 2, there = line < heads;
                copy16(queries_at + latent_at(i), latents + (there ? line : 0) * LATENT + i % 2 * 256 + 8 * lane, there ? 16 : 0);
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 line = warp * 16 + 4 * i + lane / 8, there = line < heads;
                copy16(queries_at + key_at(i), keys + (there ? line : 0) * ROPE + lane % 8 * 8, there ? 16 : 0);
            }
            copies_commit();
        };
        auto take_queries = [&]() {
            copies_wait<0>();
#pragma unroll 4
            for (u32 i = 0; i < 32; i++) {
                uint4 *at = (uint4 *)(queries + latent_at(i)), bits = *at;
                *at = make_uint4(to_f16(bits.x), to_f16(bits.y), to_f16(bits.z), to_f16(bits.w));
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                uint4 *at = (uint4 *)(queries + key_at(i)), bits = *at;
                *at = make_uint4(stretch(bits.x), stretch(bits.y), stretch(bits.z), stretch(bits.w));
            }
            written_for_matrix_unit();
            some_sync(QUERIES, 128);
        };
        float scale = a.scale * (1.4426950408889634f / STRETCH);
        u32 n = 0, parts = 0;
        if (blockIdx.y < rows) ask_queries(blockIdx.y);
        for (u32 item = blockIdx.y; item < rows; item += gridDim.y) {
            u32 seen = seen_by(item), tiles = div_up(seen, TOKENS);
            bool more = item + gridDim.y < rows;
            take_queries();
            if (tiles == 0 && more) some_sync(QUERIES, 128), ask_queries(item + gridDim.y);
            Softmax softmax = no_weights();
            for (u32 i = 0; i < tiles; i++, n++) {
                u32 stage = n % 2, tile_at = cache_at + stage * PIECES * PIECE;
                float scores[32];
                barrier_wait(full + 16 * stage, n / 2 & 1);
                mma_begin();
#pragma unroll
                for (u32 k = 0; k < PIECES; k++) {
                    u32 piece = piece_of(k);
                    if (k == 5) barrier_wait(full + 16 * stage + 8, n / 2 & 1);
                    u64 q = tile(queries_at) + piece * (PIECE >> 4), v = tile(tile_at) + piece * (PIECE >> 4);
#pragma unroll
                    for (u32 step = 0; step < 4; step++) {
                        if (k > 0) MmaF16<64>::run(scores, q + 2 * step, v + 2 * step, 1);
                        else MmaBf16<64>::run(scores, q + 2 * step, v + 2 * step, step > 0);
                    }
                }
                mma_commit();
                mma_wait<0>();
                if (lane == 0) barrier_arrive(scored);
                if (i + 1 == tiles && more) some_sync(QUERIES, 128), ask_queries(item + gridDim.y);
                float correction[2];
                u32 bits[16];
                weigh(scores, seen - i * TOKENS, scale, softmax, correction, bits);
                if (n > 0) barrier_wait(used, (n - 1) & 1);
                if (lane % 4 == 0) corrections[head] = correction[0], corrections[head + 8] = correction[1];
                store_weights(weights, head, bits);
                if (ends_part(i, tiles)) {
#pragma unroll
                    for (u32 j = 0; j < 2; j++) {
                        float total = all_weights(softmax.total[j]);
                        if (lane % 4 == 0) {
                            totals[parts % 2][head + 8 * j] = total;
                            u32 slot = ((blockIdx.y * gridDim.x + blockIdx.x) * HEADS + head + 8 * j) * a.splits + i / PART_TILES;
                            if (tiles > PART_TILES) a.part_sums[slot] = make_float2(softmax.reference[j], total);
                        }
                    }
                    softmax = no_weights();
                    parts++;
                }
                written_for_matrix_unit();
                __syncwarp();
                if (lane % 4 == 0) barrier_arrive(weighed);
            }
        }
    } else {
        registers_up<184>();
        u32 half = thread / 128 - 2, n = 0, parts = 0;
        float sums[2][64];
        // From one part to the next none is kept in registers.
        auto forget = [&]() {
#pragma unroll
            for (u32 j = 0; j < 128; j++) sums[j / 64][j % 64] = 0.0f;
        };
        forget();
        for (u32 item = blockIdx.y; item < rows; item += gridDim.y) {
            u32 tiles = div_up(seen_by(item), TOKENS);
            if (tiles == 0) {
                for (u32 i = thread % 128; i < heads * 32; i += 128) {
                    *(uint4 *)(a.out + (query_of(item) + i / 32) * LATENT + half * 256 + 8 * (i % 32)) = make_uint4(0, 0, 0, 0);
                }
            }
            for (u32 i = 0; i < tiles; i++, n++) {
                u32 stage = n % 2, tile_at = cache_at + stage * PIECES * PIECE + half * 4 * PIECE;
                barrier_wait(weighed, n & 1);
                float low = first_of_four(corrections, head), high = first_of_four(corrections, head + 8);
                bool fresh = i % PART_TILES == 0;
                if (!fresh && __any_sync(ALL, low != 1.0f || high != 1.0f)) scale_sums(sums, low, high);
                barrier_wait(full + 16 * stage, n / 2 & 1), barrier_wait(full + 16 * stage + 8, n / 2 & 1);
                if (i + 1 < tiles) barrier_wait(scored, (n + 1) & 1);
                mma_begin();
                u64 v = tile_across(tile_at), w = tile(weights_at);
#pragma unroll
                for (u32 pair = 0; pair < 2; pair++) {
#pragma unroll
                    for (u32 step = 0; step < 4; step++) {
                        MmaF16<128>::across(sums[pair], w + 2 * step, v + 2 * pair * (PIECE >> 4) + step * 128, step > 0 || !fresh);
                    }
                    mma_commit();
                }
                mma_wait<1>();
                if (lane == 0) barrier_arrive(empty + 16 * stage);
                mma_wait<0>();
                if (lane % 4 == 0) barrier_arrive(used);
                if (ends_part(i, tiles)) {
                    u32 splits = div_up(tiles, PART_TILES);
                    u16 *out = a.out + query_of(afresh(item)) * LATENT;
                    u8 *staged = cache + (stage * PIECES + half * 4) * PIECE;
                    bool whole = splits == 1, last = i + 1 == tiles;
                    float low = 1.0f / (STRETCH * first_of_four(totals[parts % 2], head));
                    float high = 1.0f / (STRETCH * first_of_four(totals[parts % 2], head + 8));
                    some_sync(STAGED + half, 128);
#pragma unroll
                    for (u32 k = 0; k < 64; k++) {
                        float share = k % 2 ? high : low, *own = &sums[k / 32][2 * k % 64], x = own[0] * share, y = own[1] * share;
                        u32 at = swizzled(head + 8 * (k % 2), k / 2 % 8) + lane % 4 * 4;
                        *(u32 *)(staged + k / 16 * PIECE + at) = whole ? pack_bf16(x, y) : pack_f16(x, y);
                    }
                    some_sync(STAGED + half, 128);
                    // Of its 8 channels' chunks a thread has one of every fourth head.
                    u32 chunk = thread % 32, channel = half * 256 + 8 * chunk;
                    u32 slots = (blockIdx.y * gridDim.x + blockIdx.x) * HEADS;
                    auto staged_at = [&](u32 own) {
                        return *(const uint4 *)(staged + chunk / 8 * PIECE + swizzled(own, chunk % 8));
                    };
                    if (whole || !last) {
                        for (u32 own = thread % 128 / 32; own < heads; own += 4) {
                            u32 to = whole ? own : (slots + own) * a.splits + i / PART_TILES;
                            *(uint4 *)((whole ? out : a.parts) + to * LATENT + channel) = staged_at(own);
                        }
                    } else {
#pragma unroll 1
                        for (u32 from = thread % 128 / 32; from < heads; from += 4 * AT_ONCE) {
                            Parts asked[AT_ONCE];
                            auto slot_of = [&](u32 j) { return (slots + min(from + 4 * j, heads - 1)) * a.splits; };
#pragma unroll
                            for (u32 j = 0; j < AT_ONCE; j++) {
                                asked[j] = ask_parts(a.part_sums + slot_of(j), a.parts + slot_of(j) * LATENT + channel, splits);
                            }
#pragma unroll
                            for (u32 j = 0; j < AT_ONCE; j++) {
                                u32 own = from + 4 * j;
                                const u16 *means = a.parts + slot_of(j) * LATENT + channel;
                                uint4 bits = staged_at(min(own, heads - 1));
                                bits = add_parts(asked[j], a.part_sums + slot_of(j), means, bits, splits);
                                if (own < heads) *(uint4 *)(out + own * LATENT + channel) = bits;
                            }
                        }
                    }
                    parts++;
                    forget();
                    // The copy unit writes there next.
                    written_for_matrix_unit();
                    barrier_arrive(stored);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 16 * stage + 8);
            }
        }
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
extern "C" __global__ void mla_unpack(const __grid_constant__ Attention, u32, u8 *) { require(false); }
extern "C" __global__ void mla_prompt(const __grid_constant__ Attention, const __grid_constant__ Map, u32) { require(false); }

#endif
