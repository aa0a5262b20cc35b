// What products of one row, of few and of many rows of LLM.int8 share (int8.cu says what they compute).
#pragma once

#include "kernels/cuda/device.cuh"

// bitsandbytes' CUDA constant for 1/127², and its fp32 1/127.
constexpr float PER_127_SQUARED = 6.200012e-05f;
constexpr float PER_127 = 0.007874015718698502f;

// An output from its int8 sum and the sum of its outlier columns, times a power of two that keeps it in fp16's range.
__device__ __forceinline__ float join(int product, float row_absmax, float scale, float outlier, float power) {
    float scaled = __fmul_rn(__fmul_rn(__int2float_rn(product), row_absmax), scale);
    __half regular = __float2half_rn(__fmul_rn(scaled, PER_127_SQUARED) * power);
    return __half2float(__float2half_rn(__half2float(regular) + outlier * power));
}

// A dequantized weight of an outlier column.
__device__ __forceinline__ float outlier_weight(int code, float scale) {
    return __half2float(__float2half_rn(__fmul_rn(__fmul_rn((float)code, scale), PER_127)));
}
