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
// One row of x is the streaming product below. Many rows: outlier_flags -> outlier_list -> quantize_rows -> cuBLAS' int8
// product -> finish_rows, all on one stream. Sums int32 and fp32.

#include "kernels/cuda/matvec.cuh"

constexpr int QUANTIZE_THREADS = 256;
constexpr int LIST_THREADS = 1024;
// bitsandbytes' CUDA constant for 1/127², and its fp32 1/127.
constexpr float PER_127_SQUARED = 6.200012e-05f;
constexpr float PER_127 = 0.007874015718698502f;

// A thread looks at one column of up to gridDim.y-th part of the rows. All writers write the same value.
extern "C" __global__ void int8_outlier_flags(
    const __half *__restrict__ x,    // [m, k]
    uint8_t *__restrict__ flags,     // [k], zero before
    int m, int k, float threshold) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= k) return;
    for (int row = blockIdx.y; row < m; row += gridDim.y)
        if (fabsf(__half2float(x[(long long)row * k + column])) >= threshold) flags[column] = 1;
}

// One block lists the flagged columns in rising order, so that later sums have one order: each round takes 1024 columns,
// ranks them by ballots within warps and a scan over the 32 warp counts.
extern "C" __global__ void int8_outlier_list(
    const uint8_t *__restrict__ flags,  // [k]
    int *__restrict__ columns,          // [k], the first *count are written
    int *__restrict__ count,            // [1]
    unsigned long long *__restrict__ total,  // [1], the count is added; or null
    int k) {
    __shared__ int warp_counts[LIST_THREADS / LANES];
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int listed = 0;
    for (int first = 0; first < k; first += LIST_THREADS) {
        int column = first + threadIdx.x;
        bool flagged = column < k && flags[column];
        unsigned ballot = __ballot_sync(ALL_LANES, flagged);
        if (lane == 0) warp_counts[warp] = __popc(ballot);
        __syncthreads();
        int before = listed;
        for (int other = 0; other < LIST_THREADS / LANES; other++) {
            if (other < warp) before += warp_counts[other];
            listed += warp_counts[other];
        }
        if (flagged) columns[before + __popc(ballot & ((1u << lane) - 1))] = column;
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    *count = listed;
    if (total) *total += listed;
}

// A block owns one row.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) int8_quantize_rows(
    const __half *__restrict__ x,       // [m, k]
    const uint8_t *__restrict__ flags,  // [k]
    int8_t *__restrict__ codes,         // [m, stride]
    float *__restrict__ row_absmax,     // [m]
    int k, int stride, float threshold) {
    __shared__ float warp_max[QUANTIZE_THREADS / LANES];
    const __half *x_row = x + (long long)blockIdx.x * k;
    float largest = 0.0f;
    for (int column = threadIdx.x; column < k; column += QUANTIZE_THREADS) {
        float magnitude = fabsf(__half2float(x_row[column]));
        if (!(magnitude >= threshold)) largest = larger(largest, magnitude);
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        largest = larger(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
    if (threadIdx.x % LANES == 0) warp_max[threadIdx.x / LANES] = largest;
    __syncthreads();
    for (int warp = 0; warp < QUANTIZE_THREADS / LANES; warp++) largest = larger(largest, warp_max[warp]);
    if (threadIdx.x == 0) row_absmax[blockIdx.x] = largest;
    // Two roundings, reciprocal and product, as the CPU rule has them. A zero row stays zero.
    float scale = largest == 0.0f ? 0.0f : __fmul_rn(__frcp_rn(largest), 127.0f);
    for (int column = threadIdx.x; column < stride; column += QUANTIZE_THREADS) {
        bool kept = column < k && !flags[column];
        codes[(long long)blockIdx.x * stride + column] = kept ? __float2int_rn(__half2float(x_row[column]) * scale) : 0;
    }
}

// What one output is of its int8 sum and of its outlier columns' sum.
__device__ __forceinline__ float join(int product, float row_absmax, float scale, float outlier) {
    float scaled = __fmul_rn(__fmul_rn(__int2float_rn(product), row_absmax), scale);
    __half regular = __float2half_rn(__fmul_rn(scaled, PER_127_SQUARED));
    return __half2float(__float2half_rn(__half2float(regular) + outlier));
}

// A weight of an outlier column.
__device__ __forceinline__ float outlier_weight(int code, float scale) {
    return __half2float(__float2half_rn(__fmul_rn(__fmul_rn((float)code, scale), PER_127)));
}

// The product where cuBLAS has none: a thread owns one sum.
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

// Many rows, behind the int8 product: a thread owns one output column and walks over rows.
extern "C" __global__ void int8_finish_rows(
    const int *__restrict__ products,         // [m, n]
    const int8_t *__restrict__ weight,        // [n, stride]
    const float *__restrict__ weight_absmax,  // [n]
    const float *__restrict__ row_absmax,     // [m]
    const int *__restrict__ columns,          // [*count]
    const int *__restrict__ count,            // [1]
    const __half *__restrict__ x,             // [m, k]
    __half *__restrict__ y,                   // [m, n]
    int m, int n, int k, int stride) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= n) return;
    float scale = weight_absmax[column];
    for (int row = blockIdx.y; row < m; row += gridDim.y) {
        float outlier = 0.0f;
        for (int at = 0; at < *count; at++) {
            int c = columns[at];
            float w = outlier_weight(weight[(long long)column * stride + c], scale);
            outlier += w * __half2float(x[(long long)row * k + c]);
        }
        float value = join(products[(long long)row * n + column], row_absmax[row], scale, outlier);
        y[(long long)row * n + column] = __float2half_rn(value);
    }
}

