// NF4 with or without double quantization: y = x · Wᵀ for few rows, and W as fp16 for many.
//
//   W[i] = code[nibble i] * absmax[i / 64]            i runs over the flattened [n, k] matrix: blocks may cross rows
//   absmax[b] = nested_code[q[b]] * nested[b / 256] + offset     (double quantization; two roundings, as bitsandbytes)
//
// Layout: byte i holds element 2i in its high nibble and 2i + 1 in its low one. A chunk is 16 bytes = 32 elements = half
// a block, so it has one absmax. The launcher pads `packed` to whole chunks.
//
//   chunk   |0 .. 31|32 .. 63|64 .. 95|...
//   block   |      absmax 0  |   absmax 1 ...
//   rows    |row 0 ......... k|k row 1 .........        a chunk at a row's edge belongs to both; each row masks its part
//
// matvec: a warp owns one output row and M rows of x; a lane loads one chunk, then the one 32 further on. Sums in fp32.
// dequantize: a thread decodes one chunk. Bytes moved: n*k/2 + n*k/64 (+ 2*n*k written by dequantize).
// Plain and correct, not tuned: no share of peak bandwidth is claimed.

#include <cstdint>
#include <cuda_fp16.h>

#include "kernels/cuda/warp.cuh"

constexpr int CHUNK = 32;
// Four warps: small enough that a 576-row matrix still gives every SM a block.
constexpr int MATVEC_WARPS = 4;

struct NestedAbsmax {
    const uint8_t *__restrict__ codes;  // [blocks]
    const float *__restrict__ nested;   // [ceil(blocks / 256)]
    const float *__restrict__ map;      // [256]
    float offset;
    __device__ float of_chunk(long long chunk) const {
        long long block = chunk / 2;
        return __fadd_rn(__fmul_rn(map[codes[block]], nested[block / 256]), offset);
    }
};

struct PlainAbsmax {
    const float *__restrict__ values;  // [blocks]
    __device__ float of_chunk(long long chunk) const { return values[chunk / 2]; }
};

// Element j of a chunk, as an index into the 16 codes.
__device__ __forceinline__ int nibble(const uint32_t (&words)[4], int j) {
    int shift = 8 * ((j % 8) / 2) + (j % 2 ? 0 : 4);
    return (words[j / 8] >> shift) & 15;
}

template <int M, class Absmax>
__device__ __forceinline__ void matvec(
    const uint4 *__restrict__ packed,  // [ceil(n*k / 32)] chunks
    const Absmax &absmax,
    const float *__restrict__ code,  // [16]
    const __half *__restrict__ x,    // [m, k]
    __half *__restrict__ y,          // [m, n]
    int m, int n, int k) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    int row = blockIdx.x * MATVEC_WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (row >= n) return;
    long long begin = (long long)row * k, end = begin + k;
    // Then every chunk lies in one row, and 32 activations are four aligned 16-byte loads.
    bool aligned = k % CHUNK == 0 && (uintptr_t)x % 16 == 0;
    float sums[M] = {};
    for (long long chunk = begin / CHUNK + lane; chunk * CHUNK < end; chunk += LANES) {
        uint4 loaded = __ldcs(packed + chunk);
        uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        float scale = absmax.of_chunk(chunk);
        int column = (int)(chunk * CHUNK - begin);  // of the chunk's first element: negative where it began in the row before
#pragma unroll
        for (int r = 0; r < M; r++) {
            const __half *x_row = x + (long long)min(r, m - 1) * k;
            float part = 0.0f;
            if (aligned) {
#pragma unroll
                for (int quarter = 0; quarter < 4; quarter++) {
                    uint4 eight = *(const uint4 *)(x_row + column + 8 * quarter);
                    const __half2 *pairs = (const __half2 *)&eight;
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        float2 two = __half22float2(pairs[pair]);
                        part += table[nibble(words, 8 * quarter + 2 * pair)] * two.x;
                        part += table[nibble(words, 8 * quarter + 2 * pair + 1)] * two.y;
                    }
                }
            } else {
#pragma unroll
                for (int j = 0; j < CHUNK; j++) {
                    int at = column + j;
                    if (at >= 0 && at < k) part += table[nibble(words, j)] * __half2float(x_row[at]);
                }
            }
            sums[r] += part * scale;
        }
    }
#pragma unroll
    for (int r = 0; r < M; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0 && r < m) y[(long long)r * n + row] = __float2half_rn(sum);
    }
}

template <class Absmax>
__device__ __forceinline__ void dequantize(
    const uint4 *__restrict__ packed,  // [ceil(n_elements / 32)] chunks
    const Absmax &absmax,
    const float *__restrict__ code,  // [16]
    __half *__restrict__ weight,     // [n_elements]
    long long n_elements) {
    long long chunk = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk * CHUNK >= n_elements) return;
    uint4 loaded = __ldcs(packed + chunk);
    uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    float scale = absmax.of_chunk(chunk);
    __half values[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) values[j] = __float2half_rn(__fmul_rn(code[nibble(words, j)], scale));
    long long first = chunk * CHUNK;
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        if (first + j < n_elements) weight[first + j] = values[j];
}

// M: rows of x a launch takes; the launcher picks the smallest that holds m.
#define MATVEC(M)                                                                                                    \
    extern "C" __global__ void nf4_matvec_nested_##M(const uint4 *packed, const uint8_t *codes, const float *nested, \
                                                     const float *map, float offset, const float *code,              \
                                                     const __half *x, __half *y, int m, int n, int k) {              \
        matvec<M>(packed, NestedAbsmax{codes, nested, map, offset}, code, x, y, m, n, k);                            \
    }                                                                                                                \
    extern "C" __global__ void nf4_matvec_plain_##M(const uint4 *packed, const float *values, const float *code,     \
                                                    const __half *x, __half *y, int m, int n, int k) {               \
        matvec<M>(packed, PlainAbsmax{values}, code, x, y, m, n, k);                                                 \
    }
MATVEC(1)
MATVEC(2)
MATVEC(4)
MATVEC(8)

extern "C" __global__ void nf4_dequantize_nested(const uint4 *packed, const uint8_t *codes, const float *nested,
                                                 const float *map, float offset, const float *code, __half *weight,
                                                 long long n_elements) {
    dequantize(packed, NestedAbsmax{codes, nested, map, offset}, code, weight, n_elements);
}

extern "C" __global__ void nf4_dequantize_plain(const uint4 *packed, const float *values, const float *code,
                                                __half *weight, long long n_elements) {
    dequantize(packed, PlainAbsmax{values}, code, weight, n_elements);
}
