// LLM.int8 as bitsandbytes computes it: outlier columns over all rows of the call, int8 products, no host in between.
//
//   outlier column c:  |x[r, c]| >= threshold for any row r
//   a[r]   = max |x[r, c]| over the entries below the threshold (those of outlier columns too)
//   q[r,c] = round_half_even(x[r, c] * (127 / a[r])), 0 in outlier columns
//   y      = fp16(sum_c q[r, c] W[n, c] * a[r] * s[n] * 6.200012e-05)
//            + sum over outlier columns x[r, c] * fp16(W[n, c] * s[n] / 127), rounded to fp16 once more
//
// W [n, k] int8 codes, s [n] row absmax. Rows of W and q are padded with zeros to `stride`, a multiple of 128 bytes:
//   |k codes ......|0 0 0|
// One row of x is the streaming product below. Few rows: quantize_few -> cuBLAS' int8 product -> finish_rows. More: outlier_flags ->
// outlier_list -> quantize_rows before these. All on one stream. Sums int32 and fp32.

#include "quant/step.cuh"

constexpr int QUANTIZE_THREADS = 256, FEW_THREADS = 1024;
constexpr int LIST_THREADS = 1024, LISTED_AT_ONCE = 16;
// bitsandbytes' CUDA constant for 1/127², and its fp32 1/127.
constexpr float PER_127_SQUARED = 6.200012e-05f;
constexpr float PER_127 = 0.007874015718698502f;

struct __align__(16) Eight {
    __half values[8];
};

// Loads 8 neighbours of a row, zeros behind its end: as one word where rows consist of whole words.
__device__ __forceinline__ Eight eight_from(const __half *row, int column, int k) {
    Eight eight;
    if (k % 8 == 0) {
        *(uint4 *)&eight = column < k ? *(const uint4 *)(row + column) : make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) eight.values[i] = column + i < k ? row[column + i] : __float2half_rn(0.0f);
    }
    return eight;
}

// Flags of 8 columns: a bit is set where one of the rows first, first + step, ... has an outlier.
__device__ __forceinline__ uint32_t outliers_among(const __half *x, int column, int first, int step, int m, int k, float threshold) {
    uint32_t flags = 0;
#pragma unroll 4
    for (int row = first; row < m; row += step) {
        const Eight eight = eight_from(x + (long long)row * k, column, k);
#pragma unroll
        for (int i = 0; i < 8; i++) flags |= (uint32_t)(fabsf(__half2float(eight.values[i])) >= threshold) << i;
    }
    return flags;
}

