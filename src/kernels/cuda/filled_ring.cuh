// Rings that copiers fill, from Hopper on.
//
// The unit for bulk copies takes no more of them than the memory keeps up with, and whoever asks it for one more stands still. A warp
// that multiplies would stand still with the next weights long in its ring, so that others copy for it:
//
//   copier     |copy ..|copy ..|copy ..|        waits until a slot has been read, and in the unit's queue
//   warp       |read|read|   |read| ...         waits until a slot is full
//
// While blocks wait for values, these few words share that queue with all weights: copies for jobs that have not begun keep it
// short, so that the words come through and the memory still has something to do.
#pragma once

#include "kernels/cuda/ring.cuh"

constexpr int MAX_SLOTS = 5;
// Rings of a copier: eight lanes each, one for a row.
constexpr int RINGS_OF_COPIER = WARPS / COPIERS;
static_assert(RINGS_OF_COPIER * TILE_ROWS == LANES, "a lane for each row");
// A block begins with equal shares of a multiprocessor's 65536 registers, by eights.
static_assert(COPIERS * REGISTERS_OF_COPIER + WARPS * REGISTERS_BESIDE_COPIERS <= (COPIERS + WARPS) * (65536 / LANES / (COPIERS + WARPS) / 8 * 8), "registers");

// What copiers and the other warps of a block tell each other.
struct Copying {
    // Barriers: a phase ends when the slot is full, or when it has been read.
    unsigned long long full[WARPS][MAX_SLOTS], empty[WARPS][MAX_SLOTS];
    int running;        // the job that is multiplied
    int at_hand;        // jobs before this one
    int copied[WARPS];  // for each ring, all jobs before this one
};

// A warp's side of its ring.
struct FilledRing {
    static constexpr int EXTRA_BYTES = 0, BLOCK_THREADS = THREADS + COPIERS * LANES;
    using Shared = Copying;
    uint32_t slots, full, empty;  // the first ones
    int at, count;                // the next slot to read, of how many
    uint32_t is_odd;              // its phase

    static __device__ __forceinline__ int bytes(int n_slots) { return n_slots * ROWS_BYTES; }

    // Once the block has met, copiers may go. `jobs` of them are at hand.
    __device__ __forceinline__ void start(uint32_t rings, int n_slots, int jobs, Copying &copying) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        if (warp >= WARPS) return;
        count = n_slots;
        slots = rings + warp * bytes(count);
        full = shared_address(copying.full[warp]);
        empty = shared_address(copying.empty[warp]);
        at = is_odd = 0;
        if (lane == 0) copying.copied[warp] = 0;
        if (threadIdx.x == 0) copying.running = 0, copying.at_hand = jobs;
        if (lane >= count) return;
        start_barrier(full + 8 * lane, 1);
        start_barrier(empty + 8 * lane, 1);
    }
    // A warp tells copiers that jobs before `limit` are at hand, and awaits that they have copied those before `at`.
    static __device__ __forceinline__ void tell_at_hand(Copying &copying, int limit) {
        __syncwarp();
        if (threadIdx.x % LANES == 0) store_release(&copying.at_hand, limit);
    }
    static __device__ __forceinline__ void await_copied(const Copying &copying, int at) {
        while (load_acquire(&copying.copied[threadIdx.x % WARPS]) < at) pause();
        __syncwarp();
    }
    // Job `at` begins.
    static __device__ __forceinline__ void begin(Copying &copying, int at) {
        if (threadIdx.x == 0) store_release(&copying.running, at);
    }
    // As of rings that warps fill themselves.
    __device__ __forceinline__ void fill(const Held *, int) {}
    __device__ __forceinline__ void leave(int) {}

    // The slot that is read next, once it is full.
    __device__ __forceinline__ uint32_t next(const Held *, int) {
        await_phase(full + 8 * at, is_odd);
        return slots + at * ROWS_BYTES;
    }
    // The slot is read.
    __device__ __forceinline__ void pass() {
        __syncwarp();
        if (threadIdx.x % LANES == 0) arrive_at(empty + 8 * at);
        at++;
        if (at < count) return;
        at = 0;
        is_odd ^= 1;
    }
};

// A copier's work: all weights that the block's jobs read.
__device__ __forceinline__ void copy_weights(const Held *jobs, int n, uint32_t rings, int n_slots, Copying &copying) {
    const int lane = threadIdx.x % LANES, row = lane % TILE_ROWS;
    const int ring = (threadIdx.x / LANES - WARPS) * RINGS_OF_COPIER + lane / TILE_ROWS;
    const uint32_t slots = rings + ring * FilledRing::bytes(n_slots), full = shared_address(copying.full[ring]), empty = shared_address(copying.empty[ring]);
    Source source;
    source.start();
    Rows rows;
    int at = 0;
    // Phases of the next slot: of its copy, and of its being read before. The one before the first counts as ended.
    uint32_t is_odd = 0;
#pragma unroll 1
    while (source.job < n) {
        if (source.walk.steps == 0) {
            source.seek(jobs, load_acquire(&copying.at_hand), ring, rows);
            if (row == 0) store_release(&copying.copied[ring], source.job);
        }
        bool goes = source.walk.steps > 0 && has_ended(empty + 8 * at, is_odd ^ 1);
        // One copy of a ring at a time for jobs that have not begun.
        if (goes && source.job > load_acquire(&copying.running)) goes = has_ended(full + 8 * (at ? at - 1 : n_slots - 1), at ? is_odd : is_odd ^ 1);
        if (!goes) {
            pause();
            continue;
        }
        const int bytes = min(source.walk.steps, STEPS_OF_SLOT) * CHUNK_BYTES;
        if (row == 0) announce(full + 8 * at, rows.count * bytes);
        if (row < rows.count) copy_bulk(slots + at * ROWS_BYTES + row_at(row), rows.from, bytes, full + 8 * at);
        rows.from += bytes;
        source.walk.steps -= bytes / CHUNK_BYTES;
        at++;
        if (at == n_slots) at = 0, is_odd ^= 1;
    }
}
