// fp16 and fp32 matrices in the streaming matrix-vector product: decoders that have nothing to decode.
// Chunks of 64 bytes are 32 halves or 16 floats of a row; rows are padded to whole ones only where k is not a multiple.

#include "kernels/cuda/matvec.cuh"

struct Nothing {
    __device__ void set(const Part &, int, int, int, int) {}
    __device__ void set(const Part &, int, int, int) {}
    __device__ void load(const Nothing &, int) {}
};

struct Value {
    float value;
    __device__ void add(const Value &other) { value += other.value; }
};

struct Halves {
    static constexpr int CHUNK = 32;
    struct Shared {};
    using Place = Nothing;
    using Extra = Nothing;
    using Row = Nothing;
    using Partial = Value;
    struct Sums {
        float of[4];
    };
    struct Activations {
        const __half *x;
        __device__ uint8_t *convert(const Matvec &, const Input &, const __half *halves, uint8_t *free_bytes, float *) {
            x = halves;
            return free_bytes;
        }
    };
    static __device__ void prepare(Shared &, const Matvec &) {}

    template <int TILES>
    static __device__ __forceinline__ void add(const Shared &, const Activations &from, int chunk, const uint4 (&weights)[TILES][2],
                                               const Extra (&)[TILES], const Row (&)[TILES], Sums (&sums)[TILES]) {
        uint4 x = *(const uint4 *)(from.x + chunk * CHUNK + threadIdx.x % 4 * 8);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint4 &low = weights[t][0], &high = weights[t][1];
            multiply_halves(sums[t].of, low.x, high.x, low.y, high.y, x.x, x.y);
            multiply_halves(sums[t].of, low.z, high.z, low.w, high.w, x.z, x.w);
        }
    }
    static __device__ void partial(const Sums &sums, Value &low, Value &high) {
        low.value = sums.of[0];
        high.value = sums.of[2];
    }
    static __device__ float result(const Value &total, const Activations &, const Part &, int) { return total.value; }
};

struct Floats {
    static constexpr int CHUNK = 16;
    struct Shared {};
    using Place = Nothing;
    using Extra = Nothing;
    using Row = Nothing;
    using Partial = Value;
    struct Sums {
        float low, high;
    };
    struct Activations {
        const float *x;
        __device__ uint8_t *convert(const Matvec &, const Input &input, const __half *halves, uint8_t *free_bytes, float *) {
            float *floats = (float *)free_bytes;
            for (int at = threadIdx.x; at < input.chunks * CHUNK; at += MATVEC_THREADS) floats[at] = __half2float(halves[at]);
            x = floats;
            return free_bytes + 4 * input.chunks * CHUNK;
        }
    };
    static __device__ void prepare(Shared &, const Matvec &) {}

    template <int TILES>
    static __device__ __forceinline__ void add(const Shared &, const Activations &from, int chunk, const uint4 (&weights)[TILES][2],
                                               const Extra (&)[TILES], const Row (&)[TILES], Sums (&sums)[TILES]) {
        float4 x = *(const float4 *)(from.x + chunk * CHUNK + threadIdx.x % 4 * 4);
        auto dot = [&](const uint4 &w) {
            return __uint_as_float(w.x) * x.x + __uint_as_float(w.y) * x.y + __uint_as_float(w.z) * x.z +
                   __uint_as_float(w.w) * x.w;
        };
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            sums[t].low += dot(weights[t][0]);
            sums[t].high += dot(weights[t][1]);
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

MATVEC_KERNEL(half_1, Halves, 1, 4)
MATVEC_KERNEL(half_2, Halves, 2, 2)
MATVEC_KERNEL(float_1, Floats, 1, 4)
MATVEC_KERNEL(float_2, Floats, 2, 2)
