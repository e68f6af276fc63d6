// Rows normed and rounded: a block of 512 threads per row.

extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ Norm n) {
    __shared__ float shared[32];
    norm_row(n, blockIdx.x, shared, previous_done);
}
