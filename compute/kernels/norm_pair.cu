// Two rows normed apart and laid side by side: out[r] = [norm(a[r]) * wa, norm(b[r]) * wb], as rms_norm norms each; a block of
// 512 threads per half of a row.
#define THREADS 512u

struct Half {
    const float *x, *w;
    float eps;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(THREADS) norm_pair(Half a, Half b, u32 dim, float *out) {
    previous_done();
    __shared__ float shared[32];
    Half half = blockIdx.x % 2 ? b : a;
    const float *x = half.x + (u64)(blockIdx.x / 2) * dim;
    out += (u64)blockIdx.x * dim;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < dim; i += THREADS) squares = fmaf(x[i], x[i], squares);
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)dim + half.eps);
    for (u32 i = threadIdx.x; i < dim; i += THREADS) out[i] = x[i] * factor * half.w[i];
}
