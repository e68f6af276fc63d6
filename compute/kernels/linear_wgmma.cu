// FP8 matrix products on Hopper's matrix unit: y[m, n] = sum over k of x[m, k] * w[n, k], for k in whole 128-blocks and n
// in whole tiles of 64.
//
// A block is one warpgroup and has 64 output channels (the M side of wgmma, so that few rows waste little) and a tile of
// 16, 64 or 128 rows (its N side). Each 128-block of K is one chain of four wgmma into fresh accumulators, which are then
// scaled and added to f32 sums (two-level accumulation: the unit's own adder keeps some 14 bits). An output element sees
// the same chain whatever its tile, hence the three tiles agree in every bit; a test holds them to it.

#define CHANNELS 64u
#define THREADS 128u

// As in linear.cu.
struct Product {
    const void *w;
    const float *w_scales;
    const void *x;
    const float *x_scales;
    const u32 *rows;
    float *y;
    u32 x_rows, m, n, k;
    u32 w_vector, x_vector;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <u32 TILE> struct Mma;

template <> struct Mma<16> {
    static __device__ __forceinline__ void run(float (&d)[8], u64 a, u64 b, u32 accumulate) {
        asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7 "
        "}, %8, %9, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "r"(accumulate));
    }
};

template <> struct Mma<64> {
    static __device__ __forceinline__ void run(float (&d)[32], u64 a, u64 b, u32 accumulate) {
        asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, %32, %33, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
    }
};

template <> struct Mma<128> {
    static __device__ __forceinline__ void run(float (&d)[64], u64 a, u64 b, u32 accumulate) {
        asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
        "}, %64, %65, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate));
    }
};

// 16 bytes to shared memory without passing through registers; zeros if `size` is 0.
__device__ __forceinline__ void copy16(u32 to, const void *from, u32 size) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void copy4(u32 to, const void *from, u32 size) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

// Rows of 128 bytes, 16-byte chunks exchanged as the 128-byte swizzle wants them; 8 rows are 1,024 bytes.
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// Descriptor of such a tile: address, 1,024 bytes from 8 rows to the next 8, 128-byte swizzle.
__device__ __forceinline__ u64 tile(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

template <u32 TILE, u32 STAGES> __device__ __forceinline__ void product(const Product &p) {
    constexpr u32 WEIGHTS = CHANNELS * 128, INPUTS = TILE * 128, SCALES = 4 * (TILE + 4);
    extern __shared__ u8 memory[];
    u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    // Tiles first, each at a multiple of 1,024; then the scales of every stage: the rows', then the weights'.
    u32 scales_at = base + STAGES * (WEIGHTS + INPUTS);
    const u8 *aligned = memory + (scales_at - (u32)__cvta_generic_to_shared(memory));
    u32 thread = threadIdx.x, chunk = thread % 8, first = blockIdx.y * TILE, out = blockIdx.x * CHANNELS;
    u32 blocks = p.k / BLOCK;
    const u8 *w = (const u8 *)p.w + (u64)(out + thread / 8) * p.k + chunk * 16;
    const float *w_scales = p.w_scales + (u64)(out / BLOCK) * blocks;
    // Rows thread / 8, + 16, ...; rows past the last are zeros.
    const u8 *inputs[TILE / 16];
    u32 there[TILE / 16];
#pragma unroll
    for (u32 i = 0; i < TILE / 16; i++) {
        u32 row = first + thread / 8 + 16 * i;
        there[i] = row < p.m ? 16 : 0;
        u32 input = row < p.m ? (p.rows ? p.rows[row] : row) : 0;
        require(input < p.x_rows);
        inputs[i] = (const u8 *)p.x + (u64)input * p.k + chunk * 16;
    }
    u32 scaled = first + thread < p.m && thread < TILE ? 4 : 0;
    u32 scale_row = scaled ? (p.rows ? p.rows[first + thread] : first + thread) : 0;
    const float *x_scales = p.x_scales + (u64)scale_row * blocks;

    auto load = [&](u32 block) {
        u32 stage = block % STAGES, weights = base + stage * (WEIGHTS + INPUTS), rows = weights + WEIGHTS;
        u32 scales = scales_at + stage * SCALES;
#pragma unroll
        for (u32 i = 0; i < CHANNELS / 16; i++) {
            copy16(weights + swizzled(thread / 8 + 16 * i, chunk), w + (u64)(16 * i) * p.k + block * BLOCK, 16);
        }
#pragma unroll
        for (u32 i = 0; i < TILE / 16; i++) {
            copy16(rows + swizzled(thread / 8 + 16 * i, chunk), inputs[i] + block * BLOCK, there[i]);
        }
        if (thread < TILE) copy4(scales + 4 * thread, x_scales + block, scaled);
        if (thread == 0) copy4(scales + 4 * TILE, w_scales + block, 4);
    };

    float sums[TILE / 2];
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) sums[i] = 0.0f;
    for (u32 block = 0; block < STAGES - 1; block++) {
        if (block < blocks) load(block);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (u32 block = 0; block < blocks; block++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        // Written by threads, read by the matrix unit.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        // Also: everybody is done with the stage that is filled next.
        __syncthreads();
        if (block + STAGES - 1 < blocks) load(block + STAGES - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        u32 stage = block % STAGES, at = base + stage * (WEIGHTS + INPUTS);
        u64 a = tile(at), b = tile(at + WEIGHTS);
        float d[TILE / 2];
#pragma unroll
        for (u32 i = 0; i < TILE / 2; i++) d[i] = 0.0f;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 step = 0; step < 4; step++) Mma<TILE>::run(d, a + 2 * step, b + 2 * step, step);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        const float *scales = (const float *)(aligned + stage * SCALES);
        float w_scale = scales[TILE];
#pragma unroll
        for (u32 i = 0; i < TILE / 8; i++) {
            float2 x_scale = *(const float2 *)(scales + 8 * i + thread % 4 * 2);
            float low = x_scale.x * w_scale, high = x_scale.y * w_scale;
            sums[4 * i] = fmaf(d[4 * i], low, sums[4 * i]);
            sums[4 * i + 1] = fmaf(d[4 * i + 1], high, sums[4 * i + 1]);
            sums[4 * i + 2] = fmaf(d[4 * i + 2], low, sums[4 * i + 2]);
            sums[4 * i + 3] = fmaf(d[4 * i + 3], high, sums[4 * i + 3]);
        }
    }
    // Channels of a thread: one and the eighth after it; rows: pairs, eight apart.
    u32 channel = out + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (u32 i = 0; i < TILE / 2; i++) {
        u32 row = first + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (row < p.m) p.y[(u64)row * p.n + channel + i % 4 / 2 * 8] = sums[i];
    }
}

#else

// Other architectures have no wgmma, and the host never launches this there.
template <u32 TILE, u32 STAGES> __device__ __forceinline__ void product(const Product &) { require(false); }

#endif

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)

ENTRY linear_fp8_wgmma_16(const __grid_constant__ Product p) { product<16, 8>(p); }
ENTRY linear_fp8_wgmma_64(const __grid_constant__ Product p) { product<64, 6>(p); }
ENTRY linear_fp8_wgmma_128(const __grid_constant__ Product p) { product<128, 4>(p); }
