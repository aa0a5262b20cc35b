// Attention of one query over a cache, after rotation and cache write.
//
//   q, k   rotated by the position's angles (half-split: element i pairs with i + rotary / 2)
//   cache  k, v of this position are appended to [g, capacity, d_pad] fp16, d_pad = d rounded up to 8, zeros behind d
//   out    softmax(scale * q . K^T + bias[head, key - query]) . V, fp32 inside
//
// A unit is a query head and `span` positions. Blocks take units in turn; units behind the last position do nothing. Where a head has several
// units, each stores (max, sum, out) in `partials`, and the last one to end merges them. The cache of earlier steps is loaded before q, k and v
// are ready.
//
//   positions |0 .. span|span .. 2 span|...|.. length|      lanes of a warp: 32 / L keys at a time, L lanes of 16 bytes each
//
// The L lanes of a key keep an online softmax of their own, (max, sum, out) over their keys, so that lanes synchronize only after all keys.
// Bytes moved: 2 * length * d_pad * 2 per unit.
#pragma once

#include "kernels/cuda/instruction.cuh"

// Keys and values of a lane, 8 elements each, that are in flight at once; more do not fit into registers.
constexpr int KEYS_AHEAD = 2;

// Waits for element `at` of a head and rotates it.
__device__ __forceinline__ float rotated(const uint32_t *head, int at, int rotary, const float2 *angles, const ExpectedTag &expected) {
    const int half = rotary / 2, pair = at < half ? at : at - half;
    const bool turns = at < rotary;
    const float2 angle = turns ? __ldg(angles + pair) : make_float2(1.0f, 0.0f);
    const uint32_t *with = turns ? head + (at < half ? at + half : pair) : head + at;
    uint32_t word = load_relaxed(head + at), of_other = load_relaxed(with);
    while (!expected.ready(expected.mismatch_half(word) | expected.mismatch_half(of_other))) {
        backoff();
        word = load_relaxed(head + at), of_other = load_relaxed(with);
    }
    const float value = __half2float(untagged(word)), other = __half2float(untagged(of_other));
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

// Merges the units of a head, in the block that ended last. A unit's partial is [2 + d]: max, sum, out.
__device__ __forceinline__ void merge_splits(const float *first_split, int d, int active, uint32_t *out, uint32_t tag) {
#pragma unroll 1
    for (int at = threadIdx.x; at < d; at += THREADS) {
        float max = -INFINITY, sum = 0.0f, merged = 0.0f;
#pragma unroll 4
        for (int split = 0; split < active; split++) max = larger(max, __ldcg(first_split + split * (2 + d)));
#pragma unroll 4
        for (int split = 0; split < active; split++) {
            const float *partial = first_split + split * (2 + d);
            const float factor = __expf(__ldcg(partial) - max);
            sum += factor * __ldcg(partial + 1);
            merged += factor * __ldcg(partial + 2 + at);
        }
        store_relaxed(out + at, tagged(__float2half_rn(merged / sum), tag));
    }
}

// Runs an attention. Its results get the tag `own`; every thread calls `ahead` once. `room`: q [d_pad] fp32, the query's own k and v [d_pad] fp16, then
// the warps' states: max and sum [WARPS], out [WARPS, d_pad] fp32.
template <class Ahead>
__device__ __forceinline__ void attend(const Attention &op, const Tags &tags, uint32_t own, uint8_t *room, Ahead ahead) {
    __shared__ bool is_last;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int d = op.d, d_pad = op.d_pad, units = d_pad / 8, span = op.span;
    const int appended = op.k ? 1 : 0;
    float *q = (float *)room;
    __half *own_k = (__half *)(q + d_pad), *own_v = own_k + d_pad;
    float *maxes = (float *)(own_v + d_pad), *sums = maxes + WARPS, *outs = sums + WARPS;

    // `width` lanes hold a key and its value, eight elements each; heads of more than 32 lanes are refused.
    int width = 1;
#pragma unroll 1
    while (width < units) width *= 2;
    const int keys_at_once = LANES / width, unit = lane % width;
    const int first_key = warp * keys_at_once + lane / width, key_step = WARPS * keys_at_once;

    const int position = appended ? load_l2(op.position) : 0;
    const int length = appended ? position + 1 : load_l2(op.length);
    const int active = (length + span - 1) / span;

    // A unit: its head, its part of the cache, and how many positions it has there; the query's own position is not in the cache yet.
    // `place` is the index of the part's first element, in units of eight.
    int index = blockIdx.x, kv_head = 0, head = 0, split = 0, first = 0, count = 0, cached = 0, place = 0;
    const int n_units = op.kv_heads * op.group * active;
    auto enter = [&]() {
        head = (unsigned)index / (unsigned)active;
        split = index - head * active;
        kv_head = head / op.group;
        first = split * span;
        count = min(span, length - first);
        cached = min(count, length - appended - first);
        place = (kv_head * op.capacity + first) * units;
    };
    uint4 held_keys[KEYS_AHEAD], held_values[KEYS_AHEAD];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < KEYS_AHEAD; i++) {
            const int key = start + i * key_step;
            held_keys[i] = held_values[i] = make_uint4(0, 0, 0, 0);
            if (key >= cached || unit >= units) continue;
            const int at = place + key * units + unit;
            held_keys[i] = load_l2((const uint4 *)op.keys + at);
            held_values[i] = load_l2((const uint4 *)op.values + at);
        }
    };
    auto begin = [&]() {
        if (index >= n_units) return;
        enter();
        load(first_key);
    };
    begin();
    ahead();
