// Attention of one query over a cache, after rotation and cache write.
//
//   q, k   rotated by the position's angles (half-split: element i pairs with i + rotary / 2)
//   cache  k, v of this position are appended to [g, capacity, d_pad] fp16, d_pad = d rounded up to 8, zeros behind d
//   out    softmax(scale * q . K^T + bias[head, key - query]) . V, fp32 inside
//
// A unit is `span` positions of a key/value head and some of its query heads. Blocks take units in turn; units behind the last position do nothing.
// Where a head has several units, each stores (max, sum, out) in `partials`, and the last one to end merges them. The cache of earlier steps is
// loaded before q, k and v are ready. Bytes moved: 2 * length * d_pad * 2 per key/value head and four of its query heads.
//
// Heads of up to 64 elements go to tensor cores, up to four query heads of a key/value head together: a warp takes 8 keys at a time,
//
//   S [heads, keys] = Q [heads, d] . K^T [d, keys]      out [d, heads] += V^T [d, keys] . P^T [keys, heads]
//
// and the fragment of S becomes that of P^T as it is, in the same lanes. Lane 4g + q loads 16 bytes at a time, of key g (K) or of keys 2q and 2q + 1
// (V); the products sum over d and take its elements in whatever order these loads give. Wider heads are multiplied lane by lane (`attend_wide`):
//
//   positions |0 .. span|span .. 2 span|...|.. length|      lanes of a warp: 32 / L keys at a time, L lanes of 16 bytes each
//
// The L lanes of a key keep an online softmax of their own, (max, sum, out) over their keys, so that lanes synchronize only after all keys.
//
// A featured attention (OPCODE_FEATURED_ATTENTION) has some of: norms of queries and keys before the rotation, a window, capped scores, sinks. It
// is `attend_wide` at every width, in code of its own.
#pragma once

#include "kernels/cuda/attention_parts.cuh"

// Query heads that a unit takes together, and the widest head of tensor cores; kernels/cuda/attention.rs counts the same.
constexpr int HEADS_TOGETHER = 4, TENSOR_D = 64;
// Keys of a warp at once, and 16-byte words of a key that a lane holds.
constexpr int KEYS_AT_ONCE = 8, KEY_WORDS = TENSOR_D / 32;

// Runs an attention of heads of up to TENSOR_D elements. `room`: q [heads, d_pad], the query's own k and v [d_pad] fp16, then the warps' states: max
// and sum [WARPS, HEADS_TOGETHER], out [WARPS, heads, d_pad] fp32.
template <class Ahead>
__device__ __forceinline__ void attend_together(const Attention &op, const Tags &tags, int instruction, uint8_t *room, Ahead ahead) {
    __shared__ bool is_last;
    const uint32_t own = tags.of(instruction);
    stamp(instruction, STAMP_BEGUN);
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, quarter = lane % 4;
    const int d = op.d, d_pad = op.d_pad, units = d_pad / 8, most = min(op.group, HEADS_TOGETHER), parts = (op.group + HEADS_TOGETHER - 1) / HEADS_TOGETHER;
    __half *q = (__half *)room, *own_k = q + most * d_pad, *own_v = own_k + d_pad;
    float *maxes = (float *)(own_v + d_pad), *sums = maxes + WARPS * HEADS_TOGETHER, *outs = sums + WARPS * HEADS_TOGETHER;

    const int appended = op.k ? 1 : 0, position = appended ? load_l2(op.position) : 0;
    const int length = appended ? position + 1 : load_l2(op.length), active = (length + op.span - 1) / op.span;

    // A unit: its heads, its part of the cache, and how many positions it has there; the query's own position is not in the cache yet. `place` is
    // the index of the part's first element, in units of eight.
    int index = blockIdx.x, kv_head = 0, first_head = 0, heads = 0, split = 0, count = 0, cached = 0, place = 0;
    const int n_units = op.kv_heads * parts * active;
    auto enter = [&]() {
        const int of_heads = (unsigned)index / (unsigned)active;
        split = index - of_heads * active;
        kv_head = of_heads / parts;
        const int in_group = (of_heads - kv_head * parts) * HEADS_TOGETHER, first = split * op.span;
        first_head = kv_head * op.group + in_group;
        heads = min(HEADS_TOGETHER, op.group - in_group);
        count = min(op.span, length - first);
        cached = min(count, length - appended - first);
        place = (kv_head * op.capacity + first) * units;
    };
    uint4 held_keys[KEY_WORDS], held_values[2];
    // `start` is the warp's first key. Loads repeat the last key behind it, whose weight is zero, and the last unit behind d, which meets zeros of q
    // or gives elements that nobody reads.
    auto load = [&](int start) {
        const int last = max(cached - 1, 0);
        const uint4 *key = (const uint4 *)op.keys + place + min(start + g, last) * units;
#pragma unroll
        for (int i = 0; i < KEY_WORDS; i++) held_keys[i] = load_l2(key + min(4 * i + quarter, units - 1));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            held_values[i] = load_l2((const uint4 *)op.values + place + min(start + 2 * quarter + i, last) * units + min(g, units - 1));
            // Nothing is there yet but the query's own.
            if (cached <= 0) held_values[i] = make_uint4(0, 0, 0, 0);
        }
    };
    const int first_key = warp * KEYS_AT_ONCE;
    auto begin = [&]() {
        if (index >= n_units) return;
        enter();
        load(first_key);
    };
    begin();
    ahead();
    if (index >= n_units) stamp_rest(instruction, STAMP_READY);
