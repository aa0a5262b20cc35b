// What CUDA's headers give to kernels, as far as ours use it. Where a chip approximates, this is as near to it as its
// manual tells.
#pragma once

#include <algorithm>
#include <cmath>

#include "launch.hpp"
#include "memory.hpp"

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(BYTES) __attribute__((aligned(BYTES)))
#define DYNAMIC_SHARED(TYPE, NAME) TYPE *NAME = (TYPE *)shim::dynamic_shared()

using std::isnan, std::max, std::min;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Halves.

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half half) {
    uint32_t sign = (half.bits & 0x8000u) << 16, magnitude = half.bits & 0x7fff;
    if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>((float)magnitude * 0x1p-24f));
    return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
}

inline __half __float2half_rn(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    // From halfway between the largest value and the next power of two on.
    if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
    if (magnitude < 0x38800000) {
        // 0.5 has the smallest half's step.
        float sum = std::bit_cast<float>(magnitude) + 0.5f;
        return {(uint16_t)(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000))};
    }
    uint32_t is_odd = magnitude >> 13 & 1;
    return {(uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + is_odd) >> 13)};
}

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half half) { return half.bits; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// Numbers.

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
// Two units in the last place on a chip.
inline float chip_rsqrt(float x) { return 1.0f / std::sqrt(x); }
#define rsqrtf chip_rsqrt
// The product is rounded before the power is taken.
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f && !std::isinf(x) ? 0.0f * x : x / y; }

// NaN becomes 0, what is too large the largest.
inline int __float2int_rn(float x) {
    if (isnan(x)) return 0;
    return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int)std::nearbyint(x);
}
inline float __int2float_rn(int x) { return (float)x; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int at = 0; at < 4; at++) result |= (unsigned)(bytes >> (selector >> 4 * at & 7) * 8 & 0xff) << 8 * at;
    return result;
}
inline unsigned __vmaxu2(unsigned x, unsigned y) { return max(x >> 16, y >> 16) << 16 | max(x & 0xffff, y & 0xffff); }
inline int __dp4a(int a, int b, int sum) {
    for (int at = 0; at < 4; at++) sum += (int8_t)((uint32_t)a >> 8 * at) * (int8_t)((uint32_t)b >> 8 * at);
    return sum;
}

// Memory. One thread of a launch runs at a time, so that every access is atomic and seen by all.

template <class T>
T __ldg(const T *at) {
    return *shim::at_global<const T>(at);
}
template <class T>
T __ldcg(const T *at) {
    return *shim::at_global<const T>(at);
}
template <class T>
T atomicAdd(T *at, T value) {
    T before = *at;
    shim::change(at, (T)(before + value));
    return before;
}
template <class T>
T atomicOr(T *at, T value) {
    T before = *at;
    shim::change(at, (T)(before | value));
    return before;
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { shim::give_way(); }

// What threads do together.

inline void __syncthreads() { shim::barrier(shim::machine->threads); }
inline void __syncwarp(unsigned lanes = shim::ALL) {
    char nothing;
    shim::together("__syncwarp", lanes, nothing, [](char **) {});
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
    struct Operand {
        T value, other;
        int distance;
    } own = {value, value, distance};
    shim::together("__shfl_xor_sync", lanes, own, [](Operand **all) {
        uint32_t lanes = shim::machine->warps[shim::machine->running / shim::WARP].wanted;
        for (int lane = 0; lane < shim::WARP; lane++) {
            if (!(lanes >> lane & 1)) continue;
            int from = lane ^ all[lane]->distance;
            if (!(lanes >> from & 1)) shim::fail("lane %d asks lane %d, which takes no part", lane, from);
            all[lane]->other = all[from]->value;
        }
    });
    return own.other;
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int from) {
    struct Operand {
        T value, other;
        int from;
    } own = {value, value, from};
    shim::together("__shfl_sync", lanes, own, [](Operand **all) {
        uint32_t lanes = shim::machine->warps[shim::machine->running / shim::WARP].wanted;
        for (int lane = 0; lane < shim::WARP; lane++) {
            if (!(lanes >> lane & 1)) continue;
            int from = all[lane]->from % shim::WARP;
            if (!(lanes >> from & 1)) shim::fail("lane %d asks lane %d, which takes no part", lane, from);
            all[lane]->other = all[from]->value;
        }
    });
    return own.other;
}

inline unsigned __ballot_sync(unsigned lanes, bool vote) {
    struct Operand {
        bool vote;
        unsigned votes;
    } own = {vote, 0};
    shim::together("__ballot_sync", lanes, own, [](Operand **all) {
        uint32_t lanes = shim::machine->warps[shim::machine->running / shim::WARP].wanted, votes = 0;
        for (int lane = 0; lane < shim::WARP; lane++)
            if (lanes >> lane & 1) votes |= (uint32_t)all[lane]->vote << lane;
        for (int lane = 0; lane < shim::WARP; lane++)
            if (lanes >> lane & 1) all[lane]->votes = votes;
    });
    return own.votes;
}
