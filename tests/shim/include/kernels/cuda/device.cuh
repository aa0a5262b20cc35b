// The host twin of src/kernels/cuda/device.cuh, which says what each of these is for. `__CUDA_ARCH__` is the chip whose
// instructions they stand for.
#pragma once

#include "cuda.hpp"
#include "kernels/cuda/warp.cuh"

inline uint32_t warp_largest(uint32_t value) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) value = std::max(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}
inline void let_next_start() {}
inline void wait_for_launch_before() {}
inline uint4 load_streaming(const void *at) { return *shim::at_global<uint4>(at); }
inline float load_float(const float *at) { return *shim::at_global<float>(at); }
inline void prefetch(const void *) {}
inline float2 load_two(const float2 *at) { return *shim::at_global<float2>(at); }
inline uint4 load_l2(const void *at) { return *shim::at_global<uint4>(at); }
inline int load_l2(const int *at) { return *shim::at_global<int>(at); }
inline __half load_l2(const __half *at) { return *shim::at_global<__half>(at); }
inline void store_to_host(unsigned long long *at, unsigned long long value) {
    *shim::at_global<unsigned long long>(at) = value;
}

// Every read is a clock and a nanosecond later.
inline uint32_t clock_low() { return (uint32_t)__builtin_ia32_rdtsc(); }
inline unsigned long long global_ns() { return __builtin_ia32_rdtsc(); }
inline uint32_t multiprocessor() { return blockIdx.x; }

// Relaxed loads and stores between the blocks of a launch. A poll that fails lets other fibers run.
#define backoff shim::give_way
inline uint32_t load_relaxed(const uint32_t *at) { return *shim::at_global<const uint32_t>(at); }
inline uint2 load_relaxed(const uint2 *at) { return *shim::at_global<const uint2>(at); }
inline uint4 load_relaxed(const uint4 *at) { return *shim::at_global<const uint4>(at); }
inline void store_relaxed(uint32_t *at, uint32_t word) { shim::change(shim::at_global<uint32_t>(at), word); }
inline void store_relaxed(uint2 *at, uint2 word) { shim::change(shim::at_global<uint2>(at), word); }

template <int COUNT>
void release_registers() {}
template <int COUNT>
void acquire_registers() {}

template <int COUNT>
void barrier_sync_first() {
    shim::barrier(COUNT);
}
inline void store_release(int *at, int value) { shim::change(at, value); }
inline int load_acquire(const int *at) { return *at; }

inline uint32_t shared_address(const void *at) { return shim::shared_address(at); }
inline uint32_t load_shared(uint32_t at) { return *shim::at_shared<uint32_t>(at); }
inline uint4 load_shared_16(uint32_t at) { return *shim::at_shared<uint4>(at); }
inline int opaque(int value) { return value; }
inline uint32_t word_at(uint32_t base, uint32_t index) { return base + 4 * index; }
inline uint32_t load_copied(uint32_t at) { return *shim::at_shared<uint32_t>(at); }
inline uint32_t load_copied_byte(uint32_t at) { return *shim::at_shared<uint8_t>(at); }
inline uint4 load_copied_16(uint32_t at) { return *shim::at_shared<uint4>(at); }

#if __CUDA_ARCH__ >= 800
inline void copy_streaming(uint32_t to, const void *from, int wanted) { shim::begin_copy<uint4>(to, wanted ? from : nullptr); }
inline void copy_word(uint32_t to, const void *from) { shim::begin_copy<uint32_t>(to, from); }
inline void commit_copies() { shim::end_batch(); }
template <int LEFT>
void wait_copies() {
    shim::wait_batches(LEFT);
}
inline void wait_all_copies() { shim::wait_batches(-1); }
#else
inline void copy_streaming(uint32_t to, const void *from, int wanted) {
    *shim::at_shared<uint4>(to) = wanted ? load_streaming(from) : uint4{};
}
inline void copy_word(uint32_t to, const void *from) { *shim::at_shared<uint32_t>(to) = *shim::at_global<uint32_t>(from); }
inline void commit_copies() {}
template <int LEFT>
void wait_copies() {}
inline void wait_all_copies() {}
#endif

#if __CUDA_ARCH__ >= 900
constexpr bool HAS_BULK_COPIES = true;
inline void mbarrier_init(uint32_t barrier, int arrivals) { shim::mbarrier_init(barrier, arrivals); }
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) { shim::count(barrier, 1, -bytes); }
inline void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) { shim::begin_bulk(to, from, bytes, barrier); }
inline void mbarrier_arrive(uint32_t barrier) { shim::count(barrier, 1, 0); }
inline bool mbarrier_has_completed(uint32_t barrier, uint32_t is_odd) { return shim::mbarrier_has_completed(barrier, is_odd); }
inline void mbarrier_wait(uint32_t barrier, uint32_t is_odd) { shim::mbarrier_wait(barrier, is_odd); }
#else
constexpr bool HAS_BULK_COPIES = false;
inline void mbarrier_init(uint32_t, int) {}
inline void mbarrier_arrive_expect(uint32_t, int) {}
inline void copy_bulk(uint32_t, const void *, int, uint32_t) {}
inline void mbarrier_arrive(uint32_t) {}
inline bool mbarrier_has_completed(uint32_t, uint32_t) { return true; }
inline void mbarrier_wait(uint32_t, uint32_t) {}
#endif