#pragma unroll 1
    while (index < n_units) {
        const bool has_own = cached < count;
#pragma unroll 1
        for (int at = threadIdx.x; at < (heads + (has_own ? 2 : 0)) * d_pad; at += THREADS) {
            const int row = (unsigned)at / (unsigned)d_pad, element = at - row * d_pad, which = max(0, row - heads + 1);
            const uint32_t *from = which == 0 ? op.q + (first_head + row) * d : (which == 1 ? op.k : op.v) + kv_head * d;
            const ExpectedTag expected(tags, op.written_by[which]);
            const float2 *angles = op.angles + (long long)position * (op.rotary / 2);
            const __half value = __float2half_rn(element < d ? rotated(from, element, which == 2 ? 0 : op.rotary, angles, expected, Unnormed()) : 0.0f);
            (which == 0 ? q + row * d_pad : which == 1 ? own_k : own_v)[element] = value;
            // The first query heads of a key/value head append.
            if (which == 0 || first_head != kv_head * op.group || element >= d) continue;
            (which == 1 ? op.keys : op.values)[(long long)(place + cached * units) * 8 + element] = value;
        }
        if (index == blockIdx.x) stamp(instruction, STAMP_READY);
        barrier_sync();
        if (index == blockIdx.x) stamp_rest(instruction, STAMP_READ);

        // Rows behind the last head repeat it, and nobody reads them.
        const uint32_t of_query = shared_address(q + min(g, heads - 1) * d_pad);
        const float *bias = op.bias + (first_head + g) * (2 * op.reach + 1) + op.reach + split * op.span - position;
        // Of row g: the largest score, and this lane's part of the sum. Out: elements 8g + 2i and 8g + 2i + 1 of heads 2q and 2q + 1.
        float largest = -INFINITY, sum = 0.0f, out[4][4] = {};
#pragma unroll 1
        for (int start = first_key; start < count; start += WARPS * KEYS_AT_ONCE) {
            if (start != first_key) load(start);
            const int before_own = has_own ? cached - start : -1;
            if (before_own >= 0 && before_own < KEYS_AT_ONCE) {
#pragma unroll
                for (int i = 0; i < KEY_WORDS; i++)
                    // Words behind d meet zeros of q, but what the cache held there before may be no number.
                    if (g == before_own) held_keys[i] = 4 * i + quarter < units ? ((const uint4 *)own_k)[4 * i + quarter] : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (2 * quarter + i == before_own && g < units) held_values[i] = ((const uint4 *)own_v)[g];
            }
            float scores[4] = {}, next = largest;
#pragma unroll
            for (int i = 0; i < KEY_WORDS; i++) {
                const uint4 a = 4 * i + quarter < units ? load_copied_16(of_query + 16 * (4 * i + quarter)) : make_uint4(0, 0, 0, 0);
                multiply_halves(scores, a.x, 0, a.y, 0, held_keys[i].x, held_keys[i].y);
                multiply_halves(scores, a.z, 0, a.w, 0, held_keys[i].z, held_keys[i].w);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = start + 2 * quarter + i;
                float score = scores[i] * op.scale;
                if (op.bias && key < count && g < heads) score += __ldg(bias + key);
                scores[i] = key < count ? score : -INFINITY;
                next = larger(next, scores[i]);
            }
            // Over the four lanes of the row. A warp's first key of a step is there, so that this is no maximum of nothing.
            next = larger(next, __shfl_xor_sync(ALL_LANES, next, 1));
            next = larger(next, __shfl_xor_sync(ALL_LANES, next, 2));
            const float old = SoftmaxState::factor(largest, next), low = __expf(scores[0] - next), high = __expf(scores[1] - next);
            largest = next;
            sum = sum * old + (low + high);
            const __half2 pair = __floats2half2_rn(low, high);
            const uint32_t weights = *(const uint32_t *)&pair;
            if (__ballot_sync(ALL_LANES, old != 1.0f)) {
                const float of_first = __shfl_sync(ALL_LANES, old, 8 * quarter), of_second = __shfl_sync(ALL_LANES, old, 8 * quarter + 4);
#pragma unroll
                for (int i = 0; i < 4; i++) out[i][0] *= of_first, out[i][1] *= of_second, out[i][2] *= of_first, out[i][3] *= of_second;
            }
            auto multiply = [&](float (&sums_of)[4], uint32_t first, uint32_t second) {
                multiply_halves(sums_of, __byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632), 0, 0, weights, 0);
            };
            multiply(out[0], held_values[0].x, held_values[1].x);
            multiply(out[1], held_values[0].y, held_values[1].y);
            multiply(out[2], held_values[0].z, held_values[1].z);
            multiply(out[3], held_values[0].w, held_values[1].w);
        }
        sum = quad_sum(sum);
        if (quarter == 0 && g < heads) maxes[warp * HEADS_TOGETHER + g] = largest, sums[warp * HEADS_TOGETHER + g] = sum;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (g >= units || 2 * quarter + i >= heads) continue;
            float4 *to = (float4 *)(outs + (warp * most + 2 * quarter + i) * d_pad) + 2 * g;
            to[0] = make_float4(out[0][i], out[0][2 + i], out[1][i], out[1][2 + i]);
            to[1] = make_float4(out[2][i], out[2][2 + i], out[3][i], out[3][2 + i]);
        }
        stamp(instruction, STAMP_MULTIPLIED);
        barrier_sync();
        stamp(instruction, STAMP_SUMMED);

        // A warp computes 32 elements of a head; each of its lanes first computes the weight of one warp.
        const int of_head = (d + LANES - 1) / LANES, head = warp / of_head, element = (warp - head * of_head) * LANES + lane;
        float *first_split = op.partials + (long long)first_head * op.splits * (2 + d), *partial = first_split + (head * op.splits + split) * (2 + d);
        if (head < heads) {
            const float max = lane < WARPS ? maxes[lane * HEADS_TOGETHER + head] : -INFINITY, of_all = warp_max(max), weight = SoftmaxState::factor(max, of_all);
            const float total = warp_sum(lane < WARPS ? sums[lane * HEADS_TOGETHER + head] * weight : 0.0f);
            float merged = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float of_warp = __shfl_sync(ALL_LANES, weight, w);
                if (element < d) merged += of_warp * outs[(w * most + head) * d_pad + element];
            }
            if (element < d) {
                if (active == 1) store_relaxed(op.out + (first_head + head) * d + element, tagged(__float2half_rn(merged / total), own));
                else partial[2 + element] = merged;
            }
            if (active > 1 && element == 0) partial[0] = of_all, partial[1] = total;
        }
        barrier_sync();
        if (active > 1) {
            if (threadIdx.x == 0) {
                __threadfence();
                is_last = atomicAdd(op.arrived + first_head, 1) == active - 1;
                // Before the results are visible: the next attention counts from zero.
                if (is_last) op.arrived[first_head] = 0;
            }
            barrier_sync();
            if (is_last) {
                __threadfence();
                merge_splits(first_split, heads, op.splits, d, active, nullptr, op.out + first_head * d, own);
            }
        }
        stamp(instruction, STAMP_STORED);
        index += gridDim.x;
        begin();
    }
}

