// y = x / sqrt(mean(x^2) + eps) * w, a block of 256 threads per row of `dim`.
extern "C" __global__ void __launch_bounds__(256)
rms_norm(const float *x, const float *w, u32 dim, float eps, float *y) {
    __shared__ float shared[32];
    x += (u64)blockIdx.x * dim;
    y += (u64)blockIdx.x * dim;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < dim; i += 256) squares = fmaf(x[i], x[i], squares);
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)dim + eps);
    for (u32 i = threadIdx.x; i < dim; i += 256) y[i] = x[i] * factor * w[i];
}
