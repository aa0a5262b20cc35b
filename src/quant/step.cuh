// The step kernel: one launch of one block per multiprocessor, which runs the instructions of a program in order. Code stays in the
// instruction cache, and copies of weights go on while a block waits for values of others.
#pragma once

#include <type_traits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/norm_add.cuh"
#include "kernels/cuda/route.cuh"
#include "quant/dense/dense.cuh"

// Side data is copied lane by lane, and then the weights are as well.
template <class Format, int DEPTH>
using PipelineFor = std::conditional_t<HAS_BULK_COPIES && Format::SideData::WORDS == 0, ProducerPipeline, SelfPipeline<typename Format::SideData, DEPTH>>;

template <class Format>
union Activations {
    HalfDecoder::Activations of_halves[MAX_VECTORS];
    FloatDecoder::Activations of_floats[MAX_VECTORS];
    typename Format::Activations own[MAX_VECTORS];
};

// Runs a matvec: waits for its inputs, streams its matrices, writes its results. Every thread calls `ahead` once. `room` holds the inputs in
// fp16, then their converted form for the decoder, then the warps' partial sums.
template <class Format, class Pipeline, class Ahead>
__device__ __forceinline__ void multiply(const Program &program, const ResidentInstruction *instructions, int at, const Tags &tags, int before, int behind, Pipeline &pipeline,
                                         typename Pipeline::Shared &shared_pipeline, const typename Format::Shared &shared, uint8_t *room, Ahead ahead) {
    __shared__ Activations<Format> activations;
    __shared__ float sums_of_warps[MAX_VECTORS * WARPS];
    const ResidentInstruction &resident = instructions[at % RESIDENT_INSTRUCTIONS];
    const Matvec &matvec = resident.instruction.matvec;
    const BlockShare &share = resident.share;
    const int opcode = resident.instruction.opcode;
    stamp(at, STAMP_BEGUN);
    RowFactors<Format> factors;
    bool has_row = is_weighed(matvec) ? factors.load_weighed(resident, threadIdx.x) : factors.load(resident, threadIdx.x / TILE_ROWS, threadIdx.x % TILE_ROWS);
    // Behind a choice nothing has been copied yet: the warp that `ahead` lets wait for its copies fills its pipeline later.
    if (!(HAS_EXPERTS && matvec.chosen && threadIdx.x / LANES == WARPS - 1)) pipeline.fill(instructions, before);
    RunReader reader;
    reader.next(resident);

    __half *x = (__half *)room;
    const int padded = padded_of(matvec);
    uint8_t *converted = (uint8_t *)(x + padded);
    const int eighths = opcode == OPCODE_HALF ? HalfDecoder::CONVERTED_EIGHTHS : opcode == OPCODE_FLOAT ? FloatDecoder::CONVERTED_EIGHTHS : Format::CONVERTED_EIGHTHS;
    uint8_t *partials = converted + padded * eighths / 8;
    const bool is_normed = matvec.inputs[0].norm == NORM_RMS || matvec.inputs[0].norm == NORM_LAYER;
    if (is_normed) prefetch_norm(matvec.inputs[0]);
    // Everything that needs no input values is done before they are ready.
    constexpr bool FORMAT_NEEDS_VALUES = Format::CONVERTED_EIGHTHS > 0;
    if (!matvec.reuses_input) {
        for (int i = 0; i < vectors_of(matvec); i++)
            for (int k = vector_at(matvec, i).k + threadIdx.x; k < vector_at(matvec, i).padded; k += THREADS) x[i * matvec.inputs[0].padded + k] = __half();
        if (opcode == OPCODE_HALF) HalfDecoder::convert(activations.of_halves, {}, matvec, x, converted, sums_of_warps);
        if (!FORMAT_NEEDS_VALUES && opcode == OPCODE_FORMAT) Format::convert(activations.own, shared, matvec, x, converted, sums_of_warps);
    }
    ahead();
    const bool has_rows = share.rows != 0 || matvec.logits || (HAS_EXPERTS && matvec.keeps_input);
    auto begin = [&]() {
        Pipeline::begin(shared_pipeline, at);
        stamp(at, STAMP_READY);
    };
    if (!matvec.reuses_input && has_rows) {
        if (HAS_FEATURES && matvec.inputs[0].norm == NORM_CAST) cast_input(matvec.inputs[0], ExpectedTag(tags, matvec.inputs[0].written_by), x, begin);
        else if (is_normed) normalize(matvec.inputs[0], ExpectedTag(tags, matvec.inputs[0].written_by), x, sums_of_warps, begin);
        else if (matvec.inputs[0].is_tagged) read_inputs<true, Format::WORDS_HELD>(matvec, tags, x, begin);
        else read_inputs<false, Format::WORDS_HELD>(matvec, tags, x, begin);
        barrier_sync();
    } else {
        begin();
        // Makes the results of `ahead` visible to all warps.
        barrier_sync();
    }
    if (!has_rows) {
        stamp_rest(at, STAMP_READ);
        return pipeline.leave(at);
    }
    if (!matvec.reuses_input) {
        if (opcode == OPCODE_FLOAT) FloatDecoder::convert(activations.of_floats, {}, matvec, x, converted, sums_of_warps);
        if (FORMAT_NEEDS_VALUES && opcode == OPCODE_FORMAT) Format::convert(activations.own, shared, matvec, x, converted, sums_of_warps);
        if (eighths > 0) barrier_sync();
    }
    stamp(at, STAMP_READ);

    if (opcode == OPCODE_HALF) stream<HalfDecoder>(instructions, at, behind, pipeline, reader, {}, activations.of_halves, partials);
    else if (opcode == OPCODE_FLOAT) stream<FloatDecoder>(instructions, at, behind, pipeline, reader, {}, activations.of_floats, partials);
    else if constexpr (!std::is_same<Format, HalfDecoder>::value) stream<Format>(instructions, at, behind, pipeline, reader, shared, activations.own, partials);
    stamp(at, STAMP_MULTIPLIED);
    barrier_sync();
    stamp(at, STAMP_SUMMED);

    auto value_of = [&](int run, int of_tile, uint32_t sums_of, float scale, float bias) {
        float value;
        if (opcode == OPCODE_FORMAT) value = Format::result(total_of<typename Format::Partial>(partials, sums_of, of_tile), activations.own[vector_of_run(matvec, run)], scale, matvec.rounded_scale);
        else value = total_of<Value>(partials, sums_of, of_tile).value;
        return value * matvec.product_scale + bias;
    };
    if (is_weighed(matvec)) {
        // A thread for each expert's product of a row; the first of a row's adds them up.
#pragma unroll 1
        for (int at_product = threadIdx.x; at_product < share.tiles * TILE_ROWS * MAX_CHOSEN; at_product += THREADS) {
            const int run = at_product % MAX_CHOSEN, of_tile = at_product / MAX_CHOSEN % TILE_ROWS;
            if (at_product >= THREADS) has_row = factors.load_weighed(resident, at_product);
            float value = 0.0f;
            if (has_row && run < share.runs) value = value_of(run, of_tile, factors.sums_of[0], factors.scale[0], factors.bias[0]) * chosen_experts().weights[run];
#pragma unroll
            for (int distance = 1; distance < MAX_CHOSEN; distance *= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
            if (has_row && run == 0) store_relaxed(matvec.residual + factors.row(), tagged(factors.residual + value, tags.of(at)));
        }
        stamp(at, STAMP_STORED);
        return;
    }
    unsigned long long best = 0;
#pragma unroll 1
    for (int at_row = threadIdx.x; at_row < share.tiles * TILE_ROWS; at_row += THREADS) {
        const int of_tile = at_row % TILE_ROWS;
        if (at_row >= THREADS) has_row = factors.load(resident, at_row / TILE_ROWS, of_tile);
        if (!has_row) continue;
        float values[MAX_INPUTS] = {};
#pragma unroll
        for (int run = 0; run < MAX_INPUTS; run++) {
            if (run >= share.runs) break;
            values[run] = value_of(run, of_tile, factors.sums_of[run], factors.scale[run], factors.bias[run]);
        }
        store_row(matvec, parts_of(matvec)[factors.part()], factors.row(), values, factors.residual, tags.of(at), best);
    }
    stamp(at, STAMP_STORED);
    if (!matvec.logits) return;
    __shared__ unsigned long long best_of_warps[WARPS];
    best = block_best(best, best_of_warps);
    if (threadIdx.x == 0) program.token_output.best[blockIdx.x] = best;
    stamp(at, STAMP_STORED);
}

// Dynamic shared memory: the warps' pipelines, then an instruction's data.
template <class Format, int DEPTH>
__device__ __forceinline__ void run_step(const Program &program) {
    using Pipeline = PipelineFor<Format, DEPTH>;
    DYNAMIC_SHARED(uint4, dynamic);
    __shared__ ResidentInstruction resident[RESIDENT_INSTRUCTIONS];
    __shared__ typename Format::Shared shared;
    __shared__ unsigned long long best_of_warps[WARPS];
    __shared__ bool is_last;
    __shared__ typename Pipeline::Shared shared_pipeline;
    const int n = program.n_instructions, warp = threadIdx.x / LANES;

    start_trace(program);
    Pipeline pipeline;
    // Weights of the instructions before it may be copied. In shared memory: nf4 on Hopper has no register left for it.
    __shared__ int shared_gate;
    if (HAS_EXPERTS && threadIdx.x == 0) shared_gate = program.gate;
    auto gate = [&]() { return HAS_EXPERTS ? shared_gate : n; };
    pipeline.start(shared_address(dynamic), program.stages, min(min(n, RESIDENT_INSTRUCTIONS), HAS_EXPERTS ? program.gate : n), shared_pipeline);
    uint8_t *room = (uint8_t *)dynamic + WARPS * Pipeline::bytes(program.stages);
    if (warp < RESIDENT_INSTRUCTIONS && warp < n) {
        // A single instruction is a kernel parameter, which asynchronous copies cannot read.
        const Instruction &instruction = program.instructions ? program.instructions[warp] : program.only;
#pragma unroll 1
        for (int at = threadIdx.x % LANES; at < INSTRUCTION_WORDS; at += LANES) ((uint32_t *)&resident[warp].instruction)[at] = ((const uint32_t *)&instruction)[at];
        compute_share(resident[warp]);
    }
    __syncthreads();
    if constexpr (std::is_same<Pipeline, ProducerPipeline>::value) {
        if (warp >= WARPS) {
            release_registers<PRODUCER_REGISTERS>();
            return copy_weights(resident, n, shared_address(dynamic), program.stages, shared_pipeline);
        }
        acquire_registers<CONSUMER_REGISTERS>();
    }
    Format::prepare(shared, program.constants);
    // Never 0, the tag of memory that nothing has been written to.
    const Tags tags = {program.instructions ? (load_relaxed(program.counters + 1) + 1) * n : 0};
    trace_header(TRACE_PREPARED, IS_TRACED ? clock_low() : 0);

#pragma unroll 1
    for (int at = 0; at < n; at++) {
        // Instructions in shared memory before and after the next one is fetched.
        const int open = min(n, gate()), before = min(open, max(at - 2, 0) + RESIDENT_INSTRUCTIONS), behind = min(open, max(at - 1, 0) + RESIDENT_INSTRUCTIONS);
        // The block has finished the instruction before, whose place in shared memory is free.
        auto ahead = [&]() {
            const int next = at - 1 + RESIDENT_INSTRUCTIONS;
            if (warp != WARPS - 1) return;
            if (at > 1 && next - 1 < n) {
                compute_share(resident[(next - 1) % RESIDENT_INSTRUCTIONS]);
                Pipeline::set_instructions_ready(shared_pipeline, min(next, gate()));
            }
            if (at > 0 && next < n) {
                Pipeline::wait_copied(shared_pipeline, at);
                fetch_instruction(resident[next % RESIDENT_INSTRUCTIONS], program.instructions[next]);
            }
        };
        const Instruction &instruction = resident[at % RESIDENT_INSTRUCTIONS].instruction;
        if (instruction.opcode == OPCODE_ATTENTION) attend(instruction.attention, tags, at, room, ahead);
        else if (HAS_FEATURES && instruction.opcode >= OPCODE_FEATURED_ATTENTION) {
            if (instruction.opcode == OPCODE_NORM_ADD) norm_add(instruction.norm_add, tags, at, room, ahead);
            else if (HAS_EXPERTS && instruction.opcode == OPCODE_ROUTE) {
                route(instruction.route, tags, at, ahead);
                if (threadIdx.x == 0) shared_gate = instruction.route.next_gate;
                // All warps see gate and choice.
                barrier_sync();
                if (warp == WARPS - 1) Pipeline::set_instructions_ready(shared_pipeline, min(min(n, gate()), max(at - 1, 0) + RESIDENT_INSTRUCTIONS));
            }
            else attend_wide<true>(instruction.attention, tags, at, room, ahead);
            pipeline.leave(at);
        }
        else multiply<Format>(program, resident, at, tags, before, behind, pipeline, shared_pipeline, shared, room, ahead);
        if (at + 1 == n) break;
        // The next instruction reuses shared memory.
        barrier_sync();
    }

    trace_header(TRACE_DONE, IS_TRACED ? clock_low() : 0);
    if (!program.counters) return;
    barrier_sync();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(program.counters, 1u) == gridDim.x - 1;
    }
    barrier_sync();
    trace_header(TRACE_ENDED, IS_TRACED ? clock_low() : 0);
    if (!is_last) return;
    __threadfence();
    if (program.token_output.best) write_token(program.token_output, best_of_warps);
    trace_header(TRACE_ENDED, IS_TRACED ? clock_low() : 0);
    if (threadIdx.x != 0) return;
    program.counters[0] = 0;
    if (program.instructions) program.counters[1]++;
}

#define STEP_KERNEL(NAME, DECODER, DEPTH)                                                           \
    extern "C" __global__ void __launch_bounds__((PipelineFor<DECODER, DEPTH>::BLOCK_THREADS), 1)        \
        NAME##_step(const __grid_constant__ Program program) {                                      \
        run_step<DECODER, DEPTH>(program);                                                          \
    }