// Runs instruction `instruction`, an attention of heads of any width, as `attend_together` does; only a FEATURED one has the features. `room`: q [d_pad] fp32, the query's own k and v
// [d_pad] fp16, then the warps' states: max and sum [WARPS], out [WARPS, d_pad] fp32.
template <bool FEATURED, class Ahead>
__device__ __forceinline__ void attend_wide(const Attention &op, const Tags &tags, int instruction, uint8_t *room, Ahead ahead) {
    __shared__ bool is_last;
    const uint32_t own = tags.of(instruction);
    stamp(instruction, STAMP_BEGUN);
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
    // The first position that the query sees.
    const int seen = FEATURED && op.window > 0 ? max(0, length - op.window) : 0;
    const int active = (length - seen + span - 1) / span;

    // A unit: its head, its part of the cache, and how many positions it has there; the query's own position is not in the cache yet.
    // `place` is the index of the part's first element, in units of eight.
    int index = blockIdx.x, kv_head = 0, head = 0, split = 0, first = 0, count = 0, cached = 0, place = 0;
    const int n_units = op.kv_heads * op.group * active;
    auto enter = [&]() {
        head = (unsigned)index / (unsigned)active;
        split = index - head * active;
        kv_head = head / op.group;
        first = seen + split * span;
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
    if (index >= n_units) stamp_rest(instruction, STAMP_READY);
#pragma unroll 1
    while (index < n_units) {
        const bool has_own = cached < count;
        HeadNorm of_q, of_k;
        if (FEATURED && op.q_norm) {
            __shared__ float room_of_norms[2 * WARPS];
            const bool all = op.norms_all_heads;
            of_q.weights = op.q_norm + (all ? head * d : 0);
            of_q.factor = norm_factor(op.q + (all ? 0 : head * d), all ? op.kv_heads * op.group * d : d, ExpectedTag(tags, op.written_by[0]), op.epsilon, room_of_norms);
            if (has_own) {
                of_k.weights = op.k_norm + (all ? kv_head * d : 0);
                of_k.factor = norm_factor(op.k + (all ? 0 : kv_head * d), all ? op.kv_heads * d : d, ExpectedTag(tags, op.written_by[1]), op.epsilon, room_of_norms + WARPS);
            }
        }
#pragma unroll 1
        for (int at = threadIdx.x; at < (has_own ? 3 : 1) * d_pad; at += THREADS) {
            const int which = (unsigned)at / (unsigned)d_pad, element = at - which * d_pad;
            const uint32_t *from = which == 0 ? op.q + head * d : (which == 1 ? op.k : op.v) + kv_head * d;
            const ExpectedTag expected(tags, op.written_by[which]);
            const float2 *angles = op.angles + (long long)position * (op.rotary / 2);
            auto read = [&](auto norm) { return rotated(from, element, which == 2 ? 0 : op.rotary, angles, expected, norm); };
            float unrounded = 0.0f;
            if (element < d) {
                // By its members: a choice among structs would put them into local memory.
                if constexpr (FEATURED) unrounded = read(HeadNorm{which == 0 ? of_q.factor : of_k.factor, which == 0 ? of_q.weights : which == 1 ? of_k.weights : nullptr});
                else unrounded = read(Unnormed());
            }
            const __half value = __float2half_rn(unrounded);
            if (which == 0) {
                q[element] = __half2float(value) * op.scale;
                continue;
            }
            (which == 1 ? own_k : own_v)[element] = value;
            // The first query head of a key/value head appends.
            if (head != kv_head * op.group || element >= d) continue;
            (which == 1 ? op.keys : op.values)[(long long)(place + cached * units) * 8 + element] = value;
        }
        if (index == blockIdx.x) stamp(instruction, STAMP_READY);
        barrier_sync();
        if (index == blockIdx.x) stamp_rest(instruction, STAMP_READ);

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
                if (FEATURED && op.softcap > 0.0f) score = capped(score, op.softcap);
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
        stamp(instruction, STAMP_MULTIPLIED);
        barrier_sync();
        stamp(instruction, STAMP_SUMMED);

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
                float total = sum;
                if (FEATURED && op.sinks && active == 1) {
                    const float sink = __ldg(op.sinks + head), most = larger(largest, sink), kept = SoftmaxState::factor(largest, most);
                    total = sum * kept + __expf(sink - most);
                    merged *= kept;
                }
                if (active == 1) store_relaxed(out + element, tagged(__float2half_rn(merged / total), own));
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
                merge_splits(first_split, 1, op.splits, d, active, FEATURED && op.sinks ? op.sinks + head : nullptr, out, own);
            }
        }
        stamp(instruction, STAMP_STORED);
        index += gridDim.x;
        begin();
    }
}

// Runs instruction `instruction`, an attention without features; every thread calls `ahead` once.
template <class Ahead>
__device__ __forceinline__ void attend(const Attention &op, const Tags &tags, int instruction, uint8_t *room, Ahead ahead) {
    if (op.d_pad <= TENSOR_D) attend_together(op, tags, instruction, room, ahead);
    else attend_wide<false>(op, tags, instruction, room, ahead);
}
