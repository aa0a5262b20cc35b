// Attention of one query over a cache, with rotation and cache write in front of it.
//
//   q, k   rotated by the position's angles (half-split: element i pairs with i + rotary / 2)
//   cache  k, v of this position are appended to [g, capacity, d_pad] fp16, d_pad = d rounded up to 8, zeros behind d
//   out    softmax(scale * q . K^T + bias[head, key - query]) . V, fp32 inside
//
// A block owns one key/value head and `span` positions; all query heads of that head share its loads. Blocks behind the
// last position leave at once, so that the grid is the same at every step. Where several blocks have positions, each
// leaves (max, sum, out) in `partials`, and the last to arrive joins them.
//
//   positions |0 .. span|span .. 2 span|...|.. length|      lanes of a warp: 32 / L keys at a time, L lanes of 16 bytes each
//
// Bytes moved: 2 * length * d_pad * 2 per key/value head.

#include "kernels/cuda/device.cuh"

constexpr int ATTENTION_THREADS = 256;
constexpr int ATTENTION_WARPS = ATTENTION_THREADS / LANES;
// Query heads that a pass over the values serves.
constexpr int HEADS_AT_ONCE = 4;
// Loads of a lane in flight.
constexpr int UNROLL = 4;

// kernels/cuda/attention.rs mirrors this.
struct Attention {
    const __half *q;  // [h, d]
    const __half *k;  // [g, d]: null where nothing is appended
    const __half *v;
    __half *keys;  // [g, capacity, d_pad]
    __half *values;
    __half *out;               // [h, d]
    const float2 *angles;      // [capacity, rotary / 2] cosine and sine, null where nothing rotates
    const float *bias;         // [h, 2 * reach + 1] by key - query, null without
    const int *position;       // of the query, where something is appended
    const int *length;         // keys, where nothing is
    float *partials;           // [g, splits, group, 2 + d]
    int *arrived;              // [g], zero between launches
    float scale;
    int group, d, d_pad, rotary, reach, capacity, span, splits;
};

__device__ __forceinline__ float block_reduce_max(float value, float *room) {
    value = warp_max(value);
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = value;
    __syncthreads();
    value = room[0];
    for (int warp = 1; warp < ATTENTION_WARPS; warp++) value = larger(value, room[warp]);
    __syncthreads();
    return value;
}

