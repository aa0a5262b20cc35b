// Rings that warps fill themselves: each copies the next steps to a slot as soon as it has read it.
#pragma once

#include "kernels/cuda/ring.cuh"

// `Place` is what the kernel's own format needs for a step beside the weights: each lane copies WORDS words, which lie behind them.
template <class Place, int DEPTH>
struct OwnRing {
    static constexpr int EXTRA_BYTES = 4 * LANES * Place::WORDS;  // of a step
    static constexpr int SLOT_BYTES = ROWS_BYTES + STEPS_OF_SLOT * EXTRA_BYTES;
    static constexpr int BLOCK_THREADS = THREADS;
    struct Shared {};
    uint32_t slots;          // the first one
    uint32_t own;            // where the lane's first 16 bytes lie in a slot
    int at, ahead;           // the next slot to read, and how many are copied from there on
    Source source;
    const uint8_t *from[2];  // two rows that the lane copies 16 bytes of
    Place place;
    int has;                 // bits: first row, second row (they are not behind the block's last one), place

    static __device__ __forceinline__ int bytes(int) { return DEPTH * SLOT_BYTES; }
    // As of rings that copiers fill.
    static __device__ __forceinline__ void tell_at_hand(Shared &, int) {}
    static __device__ __forceinline__ void await_copied(const Shared &, int) {}
    static __device__ __forceinline__ void begin(Shared &, int) {}

    __device__ __forceinline__ void start(uint32_t rings, int, int, Shared &) {
        slots = rings + threadIdx.x / LANES * bytes(0);
        own = row_at(threadIdx.x % LANES / 8) + threadIdx.x % 8 * 16;
        at = ahead = 0;
        source.start();
    }

    __device__ __forceinline__ void seek(const Held *jobs, int limit) {
        Rows rows = {};
        if (!source.seek(jobs, limit, threadIdx.x / LANES, rows)) return;
        const int lane = threadIdx.x % LANES;
        // Each lane has found one of the rows; whoever copies it asks that lane.
        has = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int of_tile = lane / 8 + 4 * i;
            from[i] = (const uint8_t *)__shfl_sync(ALL_LANES, (unsigned long long)rows.from, of_tile) + lane % 8 * 16;
            has |= (of_tile < rows.count) << i;
        }
        const Job &job = jobs[source.job % JOBS_HELD].job;
        if (!Place::WORDS || job.kind != KIND_OWN) return;
        has |= 4;
        const int asked = Place::row_of(lane), index = __shfl_sync(ALL_LANES, (int)(rows.part - job.matvec.parts), asked);
        place.set(job.matvec.parts[index], rows.k, __shfl_sync(ALL_LANES, rows.row, asked), source.walk.chunk);
    }

    // Job `done` is read to its end: its place among the held ones may be taken.
    __device__ __forceinline__ void leave(int done) {
        if (source.job > done) return;
        source.job = done + 1;
        source.walk.run = -1;
    }

    // Copies the next steps to a slot, as many as it holds or are left, at least one.
    __device__ __forceinline__ void copy(int index) {
        const int n = min(source.walk.steps, STEPS_OF_SLOT);
        const uint32_t to = slots + index * SLOT_BYTES;
        source.walk.steps -= n;
        // All lanes have read what was there.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int step = 0; step < STEPS_OF_SLOT; step++)
                copy_streaming(to + own + 2 * i * ROW_BYTES + step * CHUNK_BYTES, from[i] + step * CHUNK_BYTES, step < n ? has & 1 << i : 0);
            from[i] += n * CHUNK_BYTES;
        }
#pragma unroll
        for (int i = 0; i < (Place::WORDS ? STEPS_OF_SLOT : 0); i++)
            if (has & 4 && i < n) place.copy(to + ROWS_BYTES + i * EXTRA_BYTES);
    }

    // Copies until the ring is full or nothing is left. Each copied slot ends a batch, and each missing one an empty batch, so
    // that DEPTH - 1 batches always follow the one that is waited for.
    __device__ __forceinline__ void fill(const Held *jobs, int limit) {
        int to = at + ahead, missing = DEPTH - ahead;
        if (to >= DEPTH) to -= DEPTH;
#pragma unroll 1
        for (;;) {
            if (source.walk.steps == 0) seek(jobs, limit);
            if (missing == 0) break;
            if (source.walk.steps > 0) {
                copy(to);
                to = to + 1 == DEPTH ? 0 : to + 1;
                ahead++;
            }
            end_copies();
            missing--;
        }
    }

    // The slot that is read next, once it is there.
    __device__ __forceinline__ uint32_t next(const Held *jobs, int limit) {
        if (source.walk.steps == 0 || ahead < DEPTH) fill(jobs, limit);
        await_copies<DEPTH - 1>();
        // Lanes read what others have copied.
        __syncwarp();
        return slots + at * SLOT_BYTES;
    }

    // The slot is read; the next steps take its place.
    __device__ __forceinline__ void pass() {
        if (source.walk.steps > 0) copy(at);
        else ahead--;
        end_copies();
        at++;
        if (at == DEPTH) at = 0;
    }
};
