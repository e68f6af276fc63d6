// The router's choice, a block a row. Values that were taken become NaN, as on the CPU.

#define THREADS 256u

#define SIGMOID 0u
#define NOAUX_TC 2u

__device__ __forceinline__ bool beats(float a, u32 i, float b, u32 j) {
    // A number beats NaN; the larger beats the smaller; the lower index decides.
    bool a_is = a == a, b_is = b == b;
    if (a_is != b_is) return a_is;
    if (a_is && a != b) return a > b;
    return i < j;
}

// Index of the largest value that is not NaN, the lowest on a tie; every lane has it.
__device__ __forceinline__ u32 warp_argmax(const float *values, u32 len) {
    u32 lane = threadIdx.x;
    // A lane without values proposes nothing that could win: NaN at the last index.
    float best = __int_as_float(0x7FC00000);
    u32 index = ALL;
    for (u32 i = lane; i < len; i += WARP) {
        if (beats(values[i], i, best, index)) best = values[i], index = i;
    }
    for (u32 step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(ALL, best, step);
        u32 other_index = __shfl_xor_sync(ALL, index, step);
        if (beats(other, other_index, best, index)) best = other, index = other_index;
    }
    return index;
}

// Orders as `beats` does: the larger number has the larger key, NaN has none. Zeros are equal.
__device__ __forceinline__ u32 key_of(float x) {
    if (x != x) return 0;
    u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Experts of a lane: with them a warp holds 256.
#define PER_LANE 8u

struct Rule {
    u32 experts, selection, top_k, groups, kept;
};

// Whether a warp can hold every choice in registers, a group in whole lanes, as many as a power of two.
__device__ __forceinline__ bool fits_warp(const Rule &r) {
    u32 size = r.experts / r.groups, lanes = size / PER_LANE;
    bool groups_fit = r.kept == r.groups || (size % PER_LANE == 0 && (lanes & (lanes - 1)) == 0);
    return r.experts <= PER_LANE * WARP && r.top_k <= WARP && groups_fit;
}

// Lane j has the j-th expert chosen; `sum` is of the scores, in that order. Every choice is one largest key of the warp instead
// of comparisons lane by lane.
__device__ __forceinline__ u32 choose_in_registers(const Rule &r, const float *scores, const float *choice, float &sum) {
    u32 lane = threadIdx.x, first = PER_LANE * lane, keys[PER_LANE];
    float values[PER_LANE];
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        bool is = first + i < r.experts;
        values[i] = is ? choice[first + i] : __int_as_float(0x7FC00000);
        keys[i] = is ? key_of(values[i]) : 0;
    }
    if (r.kept < r.groups) {
        float best = -INFINITE, second = -INFINITE;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) {
            if (values[i] > best) second = best, best = values[i];
            else if (values[i] > second) second = values[i];
        }
        u32 lanes = r.experts / r.groups / PER_LANE;
        for (u32 step = 1; step < lanes; step *= 2) {
            float other = __shfl_xor_sync(ALL, best, step), other_second = __shfl_xor_sync(ALL, second, step);
            second = fmaxf(fminf(best, other), fmaxf(second, other_second)), best = fmaxf(best, other);
        }
        u32 rank = first < r.experts ? key_of(r.selection == NOAUX_TC && second > -INFINITE ? best + second : best) : 0;
        bool kept = false;
        for (u32 i = 0; i < r.kept; i++) {
            u32 winner = __ffs(__ballot_sync(ALL, rank == __reduce_max_sync(ALL, rank))) - 1;
            if (lane / lanes == winner / lanes) rank = 0, kept = true;
        }
        // Minus infinity and not zero: biased scores may be negative.
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++)
            if (!kept && first + i < r.experts) keys[i] = key_of(-INFINITE);
    }
    u32 chosen = 0;
    sum = 0.0f;
    for (u32 j = 0; j < r.top_k; j++) {
        u32 own = 0, at = 0;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) own = max(own, keys[i]);
#pragma unroll
        for (u32 i = PER_LANE; i-- > 0;) at = keys[i] == own ? i : at;
        // Lanes are in the order of the experts: the lowest has the lowest.
        u32 winner = __ffs(__ballot_sync(ALL, own == __reduce_max_sync(ALL, own))) - 1;
        u32 expert = __shfl_sync(ALL, first + at, winner);
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) keys[i] = lane == winner && i == at ? 0 : keys[i];
        chosen = lane == j ? expert : chosen;
        sum += scores[expert];
    }
    return chosen;
}

