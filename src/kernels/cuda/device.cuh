// The PTX that kernels use, by chip. No other file of kernels holds assembly, so that the twin of this file in tests/shim/include runs the
// same kernels on a host.
#pragma once

#include <cstdint>
#include <cuda_fp16.h>

#include "kernels/cuda/warp.cuh"

// Dynamic shared memory, aligned to 32 bytes.
#define DYNAMIC_SHARED(TYPE, NAME) extern __shared__ __align__(32) TYPE NAME[]

// The largest over the warp, in every lane.
__device__ __forceinline__ uint32_t warp_largest(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, value);
#else
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
#endif
}

// Loads 16 bytes that are read once (evict-first). Volatile, so that the load stays above a wait.
__device__ __forceinline__ uint4 load_streaming(const void *at) {
    uint4 value;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at));
    return value;
}

// A 32-bit address of shared memory: a generic pointer that was stored in memory would be loaded from as if it could point anywhere.
__device__ __forceinline__ uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

// Loads data that does not change after a barrier and whose address is known only behind it: the compiler may move these loads.
__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
    uint32_t value;
    asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at));
    return value;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t at) {
    uint4 value;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at));
    return value;
}

// The address of word `index` in one instruction; the compiler makes three of it where the index is an extracted byte.
__device__ __forceinline__ uint32_t word_at(uint32_t base, uint32_t index) {
    uint32_t at;
    asm("mad.lo.u32 %0, %1, 4, %2;" : "=r"(at) : "r"(index), "r"(base));
    return at;
}

// Launches that overlap (`Grid::overlapping`): lets the next launch's blocks start as soon as all of this one's have, and waits until the launch
// before has ended and its writes are seen. What is read in between is written by no launch: weights and tables.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same value, opaque to the compiler: it is kept over a loop and not recomputed in it.
__device__ __forceinline__ int opaque(int value) {
    asm("" : "+r"(value));
    return value;
}

// Loads data that an asynchronous copy has written, behind the wait for the copy.
__device__ __forceinline__ uint4 load_copied_16(uint32_t at) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
    return value;
}

__device__ __forceinline__ uint32_t load_copied(uint32_t at) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
__device__ __forceinline__ uint32_t load_copied_byte(uint32_t at) {
    uint32_t value;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}

// Copies 16 bytes into shared memory, asynchronously where the chip can; each lane waits for its own copies. The rest of the cache line is
// prefetched. Writes zeros where not `wanted`, and does not read `from`.
__device__ __forceinline__ void copy_streaming(uint32_t to, const void *from, int wanted) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .pred p; setp.eq.u32 p, %2, 0; cp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;}" ::"r"(to), "l"(from),
                 "r"(wanted)
                 : "memory");
#else
    uint4 value = wanted ? load_streaming(from) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
#endif
}

__device__ __forceinline__ void copy_word(uint32_t to, const void *from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(*(const uint32_t *)from) : "memory");
#endif
}

// Bulk copies (TMA), from Hopper on: a barrier in shared memory counts the bytes that have arrived.
#if __CUDA_ARCH__ >= 900
constexpr bool HAS_BULK_COPIES = true;

// A phase of the barrier completes with so many arrivals and all expected bytes. The barrier is visible to other threads behind the next
// barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n fence.mbarrier_init.release.cluster;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Arrives, and adds to the bytes that the phase expects.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Size and both addresses are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity has completed. The first phase is even.
__device__ __forceinline__ bool mbarrier_has_completed(uint32_t barrier, uint32_t is_odd) {
    uint32_t counters;
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(counters)
        : "r"(barrier), "r"(is_odd)
        : "memory");
    return counters;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t is_odd) {
    asm volatile(
        "{.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again;}" ::"r"(barrier),
        "r"(is_odd)
        : "memory");
}
#else
constexpr bool HAS_BULK_COPIES = false;
__device__ __forceinline__ void mbarrier_init(uint32_t, int) {}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t, int) {}
__device__ __forceinline__ void copy_bulk(uint32_t, const void *, int, uint32_t) {}
__device__ __forceinline__ void mbarrier_arrive(uint32_t) {}
__device__ __forceinline__ bool mbarrier_has_completed(uint32_t, uint32_t) { return true; }
__device__ __forceinline__ void mbarrier_wait(uint32_t, uint32_t) {}
#endif

// A barrier of the first COUNT threads of a block.
template <int COUNT>
__device__ __forceinline__ void barrier_sync_first() {
    asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory");
}

// Release and acquire between the threads of a block, in shared memory.
__device__ __forceinline__ void store_release(int *at, int value) {
    asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(at)), "r"(value) : "memory");
}

