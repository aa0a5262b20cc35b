// NF4 with or without double quantization.
//
//   W[i] = code[nibble i] * absmax[i / 64]            i runs over the flattened [n, k] matrix: blocks may cross rows
//   absmax[b] = absmax_code[q[b]] * nested[b / 256] + offset     (double quantization; two roundings, as bitsandbytes)
//
// Layout: a byte holds two codes, the even element in the high nibble. Rows are padded to whole chunks of 128 bytes = four
// blocks; in each half of a chunk the eight units of 8 bytes are reordered so that the 16 bytes of lane q serve both blocks:
//
//   stored   |u0 u1 u2 u3|u4 u5 u6 u7|      a block is four units of 16 elements
//   half     |u0 u4|u1 u5|u2 u6|u3 u7|
//   lane q   |  0  |  1  |  2  |  3  |
//
// One row of x: a byte becomes a pair of halves by one look-up in shared memory, in a table that has a copy for each lane
// of a bank so that no two lanes meet; tensor cores add a block in fp32; its absmax multiplies the sum, once. The 16 code
// values are rounded to fp16, nothing else is. Where blocks cross rows (k not a multiple of 64) a plain loop does the same.
// Many rows: `dequantize`, then cuBLAS.

#include "kernels/cuda/matvec.cuh"

constexpr int BLOCK = 64;

// Where a lane's absmax lies in memory, what is copied of it for a step, and its value.
struct NestedAbsmax {
    static constexpr int WORDS = 2;
    const uint8_t *codes;
    const float *nested;
    __device__ void set(const Part &part) {
        codes = (const uint8_t *)part.scales;
        nested = part.nested;
    }
    // The four codes around the block's, and what it multiplies.
    __device__ void copy(uint32_t to, int block) const {
        copy_word(to, codes + (block & ~3));
        copy_word(to + 4 * LANES, nested + (block >> 8));
    }
    static __device__ float value(uint32_t words, int block, uint32_t absmax_code, float offset) {
        uint32_t code = __byte_perm(load_copied(words), 0, 0x4440 | (block & 3));
        float of_code = __uint_as_float(load_shared(absmax_code + 4 * code));
        return __fadd_rn(__fmul_rn(of_code, __uint_as_float(load_copied(words + 4 * LANES))), offset);
    }
    static __device__ float of_block(const Part &part, int block, const float *absmax_code) {
        uint32_t code = ((const uint8_t *)part.scales)[block];
        return __fadd_rn(__fmul_rn(absmax_code[code], part.nested[block >> 8]), part.offset);
    }
};

struct PlainAbsmax {
    static constexpr int WORDS = 1;
    const float *values;
    __device__ void set(const Part &part) { values = (const float *)part.scales; }
    __device__ void copy(uint32_t to, int block) const { copy_word(to, values + block); }
    static __device__ float value(uint32_t words, int, uint32_t, float) { return __uint_as_float(load_copied(words)); }
    static __device__ float of_block(const Part &part, int block, const float *) { return ((const float *)part.scales)[block]; }
};

struct Value {
    float value;
    __device__ void add(const Value &other) { value += other.value; }
};

struct NoConstant {
    __device__ void load(const Part &, int) {}
};

// Chips whose memory feeds an SM more weights than 8 copies can look up have 32, the others room for more blocks.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int COPY_BITS = 5;
#else
constexpr int COPY_BITS = 4;
#endif

