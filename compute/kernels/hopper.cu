// Hopper's matrix unit and the copies that feed it, for kernels of sm_90a. Put before those kernels' text, after numbers.cu.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// 16 bytes to shared memory without passing through registers; zeros if `size` is 0.
__device__ __forceinline__ void copy16(u32 to, const void *from, u32 size) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void copy4(u32 to, const void *from, u32 size) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 LEFT> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// What threads wrote to shared memory may now be read by the matrix unit.
__device__ __forceinline__ void written_for_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 LEFT> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives when the thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra DONE; bra WAIT; "
                 "DONE: }" ::"r"(barrier), "r"(parity) : "memory");
}

// The copy unit sees barriers made so far.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives and awaits `bytes` of the copy unit's.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
}

// A box of a matrix that the host described, its corner at (column, row), to shared memory; counts its bytes at `barrier`.
__device__ __forceinline__ void copy_box(u32 to, const void *map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// A barrier among `threads` of a block.
__device__ __forceinline__ void some_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <u32 COUNT> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <u32 COUNT> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Rows of 128 bytes, 16-byte chunks exchanged as the 128-byte swizzle wants them; 8 rows are 1,024 bytes.
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// Descriptor of such a tile: address, 1,024 bytes from 8 rows to the next 8, 128-byte swizzle.
__device__ __forceinline__ u64 tile(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 4)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
#define SUMS_128(d, i) SUMS_64(d, i), SUMS_64(d, i + 64)

#define REGISTERS_8 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction: d += a . b for 64 rows of a and the instruction's columns of b, or d = a . b if `accumulate` is 0.
#define WGMMA(SHAPE, COUNT, A, B, P, TAIL) \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned." SHAPE " {" REGISTERS_##COUNT \
                 "}, %" #A ", %" #B ", p, 1, 1" TAIL "; }" \
                 : SUMS_##COUNT(d, 0) \
                 : "l"(a), "l"(b), "r"(accumulate))

// E4M3, both operands with K contiguous, 32 of K.
template <u32 COLUMNS> struct MmaFp8;
// bf16, 16 of K; `across` where b's columns are contiguous instead of its K.
template <u32 COLUMNS> struct MmaBf16;

template <> struct MmaFp8<16> {
    static __device__ __forceinline__ void run(float (&d)[8], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n16k32.f32.e4m3.e4m3", 8, 8, 9, 10, "");
    }
};

template <> struct MmaFp8<32> {
    static __device__ __forceinline__ void run(float (&d)[16], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n32k32.f32.e4m3.e4m3", 16, 16, 17, 18, "");
    }
};

template <> struct MmaFp8<64> {
    static __device__ __forceinline__ void run(float (&d)[32], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n64k32.f32.e4m3.e4m3", 32, 32, 33, 34, "");
    }
};

template <> struct MmaFp8<128> {
    static __device__ __forceinline__ void run(float (&d)[64], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n128k32.f32.e4m3.e4m3", 64, 64, 65, 66, "");
    }
};

template <> struct MmaBf16<16> {
    static __device__ __forceinline__ void run(float (&d)[8], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n16k16.f32.bf16.bf16", 8, 8, 9, 10, ", 0, 0");
    }
    static __device__ __forceinline__ void across(float (&d)[8], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n16k16.f32.bf16.bf16", 8, 8, 9, 10, ", 0, 1");
    }
};

template <> struct MmaBf16<32> {
    static __device__ __forceinline__ void run(float (&d)[16], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n32k16.f32.bf16.bf16", 16, 16, 17, 18, ", 0, 0");
    }
    static __device__ __forceinline__ void across(float (&d)[16], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n32k16.f32.bf16.bf16", 16, 16, 17, 18, ", 0, 1");
    }
};

template <> struct MmaBf16<64> {
    static __device__ __forceinline__ void run(float (&d)[32], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n64k16.f32.bf16.bf16", 32, 32, 33, 34, ", 0, 0");
    }
    static __device__ __forceinline__ void across(float (&d)[32], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n64k16.f32.bf16.bf16", 32, 32, 33, 34, ", 0, 1");
    }
};

template <> struct MmaBf16<128> {
    static __device__ __forceinline__ void run(float (&d)[64], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n128k16.f32.bf16.bf16", 64, 64, 65, 66, ", 0, 0");
    }
    static __device__ __forceinline__ void across(float (&d)[64], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n128k16.f32.bf16.bf16", 64, 64, 65, 66, ", 0, 1");
    }
};

template <> struct MmaBf16<256> {
    static __device__ __forceinline__ void run(float (&d)[128], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n256k16.f32.bf16.bf16", 128, 128, 129, 130, ", 0, 0");
    }
    static __device__ __forceinline__ void across(float (&d)[128], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n256k16.f32.bf16.bf16", 128, 128, 129, 130, ", 0, 1");
    }
};

// f16, 16 of K, as MmaBf16.
template <u32 COLUMNS> struct MmaF16;

template <> struct MmaF16<64> {
    static __device__ __forceinline__ void run(float (&d)[32], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n64k16.f32.f16.f16", 32, 32, 33, 34, ", 0, 0");
    }
};

template <> struct MmaF16<128> {
    static __device__ __forceinline__ void across(float (&d)[64], u64 a, u64 b, u32 accumulate) {
        WGMMA("m64n128k16.f32.f16.f16", 64, 64, 65, 66, ", 0, 1");
    }
};

#endif
