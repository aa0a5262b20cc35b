// One token times weight matrices, at the speed of reading the weights. A format adds a decoder.
//
//   y = epilogue(W . prologue(x))
//     prologue: rms or layer norm of a residual, or activations as they are; the decoder's own (LLM.int8 quantizes)
//     epilogue: bias, activation, gate * up, residual, and for a head the largest logit
//
// Layout: rows of W start every `stride` bytes and are read in chunks of 128 bytes, a cache line. A tile is 8 rows; a step
// is one chunk of a tile, 1 KB, in two 16-byte copies a lane:
//
//              bytes 0 .. 63: low           64 .. 127: high
//   row g    |q = 0| 1 | 2 | 3 |        |q = 0| 1 | 2 | 3 |           lane 4g + q
//
// Tensor cores take 16 rows, so a step is 16 rows to them: rows g are the low halves, rows g + 8 the high ones. Their 8
// columns hold the one token: even columns the activations that belong to the low half, odd columns those of the high one,
// so that sums[0] (row g, even) and sums[3] (row g + 8, odd) are the two halves of row g's sum, in all four lanes of g.
//
// Work: a block takes neighbouring tiles. All steps over one matrix in one tile are a run, and the block's warps split the
// steps of all its runs evenly, wherever one begins or ends:
//
//   steps    |run 0 ....|run 1 ....|run 2 ....|
//   warps    |0 ..|1 ..|2 ..|3 ..|4 ..|5 ..|6 .|
//
// A warp that leaves a run puts its 8 sums down in `partials`, at place run + warp: going along the steps, one of the two
// grows from one segment to the next, so that places differ. At the end each thread adds up rows, in the order of the
// steps: equal inputs give equal bits.
//
// Each warp copies STAGES steps ahead into its own part of shared memory. The first copies stand before the wait for the
// predecessor, since weights depend on nothing, and a block leaves room for another on its multiprocessor, but for nf4:
// launches may overlap (`EARLY` in matvec.rs says whether they do). Code that runs once is kept short, since each launch
// fetches it anew.
// Bytes moved: the matrix once. Sums fp32 (int32 for LLM.int8's products).
#pragma once

#include "kernels/cuda/device.cuh"

constexpr int MATVEC_THREADS = 512;
constexpr int MATVEC_WARPS = MATVEC_THREADS / LANES;
constexpr int TILE_ROWS = 8;
constexpr int CHUNK_BYTES = 128;
constexpr int STEP_BYTES = TILE_ROWS * CHUNK_BYTES;
constexpr int MAX_PARTS = 4;
constexpr int MAX_INPUTS = 2;

enum Norm { NORM_NONE, NORM_RMS, NORM_LAYER };
enum Activation { ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_RELU };
enum Mode {
    MODE_PARTS,   // every part is a matrix of its own over input 0
    MODE_GATED,   // two runs a tile, parts 0 and 1 over input 0: out = act(part 0) * part 1
    MODE_JOINED,  // a run for each input, part i over input i; the products of the same row add up
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
    int first_tile;  // behind all tiles where there is no such part
    int activation;
};

struct Input {
    const void *x;             // [k]: fp32 where it is normed, fp16 otherwise
    const float *norm_weight;  // [k]
    const float *norm_bias;    // [k]
    float epsilon;
    float scale;  // of what the norm gives
    float per_k;  // 1 / k
    int norm;
    int k;
    int chunks;  // of a row
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
    unsigned long long *outlier_columns;  // int8: those found are added; or null
    Head head;
    float threshold;  // int8: NaN where outlier columns are off
    int stride;       // bytes from row to row of part 0; of part 1 where inputs are joined: stride_1
    int stride_1;
    int n_inputs, mode, tiles, segments, out_is_float;
};

