// NF4 with or without double quantization.
//
//   W[i] = code[nibble i] * absmax[i / 64]            i runs over the flattened [n, k] matrix: blocks may cross rows
//   absmax[b] = absmax_code[q[b]] * nested[b / 256] + offset     (double quantization; two roundings, as bitsandbytes)
//
// Layout: a byte holds two codes, the even element in the high nibble. Rows are padded to whole chunks of 64 bytes = two
// blocks, and the eight units of 8 bytes in a chunk are reordered so that the 16 bytes of lane q serve both blocks:
//
//   stored   |u0 u1 u2 u3|u4 u5 u6 u7|      a block is four units of 16 elements
//   chunk    |u0 u4|u1 u5|u2 u6|u3 u7|
//   lane q   |  0  |  1  |  2  |  3  |
//
// One row of x: a byte becomes a pair of halves by one look-up in shared memory, in a table that has a copy for each lane
// of a bank so that no two lanes meet; tensor cores add a block in fp32; its absmax multiplies the sum, once. The 16 code
// values are rounded to fp16, nothing else is. Where blocks cross rows (k not a multiple of 64) a plain loop does the same.
// Many rows: `dequantize`, then cuBLAS.

#include "kernels/cuda/matvec.cuh"

constexpr int BLOCK = 64;

struct NestedAbsmax {
    // A code and what it multiplies; decoded when it is used, so that nobody waits for it before.
    uint32_t code;
    float nested;
    __device__ void load(const Part &part, int block) {
        code = load_byte((const uint8_t *)part.scales + block);
        nested = load_float(part.nested + (block >> 8));
    }
    __device__ float value(const float *absmax_code, float offset) const {
        return __fadd_rn(__fmul_rn(absmax_code[code], nested), offset);
    }
};

struct PlainAbsmax {
    float absmax;
    __device__ void load(const Part &part, int block) { absmax = load_float((const float *)part.scales + block); }
    __device__ float value(const float *, float) const { return absmax; }
};

struct Value {
    float value;
    __device__ void add(const Value &other) { value += other.value; }
};

struct HalfActivations {
    const __half *x;
    __device__ uint8_t *convert(const Matvec &, const Input &, const __half *halves, uint8_t *free_bytes, float *) {
        x = halves;
        return free_bytes;
    }
};

// Chips whose memory feeds an SM more weights than 8 copies can look up have 32, the others room for more blocks.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int COPY_BITS = 5;
#else
constexpr int COPY_BITS = 4;
#endif

template <class Absmax>
struct Nibbles {
    static constexpr int CHUNK = 128, COPIES = 1 << COPY_BITS, SHIFT = COPY_BITS + 2;
    struct Shared {
        uint32_t pairs[256 * COPIES];
        float absmax_code[256];
    };
    // The lane's share of scaling: row g or g + 8 by its lowest bit, the chunk's first or second block by the other.
    struct Place {
        const Part *part;
        int first_block, last_block;
        __device__ void set(const Part &of, int k, int row_low, int row_high, int quarter) {
            part = &of;
            int blocks = (k + BLOCK - 1) / BLOCK, row = quarter & 1 ? row_high : row_low;
            first_block = row * blocks + quarter / 2;
            last_block = row * blocks + blocks - 1;
        }
    };
    struct Extra {
        Absmax absmax;
        // A chunk's second block may be padding: its activations are zero, its absmax any.
        __device__ void load(const Place &place, int chunk) {
            absmax.load(*place.part, min(place.first_block + 2 * chunk, place.last_block));
        }
    };
    struct Row {
        float offset;
        __device__ void set(const Part &part, int, int, int) { offset = part.offset; }
    };
    using Partial = Value;
    struct Sums {
        float scaled;
    };
    using Activations = HalfActivations;

    static __device__ void prepare(Shared &shared, const Matvec &job) {
        for (int at = 4 * threadIdx.x; at < 256 * COPIES; at += 4 * MATVEC_THREADS) {
            int byte = at / COPIES;
            __half2 pair = __floats2half2_rn(__ldg(job.code + byte / 16), __ldg(job.code + byte % 16));
            uint32_t bits = *(const uint32_t *)&pair;
            *(uint4 *)(shared.pairs + at) = make_uint4(bits, bits, bits, bits);
        }
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(job.code + 16 + threadIdx.x);
    }

