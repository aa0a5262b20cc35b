// A residual whose summand is normed (Gemma 2 and 3, OLMo 2):
//
//   x += y / sqrt(mean(y^2) + epsilon) * weight        fp32
//
// A block takes rows n THREADS .. n THREADS + THREADS - 1 and all of y, whose sum of squares it needs; a thread always has the same rows, so that it
// alone writes what it reads of x. Blocks behind the last row do nothing. Bytes moved: 8 * n a block, from L2.
#pragma once

#include "kernels/cuda/matvec.cuh"

// `room` holds a float a warp. Every thread calls `ahead` once.
template <class Ahead>
__device__ __forceinline__ void norm_add(const NormAdd &op, const Tags &tags, int instruction, uint8_t *room, Ahead ahead) {
    constexpr int HELD = 4;
    stamp(instruction, STAMP_BEGUN);
    ahead();
    if ((int)blockIdx.x * THREADS >= op.n) return stamp_rest(instruction, STAMP_READY);
    const ExpectedTag of_y(tags, op.written_by[0]), of_x(tags, op.written_by[1]);
    float squares = 0.0f;
#pragma unroll 1
    for (int start = threadIdx.x; start < op.n; start += HELD * THREADS) {
        uint2 loaded[HELD] = {};
        for (;;) {
            uint32_t mismatch = 0;
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < op.n) loaded[i] = load_relaxed(op.y + start + i * THREADS);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < op.n) mismatch |= of_y.mismatch(loaded[i].y);
            if (of_y.ready(mismatch)) break;
            backoff();
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) squares += __uint_as_float(loaded[i].x) * __uint_as_float(loaded[i].x);
    }
    stamp(instruction, STAMP_READY);
    const float factor = rsqrtf(block_sum(squares, (float *)room) / op.n + op.epsilon);
#pragma unroll 1
    for (int row = blockIdx.x * THREADS + threadIdx.x; row < op.n; row += gridDim.x * THREADS) {
        const float sum = wait_float(op.x + row, of_x) + wait_float(op.y + row, of_y) * factor * __ldg(op.weight + row);
        store_relaxed(op.x + row, tagged(sum, tags.of(instruction)));
    }
    stamp_rest(instruction, STAMP_READ);
}
