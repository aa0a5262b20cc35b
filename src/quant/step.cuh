// A decode step as one launch: a block for each multiprocessor runs the program's jobs one after the other. So code stays in
// the instruction cache, and the copies of weights go on while a block waits for what others compute.
#pragma once

#include <type_traits>

#include "kernels/cuda/attention.cuh"
#include "quant/dense/dense.cuh"

// Lanes copy what a format needs beside the weights, and then the weights as well.
template <class Own, int DEPTH>
using RingOf = std::conditional_t<HAS_BULK_COPIES && Own::Place::WORDS == 0, FilledRing, OwnRing<typename Own::Place, DEPTH>>;

template <class Own>
union Activations {
    Halves::Activations of_halves[MAX_INPUTS];
    Floats::Activations of_floats[MAX_INPUTS];
    typename Own::Activations own[MAX_INPUTS];
};

// Multiplies what a matrix job reads, once it is there; every thread calls `ahead` once. `room` has the inputs in fp16, then what the
// decoder makes of them, then the warps' sums.
template <class Own, class Ring, class Ahead>
__device__ __forceinline__ void multiply(const Program &program, const Held *jobs, int at, const Tags &tags, int before, int behind, Ring &ring,
                                         typename Ring::Shared &copying, const typename Own::Shared &shared, uint8_t *room, Ahead ahead) {
    __shared__ Activations<Own> activations;
    __shared__ float sums_of_warps[MAX_INPUTS * WARPS];
    const Held &held = jobs[at % JOBS_HELD];
    const Matvec &job = held.job.matvec;
    const Share &share = held.share;
    const int kind = held.job.kind;
    RowFactors<Own> factors;
    bool has_row = factors.load(held, threadIdx.x / TILE_ROWS, threadIdx.x % TILE_ROWS);
    ring.fill(jobs, before);
    Reading reading;
    reading.next(held);

    __half *x = (__half *)room;
    const int padded = job.inputs[0].padded + (job.n_inputs > 1 ? job.inputs[1].padded : 0);
    uint8_t *converted = (uint8_t *)(x + padded);
    const int eighths = kind == KIND_HALF ? Halves::CONVERTED_EIGHTHS : kind == KIND_FLOAT ? Floats::CONVERTED_EIGHTHS : Own::CONVERTED_EIGHTHS;
    uint8_t *partials = converted + padded * eighths / 8;
    const bool is_normed = job.inputs[0].norm != NORM_NONE;
    if (is_normed) fetch_norm(job.inputs[0]);
    // What needs no values is made now.
    constexpr bool OWN_NEEDS_VALUES = Own::CONVERTED_EIGHTHS > 0;
    if (!job.keeps) {
        for (int i = 0; i < job.n_inputs; i++)
            for (int k = job.inputs[i].k + threadIdx.x; k < job.inputs[i].padded; k += THREADS) x[i * job.inputs[0].padded + k] = __half();
        if (kind == KIND_HALF) Halves::convert(activations.of_halves, {}, job, x, converted, sums_of_warps);
        if (!OWN_NEEDS_VALUES && kind == KIND_OWN) Own::convert(activations.own, shared, job, x, converted, sums_of_warps);
    }
    ahead();
    const bool has_rows = share.rows != 0 || job.logits;
    auto begin = [&]() { Ring::begin(copying, at); };
    if (!job.keeps && has_rows) {
        if (is_normed) normalize(job.inputs[0], Awaited(tags, job.inputs[0].of_job), x, sums_of_warps, begin);
        else if (job.inputs[0].is_tagged) read_plain<true, Own::WORDS_HELD>(job, tags, x, begin);
        else read_plain<false, Own::WORDS_HELD>(job, tags, x, begin);
        meet();
    } else {
        begin();
        // What `ahead` has found of later jobs is there for all warps.
        meet();
    }
    if (!has_rows) return ring.leave(at);
    if (!job.keeps) {
        if (kind == KIND_FLOAT) Floats::convert(activations.of_floats, {}, job, x, converted, sums_of_warps);
        if (OWN_NEEDS_VALUES && kind == KIND_OWN) Own::convert(activations.own, shared, job, x, converted, sums_of_warps);
        if (eighths > 0) meet();
    }

    if (kind == KIND_HALF) stream<Halves>(jobs, at, behind, ring, reading, {}, activations.of_halves, partials);
    else if (kind == KIND_FLOAT) stream<Floats>(jobs, at, behind, ring, reading, {}, activations.of_floats, partials);
    else if constexpr (!std::is_same<Own, Halves>::value) stream<Own>(jobs, at, behind, ring, reading, shared, activations.own, partials);
    meet();

    unsigned long long best = 0;
#pragma unroll 1
    for (int at_row = threadIdx.x; at_row < share.tiles * TILE_ROWS; at_row += THREADS) {
        const int of_tile = at_row % TILE_ROWS;
        if (at_row >= THREADS) has_row = factors.load(held, at_row / TILE_ROWS, of_tile);
        if (!has_row) continue;
        float values[MAX_INPUTS] = {};
#pragma unroll
        for (int run = 0; run < MAX_INPUTS; run++) {
            if (run >= share.runs) break;
            if (kind == KIND_OWN) values[run] = Own::result(total_of<typename Own::Partial>(partials, factors.sums_of[run], of_tile),
                                                            activations.own[job.mode == MODE_JOINED ? run : 0], factors.scale[run]);
            else values[run] = total_of<Value>(partials, factors.sums_of[run], of_tile).value;
            values[run] += factors.bias[run];
        }
        put_row(job, job.parts[factors.part()], factors.row(), values, factors.residual, tags.of(at), best);
    }
    if (!job.logits) return;
    __shared__ unsigned long long best_of_warps[WARPS];
    best = block_best(best, best_of_warps);
    if (threadIdx.x == 0) program.head.best[blockIdx.x] = best;
}

