// Matrices times few rows of activations, as batches have: weights stream through registers once. A format adds how it decodes them.
//
//   y[s, n] = scale * sum over k of W[n, k] x[s, k]            of up to four matrices that read the same x
//
// A block owns 32 rows of a matrix and all rows of x; its warps share the steps along k, in each of which a lane takes 16 bytes of each of 4 rows (or
// twice as many), and the same elements of x: products need no exchange between lanes. Tensor cores take any order of k, if both sides have it.
//
//   k        |step 0|step 1|step 2|step 3|step 4|...        lane 4g + q: bytes 16q .. + 15 of 64, of rows g, g + 8, g + 16, g + 24
//   warp     |  0 ........|  1 ........|  2 ..
//
// A step's loads are under way while the one before is multiplied. Warps' sums are added in their order at the end, so that equal inputs give equal
// bits. Bytes moved: the weights once, x once for each block, from L2.
#pragma once

#include "kernels/cuda/instruction.cuh"

constexpr int ROWS_TILE = 32, ROWS_PARTS = 4;
// From column to column of the warps' sums: lanes have no bank conflicts.
constexpr int COLUMN_WORDS = ROWS_TILE + 4;

struct FewRowsPart {
    MatrixPart part;
    void *y;         // [m, n]
    float scale;     // a power of two
    int is_float;    // y is fp32, else fp16
    int first_tile;  // in the tiles of all parts; behind all of them where there is no such part
};

struct FewRows {
    FewRowsPart parts[ROWS_PARTS];
    const void *x;  // [m, x_stride], as the format reads it
    int m, k;
    int stride, x_stride;  // bytes from row to row
    // int8 alone: of x in fp16 [m, k], the rows' absmax [m], and the outlier columns.
    const __half *values;
    const float *row_absmax;
    const int *columns, *count;
    const float *constants;  // of nf4
};

// Rows of the weight and of x that a lane reads.
template <int COLUMNS>
struct LaneRows {
    const uint8_t *weights[4];
    const uint8_t *x[COLUMNS];
    int first_row, n, row_of_scale;  // the row g + 8q
    __device__ LaneRows(const FewRows &op, const MatrixPart &part, int tile) {
        const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
        first_row = tile * ROWS_TILE;
        n = part.n;
        // Rows behind the last one are computed as the last one is.
#pragma unroll
        for (int i = 0; i < 4; i++) weights[i] = part.weight + (long long)min(first_row + g + 8 * i, n - 1) * op.stride + 16 * q;
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) x[i] = (const uint8_t *)op.x + (long long)min(g + 8 * i, op.m - 1) * op.x_stride;
        row_of_scale = min(first_row + g + 8 * q, n - 1);
    }
};

// A format has:
//   STEP_BYTES            of a row of the weight
//   Sum                   of a lane: float or int
//   Tables                in shared memory; `fill` makes them
//   Ahead, load_weights   what a step reads, and its loads
//   load_x
//   multiply              adds a step's products to sums: rows g, g + 8 and g + 16, g + 24, columns 2q and 2q + 1 of each eight
//   result                a value of y from its sum
template <template <int> class Format, int COLUMNS, int THREADS>
__device__ __forceinline__ void multiply_few_rows(const FewRows &op) {
    using Decoder = Format<COLUMNS>;
    constexpr int WARPS_OF_BLOCK = THREADS / LANES, SUMS = WARPS_OF_BLOCK * COLUMNS * 8 * COLUMN_WORDS;
    union Room {
        typename Decoder::Tables tables;
        typename Decoder::Sum sums[SUMS];
    };
    __shared__ __align__(16) Room room;
    let_next_start();
    int which = 0;
#pragma unroll
    for (int i = 1; i < ROWS_PARTS; i++)
        if ((int)blockIdx.x >= op.parts[i].first_tile) which = i;
    const FewRowsPart &of = op.parts[which];
    const LaneRows<COLUMNS> rows(op, of.part, blockIdx.x - of.first_tile);
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
    const int steps = (Decoder::row_bytes(op) + Decoder::STEP_BYTES - 1) / Decoder::STEP_BYTES, of_warp = (steps + WARPS_OF_BLOCK - 1) / WARPS_OF_BLOCK;
    const int begin = min(warp * of_warp, steps), end = min(begin + of_warp, steps);
    Decoder decoder(op, of.part, rows);
    typename Decoder::Ahead ahead;
    // Weights and tables come while the launch before ends.
    decoder.load_weights(ahead, rows, begin, end);
    decoder.fill(room.tables, op.constants);
    wait_for_launch_before();
    decoder.load_x(ahead, rows, begin, end);
    __syncthreads();

    typename Decoder::Sum sums[COLUMNS][2][4] = {};
#pragma unroll 1
    for (int step = begin; step < end; step++) {
        const typename Decoder::Ahead now = ahead;
        decoder.load_weights(ahead, rows, step + 1, end);
        decoder.load_x(ahead, rows, step + 1, end);
        decoder.multiply(now, room.tables, rows, step, sums);
    }
    // Tables are read no more.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int column = 8 * i + 2 * q + at % 2, row = 16 * half + 8 * (at / 2) + g;
                room.sums[(warp * COLUMNS * 8 + column) * COLUMN_WORDS + row] = sums[i][half][at];
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS_TILE * COLUMNS * 8; at += THREADS) {
        const int column = at / ROWS_TILE, row = rows.first_row + at % ROWS_TILE;
        if (column >= op.m || row >= rows.n) continue;
        typename Decoder::Sum sum = 0;
#pragma unroll
        for (int other = 0; other < WARPS_OF_BLOCK; other++) sum += room.sums[(other * COLUMNS * 8 + column) * COLUMN_WORDS + at % ROWS_TILE];
        const float y = Decoder::result(op, of.part, sum, row, column, of.scale);
        const long long to = (long long)column * rows.n + row;
        if (of.is_float) ((float *)of.y)[to] = y;
        else ((__half *)of.y)[to] = __float2half_rn(y);
    }
}

// Kernels of up to 8, 16 and 32 rows of x, and of up to 8 with twice the warps, for matrices of few rows. BLOCKS that share a multiprocessor are as
// many as registers allow.
#define FEW_ROWS_KERNEL(NAME, FORMAT, COLUMNS, THREADS, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ FewRows op) {                     \
        multiply_few_rows<FORMAT, COLUMNS, THREADS>(op);                                                                         \
    }