// As choose_in_registers, for any number of experts, with the choices in shared memory, which are overwritten.
__device__ __forceinline__ void choose(const Rule &r, const float *scores, float *choice, float *ranks, u16 *ids, float *weights,
                                       float &sum) {
    const float nan = __int_as_float(0x7FC00000);
    u32 lane = threadIdx.x;
    if (r.kept < r.groups) {
        u32 size = r.experts / r.groups;
        for (u32 group = lane; group < r.groups; group += WARP) {
            float best = -INFINITE, second = -INFINITE;
            for (u32 i = group * size; i < (group + 1) * size; i++) {
                if (choice[i] > best) second = best, best = choice[i];
                else if (choice[i] > second) second = choice[i];
            }
            ranks[group] = r.selection == NOAUX_TC && second > -INFINITE ? best + second : best;
        }
        __syncwarp();
        for (u32 i = 0; i < r.kept; i++) {
            u32 group = warp_argmax(ranks, r.groups);
            __syncwarp();
            if (lane == 0) ranks[group] = nan;
            __syncwarp();
        }
        for (u32 i = lane; i < r.experts; i += WARP) {
            if (ranks[i / size] == ranks[i / size]) choice[i] = -INFINITE;
        }
        __syncwarp();
    }
    sum = 0.0f;
    for (u32 j = 0; j < r.top_k; j++) {
        u32 expert = warp_argmax(choice, r.experts);
        __syncwarp();
        if (lane == 0) {
            choice[expert] = nan;
            ids[j] = (u16)expert;
        }
        sum += scores[expert];
        if (lane == 0) weights[j] = scores[expert];
        __syncwarp();
    }
}

// What experts.cu's group_rows makes of the choice; all null where that sorts.
struct Sorted {
    u32 *order;
    uint4 *tiles;
    u32 *totals;
};

// logits [slices, m, experts], added in order, to ids and weights [m, top_k], in descending order of the score that
// selected them. A row at or past *row_count (null: none) is padding: its ids are 0xFFFF, its weights zero. The choices of a
// single row are sorted here: each expert is a tile of its own.
extern "C" __global__ void __launch_bounds__(THREADS)
route(const float *logits, u32 slices, u32 experts, const float *bias, u32 scoring, u32 selection, u32 top_k, u32 groups,
      u32 kept, u32 normalise, float factor, const u32 *row_count, u16 *ids, float *weights, const __grid_constant__ Sorted sorted) {
    extern __shared__ float memory[];
    float *scores = memory, *choice = memory + experts, *ranks = choice + experts;
    u32 lane = threadIdx.x;
    float own_bias = bias && lane < experts ? bias[lane] : 0.0f;
    previous_done();
    ids += (u64)blockIdx.x * top_k;
    weights += (u64)blockIdx.x * top_k;
    // All threads add slices, sixteen of which are under way at once; what follows is the first warp's.
    u64 stride = (u64)gridDim.x * experts;
    const float *at = logits + (u64)blockIdx.x * experts;
    u32 rows = row_count ? *row_count : gridDim.x;
    for (u32 i = lane; i < experts; i += THREADS) {
        float sum = at[i];
        for (u32 slice = 1; slice < slices; slice += 16) {
            float parts[16];
#pragma unroll
            for (u32 j = 0; j < 16; j++) parts[j] = slice + j < slices ? at[(slice + j) * stride + i] : 0.0f;
#pragma unroll
            for (u32 j = 0; j < 16; j++)
                if (slice + j < slices) sum += parts[j];
        }
        float score = scoring == SIGMOID ? 1.0f / (1.0f + expf(-sum)) : sum;
        scores[i] = score;
        if (scoring == SIGMOID) choice[i] = bias ? score + (i < THREADS ? own_bias : bias[i]) : score;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    if (blockIdx.x >= rows) {
        for (u32 i = lane; i < top_k; i += WARP) ids[i] = 0xFFFF, weights[i] = 0.0f;
        if (sorted.totals && lane < 2) sorted.totals[lane] = 0;
        return;
    }
    if (scoring != SIGMOID) {
        float largest = -INFINITE, sum = 0.0f;
        for (u32 i = lane; i < experts; i += WARP) largest = fmaxf(largest, scores[i]);
        largest = warp_max(largest);
        for (u32 i = lane; i < experts; i += WARP) sum += scores[i] = expf(scores[i] - largest);
        sum = warp_sum(sum);
        for (u32 i = lane; i < experts; i += WARP) {
            float score = scores[i] / sum;
            scores[i] = score, choice[i] = bias ? score + bias[i] : score;
        }
        __syncwarp();
    }
    Rule rule = {experts, selection, top_k, groups, kept};
    float sum;
    if (!fits_warp(rule)) {
        choose(rule, scores, choice, ranks, ids, weights, sum);
        float divisor = normalise ? sum + 1e-20f : 1.0f;
        if (lane == 0) {
            for (u32 j = 0; j < top_k; j++) weights[j] = weights[j] / divisor * factor;
        }
        __syncwarp();
    } else {
        u32 expert = choose_in_registers(rule, scores, choice, sum);
        float divisor = normalise ? sum + 1e-20f : 1.0f;
        if (lane < top_k) ids[lane] = (u16)expert, weights[lane] = scores[expert] / divisor * factor;
    }
    if (!sorted.totals) return;
    for (u32 j = lane; j < top_k; j += WARP) sorted.order[j] = j, sorted.tiles[j] = make_uint4(ids[j], j, 1, 0);
    if (lane < 2) sorted.totals[lane] = top_k;
}
