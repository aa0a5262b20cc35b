// One token times a weight matrix, at the speed of reading the weights. A format adds a decoder.
//
//   y = epilogue(W . prologue(x))
//     prologue: rms or layer norm of a residual, or activations as they are; the decoder's own (LLM.int8 quantizes)
//     epilogue: bias, activation, gate * up, residual, and for a head the largest logit
//
// Layout: rows of W start every `stride` bytes, a multiple of 64, and are read in chunks of 64 bytes. A tile is 16 rows; a
// warp step is one chunk of a tile, 1 KB in two 16-byte loads a lane, rows g and g + 8 for lane 4g + q:
//
//            | lane q = 0 | 1 | 2 | 3 |  next chunk: W warps further on
//   row g    |   16 bytes |...|   |   |
//   row g+8  |   16 bytes |...|   |   |
//
// Tensor cores multiply the 16 rows at once. Their 8 columns all hold the one token, so that every lane ends with the
// sums of its two rows. A block's warps share a tile's chunks and add up in shared memory; blocks take tiles in turn.
// STAGES steps are in flight in registers, across tiles, and the first ones are asked for before the predecessor has
// ended: weights depend on nothing. Bytes moved: the matrix once. Sums fp32 (int32 for LLM.int8's products).
#pragma once

#include "kernels/cuda/device.cuh"

constexpr int MATVEC_THREADS = 256;
constexpr int MATVEC_WARPS = MATVEC_THREADS / LANES;
constexpr int TILE_ROWS = 16;
constexpr int CHUNK_BYTES = 64;
constexpr int MAX_PARTS = 4;
constexpr int MAX_INPUTS = 2;

enum Norm { NORM_NONE, NORM_RMS, NORM_LAYER };
enum Activation { ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_RELU };
enum Mode {
    MODE_PARTS,   // every part is a matrix of its own over input 0
    MODE_GATED,   // parts 0 and 1 over input 0, row by row: out = act(part 0) * part 1
    MODE_JOINED,  // part i reads input i; the products of the same row add up
};

// One matrix. kernels/cuda/matvec.rs mirrors this and the next two.
struct Part {
    const uint8_t *weight;
    const void *scales;   // int8: row absmax [n] fp32; nf4: blocks' absmax, 8-bit codes or fp32
    const float *nested;  // nf4: absmax of absmax codes
    const float *bias;    // [n] or null
    void *out;            // [n], fp32 where `out_is_float`, else fp16
    float offset;         // nf4: mean of absmax
    int n;
    int first_tile;
    int activation;
};

struct Input {
    const void *x;             // [k]: fp32 where it is normed, fp16 otherwise
    const float *norm_weight;  // [k]
    const float *norm_bias;    // [k], layer norm only
    float epsilon;
    float scale;  // of what the norm gives
    int norm;
    int k;
    int chunks;  // of a row
    int first_warp, warps;  // of the block that read this input's chunks
};

// Where the token goes.
struct Head {
    float *logits;            // [n], null for every other matrix
    unsigned long long *best;  // [blocks]
    int *arrived;             // counts blocks, zero between launches
    int *state;               // token, position, step
    unsigned long long *host;  // ring of the host
    const __half *table;      // [vocab, table_stride]: embeddings
    float *embedding;         // [hidden]
    float table_scale;
    int table_stride, hidden, host_slots, advance;
};

struct Matvec {
    Part parts[MAX_PARTS];
    Input inputs[MAX_INPUTS];
    const float *code;  // nf4: values of the 16 codes, then of the 256 absmax codes
    float *residual;    // [n]: added, and replaced by the sum; or null
    Head head;
    float threshold;  // int8: NaN where outlier columns are off
    int stride;       // bytes from row to row of part 0; of part 1 where inputs are joined: stride_1
    int stride_1;
    int n_parts, n_inputs, mode, tiles, out_is_float;
};

__device__ __forceinline__ float activate(int kind, float x) {
    if (kind == ACT_SILU) return x / (1.0f + __expf(-x));
    if (kind == ACT_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    if (kind == ACT_RELU) return x > 0.0f || isnan(x) ? x : 0.0f;
    return x;
}

// The sum over the block, in every thread. `room` holds a float a warp and is free again after the next barrier.
__device__ __forceinline__ float block_sum(float value, float *room) {
    value = warp_sum(value);
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / LANES; warp++) sum += room[warp];
    return sum;
}

