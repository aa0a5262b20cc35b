// Attention of many rows over a cache, in tiles, with an online softmax: no score is stored.
//
//   out[r, h] = softmax(scale * q[r, h] . K[h']^T + bias[h, key - query]) . V[h']        h' = h / group, fp16, sums fp32
//
// A block owns TILE_QUERIES rows of a head, a warp 16 of them, whose outputs stay in its registers. Tiles of keys and values go through shared
// memory; the next one is copied during the products of this one:
//
//   keys     |tile 0 ..|tile 1 ..|tile 2 ..|        S = Q . K^T   max, exp2, sum    O = O * old / new + P . V
//   blocks   rows r .. r + 63 of a head: all tiles up to the last key that one of them sees
//
// Few rows over many keys leave multiprocessors without a block: then `splits` blocks share the keys of a tile of rows, each leaves (max, sum, out),
// and `attend_merge` merges them.
//
// Featured kernels have some of: a window, capped scores, sinks.
//
// Weights P are rounded to fp16 before their sum divides them. Elements behind d and keys behind the last are zeros. Bytes moved: K and V of a
// head once for each block, from L2.

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/place.cuh"

constexpr int TILE_THREADS = 128, TILE_WARPS = TILE_THREADS / LANES, WARP_QUERIES = 16, TILE_QUERIES = TILE_WARPS * WARP_QUERIES;
constexpr float LOG2_E = 1.4426950408889634f;

// One attention of `rows` rows of each sequence, whose first row is at `position`. All are one behind the other, by sequence.
struct RowsAttention {
    const __half *q;      // [sequences, rows, heads, d]
    const __half *keys;   // [sequences, heads / group, capacity, d_pad]; so are values
    const __half *values;
    __half *out;        // [sequences, rows, heads, d]
    const float *bias;  // [heads, 2 * reach + 1] by key - query, or null
    float scale;
    int rows, heads, group, d, d_pad, capacity;
    int total;      // keys
    int position;   // of the first row
    int is_causal;  // a row sees no keys behind its own position
    int reach;
    int splits;
    float *partials;  // [splits, sequences, rows, heads, 2 + d], where there are several splits: max in powers of two, sum, out
    const Place *places;  // [sequences], in the place of `position` and `total`, which are the most then; null without
    int sequences;
    int over_encoder;  // keys are the encoder's rows, and rows have no position
    // Of featured kernels alone.
    const float *sinks;  // [heads]: scores that join the softmax and weigh no value; null without
    float softcap;       // of scores: softcap * tanh(score / softcap); 0 for none
    int window;          // keys that a row sees, its own the last; 0 for all
};

__device__ __forceinline__ uint32_t pair_of(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *(const uint32_t *)&pair;
}

// Two neighbouring elements of a row, zeros behind its d.
__device__ __forceinline__ uint32_t two_of(const __half *row, int at, int d) {
    if (d % 2 == 0) return at < d ? *(const uint32_t *)(row + at) : 0;
    const __half zero = __float2half_rn(0.0f);
    const __half2 pair = __halves2half2(at < d ? row[at] : zero, at + 1 < d ? row[at + 1] : zero);
    return *(const uint32_t *)&pair;
}

// The largest, and the sum, over the four lanes of a row.
__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

