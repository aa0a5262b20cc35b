// fp16 and fp32 matrices in the streaming matrix-vector product: decoders that have nothing to decode.
// Chunks of 128 bytes are 64 halves or 32 floats of a row; rows are padded to whole ones only where k is not a multiple.
#pragma once

#include "kernels/cuda/matvec.cuh"

// For decoders that need nothing beside the weights.
struct NoSideData {
    static constexpr int WORDS = 0;
    static __device__ int row_of(int) { return 0; }
    __device__ void set(const MatrixPart &, int, int, int) {}
    __device__ void copy(uint32_t) {}
};

struct Value {
    float value;
    __device__ void add(const Value &other) { value += other.value; }
};

// The common part of decoders without tables: one sum a row, and activations at an address of shared memory.
struct PlainDecoder {
    struct Shared {};
    using SideData = NoSideData;
    static constexpr bool HAS_ROW_SCALES = false;
    static constexpr int WORDS_HELD = HAS_BULK_COPIES ? 3 : __CUDA_ARCH__ > 800 ? 1 : 2;
    using Partial = Value;
    struct Activations {
        uint32_t x;
    };
    static __device__ void prepare(Shared &, const float *) {}
    static __device__ float result(const Value &total, const Activations &, float, float) { return total.value; }
};

struct HalfDecoder : PlainDecoder {
    static constexpr int CHUNK = 64, CONVERTED_EIGHTHS = 0;
    struct Sums {
        float of[4];
    };
    struct Row {
        uint32_t x;  // of this lane
        __device__ void set(const Shared &, const MatrixPart &, const Activations &from, int, int, int lane, int chunk) {
            x = from.x + (lane / 4 % 2 * 4 + lane % 4) * 16 + chunk * 2 * CHUNK;
        }
    };
    static __device__ void convert(Activations (&to)[MAX_VECTORS], const Shared &, const Matvec &matvec, const __half *x, uint8_t *,
                                   float (&)[MAX_VECTORS * WARPS]) {
        if ((int)threadIdx.x < vectors_of(matvec)) to[threadIdx.x].x = shared_address(x + threadIdx.x * matvec.inputs[0].padded);
    }

    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t, uint32_t, Row &row, Sums &sums) {
        uint4 x = load_shared_16(row.x);
        row.x += 2 * CHUNK;
        multiply_halves(sums.of, low.x, high.x, low.y, high.y, x.x, x.y);
        multiply_halves(sums.of, low.z, high.z, low.w, high.w, x.z, x.w);
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = sums.of[0] + sums.of[3]; }
};

struct FloatDecoder : PlainDecoder {
    static constexpr int CHUNK = 32, CONVERTED_EIGHTHS = 8 * sizeof(float);
    struct Sums {
        float sum;
    };
    struct Row {
        uint32_t x;  // of this lane
        __device__ void set(const Shared &, const MatrixPart &, const Activations &from, int, int, int lane, int chunk) {
            x = from.x + lane % 4 * 16 + chunk * 4 * CHUNK;
        }
    };
    static __device__ void convert(Activations (&to)[MAX_VECTORS], const Shared &, const Matvec &matvec, const __half *x, uint8_t *free_bytes,
                                   float (&)[MAX_VECTORS * WARPS]) {
        float *floats = (float *)free_bytes;
        for (int at = threadIdx.x; at < padded_of(matvec); at += THREADS) floats[at] = __half2float(x[at]);
        if ((int)threadIdx.x < vectors_of(matvec)) to[threadIdx.x].x = shared_address(floats + threadIdx.x * matvec.inputs[0].padded);
    }

    static __device__ __forceinline__ float dot(const uint4 &w, const uint4 &x) {
        return __uint_as_float(w.x) * __uint_as_float(x.x) + __uint_as_float(w.y) * __uint_as_float(x.y) +
               __uint_as_float(w.z) * __uint_as_float(x.z) + __uint_as_float(w.w) * __uint_as_float(x.w);
    }
    static __device__ __forceinline__ void add(const uint4 &low, const uint4 &high, uint32_t, uint32_t, Row &row, Sums &sums) {
        sums.sum += dot(low, load_shared_16(row.x)) + dot(high, load_shared_16(row.x + 2 * CHUNK));
        row.x += 4 * CHUNK;
    }
    static __device__ void partial(const Sums &sums, Value &of_row) { of_row.value = quad_sum(sums.sum); }
};
