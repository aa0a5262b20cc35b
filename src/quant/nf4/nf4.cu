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
// One row of x: one look-up in shared memory turns a byte into two fp16 values. The table has copies, so that lanes have no bank conflicts.
// Tensor cores sum a block in fp32, and its absmax multiplies the sum once. Only the 16 code values are rounded to fp16. Where blocks cross
// rows (k not a multiple of 64) a plain loop does the same.
// Many rows: `dequantize`, then cuBLAS.

#include "quant/step.cuh"

constexpr int BLOCK = 64;

// The absmax of a step's blocks: the words that lanes copy, and the part of them that a lane reads for its own block.
struct NestedAbsmax {
    // Lanes 0 .. 15 copy absmax codes, two words a row, since a row's four codes may straddle words. The other lanes copy the nested absmax of the
    // first block and of the last one.
    static __device__ int row_of(int lane) { return lane % 16 / 2; }
    static __device__ const uint32_t *base_of(const MatrixPart &part, int lane) {
        return (const uint32_t *)(lane < 16 ? part.scales : part.nested);
    }
    static __device__ int shift_of(int lane) { return lane < 16 ? 2 : 8; }
    static __device__ int offset_of(int lane) { return lane % 2 * (lane < 16 ? 4 : 3); }
    // A lane's reads from these words: the byte of its own block among its row's eight, and the nested absmax. That is the last block's where the
    // index of the step's first block among 256, in the top byte of `place`, is above `limit`.
    struct Reader {
        uint32_t code, nested, place, limit;
        __device__ void set(int block, int row, int quarter) {
            code = row * 8 + (block & 3) + quarter;
            nested = row * 8;
            place = (uint32_t)block << 24;
            limit = (uint32_t)(255 - quarter) << 24;
        }
        // The absmax of this step; moves on to the next step.
        __device__ float next(uint32_t words, uint32_t absmax_code, float offset) {
            float of_code = __uint_as_float(load_shared(word_at(absmax_code, load_copied_byte(words + code))));
            uint32_t of_nested = load_copied(words + nested + (place > limit ? 68 : 64));
            place += 4u << 24;
            return __fadd_rn(__fmul_rn(of_code, __uint_as_float(of_nested)), offset);
        }
    };
    static __device__ float rows_per_block(const MatrixPart &part, int block, const float *absmax_code) {
        uint32_t code = ((const uint8_t *)part.scales)[block];
        return __fadd_rn(__fmul_rn(absmax_code[code], part.nested[block >> 8]), part.offset);
    }
};

struct PlainAbsmax {
    static __device__ int row_of(int lane) { return lane / 4; }
    static __device__ const uint32_t *base_of(const MatrixPart &part, int) { return (const uint32_t *)part.scales; }
    static __device__ int shift_of(int) { return 0; }
    static __device__ int offset_of(int lane) { return lane % 4; }
    struct Reader {
        uint32_t at;
        __device__ void set(int, int row, int quarter) { at = row * 16 + quarter * 4; }
        __device__ float next(uint32_t words, uint32_t, float) { return __uint_as_float(load_copied(words + at)); }
    };
    static __device__ float rows_per_block(const MatrixPart &part, int block, const float *) { return ((const float *)part.scales)[block]; }
};

// Copies of the table: 32 on chips whose memory feeds an SM more weights than 8 copies can look up; fewer on others, which need the shared
// memory, Turing most of all.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int COPY_BITS = 5;
#elif __CUDA_ARCH__ >= 800
constexpr int COPY_BITS = 4;
#else
constexpr int COPY_BITS = 2;
#endif