#pragma unroll 1
    while (index < n_units) {
        const bool has_own = cached < count;
#pragma unroll 1
        for (int at = threadIdx.x; at < (has_own ? 3 : 1) * d_pad; at += THREADS) {
            const int which = (unsigned)at / (unsigned)d_pad, element = at - which * d_pad;
            const uint32_t *from = which == 0 ? op.q + head * d : (which == 1 ? op.k : op.v) + kv_head * d;
            const ExpectedTag expected(tags, op.written_by[which]);
            const float2 *angles = op.angles + (long long)position * (op.rotary / 2);
            const __half value = __float2half_rn(element < d ? rotated(from, element, which == 2 ? 0 : op.rotary, angles, expected) : 0.0f);
            if (which == 0) {
                q[element] = __half2float(value) * op.scale;
                continue;
            }
            (which == 1 ? own_k : own_v)[element] = value;
            // The first query head of a key/value head appends.
            if (head != kv_head * op.group || element >= d) continue;
            (which == 1 ? op.keys : op.values)[(long long)(place + cached * units) * 8 + element] = value;
        }
        barrier_sync();

        float of_query[8] = {};
        if (unit < units) {
#pragma unroll
            for (int i = 0; i < 8; i++) of_query[i] = q[unit * 8 + i];
        }
        const float *bias = op.bias + head * (2 * op.reach + 1) + op.reach + first - position;
        SoftmaxState state = {-INFINITY, 0.0f, {}};
#pragma unroll 1
        for (int start = first_key; start - lane / width < count; start += KEYS_AHEAD * key_step) {
            if (start != first_key) load(start);
#pragma unroll
            for (int i = 0; i < KEYS_AHEAD; i++) {
                const int key = start + i * key_step;
                if (key - lane / width >= count) break;
                uint4 of_key = held_keys[i], of_value = held_values[i];
                if (has_own && key == cached && unit < units) {
                    of_key = ((const uint4 *)own_k)[unit];
                    of_value = ((const uint4 *)own_v)[unit];
                }
                float key_values[8], value_values[8];
                widen(of_key, key_values);
                widen(of_value, value_values);
                float score = unit < units ? dot(key_values, of_query) : 0.0f;
#pragma unroll 1
                for (int distance = width / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(ALL_LANES, score, distance);
                if (key >= count) continue;
                state.add_key(op.bias ? score + __ldg(bias + key) : score, value_values);
            }
        }
        // Merges the keys of a warp, then the warps.
#pragma unroll 1
        for (int distance = LANES / 2; distance >= width; distance /= 2) state.merge(distance);
        if (lane < units) {
            if (lane == 0) maxes[warp] = state.max, sums[warp] = state.sum;
            float4 *to = (float4 *)(outs + warp * d_pad) + 2 * lane;
            to[0] = make_float4(state.out[0], state.out[1], state.out[2], state.out[3]);
            to[1] = make_float4(state.out[4], state.out[5], state.out[6], state.out[7]);
        }
        barrier_sync();

        // A warp computes 32 elements; each of its lanes first computes the weight of one warp.
        uint32_t *out = op.out + head * d;
        float *first_split = op.partials + (long long)head * op.splits * (2 + d), *partial = first_split + split * (2 + d);
        if (warp * LANES < d) {
            const float max = lane < WARPS ? maxes[lane] : -INFINITY, largest = warp_max(max), weight = SoftmaxState::factor(max, largest);
            const float sum = warp_sum(lane < WARPS ? sums[lane] * weight : 0.0f);
            const int element = threadIdx.x;
            float merged = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float of_warp = __shfl_sync(ALL_LANES, weight, w);
                if (element < d) merged += of_warp * outs[w * d_pad + element];
            }
            if (element < d) {
                if (active == 1) store_relaxed(out + element, tagged(__float2half_rn(merged / sum), own));
                else partial[2 + element] = merged;
            }
            if (active > 1 && element == 0) partial[0] = largest, partial[1] = sum;
        }
        barrier_sync();
        if (active > 1) {
            if (threadIdx.x == 0) {
                __threadfence();
                is_last = atomicAdd(op.arrived + head, 1) == active - 1;
                // Before the results are visible: the next attention counts from zero.
                if (is_last) op.arrived[head] = 0;
            }
            barrier_sync();
            if (is_last) {
                __threadfence();
                merge_splits(first_split, d, active, out, own);
            }
        }
        index += gridDim.x;
        begin();
    }
}
