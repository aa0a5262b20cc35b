// What the lanes of a warp make together. device.cuh includes it, on the device as on a host.
#pragma once

constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over each WIDTH neighbouring lanes, all of them by default, in every lane. The order is fixed, so equal inputs
// give equal bits.
template <int WIDTH = LANES, typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = WIDTH / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

// The sum over the four lanes 4g .. 4g + 3.
__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(ALL_LANES, value, 1);
    return value + __shfl_xor_sync(ALL_LANES, value, 2);
}

// The larger one, NaN if either is.
__device__ __forceinline__ float larger(float a, float b) { return b > a || isnan(b) ? b : a; }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        value = larger(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}