template <class Absmax>
struct Nibbles {
    static constexpr int CHUNK = 256, CONVERTED_EIGHTHS = 0, COPIES = 1 << COPY_BITS;
    struct Shared {
        __align__(16) uint32_t pairs[256 * COPIES];  // filled by 16 bytes at a time
        float absmax_code[256];
    };
    // Blocks behind the row's last one are padding: their activations are zero, their absmax is arbitrary.
    struct SideData {
        static constexpr int WORDS = 1;
        const uint32_t *base;
        int block, last;
        static __device__ int row_of(int lane) { return Absmax::row_of(lane); }
        __device__ void set(const MatrixPart &part, int k, int row, int chunk) {
            const int lane = threadIdx.x % LANES, blocks = k / BLOCK;
            base = Absmax::base_of(part, lane);
            block = row * blocks + 4 * chunk + Absmax::offset_of(lane);
            last = row * blocks + blocks - 1;
        }
        __device__ void copy(uint32_t to) {
            const int lane = threadIdx.x % LANES;
            copy_word(to + 4 * lane, base + (min(block, last) >> Absmax::shift_of(lane)));
            block += 4;
        }
    };
    // Addresses of tables, stored in shared memory: the compiler would recompute them in every step.
    struct Activations {
        uint32_t x, pairs, absmax_code;
    };
    struct Row {
        // Address of this lane's 16 elements of the low half's first block, eight here and eight at x ^ 16; for the high half the other eight
        // come first, so that the two halves use different banks.
        uint32_t x;
        uint32_t pairs;  // the lane's copy
        uint32_t absmax_code;
        float offset;
        typename Absmax::Reader absmax;
        int scaled;  // the block that this lane scales
        __device__ void set(const Shared &, const MatrixPart &part, const Activations &from, int k, int row, int lane, int chunk) {
            const uint32_t half = lane / 4 % 2, of_lane = from.x + half * CHUNK + lane % 4 * 32 + chunk * 2 * CHUNK;
            x = of_lane + 16 * half;
            pairs = from.pairs + lane % COPIES * 4;
            absmax_code = from.absmax_code;
            offset = part.offset;
            absmax.set(row * (k / BLOCK) + 4 * chunk, lane / 4, lane % 4);
            scaled = opaque(lane % 4);
        }
    };
    static __device__ void convert(Activations (&to)[MAX_VECTORS], const Shared &shared, const Matvec &matvec, const __half *x, uint8_t *,
                                   float (&)[MAX_VECTORS * WARPS]) {
        const int i = threadIdx.x;
        if (i < vectors_of(matvec))
            to[i] = {shared_address(x + i * matvec.inputs[0].padded), shared_address(shared.pairs), shared_address(shared.absmax_code)};
    }
    static constexpr bool HAS_ROW_SCALES = false;
    static constexpr int WORDS_HELD = 2;
    using Partial = Value;
    struct Sums {
        float scaled;
    };
    static __device__ void prepare(Shared &shared, const float *code) {
        for (int at = 4 * threadIdx.x; at < 256 * COPIES; at += 4 * THREADS) {
            int byte = at / COPIES;
            __half2 pair = __floats2half2_rn(__ldg(code + byte / 16), __ldg(code + byte % 16));
            uint32_t bits = *(const uint32_t *)&pair;
            *(uint4 *)(shared.pairs + at) = make_uint4(bits, bits, bits, bits);
        }
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(code + 16 + threadIdx.x);
    }

    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t, uint32_t extra, Row &row, Sums &sums) {
        // Decodes byte `at` of a word to two halves.
        auto pair = [&](uint32_t word, int at) {
            return load_shared(__byte_perm(word, 0, 0x4440 | at) * (4 * COPIES) + row.pairs);
        };
        auto multiply = [&](float (&sums_of_blocks)[4], uint32_t a, uint32_t b, const uint4 &x) {
            multiply_halves(sums_of_blocks, pair(a, 0), pair(b, 0), pair(a, 1), pair(b, 1), x.x, x.y);
            multiply_halves(sums_of_blocks, pair(a, 2), pair(b, 2), pair(a, 3), pair(b, 3), x.z, x.w);
        };
        // Blocks 0 and 2, then 1 and 3. Words of the high half go with its x.
        float even[4] = {}, odd[4] = {};
        multiply(even, low.x, high.y, load_shared_16(row.x));
        multiply(even, low.y, high.x, load_shared_16(row.x ^ 16));
        multiply(odd, low.z, high.w, load_shared_16(row.x + 2 * BLOCK));
        multiply(odd, low.w, high.z, load_shared_16((row.x ^ 16) + 2 * BLOCK));
        row.x += 2 * CHUNK;
        const bool is_odd = row.scaled & 1;
        float of_low = is_odd ? odd[0] : even[0], of_high = is_odd ? odd[3] : even[3];
        sums.scaled += row.absmax.next(extra, row.absmax_code, row.offset) * (row.scaled & 2 ? of_high : of_low);
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = quad_sum(sums.scaled); }
    static __device__ float result(const Value &total, const Activations &, float, float) { return total.value; }
};

// Blocks that cross rows: every element reads its own absmax.
template <class Absmax>
struct CrossingNibbles {
    static constexpr int CHUNK = 256, CONVERTED_EIGHTHS = 0;
    struct Shared {
        float code[16], absmax_code[256];
    };
    using SideData = NoSideData;
    struct Activations {
        const __half *x;
    };
    struct Row {
        const Shared *shared;
        const __half *x;
        const MatrixPart *part;
        int k, column;
        long long first;
        __device__ void set(const Shared &tables, const MatrixPart &of, const Activations &from, int columns, int row, int lane, int chunk) {
            shared = &tables;
            x = from.x;
            part = &of;
            k = columns;
            column = chunk * CHUNK + lane % 4 * 16;
            first = (long long)row * k;
        }
    };
    static constexpr bool HAS_ROW_SCALES = false;
    static constexpr int WORDS_HELD = 2;
    using Partial = Value;
    struct Sums {
        float sum;
    };
    static __device__ void convert(Activations (&to)[MAX_VECTORS], const Shared &, const Matvec &matvec, const __half *x, uint8_t *,
                                   float (&)[MAX_VECTORS * WARPS]) {
        if ((int)threadIdx.x < vectors_of(matvec)) to[threadIdx.x].x = x + threadIdx.x * matvec.inputs[0].padded;
    }