// 1 / (1 + exp(-x)), a few units in the last place of fp32.
__device__ __forceinline__ float logistic(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(int kind, float x) {
    if (kind == ACT_RELU) return x > 0.0f || isnan(x) ? x : 0.0f;
    // tanh's argument doubled makes of (1 + tanh) / 2 a logistic function.
    float inner = kind == ACT_SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x * logistic(inner);
}

// The sum over the block, in every thread. `room` holds a float a warp and is free again after the next barrier.
__device__ __forceinline__ float block_sum(float value, float *room) {
    value = warp_sum(value);
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % LANES < MATVEC_WARPS ? room[threadIdx.x % LANES] : 0.0f);
}

// Brings what a norm multiplies with near, before the predecessor has ended.
__device__ __forceinline__ void fetch_norm(const Input &input) {
    int at = threadIdx.x * (128 / sizeof(float));
    if (input.norm == NORM_NONE || at >= input.k) return;
    prefetch(input.norm_weight + at);
    prefetch(input.norm_bias + at);
}

// norm(x) [k] in fp16. Rows of 4096 stay in registers; longer ones are read again. An rms norm's bias is zeros.
__device__ __forceinline__ void normalize(const Input &input, __half *out, float *room) {
    constexpr int HELD = 4096 / MATVEC_THREADS, REST = HELD * MATVEC_THREADS;
    const float *x = (const float *)input.x;
    const bool centres = input.norm == NORM_LAYER;
    float held[HELD], sum = 0.0f, mean = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = i * MATVEC_THREADS + threadIdx.x;
        held[i] = at < input.k ? load_fresh(x + at) : 0.0f;
    }
    if (centres) {
#pragma unroll
        for (int i = 0; i < HELD; i++) sum += held[i];
#pragma unroll 1
        for (int at = REST + threadIdx.x; at < input.k; at += MATVEC_THREADS) sum += load_fresh(x + at);
        mean = block_sum(sum, room) * input.per_k;
        sum = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float off = i * MATVEC_THREADS + threadIdx.x < input.k ? held[i] - mean : 0.0f;
        sum += off * off;
    }
#pragma unroll 1
    for (int at = REST + threadIdx.x; at < input.k; at += MATVEC_THREADS) {
        float off = load_fresh(x + at) - mean;
        sum += off * off;
    }
    float factor = rsqrtf(block_sum(sum, room + MATVEC_WARPS) * input.per_k + input.epsilon);
    auto put = [&](int at, float value) {
        float y = (value - mean) * factor * __ldg(input.norm_weight + at) + __ldg(input.norm_bias + at);
        out[at] = __float2half_rn(__half2float(__float2half_rn(y)) * input.scale);
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = i * MATVEC_THREADS + threadIdx.x;
        if (at < input.k) put(at, held[i]);
    }
#pragma unroll 1
    for (int at = REST + threadIdx.x; at < input.k; at += MATVEC_THREADS) put(at, load_fresh(x + at));
}

// x [k] in fp16 and zeros behind it up to whole chunks.
template <class Decoder>
__device__ __forceinline__ void read_input(const Input &input, __half *out, float *room) {
    if (input.norm != NORM_NONE) {
        normalize(input, out, room);
    } else {
        const __half *x = (const __half *)input.x;
        int whole = (uintptr_t)x % 16 == 0 ? input.k / 8 : 0;
#pragma unroll 4
        for (int at = threadIdx.x; at < whole; at += MATVEC_THREADS) ((uint4 *)out)[at] = load_fresh((const uint4 *)x + at);
#pragma unroll 1
        for (int at = 8 * whole + threadIdx.x; at < input.k; at += MATVEC_THREADS) out[at] = load_fresh(x + at);
        if (input.scale != 1.0f) {
            __syncthreads();
#pragma unroll 1
            for (int at = threadIdx.x; at < input.k; at += MATVEC_THREADS)
                out[at] = __float2half_rn(__half2float(out[at]) * input.scale);
        }
    }
#pragma unroll 1
    for (int at = input.k + threadIdx.x; at < input.chunks * Decoder::CHUNK; at += MATVEC_THREADS) out[at] = __half();
}

