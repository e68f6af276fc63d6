// y = x / sqrt(mean(x^2) + eps) * w, a block of 512 threads per row of `dim`; a thread has four channels of every 2,048.
// `vector` says that every row starts at a multiple of four values.

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const float *x, const float *w, u32 dim, u32 vector, float eps, float *y) {
    previous_done();
    __shared__ float shared[32];
    x += (u64)blockIdx.x * dim;
    y += (u64)blockIdx.x * dim;
    float squares = 0.0f;
#pragma unroll 4
    for (u32 i = 4 * threadIdx.x; i < dim; i += 4 * THREADS) {
        float4 v = load(x + i, dim - i, vector);
        squares = fmaf(v.x, v.x, squares);
        squares = fmaf(v.y, v.y, squares);
        squares = fmaf(v.z, v.z, squares);
        squares = fmaf(v.w, v.w, squares);
    }
    squares = block_sum(squares, shared);
    float factor = 1.0f / sqrtf(squares / (float)dim + eps);
#pragma unroll 4
    for (u32 i = 4 * threadIdx.x; i < dim; i += 4 * THREADS) {
        float4 v = load(x + i, dim - i, vector), weight = load(w + i, dim - i, vector);
        float4 out = make_float4(v.x * factor * weight.x, v.y * factor * weight.y, v.z * factor * weight.z,
                                 v.w * factor * weight.w);
        u32 left = dim - i;
        if (vector && left >= 4) {
            *(float4 *)(y + i) = out;
        } else {
            y[i] = out.x;
            if (left > 1) y[i + 1] = out.y;
            if (left > 2) y[i + 2] = out.z;
            if (left > 3) y[i + 3] = out.w;
        }
    }
}
