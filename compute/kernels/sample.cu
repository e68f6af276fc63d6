// From rows of logits to tokens: bias, penalties and suppression in place, log-probability, temperature, min-p, top-k, top-p and
// one draw by the Gumbel-max rule. A cluster of thread blocks a row; each has its part of the vocabulary.
//
// Every sum is one of integers: probabilities relative to the best token's in units of 2^-40. So neither the order of additions
// nor the number of blocks shows in a result.

#if __CUDA_ARCH__ == 900
#define PARTS 8u
#define CLUSTER __cluster_dims__(8, 1, 1)
#else
#define PARTS 1u
#define CLUSTER
#endif
#define THREADS 512u
// Tokens that a thread can hold.
#define HELD 32u
// No noise is as large.
#define NOISE_MAX 23.0f
#define UNIT 1099511627776.0f

// What is done to a row; `RowWords` of the host.
struct Row {
    u32 first, count;
    float repetition, frequency, presence, temperature;
    u32 top_k;
    float top_p, min_p;
    u32 seed_low, seed_high, choice, position_low, position_high, drawn, greedy;
};

// What is done to a token of a row: `seen` counts its occurrences in the completion, the highest bit says that it is in the prompt.
struct Adjustment {
    u32 token;
    float bias;
    u32 seen, suppressed;
};

// ---- Noise: the same operations as the CPU's, each rounded on its own. ----

__device__ __forceinline__ uint4 philox(uint4 c, u32 k0, u32 k1) {
    for (u32 round = 0; round < 10; round++) {
        u64 left = (u64)0xD2511F53u * c.x, right = (u64)0xCD9E8D57u * c.z;
        c = make_uint4((u32)(right >> 32) ^ c.y ^ k0, (u32)right, (u32)(left >> 32) ^ c.w ^ k1, (u32)left);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
}

__device__ __forceinline__ float natural_log(float x) {
    u32 bits = __float_as_uint(x);
    int exponent = (int)(bits - 0x3F3504F3u) >> 23;
    float f = __uint_as_float(bits - ((u32)exponent << 23)) - 1.0f, n = (float)exponent, z = f * f;
    float sum = 7.0376836e-2f;
    sum = sum * f - 1.151461e-1f;
    sum = sum * f + 1.1676999e-1f;
    sum = sum * f - 1.2420141e-1f;
    sum = sum * f + 1.4249323e-1f;
    sum = sum * f - 1.6668057e-1f;
    sum = sum * f + 2.0000715e-1f;
    sum = sum * f - 2.4999994e-1f;
    sum = sum * f + 3.3333331e-1f;
    float ln = sum * f * z;
    ln += n * -2.1219444e-4f;
    ln -= 0.5f * z;
    return (f + ln) + n * 0.6933594f;
}

__device__ __forceinline__ float gumbel(u32 word) {
    const float below_one = 1.0f - 0x1p-24f;
    float v = ((float)word + 0.5f) * 0x1p-32f;
    v = v < below_one ? v : below_one;
    float rest = 1.0f - v;
    float exponential = -natural_log(rest) * (v / (1.0f - rest));
    return -natural_log(exponential > v ? exponential : v);
}

// The words of the tokens 64 (i / 16) + i % 16 + {0, 16, 32, 48}.
__device__ __forceinline__ uint4 words(const Row &row, u32 i) {
    return philox(make_uint4(i, row.position_low, row.position_high, row.choice), row.seed_low, row.seed_high);
}

__device__ __forceinline__ u32 word_of(uint4 words, u32 j) {
    return j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
}

// ---- Order. ----

// Larger for larger numbers, 0 for what is none.
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// The larger number, of equals the lower token.
__device__ __forceinline__ u64 ranked(float x, u32 token) { return (u64)key_of(x) << 32 | (ALL - token); }

// ---- Reductions over the cluster. ----

#if __CUDA_ARCH__ == 900
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u64 from_block(const u64 *p, u32 block) {
    u32 here = (u32)__cvta_generic_to_shared(p), there;
    u64 value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(there) : "memory");
    return value;
}
#else
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ u64 from_block(const u64 *p, u32) { return *p; }
#endif

struct Shared {
    u64 warps[THREADS / WARP];
    // Two, in turn: the other is still being read.
    u64 block[2], total;
};

template <bool MAX>
__device__ __forceinline__ u64 join(u64 a, u64 b) { return MAX ? (a > b ? a : b) : a + b; }

