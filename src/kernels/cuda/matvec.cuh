// Matrix-vector products of one token at the speed of reading the weights. A format adds a decoder.
//
//   y = epilogue(W . prologue(x))
//     prologue: rms or layer norm of a residual, or activations as they are; the decoder's own (LLM.int8 quantizes)
//     epilogue: bias, activation, gate * up, residual, and for the LM head the largest logit
//
// Layout: rows of W start every `stride` bytes and are read in chunks of 128 bytes, a cache line. A tile is 8 rows; a step
// is one chunk of a tile, 1 KB, which pipeline.cuh has copied:
//
//              bytes 0 .. 63: low           64 .. 127: high
//   row g    |q = 0| 1 | 2 | 3 |        |q = 0| 1 | 2 | 3 |           lane 4g + q
//
// Tensor cores take 16 rows, so a step is 16 rows to them: rows g are the low halves, rows g + 8 the high ones. Their 8
// columns hold the one token: even columns the activations that belong to the low half, odd columns those of the high one,
// so that sums[0] (row g, even) and sums[3] (row g + 8, odd) are the two halves of row g's sum, in all four lanes of g.
//
// A warp that leaves a run stores its 8 sums in `partials` at index run + warp. Along the steps one of the two grows from segment to
// segment, so that all indices differ. At the end each thread adds up rows in the order of the steps: equal inputs give equal bits.
// Bytes moved: the matrix once. Sums fp32 (int32 for LLM.int8's products).
#pragma once

#include "kernels/cuda/token_output.cuh"
#include "kernels/cuda/producer_pipeline.cuh"
#include "kernels/cuda/self_pipeline.cuh"
#include "kernels/cuda/trace.cuh"

// 1 / (1 + exp(-x)), a few units in the last place of fp32.
__device__ __forceinline__ float logistic(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// cap * tanh(x / cap), within some units in the last place of cap.
__device__ __forceinline__ float capped(float x, float cap) { return cap * (1.0f - __fdividef(2.0f, __expf(2.0f * __fdividef(x, cap)) + 1.0f)); }

__device__ __forceinline__ float activate(int kind, float x) {
    if (kind == ACT_RELU) return x > 0.0f || isnan(x) ? x : 0.0f;
    // (1 + tanh(z)) / 2 is the logistic function of 2 z.
    float inner = kind == ACT_SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x * logistic(inner);
}

// The sum over the block, in every thread. `room` holds a float a warp and is free again after the next barrier.
__device__ __forceinline__ float block_sum(float value, float *room) {
    value = warp_sum(value);
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = value;
    barrier_sync();
    return warp_sum<WARPS>(room[threadIdx.x % WARPS]);
}

// Words of 16 bytes of a norm's input that a thread keeps in registers: the whole row of most models, so that one latency covers it.
constexpr int NORM_HELD = 4096 / 2 / THREADS;

// Prefetches weight and bias of a norm into L1 before the input is ready. The compiler would not keep them in registers.
__device__ __forceinline__ void prefetch_norm(const InputDesc &input) {
    const int at = threadIdx.x * (CHUNK_BYTES / (int)sizeof(float));
    if (at >= input.k) return;
    prefetch(input.norm_weight + at);
    prefetch(input.norm_bias + at);
}

// Waits for x and stores norm(x) [k] in fp16. Rows of up to 4096 stay in registers; longer ones are read again. x, weights and bias have
// zeros behind k up to a multiple of 2; so has the result. An rms norm's bias is zeros. A thread calls `on_ready` once its registers are
// loaded.
template <class OnReady>
__device__ __forceinline__ void normalize(const InputDesc &input, const ExpectedTag &expected, __half *out, float *room, OnReady on_ready) {
    const float2 *weights = (const float2 *)input.norm_weight, *biases = (const float2 *)input.norm_bias;
    const int twos = (input.k + 1) / 2, rest = NORM_HELD * THREADS + threadIdx.x;
    auto is_mine = [&](int i) { return i * THREADS + (int)threadIdx.x < twos; };
    auto load_at = [&](int at) { return load_relaxed((const uint4 *)input.x + at); };
    // Values behind k are never written.
    auto is_ready = [&](const uint4 &two, int at) {
        return expected.ready(expected.mismatch(two.y) | (2 * at + 1 < input.k ? expected.mismatch(two.w) : 0));
    };
    // A thread loads only what it needs: loads of all blocks from one address would be serialized.
    uint4 loaded[NORM_HELD] = {};
    for (;;) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) loaded[i] = load_at(i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) all = is_ready(loaded[i], i * THREADS + threadIdx.x) && all;
        if (all) break;
        backoff();
    }
    on_ready();
    auto two_at = [&](int at) {
        uint4 two = load_at(at);
        while (!is_ready(two, at)) {
            backoff();
            two = load_at(at);
        }
        return make_float2(__uint_as_float(two.x), __uint_as_float(two.z));
    };
    float2 values[NORM_HELD];
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++) values[i] = make_float2(__uint_as_float(loaded[i].x), __uint_as_float(loaded[i].z));
    float sum = 0.0f, mean = 0.0f;
    if (input.norm == NORM_LAYER) {
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++)
            if (is_mine(i)) sum += values[i].x + values[i].y;