// Lists the flagged columns in ascending order, so that later sums have a fixed order. A round takes 1024 times 16 columns, a thread 16
// neighbours, whose flags `flagged_from` returns. Prefix sums over a warp and over the 32 warps give each thread its index.
template <class Flagged>
__device__ __forceinline__ void list_outliers(Flagged flagged_from, int *columns, int *count, unsigned long long *total, int stride) {
    __shared__ int warp_counts[LIST_THREADS / LANES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int listed = 0;
    for (int first = 0; first < stride; first += LIST_THREADS * LISTED_AT_ONCE) {
        const int own = first + threadIdx.x * LISTED_AT_ONCE;
        uint32_t flagged = own < stride ? flagged_from(own) : 0;
        // Prefix sum within the warp.
        int rank = __popc(flagged);
#pragma unroll
        for (int distance = 1; distance < LANES; distance *= 2) {
            const int other = __shfl_sync(ALL_LANES, rank, max(lane - distance, 0));
            if (lane >= distance) rank += other;
        }
        if (lane == LANES - 1) warp_counts[warp] = rank;
        __syncthreads();
        const int of_lane = warp_counts[lane];
        int at = listed + warp_sum(lane < warp ? of_lane : 0) + rank - __popc(flagged);
        listed += warp_sum(of_lane);
        for (; flagged; flagged &= flagged - 1) columns[at++] = own + __ffs(flagged) - 1;
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    *count = listed;
    if (total) *total += listed;
}

// A block encodes a row; a thread takes 8 neighbours at a time.
template <int THREADS>
__device__ __forceinline__ void quantize_row(const __half *x_row, const uint8_t *flags, int8_t *codes, float *absmax, int k, int stride,
                                             float threshold) {
    __shared__ float of_warps[THREADS / LANES];
    const int lane = threadIdx.x % LANES;
    float largest = 0.0f;
    for (int column = 8 * threadIdx.x; column < k; column += 8 * THREADS) {
        const Eight eight = eight_from(x_row, column, k);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float magnitude = fabsf(__half2float(eight.values[i]));
            if (!(magnitude >= threshold)) largest = larger(largest, magnitude);
        }
    }
    largest = warp_max(largest);
    if (lane == 0) of_warps[threadIdx.x / LANES] = largest;
    __syncthreads();
    largest = warp_max(lane < THREADS / LANES ? of_warps[lane] : 0.0f);
    if (threadIdx.x == 0) *absmax = largest;
    // Two roundings, of the reciprocal and of the product, as on the CPU. A zero row stays zero.
    const float scale = largest == 0.0f ? 0.0f : __fmul_rn(__frcp_rn(largest), 127.0f);
    for (int column = 8 * threadIdx.x; column < stride; column += 8 * THREADS) {
        const Eight eight = eight_from(x_row, column, k);
        const uint32_t flagged = flags[column / 8];
        __align__(8) int8_t made[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const bool opaque = column + i < k && !(flagged >> i & 1);
            made[i] = opaque ? __float2int_rn(__half2float(eight.values[i]) * scale) : 0;
        }
        *(uint2 *)(codes + column) = *(const uint2 *)made;
    }
}

// A thread examines 8 columns of one of gridDim.y parts of the rows and writes a byte of flags, a bit for each column.
extern "C" __global__ void int8_outlier_flags(
    const __half *__restrict__ x,  // [m, k]
    uint8_t *__restrict__ flags,   // [gridDim.y, stride / 8]
    int m, int k, int stride, float threshold) {
    const int byte = blockIdx.x * blockDim.x + threadIdx.x;
    if (byte >= stride / 8) return;
    flags[blockIdx.y * (stride / 8) + byte] = outliers_among(x, 8 * byte, blockIdx.y, gridDim.y, m, k, threshold);
}

// One block merges the flags of all parts into the first part and lists the columns.
extern "C" __global__ void __launch_bounds__(LIST_THREADS) int8_outlier_list(
    uint8_t *flags,                          // [parts, stride / 8]
    int *__restrict__ columns,               // [k], the first *count are written
    int *__restrict__ count,                 // [1]
    unsigned long long *__restrict__ total,  // [1], the count is added; or null
    int parts, int stride) {
    auto joined = [&](int column) {
        uint32_t flagged = 0;
#pragma unroll 4
        for (int part = 0; part < parts; part++) flagged |= *(const uint16_t *)(flags + (part * stride + column) / 8);
        *(uint16_t *)(flags + column / 8) = (uint16_t)flagged;
        return flagged;
    };
    list_outliers(joined, columns, count, total, stride);
}

// A block owns one row.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) int8_quantize_rows(
    const __half *__restrict__ x,       // [m, k]
    const uint8_t *__restrict__ flags,  // [stride / 8]
    int8_t *__restrict__ codes,         // [m, stride]
    float *__restrict__ row_absmax,     // [m]
    int k, int stride, float threshold) {
    quantize_row<QUANTIZE_THREADS>(x + (long long)blockIdx.x * k, flags, codes + (long long)blockIdx.x * stride, row_absmax + blockIdx.x, k,
                                   stride, threshold);
}

