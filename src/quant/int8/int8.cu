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

#include "quant/int8/bytes.cuh"
#include "quant/step.cuh"

constexpr int QUANTIZE_THREADS = 256, FEW_THREADS = 1024;
constexpr int LIST_THREADS = 1024, LISTED_AT_ONCE = 16;

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
    let_next_start();
    wait_for_launch_before();
    DYNAMIC_SHARED(uint16_t, flags_of_16);
    uint8_t *flags = (uint8_t *)flags_of_16;
    for (int byte = threadIdx.x; byte < stride / 8; byte += FEW_THREADS) flags[byte] = outliers_among(x, 8 * byte, 0, 1, m, k, threshold);
    __syncthreads();
    quantize_row<FEW_THREADS>(x + (long long)blockIdx.x * k, flags, codes + (long long)blockIdx.x * stride, row_absmax + blockIdx.x, k, stride,
                              threshold);
    if (blockIdx.x != 0) return;
    list_outliers([&](int column) { return (uint32_t)flags_of_16[column / 16]; }, columns, count, total, stride);
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

// Two neighbouring outputs at `at`, of which the second may be behind the row's end.
__device__ __forceinline__ void finish_two(const int *products, const float *weight_absmax, float row_absmax, float scale, __half *y, long long at, int column, int n, float first, float second) {
    auto made = [&](int product, int j) { return __float2half_rn(join(product, row_absmax, weight_absmax[column + j], j ? second : first, scale)); };
    if (n % 2 == 0) {
        const int2 both = *(const int2 *)(products + at);
        *(__half2 *)(y + at) = __halves2half2(made(both.x, 0), made(both.y, 1));
    } else {
        for (int j = 0; j < 2 && column + j < n; j++) y[at + j] = made(products[at + j], j);
    }
}

// Many rows, behind the int8 product: a block owns FINISH_COLUMNS outputs of FINISH_ROWS rows at a time, a warp 32 by 16 of them. Tensor cores
// multiply FINISH_OUTLIERS outlier columns at a time, which all threads gather: a lane always the same one of them, so that all its loads are
// under way at once, those of the next ones during the products. Rows of an odd number of 16-byte words have no bank conflicts.
constexpr int FINISH_COLUMNS = 64, FINISH_ROWS = 64, FINISH_OUTLIERS = 32, FINISH_THREADS = 256;
constexpr int FINISH_STRIDE = FINISH_OUTLIERS + 8, FINISH_WARPS = FINISH_THREADS / LANES, GATHERED = FINISH_ROWS / FINISH_WARPS;
static_assert(FINISH_OUTLIERS == LANES && FINISH_COLUMNS == FINISH_ROWS, "a lane for each outlier column, as many rows as columns for a warp");

