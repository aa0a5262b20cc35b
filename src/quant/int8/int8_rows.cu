// LLM.int8 times few rows of activations: few_rows.cuh says how the weights stream, int8.cu what is computed. The rows were quantized before; outlier
// columns, whose codes are zero, are multiplied in fp16 at the end, a thread for each output. A step is 128 codes of a row.

#include "kernels/cuda/few_rows.cuh"
#include "quant/int8/join.cuh"

template <int COLUMNS>
struct Bytes {
    static constexpr int STEP_BYTES = 128, HALVES = 2;
    using Sum = int;
    struct Tables {};
    struct Ahead {
        uint4 codes[HALVES][4];
        uint4 x[HALVES][COLUMNS];
    };
    __device__ Bytes(const FewRows &, const MatrixPart &, const LaneRows<COLUMNS> &) {}
    // Rows are padded to whole steps.
    static __device__ int row_bytes(const FewRows &op) { return op.stride; }

    __device__ __forceinline__ void load_weights(Ahead &ahead, const LaneRows<COLUMNS> &rows, int step, int end) const {
        if (step >= end) return;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) ahead.codes[half][i] = load_streaming(rows.weights[i] + step * STEP_BYTES + 64 * half);
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
                const uint4 &low = now.codes[half][2 * at], &high = now.codes[half][2 * at + 1];
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    multiply_bytes(sums[i][at], low.x, high.x, low.y, high.y, now.x[half][i].x, now.x[half][i].y);
                    multiply_bytes(sums[i][at], low.z, high.z, low.w, high.w, now.x[half][i].z, now.x[half][i].w);
                }
            }
        }
    }
    static __device__ float result(const FewRows &op, const MatrixPart &part, int sum, int row, int column, float scale) {
        const float of_row = ((const float *)part.scales)[row];
        const int8_t *weight = (const int8_t *)part.weight + (long long)row * op.stride;
        const __half *x = op.values + (long long)column * op.k;
        float outlier = 0.0f;
        const int count = *op.count;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            const int at = op.columns[i];
            outlier += __half2float(x[at]) * outlier_weight(weight[at], of_row);
        }
        return join(sum, op.row_absmax[column], of_row, outlier, scale);
    }
};

FEW_ROWS_KERNEL(int8_rows_8, Bytes, 1, 256, 2)
FEW_ROWS_KERNEL(int8_rows_8_wide, Bytes, 1, 512, 1)
FEW_ROWS_KERNEL(int8_rows_16, Bytes, 2, 256, 2)