// The largest, or the sum, of every thread's value; every thread has it. `turn` counts the calls.
template <bool MAX>
__device__ __forceinline__ u64 over_cluster(u64 x, Shared &shared, u32 &turn) {
    u32 lane = threadIdx.x % WARP;
    for (u32 step = 16; step > 0; step /= 2) x = join<MAX>(x, __shfl_xor_sync(ALL, x, step));
    if (lane == 0) shared.warps[threadIdx.x / WARP] = x;
    __syncthreads();
    u64 *block = shared.block + turn % 2;
    turn++;
    if (threadIdx.x < WARP) {
        x = lane < THREADS / WARP ? shared.warps[lane] : 0;
        for (u32 step = 16; step > 0; step /= 2) x = join<MAX>(x, __shfl_xor_sync(ALL, x, step));
        if (lane == 0) *block = x;
    }
    cluster_barrier();
    if (threadIdx.x < WARP) {
        x = lane < PARTS ? from_block(block, lane) : 0;
        for (u32 step = 16; step > 0; step /= 2) x = join<MAX>(x, __shfl_xor_sync(ALL, x, step));
        if (lane == 0) shared.total = x;
    }
    __syncthreads();
    return shared.total;
}

// ---- The part of a row that this block looks at. ----

struct Part {
    const float *logits;
    u32 vocab, first, end;

    // Calls `look(token, logit, group, j)` for each token of this thread: j-th of a group that shares random words.
    template <typename Look> __device__ __forceinline__ void each(Look look) const {
        for (u32 group = first + threadIdx.x; group < end; group += THREADS) {
            u32 token = group / 16 * 64 + group % 16;
            for (u32 j = 0; j < 4; j++, token += 16) {
                if (token < vocab) look(token, logits[token]);
            }
        }
    }
};

// Which tokens are left: better than `key`, or as good and no further than `last`; and at least `min_p` as likely as the best.
struct Kept {
    u32 key, last;
    float min_p, peak, temperature;

    __device__ __forceinline__ float weight(float x) const { return expf((x - peak) / temperature); }
    __device__ __forceinline__ bool has(u32 token, float x) const {
        u32 k = key_of(x);
        return k > 0 && (k > key || (k == key && token <= last)) && (min_p <= 0.0f || weight(x) >= min_p);
    }
};

__device__ __forceinline__ u64 units(float weight) { return __float2ull_rn(weight * UNIT); }

// The largest key such that the tokens at least as good come to `target`: their number, or (MASS) their probability. 0 if
// all of them do not.
template <bool MASS>
__device__ __forceinline__ u32 threshold(const Part &part, const Kept &kept, u64 target, Shared &shared, u32 &turn) {
    u32 found = 0;
    // Every thread keeps its tokens' keys where it has room for all of them (a vocabulary of 131,072): the search then reads
    // nothing but registers.
    bool fits = part.end - part.first <= THREADS * HELD / 4;
    u32 keys[HELD];
    if (fits) {
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            u32 group = part.first + threadIdx.x + i / 4 * THREADS, token = group / 16 * 64 + group % 16 + i % 4 * 16;
            keys[i] = 0;
            if (group < part.end && token < part.vocab && kept.has(token, part.logits[token])) {
                keys[i] = key_of(part.logits[token]);
            }
        }
    }
    for (u32 bit = 0x80000000u; bit > 0; bit /= 2) {
        u32 tried = found | bit;
        u64 sum = 0;
        if (fits) {
            u32 count = 0;
#pragma unroll
            for (u32 i = 0; i < HELD; i++) {
                if (MASS && keys[i] >= tried) sum += units(kept.weight(number_of(keys[i])));
                if (!MASS) count += keys[i] >= tried;
            }
            sum += count;
        } else {
            part.each([&](u32 token, float x) {
                if (key_of(x) >= tried && kept.has(token, x)) sum += MASS ? units(kept.weight(x)) : 1;
            });
        }
        if (over_cluster<false>(sum, shared, turn) >= target) found = tried;
    }
    return found;
}

// Cuts `kept` down by top-k and top-p, in this order.
__device__ __forceinline__ void truncate(const Part &part, const Row &row, Kept &kept, Shared &shared, u32 &turn) {
    if (row.top_k > 0 && row.top_k < part.vocab) {
        kept.key = max(kept.key, threshold<false>(part, kept, row.top_k, shared, turn));
    }
    if (row.top_p >= 1.0f) return;
    u64 mine = 0;
    part.each([&](u32 token, float x) {
        if (kept.has(token, x)) mine += units(kept.weight(x));
    });
    u64 total = over_cluster<false>(mine, shared, turn);
    u64 limit = max((u64)ceil((double)row.top_p * (double)total), (u64)1);
    u32 key = threshold<true>(part, kept, limit, shared, turn);
    // Of those that are as good as the last of all, only as many as the limit needs, the lowest first.
    u64 above = 0, equals = 0;
    part.each([&](u32 token, float x) {
        if (!kept.has(token, x)) return;
        if (key_of(x) > key) above += units(kept.weight(x));
        else if (key_of(x) == key) equals += 1;
    });
    above = over_cluster<false>(above, shared, turn);
    equals = over_cluster<false>(equals, shared, turn);
    u64 each = max(units(kept.weight(number_of(key))), (u64)1);
    u32 last = ALL;
    if (equals > 0 && above + (equals - 1) * each >= limit) {
        last = 0;
        for (u32 bit = 0x80000000u; bit > 0; bit /= 2) {
            // The last token before which there is less than the limit.
            u32 tried = last | bit;
            u64 below = 0;
            part.each([&](u32 token, float x) {
                if (token < tried && key_of(x) == key && kept.has(token, x)) below += 1;
            });
            if (above + over_cluster<false>(below, shared, turn) * each < limit) last = tried;
        }
    }
    kept.key = key, kept.last = last;
}

