// Rows normed and rounded.

// A block of 512 threads per row.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ Norm n) {
    __shared__ float shared[32];
    norm_row<1>(n, blockIdx.x, 0, shared, previous_done);
}

// Few rows of up to 8,192 channels: a cluster of four blocks per row.
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __launch_bounds__(THREADS) __cluster_dims__(KEPT, 1, 1) norm_rows_split(const __grid_constant__ Norm n) {
    __shared__ float shared[32];
    norm_row<KEPT>(n, blockIdx.x / KEPT, blockIdx.x % KEPT, shared, previous_done);
}
#else
// Older architectures have no clusters, and the host never launches this there.
extern "C" __global__ void norm_rows_split(const __grid_constant__ Norm) { require(false); }
#endif