// Heads of up to D elements, a multiple of 16; tiles of KEYS keys. A block makes OUT elements of the output: all, or as many as registers hold.
template <int D, int KEYS, int OUT = D, bool FEATURED = false>
__device__ __forceinline__ void attend_tile(const RowsAttention &op) {
    // A row of shared memory: an odd number of 16-byte words, so that neighbouring rows have no bank conflicts.
    let_next_start();
    wait_for_launch_before();
    constexpr int WORDS = D / 8, ROW_BYTES = (WORDS | 1) * 16, TILE_BYTES = KEYS * ROW_BYTES, PARTS = D / OUT;
    static_assert(D % 16 == 0 && KEYS % 16 == 0 && OUT % 16 == 0 && D % OUT == 0, "whole fragments");
    DYNAMIC_SHARED(uint4, tiles);
    const uint32_t shared = shared_address(tiles);
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, split = blockIdx.y % op.splits, head = blockIdx.y / op.splits / PARTS, first_element = blockIdx.y / op.splits % PARTS * OUT;
    // The longest blocks go first.
    const int of_sequence = (op.rows + TILE_QUERIES - 1) / TILE_QUERIES, sequence = op.sequences == 1 ? 0 : blockIdx.x / of_sequence;
    const int first_row = (of_sequence - 1 - (blockIdx.x - sequence * of_sequence)) * TILE_QUERIES, last_row = min(first_row + TILE_QUERIES, op.rows) - 1;
    const int position = op.places ? (op.over_encoder ? 0 : op.places[sequence].position) : op.position;
    const int total = op.places ? (op.over_encoder ? op.places[sequence].encoded : position + op.rows) : op.total;
    const int seen = op.is_causal ? min(total, position + last_row + 1) : total, all_tiles = (seen + KEYS - 1) / KEYS;
    // The tile with the first key that a row of the block sees.
    const int begin = FEATURED && op.window > 0 ? max(0, position + first_row + 1 - op.window) / KEYS : 0;
    const int of_split = (all_tiles - begin + op.splits - 1) / op.splits, first_tile = begin + split * of_split, n_tiles = min(all_tiles, first_tile + of_split);
    // In words of 16 bytes, of which a cache has fewer than 2^32.
    const uint32_t cache = (uint32_t)(sequence * (op.heads / op.group) + head / op.group) * op.capacity * (op.d_pad / 8);
    // Copies a tile's keys and values: 16 bytes a thread at a time.
    auto copy = [&](int tile) {
        const uint32_t to = shared + tile % 2 * 2 * TILE_BYTES;
#pragma unroll 2
        for (int at = threadIdx.x; at < KEYS * WORDS; at += TILE_THREADS) {
            const int key = at / WORDS, word = at % WORDS, place = tile * KEYS + key;
            const bool is_there = place < total && 8 * word < op.d_pad;
            const long long from = is_there ? 8ll * (cache + (uint32_t)(place * (op.d_pad / 8) + word)) : 0;
            copy_streaming(to + key * ROW_BYTES + 16 * word, op.keys + from, is_there);
            if (OUT == D || (8 * word >= first_element && 8 * word < first_element + OUT))
                copy_streaming(to + TILE_BYTES + key * ROW_BYTES + 16 * word, op.values + from, is_there);
        }
        commit_copies();
    };
    copy(first_tile);

    // This lane's two rows; those behind the last one compute what the last one does.
    const int row_of_lane = first_row + warp * WARP_QUERIES + g, own = position + row_of_lane;
    uint32_t of_query[D / 16][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const __half *row = op.q + (((long long)sequence * op.rows + min(row_of_lane + 8 * i, op.rows - 1)) * op.heads + head) * op.d;
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            of_query[step][i] = two_of(row, step * 16 + 2 * q, op.d);
            of_query[step][i + 2] = two_of(row, step * 16 + 2 * q + 8, op.d);
        }
    }
    const bool is_capped = FEATURED && op.softcap > 0.0f;
    const float factor = op.bias || is_capped ? 1.0f : op.scale * LOG2_E;
    float out[OUT / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};

