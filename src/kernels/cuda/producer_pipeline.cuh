// Pipelines that producer warps fill, from Hopper on.
//
// The bulk-copy unit accepts no more copies than the memory keeps up with, and a warp that issues one more stalls. A warp that multiplies
// would stall although its pipeline is full, so that producer warps issue the copies:
//
//   producer   |copy ..|copy ..|copy ..|        waits for an empty stage, and for the unit's queue
//   consumer   |read|read|   |read| ...         waits for a full stage
//
// The words that blocks poll share that queue with the weights. For instructions that have not begun a pipeline has one copy in flight, so
// that the queue stays short and the memory stays busy.
#pragma once

#include "kernels/cuda/pipeline.cuh"

constexpr int MAX_STAGES = 5;
// Pipelines of a producer warp: eight lanes each, one for a row.
constexpr int PIPELINES_PER_PRODUCER = WARPS / PRODUCER_WARPS;
static_assert(PIPELINES_PER_PRODUCER * TILE_ROWS == LANES, "a lane for each row");
// A block starts with equal shares of a multiprocessor's 65536 registers, in multiples of eight.
static_assert(PRODUCER_WARPS * PRODUCER_REGISTERS + WARPS * CONSUMER_REGISTERS <= (PRODUCER_WARPS + WARPS) * (65536 / LANES / (PRODUCER_WARPS + WARPS) / 8 * 8), "registers");

// State that producer warps and consumer warps of a block share.
struct ProducerShared {
    // Barriers: a phase completes when the stage is full, or when it has been read.
    unsigned long long full[WARPS][MAX_STAGES], empty[WARPS][MAX_STAGES];
    int running;        // the instruction that is multiplied
    int ready;        // instructions before this one are in shared memory
    int copied[WARPS];  // for each pipeline: the weights of all instructions before this one
};

// A consumer warp's side of its pipeline.
struct ProducerPipeline {
    static constexpr int EXTRA_BYTES = 0, BLOCK_THREADS = THREADS + PRODUCER_WARPS * LANES;
    using Shared = ProducerShared;
    uint32_t stages, full, empty;  // the first ones
    int at, count;                // the next stage to read, of how many
    uint32_t is_odd;              // its phase

    static __device__ __forceinline__ int bytes(int n_stages) { return n_stages * ROWS_BYTES; }
    __device__ __forceinline__ int depth() const { return count; }

    // Producer warps may start behind the next barrier of the block. `instructions` of them are ready.
    __device__ __forceinline__ void start(uint32_t pipelines, int n_stages, int instructions, ProducerShared &shared_pipeline) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        if (warp >= WARPS) return;
        count = n_stages;
        stages = pipelines + warp * bytes(count);
        full = shared_address(shared_pipeline.full[warp]);
        empty = shared_address(shared_pipeline.empty[warp]);
        at = is_odd = 0;
        if (lane == 0) shared_pipeline.copied[warp] = 0;
        if (threadIdx.x == 0) shared_pipeline.running = 0, shared_pipeline.ready = instructions;
        if (lane >= count) return;
        mbarrier_init(full + 8 * lane, 1);
        mbarrier_init(empty + 8 * lane, 1);
    }
    // One warp publishes that instructions before `limit` are ready, and waits until the weights of those before `at` are copied.
    static __device__ __forceinline__ void set_instructions_ready(ProducerShared &shared_pipeline, int limit) {
        __syncwarp();
        if (threadIdx.x % LANES == 0) store_release(&shared_pipeline.ready, limit);
    }
    static __device__ __forceinline__ void wait_copied(const ProducerShared &shared_pipeline, int at) {
        while (load_acquire(&shared_pipeline.copied[threadIdx.x % WARPS]) < at) backoff();
        __syncwarp();
    }
    // Instruction `at` begins.
    static __device__ __forceinline__ void begin(ProducerShared &shared_pipeline, int at) {
        if (threadIdx.x == 0) store_release(&shared_pipeline.running, at);
    }
    // The interface of SelfPipeline.
    __device__ __forceinline__ void fill(const ResidentInstruction *, int) {}
    __device__ __forceinline__ void leave(int) {}

    // Waits for the stage that is read next.
    __device__ __forceinline__ uint32_t next(const ResidentInstruction *, int) {
        mbarrier_wait(full + 8 * at, is_odd);
        return stages + at * ROWS_BYTES;
    }
    // Releases the stage that was read.
    __device__ __forceinline__ void pass() {
        __syncwarp();
        if (threadIdx.x % LANES == 0) mbarrier_arrive(empty + 8 * at);
        at++;
        if (at < count) return;
        at = 0;
        is_odd ^= 1;
    }
};

// A producer warp: copies all weights that the block's instructions read.
__device__ __forceinline__ void copy_weights(const ResidentInstruction *instructions, int n, uint32_t pipelines, int n_stages, ProducerShared &shared_pipeline) {
    const int lane = threadIdx.x % LANES, row = lane % TILE_ROWS;
    const int pipeline = (threadIdx.x / LANES - WARPS) * PIPELINES_PER_PRODUCER + lane / TILE_ROWS;
    const uint32_t stages = pipelines + pipeline * ProducerPipeline::bytes(n_stages), full = shared_address(shared_pipeline.full[pipeline]), empty = shared_address(shared_pipeline.empty[pipeline]);
    CopyCursor cursor;
    cursor.start();
    TileRows rows;
    int at = 0;
    // The phase of the next stage; the one before the first counts as completed.
    uint32_t is_odd = 0;
#pragma unroll 1
    while (cursor.index < n) {
        if (cursor.iterator.steps == 0) {
            cursor.seek(instructions, load_acquire(&shared_pipeline.ready), pipeline, rows);
            if (row == 0) store_release(&shared_pipeline.copied[pipeline], cursor.index);
        }
        bool goes = cursor.iterator.steps > 0 && mbarrier_has_completed(empty + 8 * at, is_odd ^ 1);
        // One copy in flight for instructions that have not begun.
        if (goes && cursor.index > load_acquire(&shared_pipeline.running)) goes = mbarrier_has_completed(full + 8 * (at ? at - 1 : n_stages - 1), at ? is_odd : is_odd ^ 1);
        if (!goes) {
            backoff();
            continue;
        }
        const int bytes = min(cursor.iterator.steps, STEPS_PER_STAGE) * CHUNK_BYTES;
        if (row == 0) mbarrier_arrive_expect(full + 8 * at, rows.count * bytes);
        if (row < rows.count) copy_bulk(stages + at * ROWS_BYTES + row_at(row), rows.from, bytes, full + 8 * at);
        rows.from += bytes;
        cursor.iterator.steps -= bytes / CHUNK_BYTES;
        at++;
        if (at == n_stages) at = 0, is_odd ^= 1;
    }
}