    template <int TILES>
    static __device__ __forceinline__ void add(const Shared &shared, const Activations &from, int chunk,
                                               const uint4 (&weights)[TILES][2], const Extra (&extras)[TILES],
                                               const Row (&rows)[TILES], Sums (&sums)[TILES]) {
        const int quarter = threadIdx.x % 4;
        const __half *x_of_lane = from.x + chunk * CHUNK + quarter * 16;
        uint32_t copy = threadIdx.x % COPIES * 4;
        keep(copy);
        // Byte `at` of a word as two halves.
        auto pair = [&](uint32_t word, int at) {
            uint32_t shifted = 8 * at >= SHIFT ? word >> (8 * at - SHIFT) : word << (SHIFT - 8 * at);
            return *(const uint32_t *)((const char *)shared.pairs + ((shifted & (0xffu << SHIFT)) | copy));
        };
        float of_block[TILES][2];
#pragma unroll
        for (int block = 0; block < 2; block++) {
            float products[TILES][4] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 x = *(const uint4 *)(x_of_lane + BLOCK * block + 8 * half);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    uint32_t low = half ? (block ? weights[t][0].w : weights[t][0].y) : (block ? weights[t][0].z : weights[t][0].x);
                    uint32_t high = half ? (block ? weights[t][1].w : weights[t][1].y) : (block ? weights[t][1].z : weights[t][1].x);
                    multiply_halves(products[t], pair(low, 0), pair(high, 0), pair(low, 1), pair(high, 1), x.x, x.y);
                    multiply_halves(products[t], pair(low, 2), pair(high, 2), pair(low, 3), pair(high, 3), x.z, x.w);
                }
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) of_block[t][block] = quarter & 1 ? products[t][2] : products[t][0];
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float absmax = extras[t].absmax.value(shared.absmax_code, rows[t].offset);
            sums[t].scaled += absmax * (quarter & 2 ? of_block[t][1] : of_block[t][0]);
        }
    }
    static __device__ void partial(const Sums &sums, Value &low, Value &high) {
        float both = sums.scaled + __shfl_xor_sync(ALL_LANES, sums.scaled, 2);
        low.value = both;  // of even lanes
        high.value = __shfl_xor_sync(ALL_LANES, both, 1);
    }
    static __device__ float result(const Value &total, const Activations &, const Part &, int) { return total.value; }
};

// Blocks that cross rows: every element asks for its own absmax.
template <class Absmax>
struct CrossingNibbles {
    static constexpr int CHUNK = 128;
    struct Shared {
        float code[16], absmax_code[256];
    };
    struct Nothing {
        __device__ void set(const Part &, int, int, int, int) {}
        __device__ void load(const Nothing &, int) {}
    };
    using Place = Nothing;
    using Extra = Nothing;
    struct Row {
        const Part *part;
        int k;
        long long low, high;  // first elements
        __device__ void set(const Part &of, int columns, int row_low, int row_high) {
            part = &of;
            k = columns;
            low = (long long)row_low * k;
            high = (long long)row_high * k;
        }
    };
    using Partial = Value;
    struct Sums {
        float low, high;
    };
    using Activations = HalfActivations;

    static __device__ void prepare(Shared &shared, const Matvec &job) {
        if (threadIdx.x < 16) shared.code[threadIdx.x] = __ldg(job.code + threadIdx.x);
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(job.code + 16 + threadIdx.x);
    }

    static __device__ float dot(const Shared &shared, const Activations &from, const uint4 &bytes, int first_column, const Row &row,
                                long long first) {
        const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
        float sum = 0.0f;
#pragma unroll
        for (int word = 0; word < 4; word++)
            for (int at = 0; at < 8; at++) {
                int column = first_column + word / 2 * BLOCK + word % 2 * 8 + at;
                if (column >= row.k) continue;
                Absmax absmax;
                absmax.load(*row.part, (int)((first + column) / BLOCK));
                int nibble = words[word] >> (at / 2 * 8 + (at % 2 ? 0 : 4)) & 15;
                float weight = __fmul_rn(shared.code[nibble], absmax.value(shared.absmax_code, row.part->offset));
                sum += weight * __half2float(from.x[column]);
            }
        return sum;
    }

