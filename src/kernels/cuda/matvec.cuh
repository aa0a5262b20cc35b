// One token times weight matrices, at the speed of reading the weights. A format adds a decoder.
//
//   y = epilogue(W . prologue(x))
//     prologue: rms or layer norm of a residual, or activations as they are; the decoder's own (LLM.int8 quantizes)
//     epilogue: bias, activation, gate * up, residual, and for a head the largest logit
//
// Layout: rows of W start every `stride` bytes and are read in chunks of 128 bytes, a cache line. A tile is 8 rows; a step
// is one chunk of a tile, 1 KB, which ring.cuh has copied:
//
//              bytes 0 .. 63: low           64 .. 127: high
//   row g    |q = 0| 1 | 2 | 3 |        |q = 0| 1 | 2 | 3 |           lane 4g + q
//
// Tensor cores take 16 rows, so a step is 16 rows to them: rows g are the low halves, rows g + 8 the high ones. Their 8
// columns hold the one token: even columns the activations that belong to the low half, odd columns those of the high one,
// so that sums[0] (row g, even) and sums[3] (row g + 8, odd) are the two halves of row g's sum, in all four lanes of g.
//
// A warp that leaves a run puts its 8 sums down in `partials`, at place run + warp: going along the steps, one of the two
// grows from one segment to the next, so that places differ. At the end each thread adds up rows, in the order of the
// steps: equal inputs give equal bits.
// Bytes moved: the matrix once. Sums fp32 (int32 for LLM.int8's products).
#pragma once

#include "kernels/cuda/head.cuh"
#include "kernels/cuda/filled_ring.cuh"
#include "kernels/cuda/own_ring.cuh"

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
    meet();
    return warp_sum<WARPS>(room[threadIdx.x % WARPS]);
}

// Words of 16 bytes of a norm's input in a thread's registers: all of most models', so that one latency covers it.
constexpr int NORM_HELD = 4096 / 2 / THREADS;

// Brings what a norm multiplies with and adds into L1, before the input is there. In registers it would not stay.
__device__ __forceinline__ void fetch_norm(const Input &input) {
    const int at = threadIdx.x * (CHUNK_BYTES / (int)sizeof(float));
    if (at >= input.k) return;
    prefetch(input.norm_weight + at);
    prefetch(input.norm_bias + at);
}

// norm(x) [k] in fp16, once x is there. Rows of 4096 stay in registers; longer ones are read again. x, weights and bias have zeros
// behind k up to a multiple of 2; so has the result. An rms norm's bias is zeros. A thread calls `come` when it has all that it holds.
template <class Come>
__device__ __forceinline__ void normalize(const Input &input, const Awaited &awaited, __half *out, float *room, Come come) {
    const float2 *weights = (const float2 *)input.norm_weight, *biases = (const float2 *)input.norm_bias;
    const int twos = (input.k + 1) / 2, rest = NORM_HELD * THREADS + threadIdx.x;
    auto is_mine = [&](int i) { return i * THREADS + (int)threadIdx.x < twos; };
    auto look_at = [&](int at) { return look((const uint4 *)input.x + at); };
    // Nobody writes what is behind k.
    auto is_there = [&](const uint4 &two, int at) {
        return awaited.are_there(awaited.off(two.y) | (2 * at + 1 < input.k ? awaited.off(two.w) : 0));
    };
    // No thread loads what it does not need: all blocks at one address would wait for each other.
    uint4 looked[NORM_HELD] = {};
    for (;;) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) looked[i] = look_at(i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) all = is_there(looked[i], i * THREADS + threadIdx.x) && all;
        if (all) break;
        pause();
    }
    come();
    auto two_at = [&](int at) {
        uint4 two = look_at(at);
        while (!is_there(two, at)) {
            pause();
            two = look_at(at);
        }
        return make_float2(__uint_as_float(two.x), __uint_as_float(two.z));
    };
    float2 held[NORM_HELD];
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++) held[i] = make_float2(__uint_as_float(looked[i].x), __uint_as_float(looked[i].z));
    float sum = 0.0f, mean = 0.0f;
    if (input.norm == NORM_LAYER) {
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) sum += held[i].x + held[i].y;
#pragma unroll 1
        for (int at = rest; at < twos; at += THREADS) {
            const float2 two = two_at(at);
            sum += two.x + two.y;
        }
        mean = block_sum(sum, room) * input.per_k;
        sum = 0.0f;
    }
    auto square = [&](float2 two, int at) {
        auto off = [&](float value, int element) { return 2 * at + element < input.k ? value - mean : 0.0f; };
        float a = off(two.x, 0), b = off(two.y, 1);
        return a * a + b * b;
    };
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++)
        if (is_mine(i)) sum += square(held[i], i * THREADS + threadIdx.x);
