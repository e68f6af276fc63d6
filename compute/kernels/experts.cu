// From the router's choice to an order of rows, expert by expert, and back to tokens.

// Id of a row that goes to no expert: padding of the batch.
#define NO_EXPERT 0xFFFFu

// Sorts `count` assignments by their expert, in one block: order[position] = index into ids; tiles of at most `tile_rows`
// positions of one expert; totals = (positions, tiles). Within an expert the order is any: a row's result does not depend
// on its neighbours. Shared memory: three words for each expert.
extern "C" __global__ void __launch_bounds__(1024)
group_rows(const u16 *ids, u32 count, u32 experts, u32 tile_rows, u32 tiles_max, u32 *order, uint4 *tiles, u32 *totals) {
    previous_done();
    extern __shared__ u32 words[];
    u32 *counts = words, *starts = words + experts, *first_tiles = starts + experts;
    for (u32 i = threadIdx.x; i < experts; i += 1024) counts[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += 1024) {
        u32 expert = ids[i];
        if (expert == NO_EXPERT) continue;
        require(expert < experts);
        atomicAdd(counts + expert, 1);
    }
    __syncthreads();
    // A warp sums up: 32 experts at a time.
    if (threadIdx.x < WARP) {
        u32 rows = 0, tile_count = 0;
        for (u32 group = 0; group < experts; group += WARP) {
            u32 expert = group + threadIdx.x, own = expert < experts ? counts[expert] : 0;
            u32 own_tiles = div_up(own, tile_rows), rows_to = own, tiles_to = own_tiles;
            for (u32 step = 1; step < WARP; step *= 2) {
                u32 a = __shfl_up_sync(ALL, rows_to, step), b = __shfl_up_sync(ALL, tiles_to, step);
                if (threadIdx.x >= step) rows_to += a, tiles_to += b;
            }
            if (expert < experts) starts[expert] = rows + rows_to - own, first_tiles[expert] = tile_count + tiles_to - own_tiles;
            rows += __shfl_sync(ALL, rows_to, WARP - 1), tile_count += __shfl_sync(ALL, tiles_to, WARP - 1);
        }
        require(tile_count <= tiles_max);
        if (threadIdx.x == 0) totals[0] = rows, totals[1] = tile_count;
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < experts; expert += 1024) {
        u32 rows = counts[expert], first = starts[expert], at = first_tiles[expert];
        for (u32 done = 0; done < rows; done += tile_rows, at++) {
            tiles[at] = make_uint4(expert, first + done, min(tile_rows, rows - done), 0);
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += 1024) {
        u32 expert = ids[i];
        if (expert != NO_EXPERT) order[atomicAdd(starts + expert, 1)] = i;
    }
}

// hidden[t, :] += shared[t, :] + sum over j of weights[t, j] * x[t * top_k + j, :], the sum first and in order of j, each
// product and sum rounded; `shared` may be null. A token whose first id is NO_EXPERT stays as it is. Four channels a
// thread; dim in fours.
#define TOGETHER 8u
template <bool BF16>
__device__ __forceinline__ void combine(float *hidden, const float *shared, const void *x, const u16 *ids,
                                        const float *weights, u32 top_k, u32 dim) {
    u32 token = blockIdx.y, channel = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (channel >= dim) return;
    u64 at = (u64)token * dim + channel;
    // Everything is asked for at once, also where it turns out that there is nothing to add.
    bool none = ids[(u64)token * top_k] == NO_EXPERT;
    float4 h = *(const float4 *)(hidden + at);
    float4 out = shared ? *(const float4 *)(shared + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 start = 0; start < top_k; start += TOGETHER) {
        float4 values[TOGETHER];
        float factors[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            u64 row = (u64)token * top_k + min(start + i, top_k - 1);
            factors[i] = weights[row];
            if (BF16) {
                ushort4 bits = *(const ushort4 *)((const u16 *)x + row * dim + channel);
                values[i] = make_float4(from_bf16(bits.x), from_bf16(bits.y), from_bf16(bits.z), from_bf16(bits.w));
            } else {
                values[i] = *(const float4 *)((const float *)x + row * dim + channel);
            }
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            float weight = factors[i];
            float4 v = values[i];
            if (start + i == 0) {
                sum = make_float4(weight * v.x, weight * v.y, weight * v.z, weight * v.w);
            } else if (start + i < top_k) {
                sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
            }
        }
    }
    if (none) return;
    out.x += sum.x, out.y += sum.y, out.z += sum.z, out.w += sum.w;
    h.x += out.x, h.y += out.y, h.z += out.z, h.w += out.w;
    *(float4 *)(hidden + at) = h;
}

extern "C" __global__ void __launch_bounds__(256)
combine_f32(float *hidden, const float *shared, const void *x, const u16 *ids, const float *weights, u32 top_k, u32 dim) {
    previous_done();
    combine<false>(hidden, shared, x, ids, weights, top_k, dim);
}

extern "C" __global__ void __launch_bounds__(256)
combine_bf16(float *hidden, const float *shared, const void *x, const u16 *ids, const float *weights, u32 top_k, u32 dim) {
    previous_done();
    combine<true>(hidden, shared, x, ids, weights, top_k, dim);
}