// One row: the block quantizes x itself, and finds the outliers of each chunk, which are multiplied from the same bytes.
struct Bytes {
    static constexpr int CHUNK = 128;
    struct Shared {};
    struct Nothing {
        __device__ void set(const Part &, int, int, int, int) {}
        __device__ void copy_extra(uint32_t) {}
    };
    using Place = Nothing;
    static constexpr int EXTRA_WORDS = 0;
    struct Constant {
        float scale;
        __device__ void load(const Part &part, int row) { scale = load_float((const float *)part.scales + row); }
    };
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
        // Read where an outlier asks for them: x lies this far behind twice the place of its codes.
        uint32_t x_behind;
        const float *scale;
        __device__ void set(const Shared &, const Part &part, const Activations &from, int, int row, int lane, int chunk) {
            const uint32_t half = lane / 4 % 2 * 64;
            codes = from.codes + half + lane % 4 * 16 + chunk * CHUNK;
            outliers = from.outliers + chunk * 16 + lane % 4 * 4;
            x_behind = from.x - 2 * (from.codes + half);
            scale = (const float *)part.scales + row;
        }
    };

    // A thread takes four elements at a time.
    static __device__ uint8_t *convert(Activations &to, const Shared &, const Matvec &job, const Input &input, const __half *halves,
                                       uint8_t *free_bytes, float *room) {
        int padded = input.chunks * CHUNK;
        uint32_t *made = (uint32_t *)free_bytes, *bits = (uint32_t *)(free_bytes + padded);
        for (int at = threadIdx.x; at < padded / 32; at += MATVEC_THREADS) bits[at] = 0;
        float largest = 0.0f;
        for (int at = threadIdx.x; at < padded / 4; at += MATVEC_THREADS) {
            float values[4];
            four(halves, at, values);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(fabsf(values[i]) >= job.threshold)) largest = larger(largest, fabsf(values[i]));
        }
        largest = warp_max(largest);
        if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = largest;
        __syncthreads();
        largest = warp_max(threadIdx.x % LANES < MATVEC_WARPS ? room[threadIdx.x % LANES] : 0.0f);
        // Two roundings, reciprocal and product, as the CPU rule has them. A zero row stays zero.
        float scale = largest == 0.0f ? 0.0f : __fmul_rn(__frcp_rn(largest), 127.0f);
        for (int at = threadIdx.x; at < padded / 4; at += MATVEC_THREADS) {
            float values[4];
            four(halves, at, values);
            uint32_t codes = 0, found = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool is_outlier = fabsf(values[i]) >= job.threshold;
                found |= (uint32_t)is_outlier << i;
                codes |= is_outlier ? 0u : ((uint32_t)__float2int_rn(values[i] * scale) & 0xff) << 8 * i;
            }
            made[at] = codes;
            if (found) {
                atomicOr(bits + at / 32 * 4 + at / 4 % 4, found << (at / 16 % 2 * 16 + at % 4 * 4));
                // Every block finds the same ones.
                if (job.outlier_columns && blockIdx.x == 0) atomicAdd(job.outlier_columns, (unsigned long long)__popc(found));
            }
        }
        if (threadIdx.x == 0) to = {shared_address(halves), shared_address(made), shared_address(bits), largest};
        return free_bytes + padded + padded / 8;
    }
    static __device__ __forceinline__ void four(const __half *halves, int at, float (&values)[4]) {
        uint2 loaded = *(const uint2 *)(halves + 4 * at);
        float2 a = __half22float2(*(const __half2 *)&loaded.x), b = __half22float2(*(const __half2 *)&loaded.y);
        values[0] = a.x, values[1] = a.y, values[2] = b.x, values[3] = b.y;
    }
    static __device__ void prepare(Shared &, const Matvec &) {}

    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t words, Row &row, Sums &sums) {
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
                uint32_t word = load_copied(words + at % 16 / 4 * 4 + at / 16 * (STEP_BYTES / 2));
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
    static __device__ float result(const Partial &total, const Activations &from, const Constant &constant) {
        return join(total.product, from.absmax, constant.scale, total.outlier);
    }
};

MATVEC_KERNELS(int8, Bytes, 4, 2)