#pragma unroll 1
    for (int at = rest; at < twos; at += THREADS) sum += square(two_at(at), at);
    const float factor = rsqrtf(block_sum(sum, room + WARPS) * input.per_k + input.epsilon);
    auto put = [&](int at, float2 two) {
        const float2 weight = load_two(weights + at), bias = load_two(biases + at);
        auto normed = [&](float value, float of_weight, float of_bias) {
            return __float2half_rn(__half2float(__float2half_rn((value - mean) * factor * of_weight + of_bias)) * input.scale);
        };
        __align__(4) __half made[2] = {normed(two.x, weight.x, bias.x), normed(two.y, weight.y, bias.y)};
        ((uint32_t *)out)[at] = *(const uint32_t *)made;
    };
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++)
        if (is_mine(i)) put(i * THREADS + threadIdx.x, held[i]);
#pragma unroll 1
    for (int at = rest; at < twos; at += THREADS) put(at, two_at(at));
}

// All inputs without a norm, in fp16, one behind the other, once they are there: 16 bytes at a time, HELD of them in a thread's
// registers so that one latency covers them, and the rest one by one. The second input is to be there no sooner than the first. A thread
// calls `come` when it has what it reads by words.
template <bool IS_TAGGED, int HELD, class Come>
__device__ __forceinline__ void read_plain(const Matvec &job, const Tags &tags, __half *out, Come come) {
    constexpr int OF_UNIT = IS_TAGGED ? 4 : 8;
    const Input &first = job.inputs[0], &second = job.inputs[1];
    auto units_of = [](const Input &input) { return (uintptr_t)input.x % 16 == 0 ? input.k / OF_UNIT : 0; };
    const int of_first = units_of(first), units = of_first + (job.n_inputs > 1 ? units_of(second) : 0);
    const Awaited of_first_input(tags, first.of_job), of_second_input(tags, second.of_job);
    auto from = [&](int at) { return at < of_first ? (const uint4 *)first.x + at : (const uint4 *)second.x + at - of_first; };
    auto is_there = [&](const uint4 &unit, int at) {
        if (!IS_TAGGED) return true;
        const Awaited &awaited = at < of_first ? of_first_input : of_second_input;
        return awaited.are_there(awaited.off_half(unit.x) | awaited.off_half(unit.y) | awaited.off_half(unit.z) | awaited.off_half(unit.w));
    };
    auto made = [&](int index, uint32_t pair) {
        const float scale = index ? second.scale : first.scale;
        if (scale == 1.0f) return pair;
        const float2 two = __half22float2(*(const __half2 *)&pair);
        return __half_as_ushort(__float2half_rn(two.x * scale)) | (uint32_t)__half_as_ushort(__float2half_rn(two.y * scale)) << 16;
    };
    auto put = [&](int at, const uint4 &unit) {
        const int index = at >= of_first;
        __half *to = index ? out + first.padded + (at - of_first) * OF_UNIT : out + at * OF_UNIT;
        if (IS_TAGGED) *(uint2 *)to = make_uint2(made(index, __byte_perm(unit.x, unit.y, 0x5410)), made(index, __byte_perm(unit.z, unit.w, 0x5410)));
        else *(uint4 *)to = make_uint4(made(index, unit.x), made(index, unit.y), made(index, unit.z), made(index, unit.w));
    };
#pragma unroll 1
    for (int start = threadIdx.x; start < units; start += HELD * THREADS) {
        uint4 looked[HELD] = {};
        uint32_t missing = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) missing |= (start + i * THREADS < units) << i;
        // Those that are there go on; the others are looked at again.
        for (;;) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (missing >> i & 1) looked[i] = look(from(start + i * THREADS));
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int at = start + i * THREADS;
                if (!(missing >> i & 1) || !is_there(looked[i], at)) continue;
                put(at, looked[i]);
                missing &= ~(1u << i);
            }
            if (missing == 0) break;
            pause();
        }
    }
    come();