#pragma unroll 1
        for (int at = rest; at < twos; at += THREADS) {
            const float2 two = two_at(at);
            sum += two.x + two.y;
        }
        mean = block_sum(sum, room) * input.per_k;
        sum = 0.0f;
    }
    auto square = [&](float2 two, int at) {
        auto centred = [&](float value, int element) { return 2 * at + element < input.k ? value - mean : 0.0f; };
        float a = centred(two.x, 0), b = centred(two.y, 1);
        return a * a + b * b;
    };
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++)
        if (is_mine(i)) sum += square(values[i], i * THREADS + threadIdx.x);
#pragma unroll 1
    for (int at = rest; at < twos; at += THREADS) sum += square(two_at(at), at);
    const float factor = rsqrtf(block_sum(sum, room + WARPS) * input.per_k + input.epsilon);
    auto store = [&](int at, float2 two) {
        const float2 weight = load_two(weights + at), bias = load_two(biases + at);
        auto normed = [&](float value, float of_weight, float of_bias) {
            return __float2half_rn(__half2float(__float2half_rn((value - mean) * factor * of_weight + of_bias)) * input.scale);
        };
        __align__(4) __half made[2] = {normed(two.x, weight.x, bias.x), normed(two.y, weight.y, bias.y)};
        ((uint32_t *)out)[at] = *(const uint32_t *)made;
    };
#pragma unroll
    for (int i = 0; i < NORM_HELD; i++)
        if (is_mine(i)) store(i * THREADS + threadIdx.x, values[i]);
#pragma unroll 1
    for (int at = rest; at < twos; at += THREADS) store(at, two_at(at));
}

// Waits for x, fp32, and stores it in fp16; zeros behind k up to a multiple of 2.
template <class OnReady>
__device__ __forceinline__ void cast_input(const InputDesc &input, const ExpectedTag &expected, __half *out, OnReady on_ready) {
    constexpr int HELD = 4;
#pragma unroll 1
    for (int start = threadIdx.x; start < input.k; start += HELD * THREADS) {
        uint2 loaded[HELD] = {};
        for (;;) {
            uint32_t mismatch = 0;
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < input.k) loaded[i] = load_relaxed((const uint2 *)input.x + start + i * THREADS);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (start + i * THREADS < input.k) mismatch |= expected.mismatch(loaded[i].y);
            if (expected.ready(mismatch)) break;
            backoff();
        }
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (start + i * THREADS < input.k) out[start + i * THREADS] = __float2half_rn(__half2float(__float2half_rn(__uint_as_float(loaded[i].x))) * input.scale);
    }
    on_ready();
}