// Flags, list and codes in one launch, for few rows: a block owns one row and examines all of them. Shared memory: flags [stride / 8].
extern "C" __global__ void __launch_bounds__(FEW_THREADS) int8_quantize_few(
    const __half *__restrict__ x,            // [m, k]
    int *__restrict__ columns,               // [k], the first *count are written
    int *__restrict__ count,                 // [1]
    unsigned long long *__restrict__ total,  // [1], the count is added; or null
    int8_t *__restrict__ codes,              // [m, stride]
    float *__restrict__ row_absmax,          // [m]
    int m, int k, int stride, float threshold) {
    DYNAMIC_SHARED(uint16_t, flags_of_16);
    uint8_t *flags = (uint8_t *)flags_of_16;
    for (int byte = threadIdx.x; byte < stride / 8; byte += FEW_THREADS) flags[byte] = outliers_among(x, 8 * byte, 0, 1, m, k, threshold);
    __syncthreads();
    quantize_row<FEW_THREADS>(x + (long long)blockIdx.x * k, flags, codes + (long long)blockIdx.x * stride, row_absmax + blockIdx.x, k, stride,
                              threshold);
    if (blockIdx.x != 0) return;
    list_outliers([&](int column) { return (uint32_t)flags_of_16[column / 16]; }, columns, count, total, stride);
}

// An output from its int8 sum and the sum of its outlier columns.
__device__ __forceinline__ float join(int product, float row_absmax, float scale, float outlier) {
    float scaled = __fmul_rn(__fmul_rn(__int2float_rn(product), row_absmax), scale);
    __half regular = __float2half_rn(__fmul_rn(scaled, PER_127_SQUARED));
    return __half2float(__float2half_rn(__half2float(regular) + outlier));
}

// A dequantized weight of an outlier column.
__device__ __forceinline__ float outlier_weight(int code, float scale) {
    return __half2float(__float2half_rn(__fmul_rn(__fmul_rn((float)code, scale), PER_127)));
}

// The int8 product for shapes that cuBLAS does not support: a thread owns one sum.
extern "C" __global__ void int8_products(
    const uint4 *__restrict__ codes,   // [m, stride / 16]
    const uint4 *__restrict__ weight,  // [n, stride / 16]
    int *__restrict__ products,        // [m, n]
    int m, int n, int stride) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)m * n) return;
    const uint4 *x = codes + at / n * (stride / 16), *w = weight + at % n * (stride / 16);
    int sum = 0;
    for (int chunk = 0; chunk < stride / 16; chunk++) {
        uint4 a = x[chunk], b = w[chunk];
        sum = __dp4a((int)a.x, (int)b.x, __dp4a((int)a.y, (int)b.y, sum));
        sum = __dp4a((int)a.z, (int)b.z, __dp4a((int)a.w, (int)b.w, sum));
    }
    products[at] = sum;
}

// Many rows, behind the int8 product: a block owns FINISH_COLUMNS outputs of FINISH_ROWS rows at a time, and a thread FINISH_WIDTH
// neighbours of every FINISH_STEP-th row. Shared memory holds weights and activations of FINISH_OUTLIERS outlier columns at a time.
constexpr int FINISH_COLUMNS = 64, FINISH_ROWS = 32, FINISH_OUTLIERS = 32, FINISH_THREADS = 256, FINISH_WIDTH = 4;
constexpr int FINISH_STEP = FINISH_THREADS / (FINISH_COLUMNS / FINISH_WIDTH);

