// Attention of one query over a cache, with rotation and cache write in front of it.
//
//   q, k   rotated by the position's angles (half-split: element i pairs with i + rotary / 2)
//   cache  k, v of this position are appended to [g, capacity, d_pad] fp16, d_pad = d rounded up to 8, zeros behind d
//   out    softmax(scale * q . K^T + bias[head, key - query]) . V, fp32 inside
//
// A unit is `heads` query heads of one key/value head, and `span` positions. Blocks take units in turn; those behind the last
// position do nothing. Where several units have positions, each leaves (max, sum, out) in `partials`, and the last to end joins
// them. What earlier steps left in the cache is asked for before the wait.
//
//   positions |0 .. span|span .. 2 span|...|.. length|      lanes of a warp: 32 / L keys at a time, L lanes of 16 bytes each
//
// The L lanes of a key keep a state of their own, (max, sum, out) over the keys that they have seen, so that nobody waits for
// anybody until all keys are seen. Bytes moved: 2 * length * d_pad * 2 per unit.
#pragma once

#include "kernels/cuda/job.cuh"

// Query heads of a unit, at most.
constexpr int MAX_HEADS = 2;
// Keys and values of a lane, 8 elements each, that are in flight at once.
constexpr int KEYS_AHEAD = 3;

// Element `at` of a head, rotated.
__device__ __forceinline__ float rotated(const __half *head, int at, int rotary, const float2 *angles) {
    int half = rotary / 2, pair = at < half ? at : at - half;
    bool turns = at < rotary;
    float value = __half2float(load_fresh(head + at)), other = turns ? __half2float(load_fresh(head + (at < half ? at + half : pair))) : 0.0f;
    float2 angle = turns ? __ldg(angles + pair) : make_float2(1.0f, 0.0f);
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

// Eight values times eight floats, which lie at a multiple of 16 bytes.
__device__ __forceinline__ float dot(const float (&values)[8], const float *with) {
    const float4 low = ((const float4 *)with)[0], high = ((const float4 *)with)[1];
    return values[0] * low.x + values[1] * low.y + values[2] * low.z + values[3] * low.w +
           (values[4] * high.x + values[5] * high.y + values[6] * high.z + values[7] * high.w);
}

// Of a lane: the softmax over the keys seen so far, and its eight elements of what that weighs.
struct State {
    float max, sum, out[8];
    // exp(from - to), where `from` may be that of nothing seen.
    static __device__ __forceinline__ float factor(float from, float to) { return from == -INFINITY ? 0.0f : __expf(from - to); }
    __device__ __forceinline__ void see(float score, const float (&value)[8]) {
        const float largest = larger(max, score), old = factor(max, largest), weight = __expf(score - largest);
        max = largest;
        sum = sum * old + weight;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = out[i] * old + weight * value[i];
    }
    // With the lanes `distance` away.
    __device__ __forceinline__ void join(int distance) {
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

// The units of the same heads, joined by the block that ended last. A unit's partial is [heads, 2 + d]: max, sum, out.
__device__ __forceinline__ void join_splits(const Attention &job, const float *first_split, int heads, int active, __half *out) {
    const int d = job.d, of_split = job.heads * (2 + d);
#pragma unroll 1
    for (int at = threadIdx.x; at < heads * d; at += THREADS) {
        const int head = (unsigned)at / (unsigned)d;
        const float *partial = first_split + head * (2 + d);
        float max = -INFINITY, sum = 0.0f, joined = 0.0f;
#pragma unroll 4
        for (int split = 0; split < active; split++) max = larger(max, __ldcg(partial + split * of_split));
#pragma unroll 4
        for (int split = 0; split < active; split++) {
            const float factor = __expf(__ldcg(partial + split * of_split) - max);
            sum += factor * __ldcg(partial + split * of_split + 1);
            joined += factor * __ldcg(partial + split * of_split + 2 + at - head * d);
        }
        out[at] = __float2half_rn(joined / sum);
    }
}

// `wait` returns once all that earlier jobs wrote is there; every block calls it once. `room` is free from then on: q [heads,
// d_pad] fp32, the query's own k and v [d_pad] fp16, then the warps' states [WARPS, heads, 2 + d_pad] fp32.
template <class Wait>
__device__ __forceinline__ void attend(const Attention &job, uint8_t *room, Wait wait) {
    __shared__ bool is_last;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int d = job.d, d_pad = job.d_pad, units = d_pad / 8, span = job.span;
    const int appended = job.k ? 1 : 0, groups = (job.group + job.heads - 1) / job.heads;
    float *q = (float *)room;
    __half *own_k = (__half *)(q + job.heads * d_pad), *own_v = own_k + d_pad;
    float *states = (float *)(own_v + d_pad);

    // `width` lanes hold a key and its value, eight elements each; rows of more than 32 lanes are not there.
    int width = 1;
#pragma unroll 1
    while (width < units) width *= 2;
    const int keys_at_once = LANES / width, unit = lane % width;
    const int first_key = warp * keys_at_once + lane / width, key_step = WARPS * keys_at_once;

    const int position = appended ? load_fresh(job.position) : 0;
    const int length = appended ? position + 1 : load_fresh(job.length);
    const int active = (length + span - 1) / span;
    const float2 *angles = job.angles + (long long)position * (job.rotary / 2);

    // A unit: its heads, its part of the cache, and how many positions it has there, of which the own one is not there yet.
    int index = blockIdx.x, kv_head, first_head, heads, split, first, count, cached;
    const int n_units = job.kv_heads * groups * active;
    __half *keys, *values;
    auto enter = [&]() {
        const int of_heads = (unsigned)index / (unsigned)active;
        split = index - of_heads * active;
        kv_head = of_heads / groups;
        first_head = (of_heads - kv_head * groups) * job.heads;
        heads = min(job.heads, job.group - first_head);
        first = split * span;
        count = min(span, length - first);
        cached = min(count, length - appended - first);
        keys = job.keys + ((long long)kv_head * job.capacity + first) * d_pad;
        values = job.values + ((long long)kv_head * job.capacity + first) * d_pad;
    };
    uint4 held_keys[KEYS_AHEAD], held_values[KEYS_AHEAD];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < KEYS_AHEAD; i++) {
            const int key = start + i * key_step;
            if (key >= cached || unit >= units) continue;
            held_keys[i] = load_fresh((const uint4 *)(keys + key * d_pad) + unit);
            held_values[i] = load_fresh((const uint4 *)(values + key * d_pad) + unit);
        }
    };
    if (index < n_units) {
        enter();
        load(first_key);
    }
    wait();
#pragma unroll 1
    for (bool is_ahead = true; index < n_units; index += gridDim.x, is_ahead = false) {
        if (!is_ahead) {
            enter();
            load(first_key);
        }
        const bool has_own = cached < count;
#pragma unroll 1
        for (int at = threadIdx.x; at < (heads + 2 * has_own) * d_pad; at += THREADS) {
            const int head = (unsigned)at / (unsigned)d_pad, element = at - head * d_pad;
            const bool is_q = head < heads, is_v = head > heads;
            const __half *from = is_q ? job.q + (kv_head * job.group + first_head + head) * d : (is_v ? job.v : job.k) + kv_head * d;
            const __half value = __float2half_rn(element < d ? rotated(from, element, is_v ? 0 : job.rotary, angles) : 0.0f);
            if (is_q) {
                q[at] = __half2float(value) * job.scale;
                continue;
            }
            (is_v ? own_v : own_k)[element] = value;
            // The head that appends is the first one of its key/value head.
            if (first_head == 0 && element < d) (is_v ? values : keys)[cached * d_pad + element] = value;
        }
        __syncthreads();

        State state[MAX_HEADS];
#pragma unroll
        for (int head = 0; head < MAX_HEADS; head++) state[head] = {-INFINITY, 0.0f, {}};
#pragma unroll 1
        for (int start = first_key; start - lane / width < count; start += KEYS_AHEAD * key_step) {
            if (start != first_key) load(start);
#pragma unroll 1
            for (int i = 0; i < KEYS_AHEAD && start + i * key_step - lane / width < count; i++) {
                const int key = start + i * key_step;
                uint4 of_key = held_keys[0], of_value = held_values[0];
#pragma unroll
                for (int next = 1; next < KEYS_AHEAD; next++) held_keys[next - 1] = held_keys[next], held_values[next - 1] = held_values[next];
                if (has_own && key == cached && unit < units) {
                    of_key = ((const uint4 *)own_k)[unit];
                    of_value = ((const uint4 *)own_v)[unit];
                }
                float key_values[8], value_values[8], scores[MAX_HEADS] = {};
                widen(of_key, key_values);
                widen(of_value, value_values);
#pragma unroll
                for (int head = 0; head < MAX_HEADS; head++)
                    if (head < heads && unit < units) scores[head] = dot(key_values, q + head * d_pad + unit * 8);
#pragma unroll 1
                for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
                    for (int head = 0; head < MAX_HEADS; head++) scores[head] += __shfl_xor_sync(ALL_LANES, scores[head], distance);
                }
                if (key >= count) continue;
#pragma unroll
                for (int head = 0; head < MAX_HEADS; head++) {
                    if (head >= heads) break;
                    if (job.bias)
                        scores[head] += __ldg(job.bias + (kv_head * job.group + first_head + head) * (2 * job.reach + 1) + job.reach + first + key - position);
                    state[head].see(scores[head], value_values);
                }
            }
        }
        // The keys of a warp, then the warps.
#pragma unroll 1
        for (int distance = LANES / 2; distance >= width; distance /= 2) {
#pragma unroll
            for (int head = 0; head < MAX_HEADS; head++)
                if (head < heads) state[head].join(distance);
        }
        const int of_head = 2 + d_pad;
#pragma unroll
        for (int head = 0; head < MAX_HEADS; head++) {
            if (head >= heads || lane >= units) continue;
            float *to = states + (warp * job.heads + head) * of_head;
            if (lane == 0) to[0] = state[head].max, to[1] = state[head].sum;
#pragma unroll
            for (int i = 0; i < 8; i++) to[2 + 8 * lane + i] = state[head].out[i];
        }
        __syncthreads();

        __half *out = job.out + (kv_head * job.group + first_head) * d;
        float *first_split = job.partials + (long long)(kv_head * groups + first_head / job.heads) * job.splits * job.heads * (2 + d);
        float *partial = first_split + split * job.heads * (2 + d);
#pragma unroll 1
        for (int at = threadIdx.x; at < heads * d; at += THREADS) {
            const int head = (unsigned)at / (unsigned)d, element = at - head * d;
            const float *of_warp = states + head * of_head;
            float max = -INFINITY, sum = 0.0f, joined = 0.0f;
#pragma unroll 4
            for (int w = 0; w < WARPS; w++) max = larger(max, of_warp[w * job.heads * of_head]);
#pragma unroll 4
            for (int w = 0; w < WARPS; w++) {
                const float factor = State::factor(of_warp[w * job.heads * of_head], max);
                sum += factor * of_warp[w * job.heads * of_head + 1];
                joined += factor * of_warp[w * job.heads * of_head + 2 + element];
            }
            if (active == 1) {
                out[at] = __float2half_rn(joined / sum);
            } else {
                partial[head * (2 + d) + 2 + element] = joined;
                if (element == 0) partial[head * (2 + d)] = max, partial[head * (2 + d) + 1] = sum;
            }
        }
        __syncthreads();
        if (active == 1) continue;
        if (threadIdx.x == 0) {
            __threadfence();
            is_last = atomicAdd(job.arrived + kv_head * groups + first_head / job.heads, 1) == active - 1;
        }
        __syncthreads();
        if (!is_last) continue;
        __threadfence();
        join_splits(job, first_split, heads, active, out);
        if (threadIdx.x == 0) job.arrived[kv_head * groups + first_head / job.heads] = 0;
    }
}