// Waits for all vectors without a norm and stores them in fp16, one behind the other: 16 bytes at a time, HELD of them in a thread's registers
// so that one latency covers them, and the rest one by one. The second input is ready no sooner than the first. A thread calls `on_ready` once
// it has read its words of 16 bytes.
template <bool IS_TAGGED, int HELD, class OnReady>
__device__ __forceinline__ void read_inputs(const Matvec &matvec, const Tags &tags, __half *out, OnReady on_ready) {
    constexpr int OF_UNIT = IS_TAGGED ? 4 : 8;
    const InputDesc &first = matvec.inputs[0], &second = matvec.inputs[1];
    // Of a vector; those of experts lie one behind the other in input 0, each of whole units or none.
    auto units_of = [&](const InputDesc &input) {
        const bool is_whole = (uintptr_t)input.x % 16 == 0 && !(is_weighed(matvec) && input.k % OF_UNIT != 0);
        return is_whole ? input.k / OF_UNIT : 0;
    };
    const int of_first = units_of(first);
    const int units = is_weighed(matvec) ? matvec.chosen * of_first : of_first + (matvec.n_inputs > 1 ? units_of(second) : 0);
    const ExpectedTag expected_first(tags, first.written_by), expected_second(tags, second.written_by);
    auto is_first = [&](int at) { return is_weighed(matvec) || at < of_first; };
    auto from = [&](int at) { return is_first(at) ? (const uint4 *)first.x + at : (const uint4 *)second.x + at - of_first; };
    auto is_ready = [&](const uint4 &unit, int at) {
        if (!IS_TAGGED) return true;
        const ExpectedTag &expected = is_first(at) ? expected_first : expected_second;
        return expected.ready(expected.mismatch_half(unit.x) | expected.mismatch_half(unit.y) | expected.mismatch_half(unit.z) | expected.mismatch_half(unit.w));
    };
    auto scaled = [&](int index, uint32_t pair) {
        const float scale = index ? second.scale : first.scale;
        if (scale == 1.0f) return pair;
        const float2 two = __half22float2(*(const __half2 *)&pair);
        return __half_as_ushort(__float2half_rn(two.x * scale)) | (uint32_t)__half_as_ushort(__float2half_rn(two.y * scale)) << 16;
    };
    auto store = [&](int at, const uint4 &unit) {
        int index = at >= of_first;
        if (is_weighed(matvec)) index = (unsigned)at / (unsigned)of_first;
        __half *to = out + index * first.padded + (at - index * of_first) * OF_UNIT;
        if (is_weighed(matvec)) index = 0;
        if (IS_TAGGED) *(uint2 *)to = make_uint2(scaled(index, __byte_perm(unit.x, unit.y, 0x5410)), scaled(index, __byte_perm(unit.z, unit.w, 0x5410)));
        else *(uint4 *)to = make_uint4(scaled(index, unit.x), scaled(index, unit.y), scaled(index, unit.z), scaled(index, unit.w));
    };
#pragma unroll 1
    for (int start = threadIdx.x; start < units; start += HELD * THREADS) {
        uint4 loaded[HELD] = {};
        uint32_t missing = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) missing |= (start + i * THREADS < units) << i;
        // Stores the words that are ready and polls the others again.
        for (;;) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (missing >> i & 1) loaded[i] = load_relaxed(from(start + i * THREADS));
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int at = start + i * THREADS;
                if (!(missing >> i & 1) || !is_ready(loaded[i], at)) continue;
                store(at, loaded[i]);
                missing &= ~(1u << i);
            }
            if (missing == 0) break;
            backoff();
        }
    }
    on_ready();
#pragma unroll 1
    for (int i = 0; i < vectors_of(matvec); i++) {
        const InputDesc &input = vector_at(matvec, i);
        const ExpectedTag expected(tags, input.written_by);
        const int behind = is_weighed(matvec) ? i * input.k : 0;
#pragma unroll 1
        for (int at = OF_UNIT * units_of(input) + threadIdx.x; at < input.k; at += THREADS) {
            const __half value = IS_TAGGED ? wait_half((const uint32_t *)input.x + behind + at, expected) : load_l2((const __half *)input.x + at);
            out[i * first.padded + at] = __ushort_as_half((unsigned short)scaled(is_weighed(matvec) ? 0 : i, __half_as_ushort(value)));
        }
    }
}