    static __device__ void prepare(Shared &shared, const float *code) {
        if (threadIdx.x < 16) shared.code[threadIdx.x] = __ldg(code + threadIdx.x);
        if (threadIdx.x < 256) shared.absmax_code[threadIdx.x] = __ldg(code + 16 + threadIdx.x);
    }

    // Eight elements, from `first_column` on.
    static __device__ float dot(uint32_t word, int first_column, const Row &row) {
        const Shared &shared = *row.shared;
        float sum = 0.0f;
        for (int at = 0; at < 8; at++) {
            int column = first_column + at;
            if (column >= row.k) break;
            float absmax = Absmax::rows_per_block(*row.part, (int)((row.first + column) / BLOCK), shared.absmax_code);
            int nibble = word >> (at / 2 * 8 + (at % 2 ? 0 : 4)) & 15;
            float weight = __fmul_rn(shared.code[nibble], absmax);
            sum += weight * __half2float(row.x[column]);
        }
        return sum;
    }

    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t, uint32_t, Row &row, Sums &sums) {
        auto half = [&](const uint4 &words, int at) {
            return dot(words.x, at, row) + dot(words.y, at + 8, row) +
                   dot(words.z, at + BLOCK, row) + dot(words.w, at + BLOCK + 8, row);
        };
        sums.sum += half(low, row.column) + half(high, row.column + CHUNK / 2);
        row.column += CHUNK;
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = quad_sum(sums.sum); }
    static __device__ float result(const Value &total, const Activations &, float, float) { return total.value; }
};

STEP_KERNEL(nf4_nested, Nibbles<NestedAbsmax>, STAGES_BESIDE_TABLES)
STEP_KERNEL(nf4_plain, Nibbles<PlainAbsmax>, STAGES_BESIDE_TABLES)
STEP_KERNEL(nf4_nested_crossing, CrossingNibbles<NestedAbsmax>, STAGES_BESIDE_TABLES)
STEP_KERNEL(nf4_plain_crossing, CrossingNibbles<PlainAbsmax>, STAGES_BESIDE_TABLES)

// Rows first_row .. end_row of the weight as fp16 [end_row - first_row, k], each value rounded once. A thread decodes a unit: 16 elements of one
// row, in one block unless blocks cross rows.
template <class Absmax>
__device__ __forceinline__ void dequantize(const uint8_t *packed, const MatrixPart &part, const float *code, __half *weight, int k,
                                           int stride, int first_row, int end_row) {
    __shared__ float values[16], absmax_values[256];
    if (threadIdx.x < 16) values[threadIdx.x] = code[threadIdx.x];
    absmax_values[threadIdx.x] = code[16 + threadIdx.x];
    __syncthreads();
    const unsigned units = stride / 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = first_row + index / units, unit = index % units;
    if (row >= end_row) return;
    int place = unit % 8;
    int column = unit / 8 * 128 + place % 2 * BLOCK + place / 2 * 16;
    uint2 bytes = *(const uint2 *)(packed + (long long)row * stride + unit * 8);
    __align__(16) __half decoded[16];
    if (column >= k) return;
    const unsigned long long first = (unsigned long long)row * k;
    const int block = (int)((first + column) / BLOCK), left = BLOCK - (int)((first + column) % BLOCK);
    float scale = Absmax::rows_per_block(part, block, absmax_values);
#pragma unroll
    for (int at = 0; at < 16; at++) {
        // The next block begins, in this row.
        if (at == left && column + at < k) scale = Absmax::rows_per_block(part, block + 1, absmax_values);
        int nibble = (at < 8 ? bytes.x : bytes.y) >> (at % 8 / 2 * 8 + (at % 2 ? 0 : 4)) & 15;
        decoded[at] = __float2half_rn(__fmul_rn(values[nibble], scale));
    }
    __half *out = weight + (long long)(row - first_row) * k + column;
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
    const __grid_constant__ MatrixPart part, const float *code, __half *weight, int k, int stride, int first_row, int end_row) {
    dequantize<NestedAbsmax>(part.weight, part, code, weight, k, stride, first_row, end_row);
}

extern "C" __global__ void __launch_bounds__(256) nf4_dequantize_plain(
    const __grid_constant__ MatrixPart part, const float *code, __half *weight, int k, int stride, int first_row, int end_row) {
    dequantize<PlainAbsmax>(part.weight, part, code, weight, k, stride, first_row, end_row);
}