// mma.sync.m<ROWS>n8k<K>.row.col, with the fragments that the PTX manual gives to lane 4g + q, where a register holds E
// elements:
//   A   register r, element e:  row g + 8 (r mod ROWS / 8),  k = 4 E (r div ROWS / 8) + E q + e
//   B   register r, element e:  k = 4 E r + E q + e,  column g
//   C   element i:  row g + 8 (i div 2),  column 2 q + i mod 2
template <class T, int ROWS, int K, class Element>
struct TensorProduct {
    static constexpr int ELEMENTS = sizeof(uint32_t) / sizeof(Element), HALVES = ROWS / 8;
    static constexpr int A = ROWS * K / (shim::WARP * ELEMENTS), B = 8 * K / (shim::WARP * ELEMENTS), C = 2 * HALVES;
    uint32_t a[A], b[B];
    T *c;

    static void multiply(TensorProduct **lanes) {
        static thread_local double of_a[ROWS][K], of_b[8][K];
        for (int lane = 0; lane < shim::WARP; lane++) {
            int g = lane / 4, q = lane % 4;
            for (int r = 0; r < A; r++)
                for (int e = 0; e < ELEMENTS; e++)
                    of_a[g + 8 * (r % HALVES)][4 * ELEMENTS * (r / HALVES) + ELEMENTS * q + e] = value(lanes[lane]->a[r], e);
            for (int r = 0; r < B; r++)
                for (int e = 0; e < ELEMENTS; e++) of_b[g][4 * ELEMENTS * r + ELEMENTS * q + e] = value(lanes[lane]->b[r], e);
        }
        for (int lane = 0; lane < shim::WARP; lane++) {
            for (int i = 0; i < C; i++) {
                const double *row = of_a[lane / 4 + 8 * (i / 2)], *column = of_b[2 * (lane % 4) + i % 2];
                double sum = lanes[lane]->c[i];
                for (int k = 0; k < K; k++) sum += row[k] * column[k];
                lanes[lane]->c[i] = (T)sum;
            }
        }
    }
    static double value(uint32_t word, int at) {
        Element elements[ELEMENTS];
        memcpy(elements, &word, sizeof word);
        return number(elements[at]);
    }
    static double number(__half half) { return __half2float(half); }
    static double number(int8_t byte) { return byte; }
};

inline void multiply_halves(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    using Mma = TensorProduct<float, 16, 16, __half>;
    Mma own = {{a0, a1, a2, a3}, {b0, b1}, sums};
    shim::together("mma.m16n8k16", ALL_LANES, own, Mma::multiply);
#else
    using Mma = TensorProduct<float, 16, 8, __half>;
    Mma first = {{a0, a1}, {b0}, sums}, second = {{a2, a3}, {b1}, sums};
    shim::together("mma.m16n8k8", ALL_LANES, first, Mma::multiply);
    shim::together("mma.m16n8k8", ALL_LANES, second, Mma::multiply);
#endif
}

inline float power_of_two(float x) {
    const float power = exp2f(x);
    return power < 1.17549435e-38f ? 0.0f : power;
}
inline uint16_t half_bits_at(uint32_t at) { return *shim::at_shared<uint16_t>(at); }
inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
    const int lane = threadIdx.x % LANES;
    for (int matrix = 0; matrix < 4; matrix++) {
        const uint32_t at = __shfl_sync(ALL_LANES, row, 8 * matrix + lane / 4) + lane % 4 * 4;
        to[matrix] = half_bits_at(at) | (uint32_t)half_bits_at(at + 2) << 16;
    }
}
inline void load_transposed(uint32_t (&to)[4], uint32_t row) {
    const int lane = threadIdx.x % LANES;
    for (int matrix = 0; matrix < 4; matrix++) {
        const uint32_t low = __shfl_sync(ALL_LANES, row, 8 * matrix + lane % 4 * 2), high = __shfl_sync(ALL_LANES, row, 8 * matrix + lane % 4 * 2 + 1);
        to[matrix] = half_bits_at(low + lane / 4 * 2) | (uint32_t)half_bits_at(high + lane / 4 * 2) << 16;
    }
}

inline void multiply_bytes(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    using Mma = TensorProduct<int, 16, 32, int8_t>;
    Mma own = {{a0, a1, a2, a3}, {b0, b1}, sums};
    shim::together("mma.m16n8k32", ALL_LANES, own, Mma::multiply);
#else
    using Mma = TensorProduct<int, 8, 16, int8_t>;
    auto multiply = [](int *c, uint32_t a, uint32_t b) {
        Mma own = {{a}, {b}, c};
        shim::together("mma.m8n8k16", ALL_LANES, own, Mma::multiply);
    };
    multiply(sums, a0, b0);
    multiply(sums, a2, b1);
    multiply(sums + 2, a1, b0);
    multiply(sums + 2, a3, b1);
#endif
}
