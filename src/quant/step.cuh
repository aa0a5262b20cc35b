// A decode step as one launch: a block for each multiprocessor runs the program's jobs one after the other. So code stays in
// the instruction cache, and the copies of weights go on while a block waits for what the others compute.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "quant/dense/dense.cuh"

template <class Own>
union Activations {
    Halves::Activations of_halves[MAX_INPUTS];
    Floats::Activations of_floats[MAX_INPUTS];
    typename Own::Activations own[MAX_INPUTS];
};

// Multiplies what a matrix job reads. `wait` returns once all that earlier jobs wrote is there.
template <class Own, int DEPTH, class Wait>
__device__ __forceinline__ void multiply(const Program &program, const Held *jobs, int at, int &limit,
                                         Ring<typename Own::Place, DEPTH> &ring, const typename Own::Shared &shared, uint8_t *room, Wait wait) {
    __shared__ Activations<Own> activations;
    __shared__ float sums_of_warps[MAX_INPUTS * WARPS];
    const Held &held = jobs[at % JOBS_HELD];
    const Matvec &job = held.job.matvec;
    const Share &share = held.share;
    const int kind = held.job.kind;
    RowFactors<Own> factors;
    if (threadIdx.x < share.rows) factors.load(held, threadIdx.x);
    ring.fill(jobs, limit);

    __half *x = (__half *)(room + (share.tiles * share.runs + WARPS) * TILE_ROWS * sizeof(typename Own::Partial));
    const bool is_normed = job.inputs[0].norm != NORM_NONE;
    if (is_normed) fetch_norm(job.inputs[0]);
    wait();
    if (share.rows == 0 && !job.logits) return ring.leave(at);
    if (is_normed) normalize(job.inputs[0], x, sums_of_warps);
    else read_plain(job, x);
    for (int i = 0; i < job.n_inputs; i++)
        for (int k = job.inputs[i].k + threadIdx.x; k < job.inputs[i].padded; k += THREADS) x[i * job.inputs[0].padded + k] = __half();
    __syncthreads();
    uint8_t *free_bytes = (uint8_t *)(x + job.inputs[0].padded + (job.n_inputs > 1 ? job.inputs[1].padded : 0));
    if (kind == KIND_HALF) Halves::convert(activations.of_halves, {}, job, x, free_bytes, sums_of_warps);
    else if (kind == KIND_FLOAT) Floats::convert(activations.of_floats, {}, job, x, free_bytes, sums_of_warps);
    else Own::convert(activations.own, shared, job, x, free_bytes, sums_of_warps);
    __syncthreads();

    if (kind == KIND_HALF) stream<Halves>(jobs, at, limit, ring, {}, activations.of_halves, room);
    else if (kind == KIND_FLOAT) stream<Floats>(jobs, at, limit, ring, {}, activations.of_floats, room);
    else stream<Own>(jobs, at, limit, ring, shared, activations.own, room);
    __syncthreads();

    unsigned long long best = 0;
#pragma unroll 1
    for (int in_block = threadIdx.x; in_block < share.rows; in_block += THREADS) {
        if (in_block >= THREADS) factors.load(held, in_block);
        float values[MAX_INPUTS] = {};
#pragma unroll 1
        for (int run = share.runs - 1; run >= 0; run--) {
            const int of_row = in_block / TILE_ROWS * share.runs + run, row = in_block % TILE_ROWS;
            // Registers have no index.
            values[1] = values[0];
            if (kind == KIND_OWN) values[0] = Own::result(total_of<typename Own::Partial>(share, room, of_row, row),
                                                          activations.own[job.mode == MODE_JOINED ? run : 0], run ? factors.scale[1] : factors.scale[0]);
            else values[0] = total_of<Value>(share, room, of_row, row).value;
            values[0] += run ? factors.bias[1] : factors.bias[0];
        }
        put_row(held, in_block, values, factors.residual, best);
    }
    if (!job.logits) return;
    __shared__ unsigned long long best_of_warps[WARPS];
    best = block_best(best, best_of_warps);
    if (threadIdx.x == 0) program.head.best[blockIdx.x] = best;
}

// Shared memory: the warps' rings, then what a job needs.
template <class Own, int DEPTH>
__device__ __forceinline__ void run_step(const Program &program) {
    using Ring = Ring<typename Own::Place, DEPTH>;
    DYNAMIC_SHARED(uint4, dynamic);
    __shared__ Held held[JOBS_HELD];
    __shared__ typename Own::Shared shared;
    __shared__ unsigned long long best_of_warps[WARPS];
    __shared__ bool is_last;
    __shared__ unsigned long long barriers[WARPS * DEPTH];
    const int n = program.n_jobs, warp = threadIdx.x / LANES;
    const Job *jobs = program.jobs ? program.jobs : &program.only;

    Ring ring;
    ring.start(shared_address(dynamic) + warp * Ring::BYTES, shared_address(barriers + warp * DEPTH));
    uint8_t *room = (uint8_t *)dynamic + WARPS * Ring::BYTES;
    if (warp < JOBS_HELD && warp < n) hold(held[warp], jobs[warp]);
    __syncthreads();
    int limit = min(n, JOBS_HELD);
    Own::prepare(shared, program.code);

#pragma unroll 1
    for (int at = 0; at < n; at++) {
        // All blocks have ended the job before, whose place is free now.
        auto wait = [&]() {
            if (at > 0) {
                if (warp == 1 && at - 1 + JOBS_HELD < n) hold(held[(at - 1) % JOBS_HELD], jobs[at - 1 + JOBS_HELD]);
                while (threadIdx.x == 0 && arrivals(program.barrier) < at * gridDim.x) pause();
                limit = min(n, at + JOBS_HELD);
            }
            __syncthreads();
        };
        if (held[at % JOBS_HELD].job.kind == KIND_ATTENTION) attend(held[at % JOBS_HELD].job.attention, room, wait);
        else multiply<Own>(program, held, at, limit, ring, shared, room, wait);
        if (at + 1 == n) break;
        __syncthreads();
        if (threadIdx.x == 0) arrive(program.barrier);
    }

    if (!program.barrier) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(program.barrier + 1, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (program.head.best) finish_head(program.head, best_of_warps);
    if (threadIdx.x == 0) program.barrier[0] = program.barrier[1] = 0;
}

#define STEP_KERNEL(NAME, DECODER, DEPTH)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME##_step(const __grid_constant__ Program program) { \
        run_step<DECODER, DEPTH>(program);                                                                          \
    }