extern "C" __global__ void __launch_bounds__(FINISH_THREADS, 2) int8_finish_rows(
    const int *__restrict__ products,         // [m, n]
    const int8_t *__restrict__ weight,        // [n, stride]
    const float *__restrict__ weight_absmax,  // [n]
    const float *__restrict__ row_absmax,     // [m]
    const int *__restrict__ columns,          // [*count]
    const int *__restrict__ count,            // [1]
    const __half *__restrict__ x,             // [m, k]
    __half *__restrict__ y,                   // [m, n]
    float scale,                              // a power of two that y is stored by
    int m, int n, int k, int stride) {
    __shared__ __align__(16) __half values[2][FINISH_ROWS][FINISH_STRIDE], weights[2][FINISH_COLUMNS][FINISH_STRIDE];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, first_column = blockIdx.x * FINISH_COLUMNS, outliers = *count;
    // Of the fragments: 16 rows, and 32 columns.
    const int warp_row = warp % 4 * 16, warp_column = warp / 4 * 32;
    const uint32_t from_values = shared_address(&values[0][warp_row + lane % 16][lane / 16 * 8]);
    const uint32_t from_weights = shared_address(&weights[0][warp_column + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    constexpr uint32_t BUFFER_BYTES = FINISH_ROWS * FINISH_STRIDE * sizeof(__half), ROWS_16 = 16 * FINISH_STRIDE * sizeof(__half);
    float scales[GATHERED];
#pragma unroll
    for (int i = 0; i < GATHERED; i++) {
        const int column = first_column + warp + i * FINISH_WARPS;
        scales[i] = column < n ? weight_absmax[column] : 0.0f;
    }
    for (int first_row = blockIdx.y * FINISH_ROWS; first_row < m; first_row += gridDim.y * FINISH_ROWS) {
        __half gathered[GATHERED];
        int8_t codes[GATHERED];
        auto gather = [&](int first) {
            const bool is_there = first + lane < outliers;
            const int column = is_there ? columns[first + lane] : 0;
#pragma unroll
            for (int i = 0; i < GATHERED; i++) {
                const int row = first_row + warp + i * FINISH_WARPS, output = first_column + warp + i * FINISH_WARPS;
                gathered[i] = is_there && row < m ? x[(long long)row * k + column] : __float2half_rn(0.0f);
                codes[i] = is_there && output < n ? weight[(long long)output * stride + column] : 0;
            }
        };
        float sums[4][4] = {};
        int buffer = 0;
        if (outliers > 0) gather(0);
        for (int first = 0; first < outliers; first += FINISH_OUTLIERS, buffer ^= 1) {
#pragma unroll
            for (int i = 0; i < GATHERED; i++) {
                values[buffer][warp + i * FINISH_WARPS][lane] = gathered[i];
                weights[buffer][warp + i * FINISH_WARPS][lane] = __float2half_rn(outlier_weight(codes[i], scales[i]));
            }
            // Behind it nobody reads the other buffer any more.
            __syncthreads();
            if (first + FINISH_OUTLIERS < outliers) gather(first + FINISH_OUTLIERS);
#pragma unroll
            for (int step = 0; step < FINISH_OUTLIERS / 16; step++) {
                uint32_t a[4];
                load_matrices(a, from_values + buffer * BUFFER_BYTES + step * 32);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    uint32_t b[4];
                    load_matrices(b, from_weights + buffer * BUFFER_BYTES + pair * ROWS_16 + step * 32);
                    multiply_halves(sums[2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
                    multiply_halves(sums[2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                }
            }
        }
        // The next rows begin with the first buffer.
        if (outliers > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int tile = i / 2, row = first_row + warp_row + lane / 4 + i % 2 * 8, column = first_column + warp_column + tile * 8 + lane % 4 * 2;
            if (row < m && column < n) finish_two(products, weight_absmax, row_absmax[row], scale, y, (long long)row * n + column, column, n, sums[tile][i % 2 * 2], sums[tile][i % 2 * 2 + 1]);
        }
    }
}

// Where there are enough rows the outlier columns are gathered first, as fp16 rows of `stride` elements of which whole FINISH_OUTLIERS are written: of
// the activations once, of each matrix once. A block owns a row.
extern "C" __global__ void __launch_bounds__(FINISH_THREADS) int8_gather_rows(
    const __half *__restrict__ x,      // [m, k]
    const int *__restrict__ columns,   // [*count]
    const int *__restrict__ count,     // [1]
    __half *__restrict__ gathered,     // [m, stride]
    int k, int stride) {
    const int outliers = *count, padded = (outliers + FINISH_OUTLIERS - 1) / FINISH_OUTLIERS * FINISH_OUTLIERS;
    for (int at = threadIdx.x; at < padded; at += FINISH_THREADS)
        gathered[(long long)blockIdx.x * stride + at] = at < outliers ? x[(long long)blockIdx.x * k + columns[at]] : __float2half_rn(0.0f);
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS) int8_gather_weights(
    const int8_t *__restrict__ weight,        // [n, stride]
    const float *__restrict__ weight_absmax,  // [n]
    const int *__restrict__ columns,          // [*count]
    const int *__restrict__ count,            // [1]
    __half *__restrict__ gathered,            // [n, stride]
    int stride) {
    const int outliers = *count, padded = (outliers + FINISH_OUTLIERS - 1) / FINISH_OUTLIERS * FINISH_OUTLIERS;
    const float scale = weight_absmax[blockIdx.x];
    for (int at = threadIdx.x; at < padded; at += FINISH_THREADS)
        gathered[(long long)blockIdx.x * stride + at] = at < outliers ? __float2half_rn(outlier_weight(weight[(long long)blockIdx.x * stride + columns[at]], scale)) : __float2half_rn(0.0f);
}

// As int8_finish_rows, of gathered columns: a block owns DENSE_ROWS by DENSE_COLUMNS outputs, a warp 32 by 32 of them.
constexpr int DENSE_ROWS = 64, DENSE_COLUMNS = 128, DENSE_STAGES = 3;

extern "C" __global__ void __launch_bounds__(FINISH_THREADS, 2) int8_finish_gathered(
    const int *__restrict__ products,         // [m, n]
    const __half *__restrict__ weights,       // [n, stride]
    const float *__restrict__ weight_absmax,  // [n]
    const float *__restrict__ row_absmax,     // [m]
    const int *__restrict__ count,            // [1]
    const __half *__restrict__ values,        // [m, stride]
    __half *__restrict__ y,                   // [m, n]
    float scale,                              // a power of two that y is stored by
    int m, int n, int stride) {
    __shared__ __align__(16) __half stages[DENSE_STAGES][DENSE_ROWS + DENSE_COLUMNS][FINISH_STRIDE];
    constexpr uint32_t ROW = FINISH_STRIDE * sizeof(__half), STAGE = (DENSE_ROWS + DENSE_COLUMNS) * ROW;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, first_row = blockIdx.y * DENSE_ROWS, first_column = blockIdx.x * DENSE_COLUMNS;
    const int warp_row = warp % 2 * 32, warp_column = warp / 2 * 32, chunks = (*count + FINISH_OUTLIERS - 1) / FINISH_OUTLIERS;
    const uint32_t shared = shared_address(stages), from_values = shared + (warp_row + lane % 16) * ROW + lane / 16 * 16;
    const uint32_t from_weights = shared + (DENSE_ROWS + warp_column + lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 16;
    // A stage: four words of 16 bytes of each row. An empty batch of copies behind the last one.
    auto copy = [&](int chunk) {
        const int word = threadIdx.x % 4, at = threadIdx.x / 4;
        const uint32_t to = shared + chunk % DENSE_STAGES * STAGE + at * ROW + word * 16;
        if (chunk < chunks) {
            const long long offset = chunk * FINISH_OUTLIERS + word * 8;
#pragma unroll
            for (int i = 0; i < (DENSE_ROWS + DENSE_COLUMNS) / (FINISH_THREADS / 4); i++) {
                const int row = i == 0 ? first_row + at : first_column + at + (i - 1) * 64;
                const bool is_there = row < (i == 0 ? m : n);
                copy_streaming(to + i * 64 * ROW, (i == 0 ? values : weights) + (is_there ? row * (long long)stride + offset : 0), is_there);
            }
        }
        commit_copies();
    };
    float sums[2][4][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < DENSE_STAGES - 1; chunk++) copy(chunk);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_copies<DENSE_STAGES - 2>();
        // Behind it the chunk is there, and nobody reads the one before.
        __syncthreads();
        copy(chunk + DENSE_STAGES - 1);
        const uint32_t stage = chunk % DENSE_STAGES * STAGE;
#pragma unroll
        for (int step = 0; step < FINISH_OUTLIERS / 16; step++) {
            uint32_t a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) load_matrices(a[i], from_values + stage + i * 16 * ROW + step * 32);
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                uint32_t b[4];
                load_matrices(b, from_weights + stage + pair * 16 * ROW + step * 32);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    multiply_halves(sums[i][2 * pair], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    multiply_halves(sums[i][2 * pair + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int tile = i / 2 % 4, row = first_row + warp_row + i / 8 * 16 + i % 2 * 8 + lane / 4, column = first_column + warp_column + tile * 8 + lane % 4 * 2;
        const float *two = &sums[i / 8][tile][i % 2 * 2];
        if (row < m && column < n) finish_two(products, weight_absmax, row_absmax[row], scale, y, (long long)row * n + column, column, n, two[0], two[1]);
    }
}

STEP_KERNEL(int8, Bytes, STAGES)