// Factors of a thread's row beside its sums, loaded early. All variables of an instruction are initialized, here and elsewhere: one that some
// path leaves uninitialized would keep its registers from instruction to instruction.
template <class Format>
struct RowFactors {
    float bias[MAX_INPUTS] = {}, scale[MAX_INPUTS] = {}, residual = 0.0f;
    uint32_t place = 0;                 // of the first run: part << 27 | row
    uint32_t sums_of[MAX_INPUTS] = {};  // each run's partials: index of the first << 16 | how many follow
    // False where the tile has no such row.
    __device__ __forceinline__ bool load(const ResidentInstruction &resident, int tile, int of_tile) {
        const Matvec &matvec = resident.instruction.matvec;
        const BlockShare &share = resident.share;
        if (tile >= share.tiles || of_tile >= rows_of(share, tile)) return false;
        int begin = tile * (share.chunks[0] + share.chunks[1]);
#pragma unroll
        for (int i = 0; i < MAX_INPUTS; i++) {
            bias[i] = scale[i] = 0.0f;
            if (i >= share.runs) continue;
            int in_part = first_row_of(share, tile) + of_tile;
            const MatrixPart &of_run = part_at(resident, i, in_part);
            if (i == 0) place = (uint32_t)(&of_run - parts_of(matvec)) << 27 | in_part;
            load_run(resident, of_run, in_part, bias[i], scale[i]);
            sums_of[i] = partials_of(share, (tile << share.shift) + i, begin, share.chunks[i]);
            begin += share.chunks[i];
        }
        // All instructions that add to a residual give a row to the same block, which has written it before a barrier.
        residual = matvec.residual ? __uint_as_float(load_relaxed(&matvec.residual[row()].x)) : 0.0f;
        return true;
    }
    // The same for one product of MODE_WEIGHED: rows of all tiles, MAX_CHOSEN runs each. True where there is such a row.
    __device__ __forceinline__ bool load_weighed(const ResidentInstruction &resident, int product) {
        const BlockShare &share = resident.share;
        const int tile = product / (TILE_ROWS * MAX_CHOSEN), of_tile = product / MAX_CHOSEN % TILE_ROWS, run = product % MAX_CHOSEN;
        if (tile >= share.tiles || of_tile >= rows_of(share, tile)) return false;
        int row = first_row_of(share, tile) + of_tile;
        place = row;
        bias[0] = scale[0] = 0.0f;
        if (run < share.runs) {
            load_run(resident, part_at(resident, run, row), row, bias[0], scale[0]);
            sums_of[0] = partials_of(share, (tile << share.shift) + run, (tile * share.runs + run) * share.chunks[0], share.chunks[0]);
        }
        residual = run == 0 ? __uint_as_float(load_relaxed(&resident.instruction.matvec.residual[row].x)) : 0.0f;
        return true;
    }
    // Bias and scale of a row of a run, which are 0 where there are none.
    static __device__ __forceinline__ void load_run(const ResidentInstruction &resident, const MatrixPart &part, int row, float &bias, float &scale) {
        if (part.bias) bias = load_float(part.bias + row);
        if (Format::HAS_ROW_SCALES && resident.instruction.opcode == OPCODE_FORMAT) scale = load_float((const float *)part.scales + row);
    }
    // Where the partials of a run are whose `chunks` steps begin at `begin`: index of the first << 16 | how many follow.
    static __device__ __forceinline__ uint32_t partials_of(const BlockShare &share, int run, int begin, int chunks) {
        const int first_warp = quotient(begin, share.of_warp, share.per_of_warp);
        return (run + first_warp) << 16 | (quotient(begin + chunks - 1, share.of_warp, share.per_of_warp) - first_warp);
    }
    __device__ __forceinline__ int part() const { return place >> 27; }
    __device__ __forceinline__ int row() const { return place & 0x7ffffff; }
};

// The run that a warp reads, and the lane's row of it.
struct RunReader {
    RunIterator iterator = {-1};
    const MatrixPart *part = nullptr;
    int row = 0;  // of the part
    __device__ __forceinline__ void next(const ResidentInstruction &resident) {
        const BlockShare &share = resident.share;
        iterator.next(share, threadIdx.x / LANES);
        if (iterator.steps == 0) return;
        const int tile = tile_of(share, iterator.run);
        row = first_row_of(share, tile) + min((int)threadIdx.x % LANES / 4, rows_of(share, tile) - 1);
        part = &part_at(resident, iterator.in_tile, row);
    }
};