// A key that orders as the logits do and, among equals, puts the lower index first. NaN never wins, as in a comparison.
__device__ __forceinline__ unsigned long long rank_of(float logit, int index) {
    uint32_t bits = __float_as_uint(logit);
    uint32_t ordered = isnan(logit) ? 0u : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    return (unsigned long long)ordered << 32 | (uint32_t)~index;
}

__device__ __forceinline__ unsigned long long block_best(unsigned long long best, unsigned long long *room) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
        best = other > best ? other : best;
    }
    __syncthreads();
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = best;
    __syncthreads();
    for (int warp = 0; warp < MATVEC_WARPS; warp++) best = room[warp] > best ? room[warp] : best;
    return best;
}

// The last block to arrive picks the token, tells the host, and fetches the embedding that the next step starts from.
__device__ __forceinline__ void finish_head(const Head &head, unsigned long long best, unsigned long long *room) {
    __shared__ bool is_last;
    best = block_best(best, room);
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
    best = block_best(best, room);
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

// Where a lane's first extra word lies behind its slot's 16 bytes; the others follow every 128 bytes.
__device__ __forceinline__ uint32_t extra_of(int lane) { return STEP_BYTES - 12 * lane; }

// The decoder's interface:
//   CHUNK                     elements of 128 bytes
//   EXTRA_WORDS               what a lane needs for a step beside the weights, copied with them: Place, copy_extra
//   Shared, prepare           tables, filled before the predecessor has ended
//   Row                       where a lane reads what a row's steps need, from a chunk on; add moves it one step on
//   Sums, add                 sums of one run in a lane; add is told the 32 bytes and where they lie, half a step apart
//   Partial, partial          a row's partial result, in the lane 4g
//   Activations, convert      what x becomes, behind x in shared memory
//   Constant, result          what a row's value is made with, asked for early; the value from the row's partials
template <class Decoder, int STAGES, bool IS_HEAD>
__device__ __forceinline__ void matvec(const Matvec &job) {
    using Partial = typename Decoder::Partial;
    constexpr int SLOT_WORDS = STEP_BYTES / 4 + Decoder::EXTRA_WORDS * LANES;
    DYNAMIC_SHARED(uint4, dynamic);  // the warps' slots, partials [run + warp][row], then x
    __shared__ typename Decoder::Shared shared;
    __shared__ typename Decoder::Activations activations[MAX_INPUTS];
    __shared__ float room[2 * MATVEC_WARPS];
    allow_next();

    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, quad = lane / 4, quarter = lane % 4;
    const int runs = job.mode == MODE_PARTS ? 1 : 2;  // of a tile
    const int chunks_0 = job.inputs[0].chunks, chunks_1 = job.mode == MODE_JOINED ? job.inputs[1].chunks : chunks_0;
    const int steps_of_tile = runs == 1 ? chunks_0 : chunks_0 + chunks_1;
    // Blocks differ by one tile at most.
    const int begin_tile = (int)((long long)job.tiles * blockIdx.x / gridDim.x);
    const int tiles = (int)((long long)job.tiles * (blockIdx.x + 1) / gridDim.x) - begin_tile;
    const int steps = tiles * steps_of_tile, share = (steps + MATVEC_WARPS - 1) / MATVEC_WARPS;

    // Runs are counted over all tiles. A warp takes the steps `begin` up to `end`, its share of all.
    auto tile_of = [&](int run) { return run >> (runs - 1); };
    auto is_second = [&](int run) { return run & (runs - 1); };
    auto first_of = [&](int run) { return tile_of(run) * steps_of_tile + (is_second(run) ? chunks_0 : 0); };
    const int begin = warp * share, end = min(begin + share, steps);
    // Where the warp enters a run, and how many steps it has there: none, or fewer, behind its last one.
    auto chunk_of = [&](int run) { return max(0, begin - first_of(run)); };
    auto steps_of = [&](int run) {
        int first = first_of(run), chunks = is_second(run) ? chunks_1 : chunks_0;
        return min(first + chunks, end) - max(first, begin);
    };

    auto part_of = [&](int tile, int run) -> const Part & {
        if (job.mode != MODE_PARTS) return job.parts[run];
        int part = 0;
        for (int i = 1; i < MAX_PARTS; i++)
            if (begin_tile + tile >= job.parts[i].first_tile) part = i;
        return job.parts[part];
    };
    auto row_of = [&](const Part &part, int tile, int row) {
        return min((begin_tile + tile - part.first_tile) * TILE_ROWS + row, part.n - 1);
    };

    // What is copied, and where a lane's part of it goes. Addresses move on by themselves, since each step that computes
    // one anew costs as much as some of its weights.
    const int first_tile = begin / steps_of_tile;
    int run = first_tile * runs;
    if (begin - first_of(run) >= chunks_0) run++;
    int source_run = run, source_steps = steps_of(run);
    const uint8_t *from = nullptr;
    typename Decoder::Place place;
    auto seek = [&]() {
        const Part &part = part_of(tile_of(source_run), is_second(source_run));
        int row = row_of(part, tile_of(source_run), quad), input = job.mode == MODE_JOINED ? is_second(source_run) : 0;
        int chunk = chunk_of(source_run);
        from = part.weight + (long long)row * (input ? job.stride_1 : job.stride) + quarter * 16 + chunk * CHUNK_BYTES;
        place.set(part, job.inputs[input].k, row, quarter, chunk);
    };
    const uint32_t slots = shared_address((uint32_t *)dynamic + warp * STAGES * SLOT_WORDS + 4 * lane);
    auto load = [&](uint32_t to) {
        copy_streaming(to, from);
        copy_streaming(to + STEP_BYTES / 2, from + CHUNK_BYTES / 2);
        place.copy_extra(to + extra_of(lane));
        from += CHUNK_BYTES;
    };
    // Into the next run; behind the last step there is nothing to copy.
    auto next_source = [&]() {
        source_run++;
        source_steps = steps_of(source_run);
        if (source_steps > 0) seek();
    };
    if (source_steps > 0) seek();
#pragma unroll 1
    for (int slot = 0; slot < STAGES; slot++) {
        if (source_steps == 0) next_source();
        if (source_steps > 0) {
            load(slots + slot * SLOT_WORDS * 4);
            source_steps--;
        }
        end_copies();
    }

    // What the thread's first row needs beside its sums.
    float bias[MAX_INPUTS] = {};
    typename Decoder::Constant constants[MAX_INPUTS] = {};
    auto load_constants = [&](int tile) {
#pragma unroll
        for (int run = 0; run < MAX_INPUTS; run++) {
            if (run >= runs) continue;
            const Part &part = part_of(tile, run);
            int row = row_of(part, tile, threadIdx.x % TILE_ROWS);
            bias[run] = part.bias ? load_float(part.bias + row) : 0.0f;
            constants[run].load(part, row);
        }
    };
    const int own_tile = threadIdx.x / TILE_ROWS;
    if (own_tile < tiles) load_constants(own_tile);
    fetch_norm(job.inputs[0]);
    Decoder::prepare(shared, job);

    wait_for_previous();

    Partial(*partials)[TILE_ROWS] = (Partial(*)[TILE_ROWS])((uint32_t *)dynamic + MATVEC_WARPS * STAGES * SLOT_WORDS);
    uint8_t *free_bytes = (uint8_t *)(partials + job.segments);
#pragma unroll 1
    for (int i = 0; i < job.n_inputs; i++) {
        __half *x = (__half *)free_bytes;
        free_bytes += 2 * job.inputs[i].chunks * Decoder::CHUNK;
        read_input<Decoder>(job.inputs[i], x, room);
        __syncthreads();
        free_bytes = Decoder::convert(activations[i], shared, job, job.inputs[i], x, free_bytes, room);
    }
    float residual = 0.0f;
    if (job.residual && own_tile < tiles)
        residual = load_fresh(job.residual + row_of(job.parts[0], own_tile, threadIdx.x % TILE_ROWS));
    __syncthreads();

    uint32_t words = slots;
#pragma unroll 1
    for (int steps_left; (steps_left = steps_of(run)) > 0; run++) {
        const Part &part = part_of(tile_of(run), is_second(run));
        const int input = job.mode == MODE_JOINED ? is_second(run) : 0;
        typename Decoder::Row row;
        row.set(shared, part, activations[input], job.inputs[input].k, row_of(part, tile_of(run), quad), lane, chunk_of(run));
        typename Decoder::Sums sums = {};
#pragma unroll 1
        while (steps_left > 0) {
            if (source_steps == 0) next_source();
            // Up to the end of this run or of the one that is copied; behind the last copy, to the end of this one.
            const bool copies = source_steps > 0;
            int n = copies ? min(steps_left, source_steps) : steps_left;
            steps_left -= n;
            source_steps -= copies ? n : 0;
#pragma unroll 1
            for (; n > 0; n--) {
                await_copies<STAGES - 1>();
                uint4 low = load_copied_16(words), high = load_copied_16(words + STEP_BYTES / 2);
                Decoder::add(low, high, words, row, sums);
                if (copies) load(words);
                end_copies();
                words += SLOT_WORDS * 4;
                if (words == slots + STAGES * SLOT_WORDS * 4) words = slots;
            }
        }
        Partial partial;
        Decoder::partial(sums, partial);
        if (quarter == 0) partials[run + warp][quad] = partial;
    }
    __syncthreads();

    unsigned long long best = 0;
#pragma unroll 1
    for (int index = threadIdx.x; index < tiles * TILE_ROWS; index += MATVEC_THREADS) {
        const int tile = index / TILE_ROWS;
        if (tile != own_tile) {
            load_constants(tile);
            if (job.residual) residual = load_fresh(job.residual + row_of(job.parts[0], tile, index % TILE_ROWS));
        }
        float values[MAX_INPUTS] = {};
#pragma unroll
        for (int run = 0; run < MAX_INPUTS; run++) {
            if (run >= runs) continue;
            int first = tile * steps_of_tile + (run ? chunks_0 : 0), last = first + (run ? chunks_1 : chunks_0) - 1;
            Partial sum = {};
#pragma unroll 1
            for (int w = first / share; w <= last / share; w++) sum.add(partials[tile * runs + run + w][index % TILE_ROWS]);
            values[run] = Decoder::result(sum, activations[job.mode == MODE_JOINED ? run : 0], constants[run]) + bias[run];
        }
        const Part &part = part_of(tile, 0);
        int row = (begin_tile + tile - part.first_tile) * TILE_ROWS + index % TILE_ROWS;
        float y = values[0] + (job.mode == MODE_JOINED ? values[1] : 0.0f);
        if (part.activation != ACT_NONE) {
            y = activate(part.activation, __half2float(__float2half_rn(y)));
            if (job.mode == MODE_GATED) y = __half2float(__float2half_rn(y)) * __half2float(__float2half_rn(values[1]));
        }
        if (row >= part.n) continue;
        if (IS_HEAD) {
            job.head.logits[row] = y;
            unsigned long long rank = rank_of(y, row);
            best = rank > best ? rank : best;
        } else if (job.residual) {
            job.residual[row] = residual + y;
        } else if (job.out_is_float) {
            ((float *)part.out)[row] = y;
        } else {
            ((__half *)part.out)[row] = __float2half_rn(y);
        }
    }
    if (IS_HEAD) {
        __shared__ unsigned long long best_room[MATVEC_WARPS];
        finish_head(job.head, best, best_room);
    }
}

// A matrix's kernel and that of a head, and how many of its blocks have registers on a multiprocessor at once.
#define MATVEC_KERNELS(NAME, DECODER, STAGES, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(MATVEC_THREADS, BLOCKS) NAME##_matvec(const __grid_constant__ Matvec job) { \
        matvec<DECODER, STAGES, false>(job);                                                                                  \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(MATVEC_THREADS, BLOCKS) NAME##_head(const __grid_constant__ Matvec job) {   \
        matvec<DECODER, STAGES, true>(job);                                                                                   \
    }
