// Operators that treat each value by itself.

#define ELEMENT ((u64)blockIdx.x * 256 + threadIdx.x)

extern "C" __global__ void __launch_bounds__(256)
silu_mul(const float *gate, const float *up, u64 len, float *out) {
    previous_done();
    u64 i = ELEMENT;
    if (i < len) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void __launch_bounds__(256) add_in_place(float *sum, const float *x, u64 len) {
    previous_done();
    u64 i = ELEMENT;
    if (i < len) sum[i] += x[i];
}

// Product and sum rounded separately (no contraction: see numbers.cu).
extern "C" __global__ void __launch_bounds__(256)
add_scaled(float *sum, float weight, const float *x, u64 len) {
    previous_done();
    u64 i = ELEMENT;
    if (i < len) sum[i] += weight * x[i];
}

// out[t, :] = sum over j of weights[t, j] * x[t * top_k + j, :], in order of j from zero.
extern "C" __global__ void __launch_bounds__(256)
weighted_sum(const float *x, const float *weights, u32 top_k, u32 dim, u64 len, float *out) {
    previous_done();
    u64 i = ELEMENT;
    if (i >= len) return;
    u64 token = i / dim, channel = i % dim;
    float sum = 0.0f;
    for (u32 j = 0; j < top_k; j++) sum += weights[token * top_k + j] * x[(token * top_k + j) * dim + channel];
    out[i] = sum;
}