// Element `at` of a head, rotated.
__device__ __forceinline__ float rotated(const __half *head, int at, int rotary, const float2 *angles) {
    float value = __half2float(load_fresh(head + at));
    if (at >= rotary) return value;
    int half = rotary / 2, pair = at < half ? at : at - half;
    float other = __half2float(load_fresh(head + (at < half ? at + half : pair)));
    float2 angle = __ldg(angles + pair);
    return at < half ? value * angle.x - other * angle.y : value * angle.x + other * angle.y;
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attention_step(const __grid_constant__ Attention job) {
    // q [group, d_pad], scores [group, span], sums [slots, HEADS_AT_ONCE, d_pad]
    DYNAMIC_SHARED(float, dynamic);
    __shared__ bool is_last;
    const int kv_head = blockIdx.x, split = blockIdx.y, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int d = job.d, d_pad = job.d_pad, group = job.group, span = job.span;
    float *q = dynamic, *scores = q + group * d_pad, *sums = scores + group * span;

    allow_next();
    wait_for_previous();

    const int position = job.k ? load_fresh(job.position) : 0;
    const int length = job.k ? position + 1 : load_fresh(job.length);
    const int active = (length + span - 1) / span;
    const int first = split * span, count = min(span, length - first);
    if (count <= 0) return;

    const float2 *angles = job.angles + (long long)position * (job.rotary / 2);
    const __half *own_q = job.q + (long long)kv_head * group * d;
    for (int at = threadIdx.x; at < group * d_pad; at += ATTENTION_THREADS) {
        int head = at / d_pad, element = at % d_pad;
        float value = element < d ? rotated(own_q + head * d, element, job.rotary, angles) : 0.0f;
        q[at] = __half2float(__float2half_rn(value)) * job.scale;
    }
    __half *keys = job.keys + (long long)kv_head * job.capacity * d_pad;
    __half *values = job.values + (long long)kv_head * job.capacity * d_pad;
    if (job.k && position >= first && position < first + count) {
        for (int at = threadIdx.x; at < d; at += ATTENTION_THREADS) {
            keys[(long long)position * d_pad + at] = __float2half_rn(rotated(job.k + kv_head * d, at, job.rotary, angles));
            values[(long long)position * d_pad + at] = load_fresh(job.v + kv_head * d + at);
        }
    }
    __syncthreads();

    // Scores: `width` lanes hold one key.
    const int units = d_pad / 8;
    int width = 1;
    while (width < units && width < LANES) width *= 2;
    const int keys_at_once = LANES / width, key_of_lane = lane / width, unit_of_lane = lane % width;
    for (int start = warp * keys_at_once; start < count; start += ATTENTION_WARPS * keys_at_once * UNROLL) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = start + u * ATTENTION_WARPS * keys_at_once + key_of_lane;
            if (key < count && unit_of_lane < units)
                loaded[u] = load_fresh((const uint4 *)(keys + (long long)(first + key) * d_pad) + unit_of_lane);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int key = start + u * ATTENTION_WARPS * keys_at_once + key_of_lane;
            for (int head = 0; head < group; head++) {
                float score = 0.0f;
                for (int unit = unit_of_lane; unit < units && key < count; unit += width) {
                    uint4 eight = unit == unit_of_lane
                                      ? loaded[u]
                                      : load_fresh((const uint4 *)(keys + (long long)(first + key) * d_pad) + unit);
                    const __half2 *pairs = (const __half2 *)&eight;
                    const float *of_head = q + head * d_pad + unit * 8;
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        float2 two = __half22float2(pairs[pair]);
                        score += two.x * of_head[2 * pair] + two.y * of_head[2 * pair + 1];
                    }
                }
                for (int distance = width / 2; distance > 0; distance /= 2)
                    score += __shfl_xor_sync(ALL_LANES, score, distance);
                if (unit_of_lane == 0 && key < count) {
                    if (job.bias) {
                        int query_head = kv_head * group + head;
                        score += job.bias[query_head * (2 * job.reach + 1) + job.reach + first + key - position];
                    }
                    scores[head * span + key] = score;
                }
            }
        }
    }
    __syncthreads();

    // exp(score - max) in place; a warp takes heads in turn and keeps their (max, sum).
    __shared__ float of_head[2][64];
    for (int head = warp; head < group; head += ATTENTION_WARPS) {
        float max = -INFINITY, sum = 0.0f;
        for (int key = lane; key < count; key += LANES) max = larger(max, scores[head * span + key]);
        max = warp_max(max);
        for (int key = lane; key < count; key += LANES) {
            float weight = __expf(scores[head * span + key] - max);
            scores[head * span + key] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (lane == 0) of_head[0][head] = max, of_head[1][head] = sum;
    }
    __syncthreads();

    // Values: a thread holds one unit of 8 elements and every slots-th key.
    const int slots = ATTENTION_THREADS / units, slot = threadIdx.x / units, unit = threadIdx.x % units;
    float *partial = job.partials + ((long long)(kv_head * job.splits + split) * group) * (2 + d);
    for (int first_head = 0; first_head < group; first_head += HEADS_AT_ONCE) {
        float total[HEADS_AT_ONCE][8] = {};
        if (slot < slots) {
#pragma unroll 4
            for (int key = slot; key < count; key += slots) {
                uint4 eight = load_fresh((const uint4 *)(values + (long long)(first + key) * d_pad) + unit);
                const __half2 *pairs = (const __half2 *)&eight;
#pragma unroll
                for (int head = 0; head < HEADS_AT_ONCE; head++) {
                    if (first_head + head >= group) break;
                    float weight = scores[(first_head + head) * span + key];
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        float2 two = __half22float2(pairs[pair]);
                        total[head][2 * pair] += weight * two.x;
                        total[head][2 * pair + 1] += weight * two.y;
                    }
                }
            }
#pragma unroll
            for (int head = 0; head < HEADS_AT_ONCE; head++)
#pragma unroll
                for (int at = 0; at < 8; at++) sums[(slot * HEADS_AT_ONCE + head) * d_pad + unit * 8 + at] = total[head][at];
        }
        __syncthreads();
        int heads = min(HEADS_AT_ONCE, group - first_head);
        for (int at = threadIdx.x; at < heads * d; at += ATTENTION_THREADS) {
            int head = at / d, element = at % d;
            float sum = 0.0f;
            for (int s = 0; s < slots; s++) sum += sums[(s * HEADS_AT_ONCE + head) * d_pad + element];
            if (active == 1)
                job.out[(kv_head * group + first_head + head) * d + element] =
                    __float2half_rn(sum / of_head[1][first_head + head]);
            else
                partial[(first_head + head) * (2 + d) + 2 + element] = sum;
        }
        __syncthreads();
    }
    if (active == 1) return;
    for (int head = threadIdx.x; head < group; head += ATTENTION_THREADS) {
        partial[head * (2 + d)] = of_head[0][head];
        partial[head * (2 + d) + 1] = of_head[1][head];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(job.arrived + kv_head, 1) == active - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();

    // scores and sums are free: the factor of each split, then the joined values.
    const float *all = job.partials + (long long)kv_head * job.splits * group * (2 + d);
    float *factors = scores;
    for (int head = 0; head < group; head++) {
        float max = -INFINITY;
        for (int s = threadIdx.x; s < active; s += ATTENTION_THREADS) max = larger(max, __ldcg(all + (s * group + head) * (2 + d)));
        max = block_reduce_max(max, dynamic);
        float sum = 0.0f;
        for (int s = 0; s < active; s++) {
            const float *of = all + (s * group + head) * (2 + d);
            float factor = __expf(__ldcg(of) - max);
            sum += factor * __ldcg(of + 1);
            if (threadIdx.x == s % ATTENTION_THREADS) factors[s] = factor;
        }
        __syncthreads();
        for (int element = threadIdx.x; element < d; element += ATTENTION_THREADS) {
            float joined = 0.0f;
            for (int s = 0; s < active; s++) joined += factors[s] * __ldcg(all + (s * group + head) * (2 + d) + 2 + element);
            job.out[(kv_head * group + head) * d + element] = __float2half_rn(joined / sum);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) job.arrived[kv_head] = 0;
}