__device__ __forceinline__ int load_acquire(const int *at) {
    int value;
    asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(at)) : "memory");
    return value;
}

// Commits a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the last LEFT.
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Waits for all copies of this thread.
__device__ __forceinline__ void wait_all_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Loads constant data. Volatile, so that the load stays above a wait.
__device__ __forceinline__ float load_float(const float *at) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(at));
    return value;
}

// Prefetches a cache line of constant data.
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }

__device__ __forceinline__ float2 load_two(const float2 *at) {
    float2 value;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(at));
    return value;
}

// Loads from L2 what an earlier launch has written. L1 may hold an older value.
__device__ __forceinline__ uint4 load_l2(const void *at) {
    uint4 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at)
                 : "memory");
    return value;
}

__device__ __forceinline__ int load_l2(const int *at) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ __half load_l2(const __half *at) {
    unsigned short bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(at) : "memory");
    return __ushort_as_half(bits);
}

// Stores a word to host memory, atomically.
__device__ __forceinline__ void store_to_host(unsigned long long *at, unsigned long long value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// Relaxed loads and stores between the blocks of a cooperative launch: words of 4 or 8 bytes, atomic, through L2. They order no other words.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t *at) {
    uint32_t word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
    return word;
}
__device__ __forceinline__ uint2 load_relaxed(const uint2 *at) {
    uint2 word;
    asm volatile("{.reg .b64 word;\n"
                 "ld.relaxed.gpu.global.b64 word, [%2];\n"
                 "mov.b64 {%0, %1}, word;}"
                 : "=r"(word.x), "=r"(word.y)
                 : "l"(at)
                 : "memory");
    return word;
}
// Two words of 8 bytes, or four of 4.
__device__ __forceinline__ uint4 load_relaxed(const uint4 *at) {
    uint4 words;
    asm volatile("{.reg .b64 a, b;\n"
                 "ld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\n"
                 "mov.b64 {%0, %1}, a;\n"
                 "mov.b64 {%2, %3}, b;}"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(at)
                 : "memory");
    return words;
}
__device__ __forceinline__ void store_relaxed(uint32_t *at, uint32_t word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint2 *at, uint2 word) {
    asm volatile("{.reg .b64 word;\n"
                 "mov.b64 word, {%1, %2};\n"
                 "st.relaxed.gpu.global.b64 [%0], word;}" ::"l"(at),
                 "r"(word.x), "r"(word.y)
                 : "memory");
}

// Clocks of this multiprocessor, modulo 2^32; nanoseconds that all of them share, in coarse ticks; the multiprocessor's number. For traces.
__device__ __forceinline__ uint32_t clock_low() {
    uint32_t now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}
__device__ __forceinline__ unsigned long long global_ns() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}
__device__ __forceinline__ uint32_t multiprocessor() {
    uint32_t number;
    asm("mov.u32 %0, %%smid;" : "=r"(number));
    return number;
}

// Between two polls. The load itself takes long enough.
__device__ __forceinline__ void backoff() {}

// Sets the registers of the threads of a warp group (four warps) to COUNT.
template <int COUNT>
__device__ __forceinline__ void release_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void acquire_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// sums[0..1] of row g and sums[2..3] of row g + 8 += A [16, 16] x B [16, 8] in fp32; lane 4g + q holds of A
// a0: row g, k pair q; a1: row g + 8, k pair q; a2, a3: the same rows, k pair q + 4; of B column g: b0: k pair q, b1: k pair q + 4.
__device__ __forceinline__ void multiply_halves(
    float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// 2^x, within two units of fp32's last place; results below the smallest normal number are zero.
__device__ __forceinline__ float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// Four matrices [8, 8] of halves from shared memory: lane 8m + r gives the address of row r of matrix m, 16 bytes. Register m of lane 4g + q holds
// elements 2q and 2q + 1 of row g; transposed, elements g of rows 2q and 2q + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// The same shape of fragments over A [16, 32] x B [32, 8] of signed bytes, four to a register, in int32.
__device__ __forceinline__ void multiply_bytes(
    int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
#define MULTIPLY_8_ROWS(C0, C1, A, B)                                                                      \
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
                 : "+r"(C0), "+r"(C1)                                                                      \
                 : "r"(A), "r"(B))
    MULTIPLY_8_ROWS(sums[0], sums[1], a0, b0);
    MULTIPLY_8_ROWS(sums[0], sums[1], a2, b1);
    MULTIPLY_8_ROWS(sums[2], sums[3], a1, b0);
    MULTIPLY_8_ROWS(sums[2], sums[3], a3, b1);
#undef MULTIPLY_8_ROWS
#endif
}
