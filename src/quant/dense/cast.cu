// A checkpoint's rows into rows of fp16 or fp32, padded with zeros to the stride that the products want.
//
//   to[row][column] = from[row][column], cast;  0 behind the last column
//
// One thread makes one element of `to`. Bytes moved: each value once in its saved dtype, each element of `to` once.

#include "kernels/cuda/source_values.cuh"

extern "C" __global__ void cast_to_halves(const SourceValues from,      // [rows, k]
                                          unsigned short *to,    // [rows, stride]
                                          int k, int stride, int count) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int row = at / stride, column = at % stride;
    to[at] = column < k ? (unsigned short)counted_half_bits(from, (long long)row * k + column) : 0;
}

extern "C" __global__ void cast_to_floats(const SourceValues from,  // [rows, k]
                                          uint32_t *to,      // [rows, stride]
                                          int k, int stride, int count) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int row = at / stride, column = at % stride;
    to[at] = column < k ? float_bits(from, (long long)row * k + column) : 0;
}
