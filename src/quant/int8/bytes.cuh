// LLM.int8's product of one row: the decoder of the step kernel, and what it shares with products of many rows (int8.cu, which says what both compute).
#pragma once

#include "quant/int8/join.cuh"
#include "quant/step.cuh"

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

    // A thread takes eight elements at a time, and all vectors in one pass; the first eight of each input stay in registers. Magnitudes of halves
    // compare as their bits do.
    static __device__ void convert(Activations (&to)[MAX_VECTORS], const Shared &, const Matvec &matvec, const __half *x, uint8_t *free_bytes,
                                   float (&room)[MAX_VECTORS * WARPS]) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        const uint32_t threshold = first_outlier(matvec.threshold) * 0x10001u;
        const int of_vector = matvec.inputs[0].padded;
        uint4 first[MAX_INPUTS] = {};
        uint32_t of_first[MAX_INPUTS] = {};
        // The largest magnitude, and the outlier bits' zeros; a thread's first eight elements without outliers, and which were.
        auto examine = [&](int i, uint4 &own, uint32_t &of_own) {
            const int padded = vector_at(matvec, i).padded;
            const uint4 *eights = (const uint4 *)(x + i * of_vector);
            uint32_t *bits = (uint32_t *)(free_bytes + i * behind(of_vector) + padded);
            uint32_t largest = 0;
#pragma unroll 1
            for (int at = threadIdx.x; at < padded / 8; at += THREADS) {
                uint4 eight = eights[at];
                if (at < padded / 32) bits[at] = 0;
                const uint32_t found = remove_outliers(eight, threshold);
                if (at == threadIdx.x) own = eight, of_own = found;
                const uint32_t low = larger_halves(eight.x & MAGNITUDES, eight.y & MAGNITUDES);
                largest = larger_halves(largest, larger_halves(low, larger_halves(eight.z & MAGNITUDES, eight.w & MAGNITUDES)));
            }
            largest = warp_largest(max(largest & 0xffff, largest >> 16));
            if (lane == 0) room[i * WARPS + warp] = __half2float(__ushort_as_half((unsigned short)largest));
        };
        auto encode = [&](int i, bool is_held, const uint4 &own, uint32_t of_own) {
            const int padded = vector_at(matvec, i).padded;
            const uint4 *eights = (const uint4 *)(x + i * of_vector);
            uint8_t *made = free_bytes + i * behind(of_vector);
            // Floats that are not negative compare as their bits do; NaN is the largest.
            const float largest = __uint_as_float(warp_largest(__float_as_uint(room[i * WARPS + lane % WARPS])));
            // Two roundings, of the reciprocal and of the product, as on the CPU. A zero row stays zero.
            const float scale = largest == 0.0f ? 0.0f : __fmul_rn(__frcp_rn(largest), 127.0f);
#pragma unroll 1
            for (int at = threadIdx.x; at < padded / 8; at += THREADS) {
                uint4 eight = own;
                uint32_t found = of_own;
                if (!is_held || at != threadIdx.x) eight = eights[at], found = remove_outliers(eight, threshold);
                ((uint2 *)made)[at] = make_uint2(codes_of(eight.x, eight.y, scale), codes_of(eight.z, eight.w, scale));
                if (!found) continue;
                atomicOr((uint32_t *)(made + padded) + at / 16 * 4 + at / 2 % 4, found << (at / 8 % 2 * 16 + at % 2 * 8));
                // Every block finds the same outliers; the last block always has rows and counts them.
                if (matvec.outlier_columns && blockIdx.x == gridDim.x - 1) atomicAdd(matvec.outlier_columns, (unsigned long long)__popc(found));
            }
            if (threadIdx.x == 0) to[i] = {shared_address(eights), shared_address(made), shared_address(made + padded), largest};
        };
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++)
            if (i < vectors_of(matvec)) examine(i, first[i], of_first[i]);
        uint4 passed;
        uint32_t of_passed;
#pragma unroll 1
        for (int i = MAX_INPUTS; i < (is_weighed(matvec) ? matvec.chosen : 0); i++) examine(i, passed, of_passed);
        barrier_sync();
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++)
            if (i < vectors_of(matvec)) encode(i, true, first[i], of_first[i]);
#pragma unroll 1
        for (int i = MAX_INPUTS; i < (is_weighed(matvec) ? matvec.chosen : 0); i++) encode(i, false, {}, 0);
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
    static __device__ float result(const Partial &total, const Activations &from, float scale, float power) {
        return join(total.product, from.absmax, scale, total.outlier, power);
    }
};
