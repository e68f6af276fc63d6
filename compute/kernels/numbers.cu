// Number formats and reductions. This text is put before every kernel's; there are no headers.
//
// Compiled with --fmad=false: where a fused multiply-add is meant it is written, so that the operations behind an
// output element are those one reads.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Channels that share a scale; also the step of every reduction over K.
#define BLOCK 128u
#define WARP 32u
#define ALL 0xFFFFFFFFu
#define INFINITE __int_as_float(0x7F800000)

// A broken invariant: ends the context, and with it the worker, before it can answer wrongly.
__device__ __forceinline__ void require(bool holds) {
    if (!holds) asm volatile("trap;");
}

// A kernel may be started while the one before it in the stream still runs: here it waits until that one is done and what it
// wrote can be read, and lets the one behind it be started. Every thread of every such kernel comes by here first, also those
// that then have nothing to do: a kernel that ended without would let the next one overtake the last one. Before it nothing is
// read but what no kernel writes, such as weights, and nothing is written.
__device__ __forceinline__ void previous_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// To the level-2 cache.
__device__ __forceinline__ void prefetch(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return a / b + (a % b != 0); }

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Nearest even. The packed form: after the scalar one, ptxas 13.0 takes a narrowing of the bits to 8 for a conversion of an
// f16 to an integer (F2I.U8.F16 in the SASS).
__device__ __forceinline__ u16 to_bf16(float x) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(x));
    return (u16)bits;
}

// Two E4M3 codes to two floats, by way of f16, which holds them exactly.
__device__ __forceinline__ void from_e4m3x2(u16 codes, float &low, float &high) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high)
        : "r"(halves));
}

__device__ __forceinline__ float from_e4m3(u8 code) {
    float low, high;
    from_e4m3x2(code, low, high);
    return low;
}

// Nearest even, saturating at 448; NaN gives NaN.
__device__ __forceinline__ u8 to_e4m3(float x) {
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(0.0f), "f"(x));
    return (u8)codes;
}

// The scale of a block whose largest magnitude is `amax`; `power_of_two` rounds it up to one (UE8M0).
__device__ __forceinline__ float block_scale(float amax, float amax_min, bool power_of_two) {
    float scale = fmaxf(amax, amax_min) / 448.0f;
    return power_of_two ? __uint_as_float((__float_as_uint(scale) + 0x7FFFFFu) & 0x7F800000u) : scale;
}

// A float at any address.
__device__ __forceinline__ float float_at(const u8 *p) {
    if (((u64)p & 3) == 0) return *(const float *)p;
    return __uint_as_float((u32)p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24);
}

// A bf16 at any address.
__device__ __forceinline__ float bf16_at(const u8 *p) {
    if (((u64)p & 1) == 0) return from_bf16(*(const u16 *)p);
    return from_bf16((u16)(p[0] | p[1] << 8));
}

__device__ __forceinline__ void store_float(u8 *p, float x) {
    u32 bits = __float_as_uint(x);
    if (((u64)p & 3) == 0) {
        *(u32 *)p = bits;
        return;
    }
    for (u32 i = 0; i < 4; i++) p[i] = (u8)(bits >> 8 * i);
}

__device__ __forceinline__ void store_bf16(u8 *p, float x) {
    u16 bits = to_bf16(x);
    p[0] = (u8)bits;
    p[1] = (u8)(bits >> 8);
}

// Sum over a warp in a fixed tree; every lane has it.
__device__ __forceinline__ float warp_sum(float x) {
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// NaN does not count.
__device__ __forceinline__ float warp_max(float x) {
    for (u32 step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// Over a block of up to 1,024 threads (whole warps) in a fixed tree; `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    u32 warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < warps ? shared[threadIdx.x % WARP] : 0.0f);
}

__device__ __forceinline__ float block_max(float x, float *shared) {
    u32 warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < warps ? shared[threadIdx.x % WARP] : -INFINITE);
}
