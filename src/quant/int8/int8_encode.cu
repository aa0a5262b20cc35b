// LLM.int8: rows of a checkpoint into codes and one absmax each, bit for bit as the CPU makes them.
//
//   absmax = max |w|           over the row's fp16 values; the NaN of the largest payload where there is one
//   code = round(w * (1 / absmax * 127))      two roundings in the factor, one in the product, half to even in the code
//
// A block takes a row: its threads read it twice, once from memory and once from the caches, and write it as whole words,
// with zero codes behind the last column. Bytes moved: each value once, each code once.

#include "kernels/cuda/source_values.cuh"

constexpr int ENCODE_THREADS = 256;
// 1.5 * 2^23: a sum with it has the nearest integer in its low bits.
constexpr float INTEGERS = 12582912.0f;

// A row without a finite scale, all zeros or with an infinity, gives NaN here.
__device__ __forceinline__ uint32_t encode(float value, float scale) {
    float product = __fmul_rn(value, scale);
    return isnan(product) ? 0 : __float_as_uint(__fadd_rn(product, INTEGERS)) & 0xff;
}

extern "C" __global__ void __launch_bounds__(ENCODE_THREADS) int8_encode_rows(const SourceValues from,  // [rows, k]
                                                                              uint32_t *codes,   // [rows, stride / 4]
                                                                              float *absmax,     // [rows]
                                                                              int k, int stride) {
    __shared__ uint32_t room[ENCODE_THREADS];
    const long long row = blockIdx.x, first = row * k;
    uint32_t largest = 0;
    for (int column = threadIdx.x; column < k; column += ENCODE_THREADS)
        largest = max(largest, widened(counted_half_bits(from, first + column)) & MAGNITUDE);
    room[threadIdx.x] = largest;
    for (int half = ENCODE_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) room[threadIdx.x] = max(room[threadIdx.x], room[threadIdx.x + half]);
    }
    __syncthreads();

    float of_row = __uint_as_float(room[0]), scale = __fmul_rn(__frcp_rn(of_row), 127.0f);
    if (threadIdx.x == 0) absmax[row] = of_row;
    for (int word = threadIdx.x; word < stride / 4; word += ENCODE_THREADS) {
        uint32_t packed = 0;
        for (int i = 0; i < 4; i++) {
            int column = 4 * word + i;
            if (column < k) packed |= encode(__uint_as_float(widened(half_bits(from, first + column))), scale) << 8 * i;
        }
        codes[row * (stride / 4) + word] = packed;
    }
}
