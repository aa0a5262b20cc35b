// Values of a checkpoint in the dtype that they were saved in, cast as the host casts them: to nearest even, and a NaN
// keeps its sign and what fits of its payload and becomes quiet.
#pragma once

#include "kernels/cuda/device.cuh"

// As `SourceDtype` of quant/cuda.rs.
enum SourceDtype { SOURCE_F16 = 0, SOURCE_BF16 = 1, SOURCE_F32 = 2 };

struct SourceValues {
    const void *values;
    // Counts finite values that became infinite in fp16.
    unsigned long long *overflow;
    int kind;
};

constexpr uint32_t MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u;
constexpr uint32_t HALF_MAGNITUDE = 0x7fffu, HALF_INFINITE = 0x7c00u;

// The fp32 bits of a half: exact.
__device__ __forceinline__ uint32_t widened(uint32_t half) {
    if ((half & HALF_MAGNITUDE) > HALF_INFINITE) return (half & 0x8000u) << 16 | 0x7fc00000u | (half & 0x3ffu) << 13;
    return __float_as_uint(__half2float(__ushort_as_half((unsigned short)half)));
}

// The bits of the nearest half.
__device__ __forceinline__ uint32_t narrowed(uint32_t bits) {
    if ((bits & MAGNITUDE) > INFINITE) return (bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu);
    return __half_as_ushort(__float2half_rn(__uint_as_float(bits)));
}

// fp32 bits of value `at`, uncast.
__device__ __forceinline__ uint32_t float_bits(const SourceValues &from, long long at) {
    if (from.kind == SOURCE_F32) return ((const uint32_t *)from.values)[at];
    uint32_t bits = ((const unsigned short *)from.values)[at];
    return from.kind == SOURCE_BF16 ? bits << 16 : widened(bits);
}

// fp16 bits of value `at`.
__device__ __forceinline__ uint32_t half_bits(const SourceValues &from, long long at) {
    if (from.kind == SOURCE_F16) return ((const unsigned short *)from.values)[at];
    return narrowed(float_bits(from, at));
}

// As half_bits, for the one reading of a value that counts.
__device__ __forceinline__ uint32_t counted_half_bits(const SourceValues &from, long long at) {
    uint32_t half = half_bits(from, at);
    if (from.kind != SOURCE_F16 && (half & HALF_MAGNITUDE) == HALF_INFINITE && (float_bits(from, at) & MAGNITUDE) != INFINITE)
        atomicAdd(from.overflow, 1ull);
    return half;
}