#pragma unroll 1
    for (int tile = first_tile; tile < n_tiles; tile++) {
        wait_all_copies();
        // Behind it the tile is there, and nobody reads the one before.
        __syncthreads();
        if (tile + 1 < n_tiles) copy(tile + 1);
        const uint32_t keys = shared + tile % 2 * 2 * TILE_BYTES, values = keys + TILE_BYTES;
        const int first_key = tile * KEYS;

        float scores[KEYS / 8][4] = {};
        // Matrices: the first eight elements of eight keys, the second eight, then those of eight keys more.
        const uint32_t of_lane = keys + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
#pragma unroll
            for (int two = 0; two < KEYS / 16; two++) {
                uint32_t b[4];
                load_matrices(b, of_lane + two * 16 * ROW_BYTES + step * 32);
                multiply_halves(scores[2 * two], of_query[step][0], of_query[step][1], of_query[step][2], of_query[step][3], b[0], b[1]);
                multiply_halves(scores[2 * two + 1], of_query[step][0], of_query[step][1], of_query[step][2], of_query[step][3], b[2], b[3]);
            }
        }

        // Element i of a fragment is of row g + 8 (i / 2), and of key 2q + i % 2. Scores with a bias are scaled with it.
        auto key_of = [&](int at, int i) { return first_key + at * 8 + 2 * q + i % 2; };
        auto distance_of = [&](int at, int i) { return key_of(at, i) - own - i / 2 * 8; };
        auto for_all = [&](auto change) {
#pragma unroll
            for (int at = 0; at < KEYS / 8; at++) {
#pragma unroll
                for (int i = 0; i < 4; i++) scores[at][i] = change(scores[at][i], at, i);
            }
        };
        if (op.bias) {
            for_all([&](float score, int at, int i) {
                if (key_of(at, i) >= total) return 0.0f;
                // Of rows behind the last one the distance may lie before the table's begin.
                const float bias = op.bias[head * (2 * op.reach + 1) + max(0, op.reach + distance_of(at, i))];
                return score * op.scale * LOG2_E + bias * LOG2_E;
            });
        }
        if (is_capped) for_all([&](float score, int, int) { return op.softcap * tanhf(score * op.scale / op.softcap) * LOG2_E; });
        if (FEATURED && op.window > 0 && first_key + op.window <= own - g + WARP_QUERIES - 1)
            for_all([&](float score, int at, int i) { return distance_of(at, i) <= -op.window ? -INFINITY : score; });
        const bool is_edge = first_key + KEYS > total || (op.is_causal && first_key + KEYS > own - g + 1);
        if (is_edge)
            for_all([&](float score, int at, int i) { return key_of(at, i) >= total || (op.is_causal && distance_of(at, i) > 0) ? -INFINITY : score; });
        // NaN is never the largest; its power is NaN all the same.
        float largest[2] = {most[0], most[1]}, old[2];
        for_all([&](float score, int, int i) {
            largest[i / 2] = fmaxf(largest[i / 2], score);
            return score;
        });
#pragma unroll
        for (int i = 0; i < 2; i++) {
            largest[i] = quad_max(largest[i]);
            // Of rows behind the last one: they may see no key of the first tile.
            const float base = largest[i] == -INFINITY ? 0.0f : largest[i] * factor;
            old[i] = power_of_two(most[i] * factor - base);
            most[i] = largest[i];
            largest[i] = base;
            sum[i] *= old[i];
        }
#pragma unroll
        for (int at = 0; at < OUT / 8; at++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[at][i] *= old[i / 2];
        }
        const uint32_t of_value = values + (lane / 8 % 2 * 8 + lane % 8) * ROW_BYTES + lane / 16 * 16 + first_element * 2;
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            float weights[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                weights[i] = power_of_two(scores[2 * step + i / 4][i % 4] * factor - largest[i % 4 / 2]);
                sum[i % 4 / 2] += weights[i];
            }
            const uint32_t a0 = pair_of(weights[0], weights[1]), a1 = pair_of(weights[2], weights[3]), a2 = pair_of(weights[4], weights[5]), a3 = pair_of(weights[6], weights[7]);
