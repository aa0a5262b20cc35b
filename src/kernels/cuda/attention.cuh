// Attention of one query over a cache, with rotation and cache write in front of it.
//
//   q, k   rotated by the position's angles (half-split: element i pairs with i + rotary / 2)
//   cache  k, v of this position are appended to [g, capacity, d_pad] fp16, d_pad = d rounded up to 8, zeros behind d
//   out    softmax(scale * q . K^T + bias[head, key - query]) . V, fp32 inside
//
// A unit is a query head and `span` positions. Blocks take units in turn; those behind the last position do nothing. Where several
// units have positions, each leaves (max, sum, out) in `partials`, and the last to end joins them. What earlier steps left in the
// cache is asked for before q, k and v are there.
//
//   positions |0 .. span|span .. 2 span|...|.. length|      lanes of a warp: 32 / L keys at a time, L lanes of 16 bytes each
//
// The L lanes of a key keep a state of their own, (max, sum, out) over the keys that they have seen, so that nobody waits for
// anybody until all keys are seen. Bytes moved: 2 * length * d_pad * 2 per unit.
#pragma once

#include "kernels/cuda/job.cuh"

// Keys and values of a lane, 8 elements each, that are in flight at once; more do not fit into its registers.
constexpr int KEYS_AHEAD = 2;

// Element `at` of a head, rotated, once it is there.
__device__ __forceinline__ float rotated(const uint32_t *head, int at, int rotary, const float2 *angles, const Awaited &awaited) {
    const int half = rotary / 2, pair = at < half ? at : at - half;
    const bool turns = at < rotary;
    const float2 angle = turns ? __ldg(angles + pair) : make_float2(1.0f, 0.0f);
    const uint32_t *with = turns ? head + (at < half ? at + half : pair) : head + at;
    uint32_t word = look(head + at), of_other = look(with);
    while (!awaited.are_there(awaited.off_half(word) | awaited.off_half(of_other))) {
        pause();
        word = look(head + at), of_other = look(with);
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

// The units of the same head, joined by the block that ended last. A unit's partial is [2 + d]: max, sum, out.
__device__ __forceinline__ void join_splits(const float *first_split, int d, int active, uint32_t *out, uint32_t tag) {
#pragma unroll 1
    for (int at = threadIdx.x; at < d; at += THREADS) {
        float max = -INFINITY, sum = 0.0f, joined = 0.0f;
#pragma unroll 4
        for (int split = 0; split < active; split++) max = larger(max, __ldcg(first_split + split * (2 + d)));
#pragma unroll 4
        for (int split = 0; split < active; split++) {
            const float *partial = first_split + split * (2 + d);
            const float factor = __expf(__ldcg(partial) - max);
            sum += factor * __ldcg(partial + 1);
            joined += factor * __ldcg(partial + 2 + at);
        }
        tell(out + at, tagged(__float2half_rn(joined / sum), tag));
    }
}

// What it makes has the tag `own`; every thread calls `ahead` once. `room`: q [d_pad] fp32, the query's own k and v [d_pad] fp16, then
// the warps' states: max and sum [WARPS], out [WARPS, d_pad] fp32.
template <class Ahead>
__device__ __forceinline__ void attend(const Attention &job, const Tags &tags, uint32_t own, uint8_t *room, Ahead ahead) {
    __shared__ bool is_last;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int d = job.d, d_pad = job.d_pad, units = d_pad / 8, span = job.span;
    const int appended = job.k ? 1 : 0;
    float *q = (float *)room;
    __half *own_k = (__half *)(q + d_pad), *own_v = own_k + d_pad;
    float *maxes = (float *)(own_v + d_pad), *sums = maxes + WARPS, *outs = sums + WARPS;

    // `width` lanes hold a key and its value, eight elements each; rows of more than 32 lanes are not there.
    int width = 1;
#pragma unroll 1
    while (width < units) width *= 2;
    const int keys_at_once = LANES / width, unit = lane % width;
    const int first_key = warp * keys_at_once + lane / width, key_step = WARPS * keys_at_once;

    const int position = appended ? load_fresh(job.position) : 0;
    const int length = appended ? position + 1 : load_fresh(job.length);
    const int active = (length + span - 1) / span;

    // A unit: its head, its part of the cache, and how many positions it has there, of which the own one is not there yet.
    // `place` is where that begins, in units of eight elements.
    int index = blockIdx.x, kv_head = 0, head = 0, split = 0, first = 0, count = 0, cached = 0, place = 0;
    const int n_units = job.kv_heads * job.group * active;
    auto enter = [&]() {
        head = (unsigned)index / (unsigned)active;
        split = index - head * active;
        kv_head = head / job.group;
        first = split * span;
        count = min(span, length - first);
        cached = min(count, length - appended - first);
        place = (kv_head * job.capacity + first) * units;
    };
    uint4 held_keys[KEYS_AHEAD], held_values[KEYS_AHEAD];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < KEYS_AHEAD; i++) {
            const int key = start + i * key_step;
            held_keys[i] = held_values[i] = make_uint4(0, 0, 0, 0);
            if (key >= cached || unit >= units) continue;
            const int at = place + key * units + unit;
            held_keys[i] = load_fresh((const uint4 *)job.keys + at);
            held_values[i] = load_fresh((const uint4 *)job.values + at);
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
            const uint32_t *from = which == 0 ? job.q + head * d : (which == 1 ? job.k : job.v) + kv_head * d;
            const Awaited awaited(tags, job.of_job[which]);
            const float2 *angles = job.angles + (long long)position * (job.rotary / 2);
            const __half value = __float2half_rn(element < d ? rotated(from, element, which == 2 ? 0 : job.rotary, angles, awaited) : 0.0f);
            if (which == 0) {
                q[element] = __half2float(value) * job.scale;
                continue;
            }
            (which == 1 ? own_k : own_v)[element] = value;
            // The head that appends is the first one of its key/value head.
            if (head != kv_head * job.group || element >= d) continue;
            (which == 1 ? job.keys : job.values)[(long long)(place + cached * units) * 8 + element] = value;
        }
        meet();

        float of_query[8] = {};
        if (unit < units) {
#pragma unroll
            for (int i = 0; i < 8; i++) of_query[i] = q[unit * 8 + i];
        }
        const float *bias = job.bias + head * (2 * job.reach + 1) + job.reach + first - position;
        State state = {-INFINITY, 0.0f, {}};
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
                state.see(job.bias ? score + __ldg(bias + key) : score, value_values);
            }
        }
        // The keys of a warp, then the warps.
