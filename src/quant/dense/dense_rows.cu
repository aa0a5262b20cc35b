// fp16 matrices times few rows of activations: few_rows.cuh says how the weights stream. A step is 64 elements of a row, of which a lane has eight in
// each half: elements 8q .. + 7, two steps along k.

#include "kernels/cuda/few_rows.cuh"

template <int COLUMNS>
struct Halves {
    static constexpr int STEP_BYTES = 128, HALVES = 2;
    using Sum = float;
    struct Tables {};
    struct Ahead {
        uint4 values[HALVES][4];
        uint4 x[HALVES][COLUMNS];
    };
    __device__ Halves(const FewRows &, const MatrixPart &, const LaneRows<COLUMNS> &) {}
    // k is a multiple of 64.
    static __device__ int row_bytes(const FewRows &op) { return 2 * op.k; }

    __device__ __forceinline__ void load_weights(Ahead &ahead, const LaneRows<COLUMNS> &rows, int step, int end) const {
        if (step >= end) return;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) ahead.values[half][i] = load_streaming(rows.weights[i] + step * STEP_BYTES + 64 * half);
        }
    }
    __device__ __forceinline__ void load_x(Ahead &ahead, const LaneRows<COLUMNS> &rows, int step, int end) const {
        if (step >= end) return;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) ahead.x[half][i] = __ldg((const uint4 *)(rows.x[i] + step * STEP_BYTES + 64 * half + threadIdx.x % 4 * 16));
        }
    }
    static __device__ __forceinline__ void fill(Tables &, const float *) {}
    __device__ __forceinline__ void multiply(const Ahead &now, const Tables &, const LaneRows<COLUMNS> &, int, Sum (&sums)[COLUMNS][2][4]) const {
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int at = 0; at < 2; at++) {
                const uint4 &low = now.values[half][2 * at], &high = now.values[half][2 * at + 1];
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    multiply_halves(sums[i][at], low.x, high.x, low.y, high.y, now.x[half][i].x, now.x[half][i].y);
                    multiply_halves(sums[i][at], low.z, high.z, low.w, high.w, now.x[half][i].z, now.x[half][i].w);
                }
            }
        }
    }
    static __device__ float result(const FewRows &, const MatrixPart &, float sum, int, int, float scale) { return sum * scale; }
};

FEW_ROWS_KERNEL(half_rows_8, Halves, 1, 256, 2)
FEW_ROWS_KERNEL(half_rows_8_wide, Halves, 1, 512, 1)
FEW_ROWS_KERNEL(half_rows_16, Halves, 2, 256, 2)
