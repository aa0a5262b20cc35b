// What every kernel here needs of a warp: its width and sums over its lanes.
#pragma once

constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp, in every lane. The order is fixed, so equal inputs give equal bits.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}