#pragma unroll 1
        for (int distance = LANES / 2; distance >= width; distance /= 2) state.join(distance);
        if (lane < units) {
            if (lane == 0) maxes[warp] = state.max, sums[warp] = state.sum;
            float4 *to = (float4 *)(outs + warp * d_pad) + 2 * lane;
            to[0] = make_float4(state.out[0], state.out[1], state.out[2], state.out[3]);
            to[1] = make_float4(state.out[4], state.out[5], state.out[6], state.out[7]);
        }
        meet();

        // A warp makes 32 elements; its lanes first weigh one warp each.
        uint32_t *out = job.out + head * d;
        float *first_split = job.partials + (long long)head * job.splits * (2 + d), *partial = first_split + split * (2 + d);
        if (warp * LANES < d) {
            const float max = lane < WARPS ? maxes[lane] : -INFINITY, largest = warp_max(max), weight = State::factor(max, largest);
            const float sum = warp_sum(lane < WARPS ? sums[lane] * weight : 0.0f);
            const int element = threadIdx.x;
            float joined = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float of_warp = __shfl_sync(ALL_LANES, weight, w);
                if (element < d) joined += of_warp * outs[w * d_pad + element];
            }
            if (element < d) {
                if (active == 1) tell(out + element, tagged(__float2half_rn(joined / sum), own));
                else partial[2 + element] = joined;
            }
            if (active > 1 && element == 0) partial[0] = largest, partial[1] = sum;
        }
        meet();
        if (active > 1) {
            if (threadIdx.x == 0) {
                __threadfence();
                is_last = atomicAdd(job.arrived + head, 1) == active - 1;
                // Before what this job makes is there: the next attention counts from zero.
                if (is_last) job.arrived[head] = 0;
            }
            meet();
            if (is_last) {
                __threadfence();
                join_splits(first_split, d, active, out, own);
            }
        }
        index += gridDim.x;
        begin();
    }
}
