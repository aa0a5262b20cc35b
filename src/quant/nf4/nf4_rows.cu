// NF4 times few rows of activations, as batches have: the codes stream through registers once, as bytes / bandwidth allows.
//
//   y[s, n] = alpha * sum over blocks of absmax[n, block] * (code[n, block] . x[s, block])        sums fp32, by tensor cores
//
// A block owns 32 rows of the weight and all rows of x; its warps share the steps along k, each a half chunk of 128 elements (nf4.cu draws it):
//
//   k        |step 0|step 1|step 2|step 3|step 4|...        a lane holds 16 bytes of each of 4 rows, 16 elements in each of two blocks
//   warp     |  0 ........|  1 ........|  2 ..               and the same elements of x: products need no exchange between lanes
//
// Tensor cores take any order of k, if both sides have it: step j of a block is elements 16q + 4j .. + 3 of lane q. Warps' sums are added in their
// order at the end, so that equal inputs give equal bits. Only the 16 code values are rounded to fp16. Bytes moved: the weight once, x once for each
// block, from L2. k is a multiple of 64; else nf4.cu's `dequantize` and cuBLAS do it.

#include "kernels/cuda/instruction.cuh"

constexpr int BLOCK = 64, ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / LANES, TILE = 32, STEP = 128;
// Copies of the table of code pairs, so that lanes have few bank conflicts.
constexpr int PAIR_COPIES = 16, COLUMN_WORDS = TILE + 4;

struct RowsProduct {
    const __half *x;  // [m, k]
    void *y;          // [m, n]
    float alpha;
    int m, n, k, stride, is_float;
};

__device__ __forceinline__ float absmax_of(const MatrixPart &part, int block, const float *absmax_code) {
    if (!part.nested) return __ldg((const float *)part.scales + block);
    return __fadd_rn(__fmul_rn(absmax_code[__ldg((const uint8_t *)part.scales + block)], __ldg(part.nested + (block >> 8))), part.offset);
}

// Products with up to 8 * COLUMNS rows of x.
template <int COLUMNS>
__device__ __forceinline__ void multiply_rows(const MatrixPart &part, const float *code, const RowsProduct &op) {
    constexpr int SUMS = ROW_WARPS * COLUMNS * 8 * COLUMN_WORDS, PAIRS = 256 * PAIR_COPIES;
    __shared__ __align__(16) uint32_t room[SUMS > PAIRS ? SUMS : PAIRS];
    __shared__ float absmax_code[256];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, first_row = blockIdx.x * TILE;
    const int blocks = op.k / BLOCK, steps = (op.k + STEP - 1) / STEP, of_warp = (steps + ROW_WARPS - 1) / ROW_WARPS;
    const int begin = min(warp * of_warp, steps), end = min(begin + of_warp, steps);
    // Rows behind the last one are computed as the last one is.
    const uint8_t *weights[4];
    const __half *x[COLUMNS];
#pragma unroll
    for (int i = 0; i < 4; i++) weights[i] = part.weight + (long long)min(first_row + g + 8 * i, op.n - 1) * op.stride + 16 * q;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) x[i] = op.x + (long long)min(g + 8 * i, op.m - 1) * op.k + 16 * q;
    // This lane's row of the scales.
    const int scaled = min(first_row + g + 8 * q, op.n - 1) * blocks;

    uint4 next[4];
    auto load = [&](int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) next[i] = step < end ? load_streaming(weights[i] + step * (STEP / 2)) : make_uint4(0, 0, 0, 0);
    };
    load(begin);
    for (int at = 4 * threadIdx.x; at < PAIRS; at += 4 * ROW_THREADS) {
        const int byte = at / PAIR_COPIES;
        const __half2 pair = __floats2half2_rn(__ldg(code + byte / 16), __ldg(code + byte % 16));
        const uint32_t bits = *(const uint32_t *)&pair;
        *(uint4 *)(room + at) = make_uint4(bits, bits, bits, bits);
    }
    absmax_code[threadIdx.x] = __ldg(code + 16 + threadIdx.x);
    __syncthreads();
    const uint32_t pairs = shared_address(room) + lane % PAIR_COPIES * 4;
    auto pair = [&](uint32_t word, int at) { return load_shared(__byte_perm(word, 0, 0x4440 | at) * (4 * PAIR_COPIES) + pairs); };

    // Rows g, g + 8 and g + 16, g + 24, and columns 2q and 2q + 1 of each eight.
    float sums[COLUMNS][2][4] = {};
