// LLM.int8 as bitsandbytes computes it: outlier columns over all rows of the call, int8 products, no host in between.
//
//   outlier column c:  |x[r, c]| >= threshold for any row r
//   a[r]   = max |x[r, c]| over the entries below the threshold (those of outlier columns too)
//   q[r,c] = round_half_even(x[r, c] * (127 / a[r])), 0 in outlier columns
//   y      = fp16(sum_c q[r, c] W[n, c] * a[r] * s[n] * 6.200012e-05)
//            + sum over outlier columns x[r, c] * fp16(W[n, c] * s[n] / 127), rounded to fp16 once more
//
// W [n, k] int8 codes, s [n] row absmax. Rows of W and q are padded with zeros to `stride`, a multiple of 16 bytes:
//   |k codes ......|0 0 0|
// Order: outlier_flags -> outlier_list -> quantize_rows -> matmul, all on one stream.
// matmul: a warp owns one output column n and M rows of x; a lane loads 16 codes at a time. Sums int32 and fp32.
// Bytes moved: n*k once per M rows, m*k twice. Plain and correct, not tuned: no share of peak bandwidth is claimed.

#include <cstdint>
#include <cuda_fp16.h>

#include "kernels/cuda/warp.cuh"

constexpr int MATMUL_WARPS = 4;
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
    if (threadIdx.x == 0) *count = listed;
}

// The larger one, NaN if either is: a diverged row must stay visible in its absmax, since a code cannot show it.
__device__ __forceinline__ float larger(float a, float b) { return b > a || isnan(b) ? b : a; }

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

template <int M>
__device__ __forceinline__ void matmul(
    const uint4 *__restrict__ weight,        // [n, stride / 16]
    const float *__restrict__ weight_absmax, // [n]
    const uint4 *__restrict__ codes,         // [m, stride / 16]
    const float *__restrict__ row_absmax,    // [m]
    const int *__restrict__ columns,         // [*count]
    const int *__restrict__ count,           // [1]
    const __half *__restrict__ x,            // [m, k]
    __half *__restrict__ y,                  // [m, n]
    int m, int n, int k, int stride) {
    int row = blockIdx.x * MATMUL_WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (row >= n) return;
    int first = blockIdx.y * M, chunks = stride / 16;
    int products[M] = {};
    for (int chunk = lane; chunk < chunks; chunk += LANES) {
        uint4 w = __ldcs(weight + (long long)row * chunks + chunk);
#pragma unroll
        for (int r = 0; r < M; r++) {
            uint4 q = codes[(long long)min(first + r, m - 1) * chunks + chunk];
            products[r] = __dp4a((int)w.x, (int)q.x, products[r]);
            products[r] = __dp4a((int)w.y, (int)q.y, products[r]);
            products[r] = __dp4a((int)w.z, (int)q.z, products[r]);
            products[r] = __dp4a((int)w.w, (int)q.w, products[r]);
        }
    }
    float scale = weight_absmax[row];
    float outliers[M] = {};
    const int8_t *weight_row = (const int8_t *)weight + (long long)row * stride;
    for (int at = lane; at < *count; at += LANES) {
        int column = columns[at];
        float w = __half2float(__float2half_rn(__fmul_rn(__fmul_rn((float)weight_row[column], scale), PER_127)));
#pragma unroll
        for (int r = 0; r < M; r++) outliers[r] += w * __half2float(x[(long long)min(first + r, m - 1) * k + column]);
    }
#pragma unroll
    for (int r = 0; r < M; r++) {
        int product = warp_sum(products[r]);
        float outlier = warp_sum(outliers[r]);
        if (lane != 0 || first + r >= m) continue;
        float scaled = __fmul_rn(__fmul_rn(__int2float_rn(product), row_absmax[first + r]), scale);
        __half regular = __float2half_rn(__fmul_rn(scaled, PER_127_SQUARED));
        y[(long long)(first + r) * n + row] = __float2half_rn(__half2float(regular) + outlier);
    }
}

// M: rows of x a block takes; the launcher picks by m.
#define MATMUL(M)                                                                                                     \
    extern "C" __global__ void int8_matmul_##M(const uint4 *weight, const float *weight_absmax, const uint4 *codes,   \
                                               const float *row_absmax, const int *columns, const int *count,         \
                                               const __half *x, __half *y, int m, int n, int k, int stride) {         \
        matmul<M>(weight, weight_absmax, codes, row_absmax, columns, count, x, y, m, n, k, stride);                   \
    }
MATMUL(1)
MATMUL(2)
MATMUL(4)
MATMUL(8)