// norm(x) [k] in fp16. Up to 16 values a thread stay in registers, which holds rows of 4096.
__device__ __forceinline__ void normalize(const Input &input, __half *out, float *room) {
    constexpr int HELD = 4096 / MATVEC_THREADS;
    const float *x = (const float *)input.x;
    float held[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = i * MATVEC_THREADS + threadIdx.x;
        held[i] = at < input.k ? load_fresh(x + at) : 0.0f;
        sum += input.norm == NORM_LAYER ? held[i] : held[i] * held[i];
    }
    for (int at = HELD * MATVEC_THREADS + threadIdx.x; at < input.k; at += MATVEC_THREADS) {
        float value = load_fresh(x + at);
        sum += input.norm == NORM_LAYER ? value : value * value;
    }
    float mean = 0.0f, square = block_sum(sum, room) / input.k;
    if (input.norm == NORM_LAYER) {
        mean = square;
        float deviation = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int at = i * MATVEC_THREADS + threadIdx.x;
            float off = at < input.k ? held[i] - mean : 0.0f;
            deviation += off * off;
        }
        for (int at = HELD * MATVEC_THREADS + threadIdx.x; at < input.k; at += MATVEC_THREADS) {
            float off = load_fresh(x + at) - mean;
            deviation += off * off;
        }
        square = block_sum(deviation, room + MATVEC_WARPS) / input.k;
    }
    float factor = rsqrtf(square + input.epsilon);
    auto put = [&](int at, float value) {
        float y = (value - mean) * factor * __ldg(input.norm_weight + at);
        if (input.norm == NORM_LAYER) y += __ldg(input.norm_bias + at);
        out[at] = __float2half_rn(__half2float(__float2half_rn(y)) * input.scale);
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = i * MATVEC_THREADS + threadIdx.x;
        if (at < input.k) put(at, held[i]);
    }
    for (int at = HELD * MATVEC_THREADS + threadIdx.x; at < input.k; at += MATVEC_THREADS) put(at, load_fresh(x + at));
}

// x [k] in fp16 and zeros behind it up to whole chunks.
template <class Decoder>
__device__ __forceinline__ void read_input(const Input &input, __half *out, float *room) {
    if (input.norm != NORM_NONE) {
        normalize(input, out, room);
    } else {
        const __half *x = (const __half *)input.x;
        int whole = (uintptr_t)x % 16 == 0 ? input.k / 8 : 0;
        for (int at = threadIdx.x; at < whole; at += MATVEC_THREADS) ((uint4 *)out)[at] = load_fresh((const uint4 *)x + at);
        for (int at = 8 * whole + threadIdx.x; at < input.k; at += MATVEC_THREADS) out[at] = load_fresh(x + at);
        if (input.scale != 1.0f) {
            __syncthreads();
            for (int at = threadIdx.x; at < input.k; at += MATVEC_THREADS)
                out[at] = __float2half_rn(__half2float(out[at]) * input.scale);
        }
    }
    for (int at = input.k + threadIdx.x; at < input.chunks * Decoder::CHUNK; at += MATVEC_THREADS) out[at] = __half();
}

// A key that orders as the logits do and, among equals, puts the lower index first. NaN never wins, as in a comparison.
__device__ __forceinline__ unsigned long long rank_of(float logit, int index) {
    uint32_t bits = __float_as_uint(logit);
    uint32_t ordered = isnan(logit) ? 0u : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    return (unsigned long long)ordered << 32 | (uint32_t)~index;
}