// Shared memory: the warps' rings, then what a job needs.
template <class Own, int DEPTH>
__device__ __forceinline__ void run_step(const Program &program) {
    using Ring = RingOf<Own, DEPTH>;
    DYNAMIC_SHARED(uint4, dynamic);
    __shared__ Held held[JOBS_HELD];
    __shared__ typename Own::Shared shared;
    __shared__ unsigned long long best_of_warps[WARPS];
    __shared__ bool is_last;
    __shared__ typename Ring::Shared copying;
    const int n = program.n_jobs, warp = threadIdx.x / LANES;

    Ring ring;
    ring.start(shared_address(dynamic), program.slots, min(n, JOBS_HELD), copying);
    uint8_t *room = (uint8_t *)dynamic + WARPS * Ring::bytes(program.slots);
    if (warp < JOBS_HELD && warp < n) {
        // A single job is a parameter, which copies in the background do not reach.
        const Job &job = program.jobs ? program.jobs[warp] : program.only;
#pragma unroll 1
        for (int at = threadIdx.x % LANES; at < JOB_WORDS; at += LANES) ((uint32_t *)&held[warp].job)[at] = ((const uint32_t *)&job)[at];
        find_share(held[warp]);
    }
    __syncthreads();
    if constexpr (std::is_same<Ring, FilledRing>::value) {
        if (warp >= WARPS) {
            give_registers<REGISTERS_OF_COPIER>();
            return copy_weights(held, n, shared_address(dynamic), program.slots, copying);
        }
        take_registers<REGISTERS_BESIDE_COPIERS>();
    }
    Own::prepare(shared, program.code);
    // Not that of memory where nothing has been written, which is zero.
    const Tags tags = {program.jobs ? (look(program.ended + 1) + 1) * n : 0};

#pragma unroll 1
    for (int at = 0; at < n; at++) {
        // Jobs at hand before the next one is fetched and behind it.
        const int before = min(n, max(at - 2, 0) + JOBS_HELD), behind = min(n, max(at - 1, 0) + JOBS_HELD);
        // The block has ended the job before, whose place is free now.
        auto ahead = [&]() {
            const int next = at - 1 + JOBS_HELD;
            if (warp != WARPS - 1) return;
            if (at > 1 && next - 1 < n) {
                find_share(held[(next - 1) % JOBS_HELD]);
                Ring::tell_at_hand(copying, next);
            }
            if (at > 0 && next < n) {
                Ring::await_copied(copying, at);
                fetch(held[next % JOBS_HELD], program.jobs[next]);
            }
        };
        const Job &job = held[at % JOBS_HELD].job;
        if (job.kind == KIND_ATTENTION) attend(job.attention, tags, tags.of(at), room, ahead);
        else multiply<Own>(program, held, at, tags, before, behind, ring, copying, shared, room, ahead);
        if (at + 1 == n) break;
        // Shared memory is the next job's.
        meet();
    }

    if (!program.ended) return;
    meet();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(program.ended, 1u) == gridDim.x - 1;
    }
    meet();
    if (!is_last) return;
    __threadfence();
    if (program.head.best) finish_head(program.head, best_of_warps);
    if (threadIdx.x != 0) return;
    program.ended[0] = 0;
    if (program.jobs) program.ended[1]++;
}

#define STEP_KERNEL(NAME, DECODER, DEPTH)                                                           \
    extern "C" __global__ void __launch_bounds__((RingOf<DECODER, DEPTH>::BLOCK_THREADS), 1)        \
        NAME##_step(const __grid_constant__ Program program) {                                      \
        run_step<DECODER, DEPTH>(program);                                                          \
    }