#pragma unroll 1
    for (int i = 0; i < job.n_inputs; i++) {
        const Input &input = job.inputs[i];
        const Awaited awaited(tags, input.of_job);
#pragma unroll 1
        for (int at = OF_UNIT * units_of(input) + threadIdx.x; at < input.k; at += THREADS) {
            const __half value = IS_TAGGED ? await_half((const uint32_t *)input.x + at, awaited) : load_fresh((const __half *)input.x + at);
            out[i * first.padded + at] = __ushort_as_half((unsigned short)made(i, __half_as_ushort(value)));
        }
    }
}

// What a thread's row is made with beside its sums, asked for early. `Own` is the kernel's own decoder. Variables of a job have values from
// their beginning on, here and elsewhere: what some ways leave without one would keep its registers from job to job.
template <class Own>
struct RowFactors {
    float bias[MAX_INPUTS] = {}, scale[MAX_INPUTS] = {}, residual = 0.0f;
    uint32_t place = 0;                 // of the first run: part << 28 | row
    uint32_t sums_of[MAX_INPUTS] = {};  // each run's partials: the first one << 16 | how many follow
    // False where the tile has no such row.
    __device__ __forceinline__ bool load(const Held &held, int tile, int of_tile) {
        const Matvec &job = held.job.matvec;
        const Share &share = held.share;
        if (tile >= share.tiles || of_tile >= rows_of(share, tile)) return false;
        int begin = tile * (share.chunks[0] + share.chunks[1]), run = tile * share.runs;
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++) {
            bias[i] = scale[i] = 0.0f;
            if (i >= share.runs) continue;
            int in_part = first_row_of(share, tile) + of_tile;
            const Part &of_run = part_at(held, i, in_part);
            if (i == 0) place = (uint32_t)(&of_run - job.parts) << 28 | in_part;
            if (of_run.bias) bias[i] = load_float(of_run.bias + in_part);
            if (Own::HAS_ROW_SCALES && held.job.kind == KIND_OWN) scale[i] = load_float((const float *)of_run.scales + in_part);
            const int first_warp = quotient(begin, share.of_warp, share.per_of_warp);
            begin += share.chunks[i];
            sums_of[i] = (run + i + first_warp) << 16 | (quotient(begin - 1, share.of_warp, share.per_of_warp) - first_warp);
        }
        // Whoever adds to a residual gives a row to the same thread, so that nobody else has written it.
        residual = job.residual ? __uint_as_float(look(&job.residual[row()].x)) : 0.0f;
        return true;
    }
    __device__ __forceinline__ int part() const { return place >> 28; }
    __device__ __forceinline__ int row() const { return place & 0xfffffff; }
};

// A run that a warp reads, and the row of it that is the lane's.
struct Reading {
    Walk walk = {-1};
    const Part *part = nullptr;
    int row = 0;  // of the part
    __device__ __forceinline__ void next(const Held &held) {
        const Share &share = held.share;
        walk.next(share, threadIdx.x / LANES);
        if (walk.steps == 0) return;
        const int tile = tile_of(share, walk.run);
        row = first_row_of(share, tile) + min((int)threadIdx.x % LANES / 4, rows_of(share, tile) - 1);
        part = &part_at(held, walk.second, row);
    }
};

