// Rows of a matrix [n, k] multiplied out: out[i, :] = w[tokens[i], :]; a thread a value, blocks of 256.
//
// A token past the matrix ends the context: whoever made the step has checked them.

extern "C" __global__ void __launch_bounds__(256)
embed_f32(const float *w, const float *, const u32 *tokens, u32 n, u32 k, float *out) {
    previous_done();
    u32 token = tokens[blockIdx.x];
    require(token < n);
    u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < k) out[(u64)blockIdx.x * k + i] = w[(u64)token * k + i];
}

extern "C" __global__ void __launch_bounds__(256)
embed_bf16(const u16 *w, const float *, const u32 *tokens, u32 n, u32 k, float *out) {
    previous_done();
    u32 token = tokens[blockIdx.x];
    require(token < n);
    u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < k) out[(u64)blockIdx.x * k + i] = from_bf16(w[(u64)token * k + i]);
}

extern "C" __global__ void __launch_bounds__(256)
embed_fp8(const u8 *w, const float *scales, const u32 *tokens, u32 n, u32 k, float *out) {
    previous_done();
    u32 token = tokens[blockIdx.x];
    require(token < n);
    scales += (u64)(token / BLOCK) * div_up(k, BLOCK);
    u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i < k) out[(u64)blockIdx.x * k + i] = from_e4m3(w[(u64)token * k + i]) * scales[i / BLOCK];
}