// logits [rows, vocab], changed in place by the rows' adjustments, to a token, its log-probability and the logarithm of the
// whole weight (f32 bits): out [rows, 3]. Of a row that is not drawn nothing is changed or written.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
sample(float *all_logits, u32 vocab, const Row *rows, const Adjustment *adjustments, u32 adjustment_count, u32 *out) {
    __shared__ Shared shared;
    Row row = rows[blockIdx.y];
    if (!row.drawn) return;
    require((u64)row.first + row.count <= adjustment_count);
    float *logits = all_logits + (u64)blockIdx.y * vocab;
    u32 groups = div_up(vocab, 64) * 16, per = div_up(groups, PARTS), turn = 0;
    Part part = {logits, vocab, min(blockIdx.x * per, groups), min((blockIdx.x + 1) * per, groups)};

    for (u32 i = threadIdx.x; i < row.count; i += THREADS) {
        Adjustment change = adjustments[row.first + i];
        u32 group = change.token / 64 * 16 + change.token % 16;
        if (change.token >= vocab || group < part.first || group >= part.end) continue;
        float x = logits[change.token] + change.bias;
        u32 generated = change.seen & 0x7FFFFFFFu;
        if (change.seen) x = x > 0.0f ? x / row.repetition : x * row.repetition;
        x -= row.frequency * (float)generated;
        if (generated) x -= row.presence;
        logits[change.token] = change.suppressed ? -INFINITE : x;
    }
    __syncthreads();

    u64 best = 0;
    part.each([&](u32 token, float x) { best = join<true>(best, ranked(x, token)); });
    best = over_cluster<true>(best, shared, turn);
    // Where nothing is a number, the first token.
    float peak = best >> 32 ? number_of((u32)(best >> 32)) : -INFINITE;
    u32 token = best >> 32 ? ALL - (u32)best : 0;
    bool finite = peak - peak == 0.0f;

    u64 whole = 0;
    if (finite) part.each([&](u32, float x) { whole += x == x ? units(expf(x - peak)) : 0; });
    whole = over_cluster<false>(whole, shared, turn);

    if (finite && !row.greedy) {
        Kept kept = {1, ALL, row.min_p, peak, row.temperature};
        truncate(part, row, kept, shared, turn);
        u32 first = token / 64 * 16 + token % 16;
        float first_score = gumbel(word_of(words(row, first), token / 16 % 4));
        u64 drawn = ranked(first_score, token);
        for (u32 group = part.first + threadIdx.x; group < part.end; group += THREADS) {
            u32 start = group / 16 * 64 + group % 16;
            bool may = false;
            for (u32 j = 0; j < 4; j++) {
                u32 at = start + 16 * j;
                // What could not win with any noise gets none.
                if (at < vocab) may |= (logits[at] - peak) / row.temperature + NOISE_MAX >= first_score;
            }
            if (!may) continue;
            uint4 random = words(row, group);
            for (u32 j = 0; j < 4; j++) {
                u32 at = start + 16 * j;
                if (at >= vocab || !kept.has(at, logits[at])) continue;
                float score = (logits[at] - peak) / row.temperature + gumbel(word_of(random, j));
                drawn = join<true>(drawn, ranked(score, at));
            }
        }
        drawn = over_cluster<true>(drawn, shared, turn);
        token = ALL - (u32)drawn;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        float log_total = finite ? peak + logf((float)whole * (1.0f / UNIT)) : peak;
        float logprob = logits[token] - log_total;
        out[3 * blockIdx.y] = token;
        out[3 * blockIdx.y + 1] = __float_as_uint(logprob == logprob ? logprob : -INFINITE);
        out[3 * blockIdx.y + 2] = __float_as_uint(log_total);
    }
    // Nobody leaves while another reads what it shared.
    cluster_barrier();
}