// Multiplies the first N steps of a stage.
template <int N, class Decoder, class Pipeline>
__device__ __forceinline__ void process_steps(uint32_t stage, typename Decoder::Row &row, typename Decoder::Sums &sums) {
    const int lane = threadIdx.x % LANES;
    const uint32_t words = stage + row_at(lane / 4) + lane % 4 * 16;
    uint4 low[N], high[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        low[i] = load_copied_16(words + i * CHUNK_BYTES);
        high[i] = load_copied_16(words + i * CHUNK_BYTES + CHUNK_BYTES / 2);
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        Decoder::add(low[i], high[i], words + i * CHUNK_BYTES, stage + ROWS_BYTES + i * Pipeline::EXTRA_BYTES, row, sums);
}

// Multiplies this warp's steps of a matvec and stores its sums in `partials`. The decoder's interface:
//   CHUNK                     elements of 128 bytes
//   CONVERTED_EIGHTHS         size of a converted element of x, in eighths of a byte
//   Row                       a lane's pointers into the data of a row's steps; add moves them one step on
//   Sums, add                 sums of one run in a lane; add gets 32 bytes of weights, their address, and the address of the
//                             step's side data
//   Partial, partial          a row's partial result, in the lane 4g
//   Activations, convert      x in converted form, behind the inputs in shared memory
//   WORDS_HELD                words of x in a thread's registers: as many as leave room for the rest
//   HAS_ROW_SCALES, result    whether a row has a scale, and the value of a row from its partials
//   Shared, prepare           tables in shared memory for the whole step
//   SideData                  data that is copied for a step beside the weights
template <class Decoder, class Pipeline>
__device__ __forceinline__ void stream(const ResidentInstruction *instructions, int at, int limit, Pipeline &pipeline, RunReader reader, const typename Decoder::Shared &shared,
                                       const typename Decoder::Activations (&activations)[MAX_VECTORS], void *room) {
    typename Decoder::Partial(*partials)[TILE_ROWS] = (typename Decoder::Partial(*)[TILE_ROWS])room;
    const ResidentInstruction &resident = instructions[at % RESIDENT_INSTRUCTIONS];
    const Matvec &matvec = resident.instruction.matvec;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    WaitClock waited;
#pragma unroll 1
    for (; reader.iterator.steps > 0; reader.next(resident)) {
        const int vector = vector_of_run(matvec, reader.iterator.in_tile);
        int steps_left = reader.iterator.steps;
        typename Decoder::Row row;
        row.set(shared, *reader.part, activations[vector], vector_at(matvec, vector).k, reader.row, lane, reader.iterator.chunk);
        typename Decoder::Sums sums = {};
#pragma unroll 1
        while (steps_left > 0) {
            const uint32_t stage = waited.around(pipeline, [&]() { return pipeline.next(instructions, limit); });
            // Two steps at a time hide each other's latency.
            if (STEPS_PER_STAGE == 2 && steps_left > 1) process_steps<STEPS_PER_STAGE, Decoder, Pipeline>(stage, row, sums);
            else process_steps<1, Decoder, Pipeline>(stage, row, sums);
            steps_left -= STEPS_PER_STAGE;
            pipeline.pass();
        }
        typename Decoder::Partial partial;
        Decoder::partial(sums, partial);
        if (lane % 4 == 0) partials[reader.iterator.run + warp][lane / 4] = partial;
    }
    pipeline.leave(at);
    waited.store(at);
}

// The sum of a row's partials, in the order of its steps.
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

// The epilogue of a row.
__device__ __forceinline__ void store_row(const Matvec &matvec, const MatrixPart &part, int row, const float (&values)[MAX_INPUTS], float residual,
                                        uint32_t tag, unsigned long long &best) {
    float y = values[0] + (matvec.mode == MODE_JOINED ? values[1] : 0.0f);
    if (HAS_FEATURES && part.activation == ACT_CAP) {
        y = capped(y, matvec.softcap);
    } else if (HAS_FEATURES && part.activation == ACT_CLAMPED) {
        const float limit = matvec.softcap, wide = __half2float(__float2half_rn(y)), gate = wide > limit ? limit : wide;
        const float of_up = __half2float(__float2half_rn(values[1])), up = of_up > limit ? limit : of_up < -limit ? -limit : of_up;
        y = (up + 1.0f) * gate * logistic(1.702f * gate);
    } else if (part.activation != ACT_NONE) {
        y = activate(part.activation, __half2float(__float2half_rn(y)));
        if (matvec.mode == MODE_GATED) y = __half2float(__float2half_rn(y)) * __half2float(__float2half_rn(values[1] * matvec.out_scale));
    }
    if (matvec.logits) {
        matvec.logits[row] = y;
        unsigned long long rank = rank_of(y, row);
        best = rank > best ? rank : best;
    } else if (matvec.residual) {
        store_relaxed(matvec.residual + row, tagged(residual + y, tag));
    } else if (matvec.output_type == OUTPUT_TAGGED_HALVES) {
        store_relaxed((uint32_t *)part.out + row, tagged(__float2half_rn(y), tag));
    } else if (HAS_FEATURES && matvec.output_type == OUTPUT_TAGGED_FLOATS) {
        store_relaxed((uint2 *)part.out + row, tagged(y, tag));
    } else if (matvec.output_type == OUTPUT_FLOATS) {
        ((float *)part.out)[row] = y;
    } else {
        ((__half *)part.out)[row] = __float2half_rn(y);
    }
}
