// Clock stamps of a step, in a build of the step kernel of its own (STEP_TRACED); nothing in the other one. kernels/cuda/trace.rs reads
// them and says what lies between two stamps.
//
//   words   [TRACED_STEPS, blocks, TRACE_HEADER + n_instructions * STAMPS]     the last steps, in turn
//
// The first thread of a block stamps for all: what lies between two barriers is its own warp's.
#pragma once

#include "kernels/cuda/instruction.cuh"

#ifdef STEP_TRACED
constexpr bool IS_TRACED = true;
#else
constexpr bool IS_TRACED = false;
#endif

constexpr int TRACED_STEPS = 8, TRACE_HEADER = 16, STAMPS = 8;

// Clocks at which a block begins an instruction, has its first inputs, has all of them as its product reads them; its first warp has
// multiplied, all warps have, the results are stored. The last stamp counts clocks: those for which the first warp waited for weights.
enum Stamp { STAMP_BEGUN, STAMP_READY, STAMP_READ, STAMP_MULTIPLIED, STAMP_SUMMED, STAMP_STORED, STAMP_WEIGHTS };

// Words of a header: clocks, but for the time (two words) at the tick, the step and the multiprocessor.
enum TraceHeader { TRACE_ENTERED, TRACE_TICK, TRACE_TICK_LOW, TRACE_TICK_HIGH, TRACE_PREPARED, TRACE_DONE, TRACE_ENDED, TRACE_STEP, TRACE_MULTIPROCESSOR };

// This block's words of this step, in shared memory; null where there are none.
__device__ __forceinline__ uint32_t *&trace_words() {
    __shared__ uint32_t *words;
    return words;
}

__device__ __forceinline__ void trace_header(TraceHeader at, uint32_t value) {
    if (!IS_TRACED || threadIdx.x != 0) return;
    if (uint32_t *words = trace_words()) words[at] = value;
}

// The first thread calls it before any other use, alone. It waits for the global timer to tick, so that clocks of different
// multiprocessors can be compared.
__device__ __forceinline__ void start_trace(const Program &program) {
    if (!IS_TRACED || threadIdx.x != 0) return;
    const uint32_t entered = clock_low();
    trace_words() = nullptr;
    if (!program.trace) return;
    const uint32_t step = load_relaxed(program.counters + 1);
    const long long of_block = TRACE_HEADER + program.n_instructions * STAMPS;
    trace_words() = program.trace + ((long long)(step % TRACED_STEPS) * gridDim.x + blockIdx.x) * of_block;
    const unsigned long long before = global_ns();
    unsigned long long tick;
    do tick = global_ns();
    while (tick == before);
    trace_header(TRACE_TICK, clock_low());
    trace_header(TRACE_ENTERED, entered);
    trace_header(TRACE_TICK_LOW, (uint32_t)tick);
    trace_header(TRACE_TICK_HIGH, (uint32_t)(tick >> 32));
    trace_header(TRACE_STEP, step);
    trace_header(TRACE_MULTIPROCESSOR, multiprocessor());
}

__device__ __forceinline__ void stamp(int at, Stamp which) {
    if (!IS_TRACED || threadIdx.x != 0) return;
    const uint32_t now = clock_low();
    if (uint32_t *words = trace_words()) words[TRACE_HEADER + at * STAMPS + which] = now;
}

// All stamps from `first` on are now: the block has no part in the rest of the instruction.
__device__ __forceinline__ void stamp_rest(int at, Stamp first) {
    if (!IS_TRACED || threadIdx.x != 0) return;
    const uint32_t now = clock_low();
    uint32_t *words = trace_words();
    if (!words) return;
    for (int which = first; which <= STAMP_STORED; which++) words[TRACE_HEADER + at * STAMPS + which] = now;
    words[TRACE_HEADER + at * STAMPS + STAMP_WEIGHTS] = 0;
}

// Clocks that the first warp spends in waits for stages. It times those for the first stage of its pipeline, as if the others were as long: timing
// all of them takes some percent of an nf4 step.
struct WaitClock {
    uint32_t clocks = 0;
    template <class Pipeline, class Wait>
    __device__ __forceinline__ auto around(const Pipeline &pipeline, Wait wait) {
        if (!IS_TRACED || threadIdx.x >= LANES || pipeline.at != 0) return wait();
        const uint32_t before = clock_low();
        const auto result = wait();
        clocks += pipeline.depth() * (clock_low() - before);
        return result;
    }
    __device__ __forceinline__ void store(int at) const {
        if (!IS_TRACED || threadIdx.x != 0) return;
        if (uint32_t *words = trace_words()) words[TRACE_HEADER + at * STAMPS + STAMP_WEIGHTS] = clocks;
    }
};