extern "C" __global__ void __launch_bounds__(FINISH_THREADS, 2) int8_finish_rows(
    const int *__restrict__ products,         // [m, n]
    const int8_t *__restrict__ weight,        // [n, stride]
    const float *__restrict__ weight_absmax,  // [n]
    const float *__restrict__ row_absmax,     // [m]
    const int *__restrict__ columns,          // [*count]
    const int *__restrict__ count,            // [1]
    const __half *__restrict__ x,             // [m, k]
    __half *__restrict__ y,                   // [m, n]
    int m, int n, int k, int stride) {
    // Rows of whole words, padded by one bank.
    __shared__ __align__(16) float weights[FINISH_OUTLIERS][FINISH_COLUMNS + FINISH_WIDTH];
    __shared__ float values[FINISH_ROWS][FINISH_OUTLIERS + 1];
    constexpr int GROUPS = FINISH_COLUMNS / FINISH_WIDTH;
    const int first_column = blockIdx.x * FINISH_COLUMNS, in_block = threadIdx.x % GROUPS * FINISH_WIDTH, row_of_thread = threadIdx.x / GROUPS;
    const int column = first_column + in_block, outliers = *count;
    float scales[FINISH_WIDTH];
#pragma unroll
    for (int j = 0; j < FINISH_WIDTH; j++) scales[j] = column + j < n ? weight_absmax[column + j] : 0.0f;
    for (int first_row = blockIdx.y * FINISH_ROWS; first_row < m; first_row += gridDim.y * FINISH_ROWS) {
        float sums[FINISH_ROWS / FINISH_STEP][FINISH_WIDTH] = {};
        for (int first = 0; first < outliers; first += FINISH_OUTLIERS) {
            const int resident = min(FINISH_OUTLIERS, outliers - first);
            __syncthreads();
            for (int at = threadIdx.x; at < FINISH_OUTLIERS * FINISH_COLUMNS; at += FINISH_THREADS) {
                const int outlier = at % FINISH_OUTLIERS, rows_per_block = at / FINISH_OUTLIERS;
                if (outlier >= resident || first_column + rows_per_block >= n) continue;
                const int8_t code = weight[(long long)(first_column + rows_per_block) * stride + columns[first + outlier]];
                weights[outlier][rows_per_block] = outlier_weight(code, weight_absmax[first_column + rows_per_block]);
            }
            for (int at = threadIdx.x; at < FINISH_OUTLIERS * FINISH_ROWS; at += FINISH_THREADS) {
                const int outlier = at % FINISH_OUTLIERS, row = at / FINISH_OUTLIERS;
                if (outlier >= resident || first_row + row >= m) continue;
                values[row][outlier] = __half2float(x[(long long)(first_row + row) * k + columns[first + outlier]]);
            }
            __syncthreads();
#pragma unroll 1
            for (int outlier = 0; outlier < resident; outlier++) {
                const float4 of_columns = *(const float4 *)&weights[outlier][in_block];
#pragma unroll
                for (int i = 0; i < FINISH_ROWS / FINISH_STEP; i++) {
                    const float value = values[row_of_thread + i * FINISH_STEP][outlier];
                    sums[i][0] += of_columns.x * value, sums[i][1] += of_columns.y * value;
                    sums[i][2] += of_columns.z * value, sums[i][3] += of_columns.w * value;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < FINISH_ROWS / FINISH_STEP; i++) {
            const int row = first_row + row_of_thread + i * FINISH_STEP;
            if (row >= m || column >= n) continue;
            const long long at = (long long)row * n + column;
            __align__(16) int made[FINISH_WIDTH];
            __align__(8) __half rounded[FINISH_WIDTH];
            if (n % FINISH_WIDTH == 0)
                *(uint4 *)made = *(const uint4 *)(products + at);
            else
                for (int j = 0; j < FINISH_WIDTH; j++) made[j] = column + j < n ? products[at + j] : 0;
#pragma unroll
            for (int j = 0; j < FINISH_WIDTH; j++) rounded[j] = __float2half_rn(join(made[j], row_absmax[row], scales[j], sums[i][j]));
            if (n % FINISH_WIDTH == 0)
                *(uint2 *)(y + at) = *(const uint2 *)rounded;
            else
                for (int j = 0; j < FINISH_WIDTH && column + j < n; j++) y[at + j] = rounded[j];
        }
    }
}

// One row: every block quantizes x itself and finds the outliers of each chunk, which are multiplied from the same bytes.
struct Bytes {
    static constexpr int CHUNK = 128, CONVERTED_EIGHTHS = 9;
    struct Shared {};
    using SideData = NoSideData;
    static constexpr bool HAS_ROW_SCALES = true;
    static constexpr int WORDS_HELD = HAS_BULK_COPIES ? 2 : 1;
    struct Partial {
        int product;
        float outlier;
        __device__ void add(const Partial &other) {
            product += other.product;
            outlier += other.outlier;
        }
    };
    struct Sums {
        int products[4];
        float outlier;
    };
    struct Activations {
        uint32_t x;
        uint32_t codes;
        uint32_t outliers;  // a bit an element: four words a chunk, one for each lane of a row, its low half's 16 bits first
        float absmax;
    };
    struct Row {
        uint32_t codes, outliers;
        // Read for outliers only: the offset of x from twice the address of its codes.
        uint32_t x_behind;
        const float *scale;
        __device__ void set(const Shared &, const MatrixPart &part, const Activations &from, int, int row, int lane, int chunk) {
            const uint32_t half = lane / 4 % 2 * 64;
            codes = from.codes + half + lane % 4 * 16 + chunk * CHUNK;
            outliers = from.outliers + chunk * 16 + lane % 4 * 4;
            x_behind = from.x - 2 * (from.codes + half);
            scale = (const float *)part.scales + row;
        }
    };

    // A thread takes eight elements at a time, and all inputs in one pass; the first eight of each stay in registers. Magnitudes of halves compare
    // as their bits do.
    static __device__ void convert(Activations (&to)[MAX_INPUTS], const Shared &, const Matvec &matvec, const __half *x, uint8_t *free_bytes,
                                   float (&room)[MAX_INPUTS * WARPS]) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        const uint32_t threshold = first_outlier(matvec.threshold) * 0x10001u;
        uint4 first[MAX_INPUTS] = {};
        uint32_t of_first[MAX_INPUTS] = {};
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++) {
            if (i >= matvec.n_inputs) break;
            const int padded = matvec.inputs[i].padded;
            const uint4 *eights = (const uint4 *)(x + i * matvec.inputs[0].padded);
            uint32_t *bits = (uint32_t *)(free_bytes + i * behind(matvec.inputs[0].padded) + padded);
            uint32_t largest = 0;
#pragma unroll 1
            for (int at = threadIdx.x; at < padded / 8; at += THREADS) {
                uint4 eight = eights[at];
                if (at < padded / 32) bits[at] = 0;
                const uint32_t found = remove_outliers(eight, threshold);
                if (at == threadIdx.x) first[i] = eight, of_first[i] = found;
                const uint32_t low = larger_halves(eight.x & MAGNITUDES, eight.y & MAGNITUDES);
                largest = larger_halves(largest, larger_halves(low, larger_halves(eight.z & MAGNITUDES, eight.w & MAGNITUDES)));
            }
            largest = warp_largest(max(largest & 0xffff, largest >> 16));
            if (lane == 0) room[i * WARPS + warp] = __half2float(__ushort_as_half((unsigned short)largest));
        }
        barrier_sync();
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++) {
            if (i >= matvec.n_inputs) break;
            const int padded = matvec.inputs[i].padded;
            const uint4 *eights = (const uint4 *)(x + i * matvec.inputs[0].padded);
            uint8_t *made = free_bytes + i * behind(matvec.inputs[0].padded);
            // Floats that are not negative compare as their bits do; NaN is the largest.
            const float largest = __uint_as_float(warp_largest(__float_as_uint(room[i * WARPS + lane % WARPS])));
            // Two roundings, of the reciprocal and of the product, as on the CPU. A zero row stays zero.
            const float scale = largest == 0.0f ? 0.0f : __fmul_rn(__frcp_rn(largest), 127.0f);
#pragma unroll 1
            for (int at = threadIdx.x; at < padded / 8; at += THREADS) {
                uint4 eight = first[i];
                uint32_t found = of_first[i];
                if (at != threadIdx.x) eight = eights[at], found = remove_outliers(eight, threshold);
                ((uint2 *)made)[at] = make_uint2(codes_of(eight.x, eight.y, scale), codes_of(eight.z, eight.w, scale));
                if (!found) continue;
                atomicOr((uint32_t *)(made + padded) + at / 16 * 4 + at / 2 % 4, found << (at / 8 % 2 * 16 + at % 2 * 8));
                // Every block finds the same outliers; the last block always has rows and counts them.
                if (matvec.outlier_columns && blockIdx.x == gridDim.x - 1) atomicAdd(matvec.outlier_columns, (unsigned long long)__popc(found));
            }
            if (threadIdx.x == 0) to[i] = {shared_address(eights), shared_address(made), shared_address(made + padded), largest};
        }
    }
    // Bytes of codes and outlier bits.
    static __device__ __forceinline__ int behind(int padded) { return padded + padded / 8; }
    static constexpr uint32_t MAGNITUDES = 0x7fff7fff, FIRST_NAN = 0x7c017c01;
    // The bits of the smallest half that is an outlier.
    static __device__ __forceinline__ uint32_t first_outlier(float threshold) {
        if (isnan(threshold)) return 0x7fff;
        const __half nearest = __float2half_rn(threshold);
        return __half_as_ushort(nearest) + (__half2float(nearest) < threshold ? 1 : 0);
    }
    // A bit for each outlier among the eight, which become zero.
    static __device__ __forceinline__ uint32_t remove_outliers(uint4 &eight, uint32_t threshold) {
        // Magnitudes and threshold have 15 bits: the 16th says that the difference is not negative.
        auto at_least = [](uint32_t pair, uint32_t least) { return ((pair | ~MAGNITUDES) - least) & ~MAGNITUDES; };
        uint32_t x = at_least(eight.x, threshold), y = at_least(eight.y, threshold), z = at_least(eight.z, threshold),
                 w = at_least(eight.w, threshold);
        if ((x | y | z | w) == 0) return 0;
        // NaN is no outlier.
        x &= ~at_least(eight.x, FIRST_NAN), y &= ~at_least(eight.y, FIRST_NAN), z &= ~at_least(eight.z, FIRST_NAN), w &= ~at_least(eight.w, FIRST_NAN);
        auto opaque = [](uint32_t pair, uint32_t outliers) { return pair & ~((outliers >> 15) * 0xffff); };
        auto two = [](uint32_t outliers) { return (outliers >> 15 & 1) | (outliers >> 30 & 2); };
        eight = make_uint4(opaque(eight.x, x), opaque(eight.y, y), opaque(eight.z, z), opaque(eight.w, w));
        return two(x) | two(y) << 2 | two(z) << 4 | two(w) << 6;
    }
    static __device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
    // Four codes: the nearest integers, half to even, in low bytes of sums whose last place is 1.
    static __device__ __forceinline__ uint32_t codes_of(uint32_t low, uint32_t high, float scale) {
        const float2 a = __half22float2(*(const __half2 *)&low), b = __half22float2(*(const __half2 *)&high);
        auto nearest = [&](float value) { return __float_as_uint(__fadd_rn(__fmul_rn(value, scale), 12582912.0f)); };
        return __byte_perm(__byte_perm(nearest(a.x), nearest(a.y), 0x0040), __byte_perm(nearest(b.x), nearest(b.y), 0x0040), 0x5410);
    }
    static __device__ void prepare(Shared &, const float *) {}

    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t words, uint32_t, Row &row, Sums &sums) {
        uint4 x = load_shared_16(row.codes);
        uint32_t outliers = load_shared(row.outliers);
        multiply_bytes(sums.products, low.x, high.x, low.y, high.y, x.x, x.y);
        multiply_bytes(sums.products, low.z, high.z, low.w, high.w, x.z, x.w);
        if (outliers) {
            const uint32_t of_chunk = 2 * row.codes + row.x_behind;
            float scale = __ldg(row.scale);
#pragma unroll 1
            do {
                uint32_t at = __ffs(outliers) - 1;
                outliers &= outliers - 1;
                uint32_t word = load_copied(words + at / 16 * (CHUNK_BYTES / 2) + at % 16 / 4 * 4);
                float weight = outlier_weight((int8_t)(word >> at % 4 * 8), scale);
                uint32_t pair = load_shared(of_chunk + at % 16 / 2 * 4 + at / 16 * 128);
                sums.outlier += weight * __half2float(__ushort_as_half((unsigned short)(pair >> at % 2 * 16)));
            } while (outliers);
        }
        row.codes += CHUNK;
        row.outliers += 16;
    }
    static __device__ void partial(const Sums &sums, Partial &of_row) {
        of_row = {sums.products[0] + sums.products[3], quad_sum(sums.outlier)};
    }
    static __device__ float result(const Partial &total, const Activations &from, float scale) {
        return join(total.product, from.absmax, scale, total.outlier);
    }
};

STEP_KERNEL(int8, Bytes, STAGES)
