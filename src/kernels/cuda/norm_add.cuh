// x += norm(y) of one token: a residual whose summand is normalised, as Gemma 2 and OLMo 2 have it.
//
//   x[i] += y[i] / sqrt(mean(y^2) + epsilon) * weight[i]          fp32
//
// A block with rows of its own reads all of y, for the mean, and adds to its rows. Bytes moved: 8 * n a block from L2.
#pragma once

#include "kernels/cuda/matvec.cuh"

// Polls for a tagged float.
__device__ __forceinline__ float wait_float(const uint2 *at, const ExpectedTag &expected) {
    uint2 word = load_relaxed(at);
    while (!expected.ready(expected.mismatch(word.y))) {
        backoff();
        word = load_relaxed(at);
    }
    return __uint_as_float(word.x);
}

// Every thread calls `ahead` once. `room` holds a float a warp.
template <class Ahead>
__device__ __forceinline__ void norm_add(const NormAdd &op, const Tags &tags, uint32_t own, uint8_t *room, Ahead ahead) {
    ahead();
    if ((int)blockIdx.x * THREADS >= op.n) return;
    const ExpectedTag of_y(tags, op.written_by[0]), of_x(tags, op.written_by[1]);
    float squares = 0.0f;
#pragma unroll 1
    for (int at = threadIdx.x; at < op.n; at += THREADS) {
        const float value = wait_float(op.y + at, of_y);
        squares += value * value;
    }
    const float factor = rsqrtf(block_sum(squares, (float *)room) / op.n + op.epsilon);
#pragma unroll 1
    for (int row = blockIdx.x * THREADS + threadIdx.x; row < op.n; row += gridDim.x * THREADS) {
        const float sum = wait_float(op.x + row, of_x) + wait_float(op.y + row, of_y) * factor * __ldg(op.weight + row);
        store_relaxed(op.x + row, tagged(sum, own));
    }
}
