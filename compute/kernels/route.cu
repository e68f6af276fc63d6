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

// logits [slices, m, experts], added in order, to ids and weights [m, top_k], in descending order of the score that
// selected them. A row at or past *row_count (null: none) is padding: its ids are 0xFFFF, its weights zero.
extern "C" __global__ void __launch_bounds__(THREADS)
route(const float *logits, u32 slices, u32 experts, const float *bias, u32 scoring, u32 selection, u32 top_k, u32 groups,
      u32 kept, u32 normalise, float factor, const u32 *row_count, u16 *ids, float *weights) {
    previous_done();
    extern __shared__ float memory[];
    float *scores = memory, *choice = memory + experts, *ranks = choice + experts;
    const float nan = __int_as_float(0x7FC00000);
    u32 lane = threadIdx.x;
    ids += (u64)blockIdx.x * top_k;
    weights += (u64)blockIdx.x * top_k;
    if (row_count && blockIdx.x >= *row_count) {
        for (u32 i = lane; i < top_k; i += THREADS) ids[i] = 0xFFFF, weights[i] = 0.0f;
        return;
    }
    // All threads add slices, eight of which are under way at once; what follows is the first warp's.
    u64 stride = (u64)gridDim.x * experts;
    for (u32 i = lane; i < experts; i += THREADS) {
        const float *at = logits + (u64)blockIdx.x * experts + i;
        float sum = at[0];
        for (u32 slice = 1; slice < slices; slice += 8) {
            float parts[8];
#pragma unroll
            for (u32 j = 0; j < 8; j++) parts[j] = slice + j < slices ? at[(slice + j) * stride] : 0.0f;
#pragma unroll
            for (u32 j = 0; j < 8; j++)
                if (slice + j < slices) sum += parts[j];
        }
        scores[i] = scoring == SIGMOID ? 1.0f / (1.0f + expf(-sum)) : sum;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    if (scoring != SIGMOID) {
        float largest = -INFINITE, sum = 0.0f;
        for (u32 i = lane; i < experts; i += WARP) largest = fmaxf(largest, scores[i]);
        largest = warp_max(largest);
        for (u32 i = lane; i < experts; i += WARP) sum += scores[i] = expf(scores[i] - largest);
        sum = warp_sum(sum);
        for (u32 i = lane; i < experts; i += WARP) scores[i] /= sum;
    }
    for (u32 i = lane; i < experts; i += WARP) choice[i] = bias ? scores[i] + bias[i] : scores[i];
    __syncwarp();
    if (kept < groups) {
        u32 size = experts / groups;
        for (u32 group = lane; group < groups; group += WARP) {
            float best = -INFINITE, second = -INFINITE;
            for (u32 i = group * size; i < (group + 1) * size; i++) {
                if (choice[i] > best) second = best, best = choice[i];
                else if (choice[i] > second) second = choice[i];
            }
            ranks[group] = selection == NOAUX_TC && second > -INFINITE ? best + second : best;
        }
        __syncwarp();
        for (u32 i = 0; i < kept; i++) {
            u32 group = warp_argmax(ranks, groups);
            __syncwarp();
            if (lane == 0) ranks[group] = nan;
            __syncwarp();
        }
        for (u32 i = lane; i < experts; i += WARP) {
            // Minus infinity and not zero: biased scores may be negative.
            if (ranks[i / size] == ranks[i / size]) choice[i] = -INFINITE;
        }
        __syncwarp();
    }
    float sum = 0.0f;
    for (u32 j = 0; j < top_k; j++) {
        u32 expert = warp_argmax(choice, experts);
        __syncwarp();
        if (lane == 0) {
            choice[expert] = nan;
            ids[j] = (u16)expert;
        }
        sum += scores[expert];
        if (lane == 0) weights[j] = scores[expert];
        __syncwarp();
    }
    float divisor = normalise ? sum + 1e-20f : 1.0f;
    if (lane == 0) {
        for (u32 j = 0; j < top_k; j++) weights[j] = weights[j] / divisor * factor;
    }
}
