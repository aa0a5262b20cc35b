// NF4 times few rows of activations: few_rows.cuh says how the codes stream.
//
//   y[s, n] = sum over blocks of absmax[n, block] * (code[n, block] . x[s, block])
//
// A step is half a chunk, two blocks (nf4.cu draws it): a lane's 16 bytes are 16 elements of each. Step j of a block is elements 16q + 4j .. + 3 of
// lane q. A block's sum is fp32; only the 16 code values are rounded to fp16. k is a multiple of 64; else `dequantize` and cuBLAS do it.

#include "kernels/cuda/few_rows.cuh"

constexpr int BLOCK = 64;
// Copies of the table of code pairs: lanes have no bank conflicts where each has its own, and few otherwise.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int PAIR_COPIES = 32;
#else
constexpr int PAIR_COPIES = 16;
#endif

template <int COLUMNS>
struct Nibbles {
    static constexpr int STEP_BYTES = 64;
    // Activations are read ahead where registers allow.
    static constexpr bool READS_AHEAD = COLUMNS == 1;
    using Sum = float;
    struct Tables {
        uint32_t pairs[256 * PAIR_COPIES];
        float absmax_code[256];
    };
    struct Ahead {
        uint4 codes[4];
        uint4 x[READS_AHEAD ? 4 : 1];
        // Of the two blocks of the row g + 8q: an absmax, or its code and what scales that.
        uint32_t code[2];
        float absmax[2];
    };
    const float *nested;
    const void *scales;
    float offset;
    int blocks, first_block;  // of a row, and of the row that this lane scales

    __device__ Nibbles(const FewRows &op, const MatrixPart &part, const LaneRows<COLUMNS> &rows)
        : nested(part.nested), scales(part.scales), offset(part.offset), blocks(op.k / BLOCK), first_block(rows.row_of_scale * (op.k / BLOCK)) {}
    static __device__ int row_bytes(const FewRows &op) { return op.k / 2; }

    __device__ __forceinline__ void load_weights(Ahead &ahead, const LaneRows<COLUMNS> &rows, int step, int end) const {
        if (step >= end) return;
#pragma unroll
        for (int i = 0; i < 4; i++) ahead.codes[i] = load_streaming(rows.weights[i] + step * STEP_BYTES);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Behind the last block is padding.
            const int block = first_block + min(2 * step + half, blocks - 1);
            ahead.code[half] = nested ? __ldg((const uint8_t *)scales + block) : 0;
            ahead.absmax[half] = nested ? __ldg(nested + (block >> 8)) : __ldg((const float *)scales + block);
        }
    }
    __device__ __forceinline__ void load_x(Ahead &ahead, const LaneRows<COLUMNS> &rows, int step, int end) const {
        if (step >= end) return;
        if constexpr (READS_AHEAD) {
#pragma unroll
            for (int at = 0; at < 4; at++) ahead.x[at] = x_at(rows, 0, min(2 * step + at / 2, blocks - 1), at % 2);
        }
    }
    // Eight elements of a block: two steps along k.
    static __device__ __forceinline__ uint4 x_at(const LaneRows<COLUMNS> &rows, int eight, int block, int word) {
        return __ldg((const uint4 *)(rows.x[eight] + 2 * (block * BLOCK + threadIdx.x % 4 * 16 + 8 * word)));
    }
    static __device__ __forceinline__ void fill(Tables &tables, const float *code) {
        for (int at = 4 * threadIdx.x; at < 256 * PAIR_COPIES; at += 4 * blockDim.x) {
            const int byte = at / PAIR_COPIES;
            const __half2 pair = __floats2half2_rn(__ldg(code + byte / 16), __ldg(code + byte % 16));
            const uint32_t bits = *(const uint32_t *)&pair;
            *(uint4 *)(tables.pairs + at) = make_uint4(bits, bits, bits, bits);
        }
        if (threadIdx.x < 256) tables.absmax_code[threadIdx.x] = __ldg(code + 16 + threadIdx.x);
    }
    __device__ __forceinline__ void multiply(const Ahead &now, const Tables &tables, const LaneRows<COLUMNS> &rows, int step, Sum (&sums)[COLUMNS][2][4]) const {
        const int lane = threadIdx.x % LANES;
        const uint32_t pairs = shared_address(tables.pairs) + lane % PAIR_COPIES * 4;
        auto pair = [&](uint32_t word, int at) { return load_shared(__byte_perm(word, 0, 0x4440 | at) * (4 * PAIR_COPIES) + pairs); };
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int block = 2 * step + half;
            if (block >= blocks) break;
            const float absmax = nested ? __fadd_rn(__fmul_rn(tables.absmax_code[now.code[half]], now.absmax[half]), offset) : now.absmax[half];
            float of_rows[4];
#pragma unroll
            for (int i = 0; i < 4; i++) of_rows[i] = __shfl_sync(ALL_LANES, absmax, lane / 4 * 4 + i);
            float products[COLUMNS][2][4] = {};
#pragma unroll
            for (int word = 0; word < 2; word++) {
                uint4 x[COLUMNS];
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) x[i] = READS_AHEAD ? now.x[READS_AHEAD ? 2 * half + word : 0] : x_at(rows, i, block, word);
                auto codes_of = [&](int row) {
                    const uint4 &codes = now.codes[row];
                    return half ? (word ? codes.w : codes.z) : (word ? codes.y : codes.x);
                };
#pragma unroll
                for (int two = 0; two < 2; two++) {
#pragma unroll
                    for (int at = 0; at < 2; at++) {
                        const uint32_t low = codes_of(2 * at), high = codes_of(2 * at + 1);
                        const uint32_t a0 = pair(low, 2 * two), a1 = pair(high, 2 * two), a2 = pair(low, 2 * two + 1), a3 = pair(high, 2 * two + 1);
#pragma unroll
                        for (int i = 0; i < COLUMNS; i++) multiply_halves(products[i][at], a0, a1, a2, a3, two ? x[i].z : x[i].x, two ? x[i].w : x[i].y);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
                for (int at = 0; at < 2; at++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][at][j] += of_rows[2 * at + j / 2] * products[i][at][j];
                }
            }
        }
    }
    static __device__ float result(const FewRows &, const MatrixPart &, float sum, int, int, float scale) { return sum * scale; }
};

FEW_ROWS_KERNEL(nf4_rows_8, Nibbles, 1, 256, 2)
FEW_ROWS_KERNEL(nf4_rows_8_wide, Nibbles, 1, 512, 1)
FEW_ROWS_KERNEL(nf4_rows_16, Nibbles, 2, 256, 2)
FEW_ROWS_KERNEL(nf4_rows_32, Nibbles, 4, 256, 1)
