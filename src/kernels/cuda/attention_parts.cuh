// Parts of attention.cuh: norm and rotation of a head, the online softmax of a lane, and the merge of a head's units.
#pragma once

#include "kernels/cuda/matvec.cuh"

// Keys and values of a lane, 8 elements each, that are in flight at once; more do not fit into registers.
constexpr int KEYS_AHEAD = 2;

// A head's elements as they are.
struct Unnormed {
    __device__ __forceinline__ float operator()(float value, int) const { return value; }
};

// An rms norm of a head's elements; without weights: as they are.
struct HeadNorm {
    float factor = 1.0f;
    const float *weights = nullptr;
    __device__ __forceinline__ float operator()(float value, int at) const { return weights ? value * factor * __ldg(weights + at) : value; }
};

// Waits for element `at` of a head, norms it and rotates it.
template <class Norm>
__device__ __forceinline__ float rotated(const uint32_t *head, int at, int rotary, const float2 *angles, const ExpectedTag &expected, const Norm &norm) {
    const int half = rotary / 2, pair = at < half ? at : at - half;
    const bool turns = at < rotary;
    const float2 angle = turns ? __ldg(angles + pair) : make_float2(1.0f, 0.0f);
    const uint32_t *with = turns ? head + (at < half ? at + half : pair) : head + at;
    uint32_t word = load_relaxed(head + at), of_other = load_relaxed(with);
    while (!expected.ready(expected.mismatch_half(word) | expected.mismatch_half(of_other))) {
        backoff();
        word = load_relaxed(head + at), of_other = load_relaxed(with);
    }
    const float value = norm(__half2float(untagged(word)), at), other = norm(__half2float(untagged(of_other)), (int)(with - head));
    if (!turns) return value;
    return at < half ? value * angle.x - other * angle.y : value * angle.x + other * angle.y;
}

__device__ __forceinline__ void widen(const uint4 &halves, float (&values)[8]) {
    const __half2 *pairs = (const __half2 *)&halves;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 two = __half22float2(pairs[i]);
        values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
}

__device__ __forceinline__ float dot(const float (&a)[8], const float (&b)[8]) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + (a[4] * b[4] + a[5] * b[5] + a[6] * b[6] + a[7] * b[7]);
}

// The online softmax of a lane over its keys so far, and its eight elements of the weighted values.
struct SoftmaxState {
    float max, sum, out[8];
    // exp(from - to), where `from` may be the maximum of no keys.
    static __device__ __forceinline__ float factor(float from, float to) { return from == -INFINITY ? 0.0f : __expf(from - to); }
    __device__ __forceinline__ void add_key(float score, const float (&value)[8]) {
        const float largest = larger(max, score), old = factor(max, largest), weight = __expf(score - largest);
        max = largest;
        sum = sum * old + weight;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = out[i] * old + weight * value[i];
    }
    // Merges the state of the lane `distance` away.
    __device__ __forceinline__ void merge(int distance) {
        const float largest = larger(max, __shfl_xor_sync(ALL_LANES, max, distance)), own = factor(max, largest);
        max = largest;
        sum *= own;
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            out[i] *= own;
            out[i] += __shfl_xor_sync(ALL_LANES, out[i], distance);
        }
    }
};

// Waits for `len` values, and returns the factor of their rms norm. `room` holds a float a warp and is free again after the next barrier.
__device__ __forceinline__ float norm_factor(const uint32_t *from, int len, const ExpectedTag &expected, float epsilon, float *room) {
    constexpr int HELD = 4;
    float squares = 0.0f;
#pragma unroll 1
    for (int start = threadIdx.x; start < len; start += HELD * THREADS) {
        uint32_t loaded[HELD] = {};
        for (;;) {
            uint32_t mismatch = 0;
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < len) loaded[i] = load_relaxed(from + start + i * THREADS);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < len) mismatch |= expected.mismatch_half(loaded[i]);
            if (expected.ready(mismatch)) break;
            backoff();
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            // Zeros behind the last one.
            const float value = __half2float(untagged(loaded[i]));
            squares += value * value;
        }
    }
    return rsqrtf(block_sum(squares, room) / len + epsilon);
}

// Merges the units of `heads` heads, whose partials lie behind each other, in the block that ended last. A unit's partial is [2 + d]: max, sum, out.
// `sinks` are those of the heads, or null.
__device__ __forceinline__ void merge_splits(const float *of_heads, int heads, int splits, int d, int active, const float *sinks, uint32_t *out, uint32_t tag) {
#pragma unroll 1
    for (int at = threadIdx.x; at < heads * d; at += THREADS) {
        const int head = (unsigned)at / (unsigned)d, element = at - head * d;
        const float *first_split = of_heads + head * splits * (2 + d);
        float max = sinks ? __ldg(sinks + head) : -INFINITY, sum = 0.0f, merged = 0.0f;
#pragma unroll 4
        for (int split = 0; split < active; split++) max = larger(max, __ldcg(first_split + split * (2 + d)));
        if (sinks) sum = __expf(__ldg(sinks + head) - max);
#pragma unroll 4
        for (int split = 0; split < active; split++) {
            const float *partial = first_split + split * (2 + d);
            const float factor = __expf(__ldcg(partial) - max);
            sum += factor * __ldcg(partial + 1);
            merged += factor * __ldcg(partial + 2 + element);
        }
        store_relaxed(out + at, tagged(__float2half_rn(merged / sum), tag));
    }
}