// The last block to arrive picks the token, tells the host, and fetches the embedding that the next step starts from.
__device__ __forceinline__ void finish_head(const Head &head, unsigned long long best, unsigned long long *room) {
    __shared__ bool is_last;
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
        best = other > best ? other : best;
    }
    // Only the first warp holds logits.
    if (threadIdx.x == 0) {
        head.best[blockIdx.x] = best;
        __threadfence();
        is_last = atomicAdd(head.arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    best = 0;
    for (int block = threadIdx.x; block < gridDim.x; block += MATVEC_THREADS) {
        unsigned long long other = __ldcg(head.best + block);
        best = other > best ? other : best;
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
        best = other > best ? other : best;
    }
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = best;
    __syncthreads();
    for (int warp = 0; warp < MATVEC_WARPS; warp++) best = room[warp] > best ? room[warp] : best;
    int token = (int)~(uint32_t)best;
    const __half *row = head.table + (long long)token * head.table_stride;
    for (int at = threadIdx.x; at < head.hidden; at += MATVEC_THREADS)
        head.embedding[at] = __half2float(row[at]) * head.table_scale;
    if (threadIdx.x == 0) {
        int step = head.state[2] + 1;
        head.state[0] = token;
        head.state[1] += head.advance;
        head.state[2] = step;
        *head.arrived = 0;
        store_to_host(head.host + (step & (head.host_slots - 1)), (unsigned long long)step << 32 | (uint32_t)token);
    }
}

// The decoder's interface:
//   CHUNK                     elements of 64 bytes
//   Shared, prepare           tables, filled before the predecessor has ended
//   Extra, extra              what a step needs beside the weights, loaded with them
//   Sums, add, Partial, partial   sums of one tile in a lane; the two rows' partial results, equal in the lanes 4g .. 4g + 3
//   Activations, convert      what x becomes, and shared-memory bytes it takes for `n` elements
//   result                    a row's value from the block's partials
template <class Decoder, int TILES, int STAGES>
__device__ __forceinline__ void matvec(const Matvec &job) {
    using Partial = typename Decoder::Partial;
    extern __shared__ uint4 dynamic[];
    __shared__ typename Decoder::Shared shared;
    __shared__ Partial partials[2][TILES][TILE_ROWS][MATVEC_WARPS];
    __shared__ float room[2 * MATVEC_WARPS];
    __shared__ unsigned long long best_room[MATVEC_WARPS];

    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, group = lane / 4, quarter = lane % 4;
    const int own_input = job.n_inputs > 1 && warp >= job.inputs[1].first_warp ? 1 : 0;
    const Input &input = job.inputs[own_input];
    const int first_chunk = warp - input.first_warp, chunk_step = input.warps, chunks = input.chunks;
    // Every warp takes as many steps, so that barriers meet.
    int steps = 0;
    for (int i = 0; i < job.n_inputs; i++)
        steps = max(steps, (job.inputs[i].chunks + job.inputs[i].warps - 1) / job.inputs[i].warps);
    const int stride = own_input == 0 ? job.stride : job.stride_1;

    // Where the loads stand: behind them the sums follow, STAGES steps later.
    int load_tile = blockIdx.x, load_step = 0;
    const uint8_t *low[TILES], *high[TILES];
    typename Decoder::Place place[TILES];
    auto locate = [&](int tile) {
        int first_part = 0;
        if (job.mode == MODE_PARTS)
            for (int i = 1; i < job.n_parts; i++)
                if (tile >= job.parts[i].first_tile) first_part = i;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            int at = job.mode == MODE_GATED ? t : job.mode == MODE_JOINED ? own_input : first_part;
            const Part &part = job.parts[at];
            int row = job.mode == MODE_GATED ? tile * TILE_ROWS
                                             : (tile - part.first_tile) * (TILES * TILE_ROWS) + t * TILE_ROWS;
            int row_low = min(row + group, part.n - 1), row_high = min(row + group + 8, part.n - 1);
            low[t] = part.weight + (long long)row_low * stride + quarter * 16;
            high[t] = part.weight + (long long)row_high * stride + quarter * 16;
            place[t].set(part, input.k, row_low, row_high, quarter);
        }
    };
    if (load_tile < job.tiles) locate(load_tile);

    uint4 weights[STAGES][TILES][2];
    typename Decoder::Extra extras[STAGES][TILES];
    auto load = [&](uint4 (&into)[TILES][2], typename Decoder::Extra (&extra)[TILES]) {
        if (load_tile >= job.tiles) return;
        int chunk = first_chunk + load_step * chunk_step;
        if (chunk < chunks) {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                into[t][0] = load_streaming(low[t] + chunk * CHUNK_BYTES);
                into[t][1] = load_streaming(high[t] + chunk * CHUNK_BYTES);
                extra[t].load(place[t], chunk);
            }
        }
        if (++load_step == steps) {
            load_step = 0;
            load_tile += gridDim.x;
            if (load_tile < job.tiles) locate(load_tile);
        }
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load(weights[stage], extras[stage]);
    Decoder::prepare(shared, job);

    allow_next();
    wait_for_previous();

    typename Decoder::Activations activations[MAX_INPUTS];
    uint8_t *free_bytes = (uint8_t *)dynamic;
#pragma unroll
    for (int i = 0; i < MAX_INPUTS; i++) {
        if (i >= job.n_inputs) continue;
        __half *x = (__half *)free_bytes;
        free_bytes += 2 * job.inputs[i].chunks * Decoder::CHUNK;
        read_input<Decoder>(job.inputs[i], x, room);
        __syncthreads();
        free_bytes = activations[i].convert(job, job.inputs[i], x, free_bytes, room);
        __syncthreads();
    }
    const typename Decoder::Activations own = own_input == 0 ? activations[0] : activations[1];

    typename Decoder::Sums sums[TILES] = {};
    unsigned long long best = 0;
    int step = 0, parity = 0;
    const int own_tiles = blockIdx.x < job.tiles ? (job.tiles - 1 - blockIdx.x) / gridDim.x + 1 : 0;
    const int n_steps = own_tiles * steps;
    int tile = blockIdx.x;
    typename Decoder::Row rows[TILES];

    for (int first = 0; first < n_steps; first += STAGES) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            if (first + stage >= n_steps) break;
            int chunk = first_chunk + step * chunk_step;
            if (step == 0) {
                // The decoder's facts of the rows that these sums belong to.
                int first_part = 0;
                if (job.mode == MODE_PARTS)
                    for (int i = 1; i < job.n_parts; i++)
                        if (tile >= job.parts[i].first_tile) first_part = i;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    int at = job.mode == MODE_GATED ? t : job.mode == MODE_JOINED ? own_input : first_part;
                    const Part &part = job.parts[at];
                    int row = job.mode == MODE_GATED ? tile * TILE_ROWS
                                                     : (tile - part.first_tile) * (TILES * TILE_ROWS) + t * TILE_ROWS;
                    rows[t].set(part, input.k, min(row + group, part.n - 1), min(row + group + 8, part.n - 1));
                }
            }
            if (chunk < chunks) {
                Decoder::template add<TILES>(shared, own, chunk, weights[stage], extras[stage], rows, sums);
            }
            load(weights[stage], extras[stage]);
            if (++step < steps) continue;

            step = 0;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                Partial of_low, of_high;
                Decoder::partial(sums[t], of_low, of_high);
                if (quarter == 0) {
                    partials[parity][t][group][warp] = of_low;
                    partials[parity][t][group + 8][warp] = of_high;
                }
                sums[t] = {};
            }
            __syncthreads();
            // One thread a row; with two buffers the other warps go on to the next tile meanwhile.
            if (threadIdx.x < TILES * TILE_ROWS) {
                int t = threadIdx.x / TILE_ROWS, row_of_tile = threadIdx.x % TILE_ROWS;
                int at = 0;
                if (job.mode == MODE_PARTS)
                    for (int i = 1; i < job.n_parts; i++)
                        if (tile >= job.parts[i].first_tile) at = i;
                if (job.mode == MODE_GATED) at = t;
                int row = job.mode == MODE_GATED
                              ? tile * TILE_ROWS + row_of_tile
                              : (tile - job.parts[at].first_tile) * (TILES * TILE_ROWS) + threadIdx.x;
                const Part &part = job.parts[at];
                if (job.mode != MODE_GATED && row >= part.n) {
                    // Behind the last row.
                } else {
                    float y = 0.0f;
                    int clamped = min(row, part.n - 1);
#pragma unroll
                    for (int i = 0; i < MAX_INPUTS; i++) {
                        if (i >= job.n_inputs) continue;
                        const Part &summand = job.mode == MODE_JOINED ? job.parts[i] : part;
                        const Input &from = job.inputs[i];
                        Partial total = {};
                        for (int w = from.first_warp; w < from.first_warp + from.warps; w++)
                            total.add(partials[parity][t][row_of_tile][w]);
                        float product = Decoder::result(total, activations[i], summand, clamped);
                        y += summand.bias ? product + __ldg(summand.bias + clamped) : product;
                    }
                    if (job.mode == MODE_GATED) {
                        // Gates sit in the lanes 0 .. 15 of the first warp, their partners 16 lanes further on.
                        float up = __shfl_down_sync(ALL_LANES, y, TILE_ROWS);
                        y = __half2float(__float2half_rn(activate(job.parts[0].activation, __half2float(__float2half_rn(y)))))
                            * __half2float(__float2half_rn(up));
                    } else {
                        y = part.activation == ACT_NONE ? y : activate(part.activation, __half2float(__float2half_rn(y)));
                    }
                    if ((job.mode == MODE_GATED && t == 1) || row >= part.n) {
                        // The gate's lane writes.
                    } else if (job.head.logits) {
                        job.head.logits[row] = y;
                        unsigned long long rank = rank_of(y, row);
                        best = rank > best ? rank : best;
                    } else if (job.residual) {
                        job.residual[row] = load_fresh(job.residual + row) + y;
                    } else if (job.out_is_float) {
                        ((float *)part.out)[row] = y;
                    } else {
                        ((__half *)part.out)[row] = __float2half_rn(y);
                    }
                }
            }
            parity ^= 1;
            tile += gridDim.x;
        }
    }
    if (job.head.logits) finish_head(job.head, best, best_room);
}

#define MATVEC_KERNEL(NAME, DECODER, TILES, STAGES)                                                    \
    extern "C" __global__ void __launch_bounds__(MATVEC_THREADS, 2) NAME(const __grid_constant__ Matvec job) { \
        matvec<DECODER, TILES, STAGES>(job);                                                           \
    }
