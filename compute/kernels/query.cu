// Splits projected queries q [m, heads, nope + rope] into what is taken into the latent space [m, heads, nope] and what is
// rotated [m, heads, rope], rotating that by the table's angles; a thread a pair of values. Widths in twos.

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ u16 narrow<u16>(float x) { return to_bf16(x); }

template <class T>
__device__ __forceinline__ void split(const float *q, u32 heads, u32 nope_dim, u32 rope_dim, const u32 *positions,
                                      const float *table, u32 positions_max, u64 len, T *nope, T *rope) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= len) return;
    u32 pairs = (nope_dim + rope_dim) / 2, channel = (u32)(i % pairs) * 2;
    u64 row = i / pairs;
    float a = q[2 * i], b = q[2 * i + 1];
    if (channel < nope_dim) {
        nope[row * nope_dim + channel] = narrow<T>(a), nope[row * nope_dim + channel + 1] = narrow<T>(b);
        return;
    }
    channel -= nope_dim;
    u32 position = positions[row / heads];
    require(position < positions_max);
    const float *angle = table + (u64)position * rope_dim + channel;
    float cos = angle[0], sin = angle[1];
    rope[row * rope_dim + channel] = narrow<T>(a * cos - b * sin);
    rope[row * rope_dim + channel + 1] = narrow<T>(a * sin + b * cos);
}

extern "C" __global__ void __launch_bounds__(256)
split_queries_f32(const float *q, u32 heads, u32 nope_dim, u32 rope_dim, const u32 *positions, const float *table,
                  u32 positions_max, u64 len, float *nope, float *rope) {
    previous_done();
    split(q, heads, nope_dim, rope_dim, positions, table, positions_max, len, nope, rope);
}

extern "C" __global__ void __launch_bounds__(256)
split_queries_bf16(const float *q, u32 heads, u32 nope_dim, u32 rope_dim, const u32 *positions, const float *table,
                   u32 positions_max, u64 len, u16 *nope, u16 *rope) {
    previous_done();
    split(q, heads, nope_dim, rope_dim, positions, table, positions_max, len, nope, rope);
}