template <class Absmax>
struct Nibbles {
    static constexpr int CHUNK = 256, COPIES = 1 << COPY_BITS, SHIFT = COPY_BITS + 2;
    struct Shared {
        __align__(16) uint32_t pairs[256 * COPIES];  // filled by 16 bytes at a time
        float absmax_code[256];
    };
    static constexpr int EXTRA_WORDS = Absmax::WORDS;
    // Lane q scales the chunk's block q. Blocks behind the row's last one are padding: their activations are zero, their
    // absmax any.
    struct Place {
        Absmax absmax;
        int block, last_block;
        __device__ void set(const Part &part, int k, int row, int quarter, int chunk) {
            absmax.set(part);
            int blocks = k / BLOCK;
            block = row * blocks + 4 * chunk + quarter;
            last_block = row * blocks + blocks - 1;
        }
        __device__ void copy_extra(uint32_t to) {
            absmax.copy(to, min(block, last_block));
            block += 4;
        }
    };
    struct Activations {
        uint32_t x;
    };
    struct Row {
        uint32_t x;      // of this lane: its 16 elements of the low half's first block, or of the high half's
        uint32_t pairs;  // the lane's copy
        uint32_t absmax_code;
        float offset;
        int block, last_block, quarter;
        __device__ void set(const Shared &shared, const Part &part, const Activations &from, int k, int row, int lane) {
            x = from.x + lane / 4 % 2 * CHUNK + lane % 4 * 32;
            pairs = shared_address(shared.pairs) + lane % COPIES * 4;
            absmax_code = shared_address(shared.absmax_code);
            offset = part.offset;
            quarter = lane % 4;
            int blocks = k / BLOCK;
            block = row * blocks + quarter;
            last_block = row * blocks + blocks - 1;
        }
    };
    static __device__ uint8_t *convert(Activations &to, const Matvec &, const Input &, const __half *x, uint8_t *free_bytes,
                                       float *) {
        if (threadIdx.x == 0) to.x = shared_address(x);
        return free_bytes;
    }
    using Constant = NoConstant;
    using Partial = Value;
    struct Sums {
        float scaled;
    };
    static __device__ void prepare(Shared &shared, const Matvec &job) {
        for (int at = 4 * threadIdx.x; at < 256 * COPIES; at += 4 * MATVEC_THREADS) {
            int byte = at / COPIES;
            __half2 pair = __floats2half2_rn(__ldg(job.code + byte / 16), __ldg(job.code + byte % 16));
            uint32_t bits = *(const uint32_t *)&pair;
            *(uint4 *)(shared.pairs + at) = make_uint4(bits, bits, bits, bits);
        }
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(job.code + 16 + threadIdx.x);
    }

    static __device__ __forceinline__ void add(int chunk, const uint4 &low, const uint4 &high, uint32_t extra, const Row &row,
                                               Sums &sums) {
        const uint32_t x = row.x + chunk * 2 * CHUNK;
        // Byte `at` of a word as two halves.
        auto pair = [&](uint32_t word, int at) {
            return load_shared(__byte_perm(word, 0, 0x4440 | at) * (4 * COPIES) + row.pairs);
        };
        auto multiply = [&](float (&sums_of_blocks)[4], uint32_t a, uint32_t b, const uint4 &x) {
            multiply_halves(sums_of_blocks, pair(a, 0), pair(b, 0), pair(a, 1), pair(b, 1), x.x, x.y);
            multiply_halves(sums_of_blocks, pair(a, 2), pair(b, 2), pair(a, 3), pair(b, 3), x.z, x.w);
        };
        // Blocks 0 and 2, then 1 and 3.
        float even[4] = {}, odd[4] = {};
        multiply(even, low.x, high.x, load_shared_16(x));
        multiply(even, low.y, high.y, load_shared_16(x + 16));
        multiply(odd, low.z, high.z, load_shared_16(x + 2 * BLOCK));
        multiply(odd, low.w, high.w, load_shared_16(x + 2 * BLOCK + 16));
        float of_low = row.quarter & 1 ? odd[0] : even[0], of_high = row.quarter & 1 ? odd[3] : even[3];
        float absmax = Absmax::value(extra, min(row.block + 4 * chunk, row.last_block), row.absmax_code, row.offset);
        sums.scaled += absmax * (row.quarter & 2 ? of_high : of_low);
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = quad_sum(sums.scaled); }
    static __device__ float result(const Value &total, const Activations &, const Constant &) { return total.value; }
};