// N steps from the first ones of a slot on.
template <int N, class Decoder, class Ring>
__device__ __forceinline__ void take_steps(uint32_t slot, typename Decoder::Row &row, typename Decoder::Sums &sums) {
    const int lane = threadIdx.x % LANES;
    const uint32_t words = slot + row_at(lane / 4) + lane % 4 * 16;
    uint4 low[N], high[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        low[i] = load_copied_16(words + i * CHUNK_BYTES);
        high[i] = load_copied_16(words + i * CHUNK_BYTES + CHUNK_BYTES / 2);
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        Decoder::add(low[i], high[i], words + i * CHUNK_BYTES, slot + ROWS_BYTES + i * Ring::EXTRA_BYTES, row, sums);
}

// A matrix's steps of this warp, its sums into `partials`. The decoder's interface:
//   CHUNK                     elements of 128 bytes
//   CONVERTED_EIGHTHS         of a byte, for what an element of x becomes
//   Row                       where a lane reads what a row's steps need, from a chunk on; add moves it one step on
//   Sums, add                 sums of one run in a lane; add is told the 32 bytes, where they lie, half a
//                             chunk apart, and where the extra words of the step do
//   Partial, partial          a row's partial result, in the lane 4g
//   Activations, convert      what x becomes, behind the xs in shared memory
//   WORDS_HELD                of x, in a thread's registers: as many as leave room for the rest
//   HAS_ROW_SCALES, result    whether a row has a scale of its own, and the value that is made of its partials
//   Shared, prepare           tables that the whole step needs
//   Place                     what is copied for a step beside the weights
template <class Decoder, class Ring>
__device__ __forceinline__ void stream(const Held *jobs, int at, int limit, Ring &ring, Reading reading, const typename Decoder::Shared &shared,
                                       const typename Decoder::Activations (&activations)[MAX_INPUTS], void *room) {
    typename Decoder::Partial(*partials)[TILE_ROWS] = (typename Decoder::Partial(*)[TILE_ROWS])room;
    const Held &held = jobs[at % JOBS_HELD];
    const Matvec &job = held.job.matvec;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#pragma unroll 1
    for (; reading.walk.steps > 0; reading.next(held)) {
        const int input = job.mode == MODE_JOINED ? reading.walk.second : 0;
        int steps_left = reading.walk.steps;
        typename Decoder::Row row;
        row.set(shared, *reading.part, activations[input], job.inputs[input].k, reading.row, lane, reading.walk.chunk);
        typename Decoder::Sums sums = {};
#pragma unroll 1
        while (steps_left > 0) {
            const uint32_t slot = ring.next(jobs, limit);
            // Two steps at a time hide each other's latencies.
            if (STEPS_OF_SLOT == 2 && steps_left > 1) take_steps<STEPS_OF_SLOT, Decoder, Ring>(slot, row, sums);
            else take_steps<1, Decoder, Ring>(slot, row, sums);
            steps_left -= STEPS_OF_SLOT;
            ring.pass();
        }
        typename Decoder::Partial partial;
        Decoder::partial(sums, partial);
        if (lane % 4 == 0) partials[reading.walk.run + warp][lane / 4] = partial;
    }
    ring.leave(at);
}

// A row's partials, in the order of its steps.
template <class Partial>
__device__ __forceinline__ Partial total_of(const void *room, uint32_t sums_of, int row) {
    const Partial *partial = (const Partial *)room + (sums_of >> 16) * TILE_ROWS + row;
    const int more = sums_of & 0xffff;
    Partial sum = *partial;
#pragma unroll 1
    for (int i = 1; i <= more; i += 4) {
        Partial four[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j <= more) four[j] = partial[(i + j) * TILE_ROWS];
#pragma unroll
        for (int j = 0; j < 4; j++) sum.add(four[j]);
    }
    return sum;
}

// What a row's value becomes, and where it goes.
__device__ __forceinline__ void put_row(const Matvec &job, const Part &part, int row, const float (&values)[MAX_INPUTS], float residual,
                                        uint32_t tag, unsigned long long &best) {
    float y = values[0] + (job.mode == MODE_JOINED ? values[1] : 0.0f);
    if (part.activation != ACT_NONE) {
        y = activate(part.activation, __half2float(__float2half_rn(y)));
        if (job.mode == MODE_GATED) y = __half2float(__float2half_rn(y)) * __half2float(__float2half_rn(values[1]));
    }
    if (job.logits) {
        job.logits[row] = y;
        unsigned long long rank = rank_of(y, row);
        best = rank > best ? rank : best;
    } else if (job.residual) {
        tell(job.residual + row, tagged(residual + y, tag));
    } else if (job.puts == PUTS_TAGGED_HALVES) {
        tell((uint32_t *)part.out + row, tagged(__float2half_rn(y), tag));
    } else if (job.puts == PUTS_FLOATS) {
        ((float *)part.out)[row] = y;
    } else {
        ((__half *)part.out)[row] = __float2half_rn(y);
    }
}