#pragma unroll
            for (int two = 0; two < OUT / 16; two++) {
                uint32_t b[4];
                load_transposed(b, of_value + step * 16 * ROW_BYTES + two * 32);
                multiply_halves(out[2 * two], a0, a1, a2, a3, b[0], b[1]);
                multiply_halves(out[2 * two + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }
    // Known once more: it would take registers of the loop.
    const int block = opaque(blockIdx.x), again = op.sequences == 1 ? 0 : block / of_sequence, end_row = (of_sequence - 1 - (block - again * of_sequence)) * TILE_QUERIES + warp * WARP_QUERIES + g;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float of_row = quad_sum(sum[i]);
        const int row = end_row + 8 * i;
        if (row >= op.rows) continue;
        if (op.splits > 1) {
            float *partial = op.partials + ((((long long)split * op.sequences + again) * op.rows + row) * op.heads + head) * (2 + op.d);
            if (q == 0) partial[0] = most[i] == -INFINITY ? -INFINITY : most[i] * factor, partial[1] = of_row;
#pragma unroll
            for (int at = 0; at < OUT / 8; at++) {
                const int element = first_element + at * 8 + 2 * q;
                if (element < op.d) partial[2 + element] = out[at][2 * i];
                if (element + 1 < op.d) partial[3 + element] = out[at][2 * i + 1];
            }
            continue;
        }
        float by = 1.0f / of_row;
        if (FEATURED && op.sinks) {
            const float own = most[i] == -INFINITY ? -INFINITY : most[i] * factor, sink = op.sinks[head] * LOG2_E, all = fmaxf(own, sink), kept = power_of_two(own - all);
            by = kept / (of_row * kept + power_of_two(sink - all));
        }
        __half *to = op.out + (((long long)again * op.rows + row) * op.heads + head) * op.d;
#pragma unroll
        for (int at = 0; at < OUT / 8; at++) {
            const int element = first_element + at * 8 + 2 * q;
            if (element < op.d) to[element] = __float2half_rn(out[at][2 * i] * by);
            if (element + 1 < op.d) to[element + 1] = __float2half_rn(out[at][2 * i + 1] * by);
        }
    }
}

// Merges the splits of a row and head, a block each.
extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_merge(const __grid_constant__ RowsAttention op) {
    let_next_start();
    wait_for_launch_before();
    const long long row = (long long)blockIdx.x * op.heads + blockIdx.y, step = (long long)op.sequences * op.rows * op.heads * (2 + op.d);
    const float *first = op.partials + row * (2 + op.d);
    const float sink = op.sinks ? op.sinks[blockIdx.y] * LOG2_E : -INFINITY;
    float most = sink, sum = 0.0f;
    for (int split = 0; split < op.splits; split++) most = fmaxf(most, first[split * step]);
    if (op.sinks) sum = power_of_two(sink - most);
    for (int split = 0; split < op.splits; split++) sum += power_of_two(first[split * step] - most) * first[split * step + 1];
    for (int at = threadIdx.x; at < op.d; at += TILE_THREADS) {
        float merged = 0.0f;
        for (int split = 0; split < op.splits; split++) merged += power_of_two(first[split * step] - most) * first[split * step + 2 + at];
        op.out[row * op.d + at] = __float2half_rn(merged / sum);
    }
}

// Blocks that share a multiprocessor: as many as registers allow without spilling; Turing would spill.
#if __CUDA_ARCH__ >= 800
constexpr int THREE = 3;
#else
constexpr int THREE = 1;
#endif

extern "C" __global__ void __launch_bounds__(TILE_THREADS, THREE) attend_64(const __grid_constant__ RowsAttention op) { attend_tile<64, 64>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS, THREE) attend_80(const __grid_constant__ RowsAttention op) { attend_tile<80, 64>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS, THREE) attend_128(const __grid_constant__ RowsAttention op) { attend_tile<128, 32>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS, THREE) attend_256(const __grid_constant__ RowsAttention op) { attend_tile<256, 16, 128>(op); }

// Their registers are not bounded: what they compute beside the products would spill.
extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_64_featured(const __grid_constant__ RowsAttention op) { attend_tile<64, 64, 64, true>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_80_featured(const __grid_constant__ RowsAttention op) { attend_tile<80, 64, 80, true>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_128_featured(const __grid_constant__ RowsAttention op) { attend_tile<128, 32, 128, true>(op); }
extern "C" __global__ void __launch_bounds__(TILE_THREADS) attend_256_featured(const __grid_constant__ RowsAttention op) { attend_tile<256, 16, 128, true>(op); }