// Blocks that cross rows: every element asks for its own absmax.
template <class Absmax>
struct CrossingNibbles {
    static constexpr int CHUNK = 256;
    struct Shared {
        float code[16], absmax_code[256];
    };
    struct Nothing {
        __device__ void set(const Part &, int, int, int, int) {}
        __device__ void copy_extra(uint32_t) {}
    };
    using Place = Nothing;
    static constexpr int EXTRA_WORDS = 0;
    struct Activations {
        const __half *x;
    };
    struct Row {
        const Shared *shared;
        const __half *x;
        const Part *part;
        int k;
        long long first;
        __device__ void set(const Shared &tables, const Part &of, const Activations &from, int columns, int row, int) {
            shared = &tables;
            x = from.x;
            part = &of;
            k = columns;
            first = (long long)row * k;
        }
    };
    using Constant = NoConstant;
    using Partial = Value;
    struct Sums {
        float sum;
    };
    static __device__ uint8_t *convert(Activations &to, const Matvec &, const Input &, const __half *x, uint8_t *free_bytes,
                                       float *) {
        if (threadIdx.x == 0) to.x = x;
        return free_bytes;
    }

    static __device__ void prepare(Shared &shared, const Matvec &job) {
        if (threadIdx.x < 16) shared.code[threadIdx.x] = __ldg(job.code + threadIdx.x);
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(job.code + 16 + threadIdx.x);
    }

    // Eight elements, from `first_column` on.
    static __device__ float dot(uint32_t word, int first_column, const Row &row) {
        const Shared &shared = *row.shared;
        float sum = 0.0f;
        for (int at = 0; at < 8; at++) {
            int column = first_column + at;
            if (column >= row.k) break;
            float absmax = Absmax::of_block(*row.part, (int)((row.first + column) / BLOCK), shared.absmax_code);
            int nibble = word >> (at / 2 * 8 + (at % 2 ? 0 : 4)) & 15;
            float weight = __fmul_rn(shared.code[nibble], absmax);
            sum += weight * __half2float(row.x[column]);
        }
        return sum;
    }

    static __device__ __forceinline__ void add(int chunk, const uint4 &low, const uint4 &high, uint32_t, const Row &row,
                                               Sums &sums) {
        int first = chunk * CHUNK + threadIdx.x % 4 * 16;
        auto half = [&](const uint4 &words, int at) {
            return dot(words.x, at, row) + dot(words.y, at + 8, row) +
                   dot(words.z, at + BLOCK, row) + dot(words.w, at + BLOCK + 8, row);
        };
        sums.sum += half(low, first) + half(high, first + CHUNK / 2);
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = quad_sum(sums.sum); }
    static __device__ float result(const Value &total, const Activations &, const Constant &) { return total.value; }
};

MATVEC_KERNELS(nf4_nested, Nibbles<NestedAbsmax>, 2)
MATVEC_KERNELS(nf4_plain, Nibbles<PlainAbsmax>, 2)
MATVEC_KERNELS(nf4_nested_crossing, CrossingNibbles<NestedAbsmax>, 2)
MATVEC_KERNELS(nf4_plain_crossing, CrossingNibbles<PlainAbsmax>, 2)

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
    int place = unit % 8;
    int column = unit / 8 * 128 + place % 2 * BLOCK + place / 2 * 16;
    uint2 bytes = *(const uint2 *)(packed + (long long)row * stride + unit * 8);
    long long first = (long long)row * k;
    __align__(16) __half decoded[16];
    if (column >= k) return;
    int block = (int)((first + column) / BLOCK);
    float scale = Absmax::of_block(part, block, absmax_values);
#pragma unroll
    for (int at = 0; at < 16; at++) {
        int of = (int)((first + column + at) / BLOCK);
        if (of != block && column + at < k) {
            block = of;
            scale = Absmax::of_block(part, block, absmax_values);
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