#pragma unroll 1
    for (int step = begin; step < end; step++) {
        uint4 now[4];
#pragma unroll
        for (int i = 0; i < 4; i++) now[i] = next[i];
        load(step + 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int block = 2 * step + half;
            // Padding of the last chunk.
            if (block >= blocks) break;
            const float absmax = absmax_of(part, scaled + block, absmax_code);
            float scales[4];
#pragma unroll
            for (int i = 0; i < 4; i++) scales[i] = __shfl_sync(ALL_LANES, absmax, 4 * g + i);
            uint32_t codes[4][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                codes[i][0] = half ? now[i].z : now[i].x;
                codes[i][1] = half ? now[i].w : now[i].y;
            }
            float products[COLUMNS][2][4] = {};
#pragma unroll
            for (int word = 0; word < 2; word++) {
                // Eight elements of each row: two steps of 16 along k.
                uint4 of_x[COLUMNS];
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) of_x[i] = __ldg((const uint4 *)(x[i] + block * BLOCK + 8 * word));
#pragma unroll
                for (int two = 0; two < 2; two++) {
#pragma unroll
                    for (int rows = 0; rows < 2; rows++) {
                        const uint32_t low = codes[2 * rows][word], high = codes[2 * rows + 1][word];
                        const uint32_t a0 = pair(low, 2 * two), a1 = pair(high, 2 * two), a2 = pair(low, 2 * two + 1), a3 = pair(high, 2 * two + 1);
#pragma unroll
                        for (int i = 0; i < COLUMNS; i++)
                            multiply_halves(products[i][rows], a0, a1, a2, a3, two ? of_x[i].z : of_x[i].x, two ? of_x[i].w : of_x[i].y);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
                for (int rows = 0; rows < 2; rows++) {
#pragma unroll
                    for (int at = 0; at < 4; at++) sums[i][rows][at] += scales[2 * rows + at / 2] * products[i][rows][at];
                }
            }
        }
    }
    // The table is read no more.
    __syncthreads();
    float *of_warps = (float *)room;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
        for (int rows = 0; rows < 2; rows++) {
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int column = 8 * i + 2 * q + at % 2, row = 16 * rows + 8 * (at / 2) + g;
                of_warps[(warp * COLUMNS * 8 + column) * COLUMN_WORDS + row] = sums[i][rows][at];
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < TILE * COLUMNS * 8; at += ROW_THREADS) {
        const int column = at / TILE, row = at % TILE;
        if (column >= op.m || first_row + row >= op.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < ROW_WARPS; other++) sum += of_warps[(other * COLUMNS * 8 + column) * COLUMN_WORDS + row];
        sum *= op.alpha;
        const long long to = (long long)column * op.n + first_row + row;
        if (op.is_float) ((float *)op.y)[to] = sum;
        else ((__half *)op.y)[to] = __float2half_rn(sum);
    }
}

// BLOCKS: that share a multiprocessor, as many as registers allow.
#define ROWS_KERNEL(NAME, COLUMNS, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(ROW_THREADS, BLOCKS) NAME(                              \
        const __grid_constant__ MatrixPart part, const float *code, const __grid_constant__ RowsProduct op) { \
        multiply_rows<COLUMNS>(part, code, op);                                                          \
    }
ROWS_KERNEL(nf4_rows_8, 1, 2)
ROWS_KERNEL(nf4_rows_16, 2, 2)
ROWS_KERNEL(nf4_rows_32, 4, 1)
