// NF4: rows of a checkpoint into blocks' absmax and codes, bit for bit as the CPU makes them, in the layout of nf4.cu.
//
//   absmax[b] = max |w|                       over the 64 fp16 values of block b; NaN where one is
//   code = thresholds below w * (1 / max(absmax, 1e-38))       a last block of fewer values divides by that maximum instead,
//                                                              and stores it
//
// Blocks run over the flattened matrix and may cross rows, so that two kernels share the work: one takes blocks, the other
// the units of 16 columns of the row layout. Their input begins with a block. Bytes moved: each value twice, the second time mostly from
// L2, each code once.

#include "kernels/cuda/source_values.cuh"

constexpr int BLOCK = 64, THRESHOLDS = 15;
constexpr int ABSMAX_THREADS = 256, PER_THREAD = 4, SHARERS = BLOCK / PER_THREAD;
constexpr int UNIT = 16, HALF_UNITS = 8;
constexpr float SMALLEST_ABSMAX = 1e-38f;

struct Thresholds {
    float below[THRESHOLDS];
};

// A block of threads takes 16 blocks of values, 16 neighbours each of them.
extern "C" __global__ void __launch_bounds__(ABSMAX_THREADS) nf4_block_absmax(const SourceValues from,  // [count]
                                                                              float *absmax,     // [count / 64, rounded up]
                                                                              int count) {
    __shared__ uint32_t room[ABSMAX_THREADS];
    int first = (blockIdx.x * ABSMAX_THREADS + threadIdx.x) * PER_THREAD;
    uint32_t largest = 0;
    for (int at = first; at < min(first + PER_THREAD, count); at++)
        largest = max(largest, widened(counted_half_bits(from, at)) & MAGNITUDE);
    room[threadIdx.x] = largest;
    __syncthreads();
    if (threadIdx.x % SHARERS != 0 || first >= count) return;
    for (int i = 1; i < SHARERS; i++) largest = max(largest, room[threadIdx.x + i]);
    float value = __uint_as_float(largest);
    absmax[first / BLOCK] = count - first < BLOCK ? fmaxf(value, SMALLEST_ABSMAX) : value;
}

// A thread encodes one unit of a padded row. The units of half a chunk, two blocks, are in the order that nf4.cu draws.
extern "C" __global__ void nf4_encode_units(const SourceValues from,     // [rows, k] = [count]
                                            const float *absmax,  // [count / 64, rounded up]
                                            uint2 *to,            // [rows, units]
                                            const Thresholds thresholds, int k, int units, int count, int threads) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= threads) return;
    int row = at / units, unit = at % units, block = -1;
    float largest = 0.0f, scale = 0.0f;
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        int column = unit * UNIT + i, element = row * k + column;
        if (column >= k) break;
        if (element / BLOCK != block) {
            block = element / BLOCK;
            largest = fmaxf(absmax[block], SMALLEST_ABSMAX);
            scale = __frcp_rn(largest);
        }
        float value = __uint_as_float(widened(half_bits(from, element)));
        bool is_short = count - block * BLOCK < BLOCK;
        float scaled = is_short ? __fdiv_rn(value, largest) : __fmul_rn(value, scale);
        uint32_t code = 0;
#pragma unroll
        for (int j = 0; j < THRESHOLDS; j++) code += scaled > thresholds.below[j];
        // The even element of a byte is its high nibble.
        words[i / 8] |= code << (8 * (i % 8 / 2) + (i % 2 == 0 ? 4 : 0));
    }
    int place = unit / HALF_UNITS * HALF_UNITS + 2 * (unit % 4) + unit % HALF_UNITS / 4;
    to[(long long)row * units + place] = {words[0], words[1]};
}