    template <int TILES>
    static __device__ __forceinline__ void add(const Shared &shared, const Activations &from, int chunk,
                                               const uint4 (&weights)[TILES][2], const Extra (&)[TILES],
                                               const Row (&rows)[TILES], Sums (&sums)[TILES]) {
        int first = chunk * CHUNK + threadIdx.x % 4 * 16;
        for (int t = 0; t < TILES; t++) {
            sums[t].low += dot(shared, from, weights[t][0], first, rows[t], rows[t].low);
            sums[t].high += dot(shared, from, weights[t][1], first, rows[t], rows[t].high);
        }
    }
    static __device__ void partial(const Sums &sums, Value &low, Value &high) {
        low.value = sums.low;
        high.value = sums.high;
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            low.value += __shfl_xor_sync(ALL_LANES, low.value, distance);
            high.value += __shfl_xor_sync(ALL_LANES, high.value, distance);
        }
    }
    static __device__ float result(const Value &total, const Activations &, const Part &, int) { return total.value; }
};

MATVEC_KERNEL(nf4_nested_1, Nibbles<NestedAbsmax>, 1, 3)
MATVEC_KERNEL(nf4_nested_2, Nibbles<NestedAbsmax>, 2, 2)
MATVEC_KERNEL(nf4_plain_1, Nibbles<PlainAbsmax>, 1, 3)
MATVEC_KERNEL(nf4_plain_2, Nibbles<PlainAbsmax>, 2, 2)
MATVEC_KERNEL(nf4_nested_crossing_1, CrossingNibbles<NestedAbsmax>, 1, 1)
MATVEC_KERNEL(nf4_nested_crossing_2, CrossingNibbles<NestedAbsmax>, 2, 1)
MATVEC_KERNEL(nf4_plain_crossing_1, CrossingNibbles<PlainAbsmax>, 1, 1)
MATVEC_KERNEL(nf4_plain_crossing_2, CrossingNibbles<PlainAbsmax>, 2, 1)

// The weight as fp16 [n, k], each value rounded once. A thread decodes a unit: 16 elements of one row, in one block unless
// blocks cross rows.
template <class Absmax>
__device__ __forceinline__ void dequantize(const uint8_t *packed, const Part &part, const float *code, __half *weight, int k,
                                           int stride) {
    __shared__ float values[16], absmax_values[256];
    if (threadIdx.x < 16) values[threadIdx.x] = code[threadIdx.x];
    absmax_values[threadIdx.x] = code[16 + threadIdx.x];
    __syncthreads();
    int units = stride / 8;
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int row = (int)(index / units), unit = (int)(index % units);
    if (row >= part.n) return;
    int slot = unit % 8;
    int column = unit / 8 * 128 + slot % 2 * BLOCK + slot / 2 * 16;
    uint2 bytes = *(const uint2 *)(packed + (long long)row * stride + unit * 8);
    long long first = (long long)row * k;
    __align__(16) __half decoded[16];
    if (column >= k) return;
    int block = (int)((first + column) / BLOCK);
    Absmax absmax;
    absmax.load(part, block);
    float scale = absmax.value(absmax_values, part.offset);
#pragma unroll
    for (int at = 0; at < 16; at++) {
        int of = (int)((first + column + at) / BLOCK);
        if (of != block && column + at < k) {
            block = of;
            absmax.load(part, block);
            scale = absmax.value(absmax_values, part.offset);
        }
        int nibble = (at < 8 ? bytes.x : bytes.y) >> (at % 8 / 2 * 8 + (at % 2 ? 0 : 4)) & 15;
        decoded[at] = __float2half_rn(__fmul_rn(values[nibble], scale));
    }
    __half *out = weight + first + column;
    if (k % 16 == 0) {
        ((uint4 *)out)[0] = ((const uint4 *)decoded)[0];
        ((uint4 *)out)[1] = ((const uint4 *)decoded)[1];
    } else {
#pragma unroll
        for (int at = 0; at < 16; at++)
            if (column + at < k) out[at] = decoded[at];
    }
}

extern "C" __global__ void __launch_bounds__(256) nf4_dequantize_nested(
    const __grid_constant__ Part part, const float *code, __half *weight, int k, int stride) {
    dequantize<NestedAbsmax>(part.weight, part, code, weight, k, stride);
}

extern "C" __global__ void __launch_bounds__(256) nf4_dequantize_plain(
    const __grid_constant__ Part part, const float *code, __half *weight, int k, int stride) {
    dequantize<PlainAbsmax>(part.weight, part, code, weight, k, stride);
}
