// Jobs near the running one, and the weights that each warp copies ahead, across the ends of jobs.
//
// Work: a block takes neighbouring rows, of all parts in turn, and every block as many but one. A tile is 8 rows; a step is
// one chunk of a tile. All steps over one matrix in one tile are a run, and the block's warps split the steps of all its
// runs evenly, wherever one begins or ends:
//
//   steps    |run 0 ....|run 1 ....|run 2 ....|
//   warps    |0 ..|1 ..|2 ..|3 ..|4 ..|5 ..|6 .|
//
// Weights depend on nothing, so that a warp that has come to the end of its steps already copies those of the next jobs
// while it waits for the other blocks: the memory reads on.
#pragma once

#include "kernels/cuda/job.cuh"

constexpr int TILE_ROWS = 8;
constexpr int CHUNK_BYTES = 128;
// Jobs that are at hand: the running one and those whose weights may be copied ahead. Turing has 64 KB for everything.
#if __CUDA_ARCH__ >= 800
constexpr int JOBS_HELD = 8;
#else
constexpr int JOBS_HELD = 4;
#endif
constexpr int JOB_WORDS = sizeof(Job) / sizeof(uint32_t);

// A block's part of a matrix job, and where its warps enter.
struct Share {
    int first_row, rows;  // of all parts, counted through
    int tiles, runs;      // of a tile: 1 or 2
    int chunks[2];        // of a run, first and second of a tile
    int steps, of_warp;
    int first_run[WARPS];
};

struct Held {
    Job job;
    Share share;
};

__device__ __forceinline__ int tile_of(const Share &share, int run) { return run >> (share.runs - 1); }
__device__ __forceinline__ int is_second(const Share &share, int run) { return run & (share.runs - 1); }

// First step of a run.
__device__ __forceinline__ int first_of(const Share &share, int run) {
    int of_tile = share.chunks[0] + share.chunks[1];
    return tile_of(share, run) * of_tile + (is_second(share, run) ? share.chunks[0] : 0);
}

// Where a warp enters a run, and how many steps it has there: none, or fewer, behind its last one.
__device__ __forceinline__ int chunk_of(const Share &share, int run, int warp) {
    return max(0, warp * share.of_warp - first_of(share, run));
}
__device__ __forceinline__ int steps_of(const Share &share, int run, int warp) {
    int first = first_of(share, run), begin = warp * share.of_warp, end = min(begin + share.of_warp, share.steps);
    return min(first + share.chunks[is_second(share, run)], end) - max(first, begin);
}

__device__ __forceinline__ int part_of(const Matvec &job, int row) {
    int part = 0;
    for (int i = 1; i < MAX_PARTS; i++)
        if (row >= job.parts[i].first_row) part = i;
    return part;
}

// Of the part that a run reads in row `in_block` of the block; rows behind the last one count as that.
__device__ __forceinline__ const Part &part_at(const Held &held, int run, int in_block, int &row) {
    const Matvec &job = held.job.matvec;
    row = held.share.first_row + min(in_block, held.share.rows - 1);
    const Part &part = job.parts[job.mode == MODE_PARTS ? part_of(job, row) : run];
    if (job.mode == MODE_PARTS) row -= part.first_row;
    return part;
}

// One warp brings a job near and finds the block's share of it.
__device__ __forceinline__ void hold(Held &held, const Job &job) {
    const int lane = threadIdx.x % LANES;
    uint32_t words[(JOB_WORDS + LANES - 1) / LANES];
#pragma unroll
    for (int at = lane, i = 0; at < JOB_WORDS; at += LANES, i++) words[i] = ((const uint32_t *)&job)[at];
#pragma unroll
    for (int at = lane, i = 0; at < JOB_WORDS; at += LANES, i++) ((uint32_t *)&held.job)[at] = words[i];
    __syncwarp();
    if (held.job.kind == KIND_ATTENTION) return;
    const Matvec &matvec = held.job.matvec;
    const unsigned rows = matvec.rows, block = blockIdx.x, blocks = gridDim.x;
    const int first_row = (int)(rows * block / blocks), behind = (int)(rows * (block + 1) / blocks);
    const int runs = matvec.mode == MODE_PARTS ? 1 : 2, tiles = (behind - first_row + TILE_ROWS - 1) / TILE_ROWS;
    const int chunks_0 = matvec.inputs[0].chunks;
    const int chunks_1 = runs == 1 ? 0 : matvec.mode == MODE_JOINED ? matvec.inputs[1].chunks : chunks_0;
    const int of_tile = chunks_0 + chunks_1, steps = tiles * of_tile, of_warp = (steps + WARPS - 1) / WARPS;
    if (lane < WARPS) {
        int begin = lane * of_warp, tile = begin / of_tile;
        held.share.first_run[lane] = tile * runs + (begin - tile * of_tile >= chunks_0 ? 1 : 0);
    }
    if (lane == 0) {
        held.share.first_row = first_row;
        held.share.rows = behind - first_row;
        held.share.tiles = tiles;
        held.share.runs = runs;
        held.share.chunks[0] = chunks_0;
        held.share.chunks[1] = chunks_1;
        held.share.steps = steps;
        held.share.of_warp = of_warp;
    }
}

// Steps that are copied in one go, side by side: rows of 256 bytes keep the unit for bulk copies busy, rows of 128 do not.
constexpr int STEPS_OF_SLOT = HAS_BULK_COPIES ? 2 : 1;

// Slots that each warp copies ahead, as shared memory allows it beside what a job needs: kernels with tables have fewer.
// kernels/cuda/program.rs counts the same.
#if __CUDA_ARCH__ >= 900
constexpr int SLOTS = 3, SLOTS_BESIDE_TABLES = 3;
#elif __CUDA_ARCH__ == 800
constexpr int SLOTS = 6, SLOTS_BESIDE_TABLES = 4;
#elif __CUDA_ARCH__ >= 800
constexpr int SLOTS = 3, SLOTS_BESIDE_TABLES = 2;
#else
constexpr int SLOTS = 1, SLOTS_BESIDE_TABLES = 1;
#endif

// How steps lie in their slot: even rows, then odd ones half a line further on, so that lanes that read the same half of
// neighbouring rows meet in no bank.
constexpr int ROW_BYTES = STEPS_OF_SLOT * CHUNK_BYTES;
constexpr int ROWS_BYTES = TILE_ROWS * ROW_BYTES + CHUNK_BYTES / 2;
__device__ __forceinline__ uint32_t row_at(int row) { return row / 2 * ROW_BYTES + row % 2 * (TILE_ROWS / 2 * ROW_BYTES + CHUNK_BYTES / 2); }

// A warp's copies: DEPTH slots in a ring. `Place` is what the kernel's own format needs for a step beside the weights: each lane
// copies WORDS words, which lie behind them.
template <class Place, int DEPTH>
struct Ring {
    static constexpr int EXTRA_BYTES = 4 * LANES * Place::WORDS;  // of a step
    static constexpr int SLOT_BYTES = ROWS_BYTES + STEPS_OF_SLOT * EXTRA_BYTES;
    static constexpr int BYTES = DEPTH * SLOT_BYTES;
    // Arrivals of a slot's barrier.
    static constexpr int ARRIVALS = 1 + (Place::WORDS ? LANES : 0);

    uint32_t slots, barriers;  // the first ones
    int at, ahead;             // the next slot to read, and how many are copied from there on
    uint32_t is_odd;           // the phase of its barrier
    int job, run, steps;       // of the source: where it is, and steps left there
    const uint8_t *from[2];    // of the lane's row, or two where lanes copy by themselves
    Place place;
    int has;                   // bits: first row, second row (they are not behind the block's last one), place; rows from bit 8 on

    // `room` is the ring's shared memory, `of_warp` its barriers.
    __device__ __forceinline__ void start(uint32_t room, uint32_t of_warp) {
        slots = room;
        barriers = of_warp;
        at = ahead = job = steps = 0;
        is_odd = 0;
        run = -1;
        const int lane = threadIdx.x % LANES;
        if (lane < DEPTH) start_barrier(barriers + 8 * lane, ARRIVALS);
    }

    __device__ __forceinline__ uint32_t slot(int index) const { return slots + index * SLOT_BYTES; }

    // The next steps of jobs before `limit`; without any left, none.
    __device__ __forceinline__ void seek(const Held *jobs, int limit) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#pragma unroll 1
        for (; job < limit; job++, run = -1) {
            const Held &held = jobs[job % JOBS_HELD];
            if (held.job.kind == KIND_ATTENTION) continue;
            run = run < 0 ? held.share.first_run[warp] : run + 1;
            steps = max(0, steps_of(held.share, run, warp));
            if (steps == 0) continue;
            const Matvec &matvec = held.job.matvec;
            const int second = is_second(held.share, run), input = matvec.mode == MODE_JOINED ? second : 0;
            const int chunk = chunk_of(held.share, run, warp), first = tile_of(held.share, run) * TILE_ROWS;
            const long long stride = input ? matvec.stride_1 : matvec.stride;
            // Each lane finds one of the rows; whoever copies it asks that lane.
            int row;
            const Part &part = part_at(held, second, first + lane % TILE_ROWS, row);
            const uint8_t *begin = part.weight + row * stride + chunk * CHUNK_BYTES;
            const int rows = min(TILE_ROWS, held.share.rows - first);
            if (HAS_BULK_COPIES) {
                from[0] = begin;
                has = (lane < rows) | rows << 8;
            } else {
                has = 0;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int of_tile = lane / 8 + 4 * i;
                    from[i] = (const uint8_t *)__shfl_sync(ALL_LANES, (unsigned long long)begin, of_tile) + lane % 8 * 16;
                    has |= (of_tile < rows) << i;
                }
            }
            if (!Place::WORDS || held.job.kind != KIND_OWN) return;
            has |= 4;
            const int asked = Place::row_of(lane), index = __shfl_sync(ALL_LANES, (int)(&part - matvec.parts), asked);
            place.set(matvec.parts[index], matvec.inputs[input].k, __shfl_sync(ALL_LANES, row, asked), chunk);
            return;
        }
    }

    // Job `done` is read to its end: its place among the held ones may be taken.
    __device__ __forceinline__ void leave(int done) {
        if (job > done) return;
        job = done + 1;
        run = -1;
    }

    // Copies the next steps to a slot, as many as it holds or are left, at least one.
    __device__ __forceinline__ void copy(int index) {
        const int lane = threadIdx.x % LANES, n = min(steps, STEPS_OF_SLOT);
        const uint32_t to = slot(index), barrier = barriers + 8 * index;
        steps -= n;
        // All lanes have read what was there.
        __syncwarp();
        if (HAS_BULK_COPIES) {
            if (lane == 0) announce(barrier, (has >> 8) * n * CHUNK_BYTES);
            if (has & 1) copy_bulk(to + row_at(lane), from[0], n * CHUNK_BYTES, barrier);
            from[0] += n * CHUNK_BYTES;
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                copy_streaming(to + row_at(lane / 8 + 4 * i) + lane % 8 * 16, from[i], has & 1 << i);
                from[i] += CHUNK_BYTES;
            }
        }
        if constexpr (Place::WORDS > 0) {
#pragma unroll
            for (int i = 0; i < STEPS_OF_SLOT; i++)
                if (has & 4 && i < n) place.copy(to + ROWS_BYTES + i * EXTRA_BYTES);
            arrive_behind_copies(barrier);
        }
    }

    // Copies until the ring is full or nothing is left. Where lanes copy by themselves, each copied slot ends a batch, and each
    // missing one an empty batch, so that DEPTH - 1 batches always follow the one that is waited for.
    __device__ __forceinline__ void fill(const Held *jobs, int limit) {
        int to = at + ahead, missing = DEPTH - ahead;
        if (to >= DEPTH) to -= DEPTH;
#pragma unroll 1
        for (;;) {
            if (steps == 0) seek(jobs, limit);
            if (missing == 0) break;
            if (steps > 0) {
                copy(to);
                to = to + 1 == DEPTH ? 0 : to + 1;
                ahead++;
            }
            if (!HAS_BULK_COPIES) end_copies();
            missing--;
        }
    }

    // The slot that is read next, once it is there.
    __device__ __forceinline__ uint32_t await() const {
        if (HAS_BULK_COPIES) {
            await_phase(barriers + 8 * at, is_odd);
        } else {
            await_copies<DEPTH - 1>();
            // Lanes read what others have copied.
            __syncwarp();
        }
        return slot(at);
    }

    // The slot is read; the next steps take its place if `refill`.
    __device__ __forceinline__ void pass(bool refill) {
        if (refill) copy(at);
        if (!HAS_BULK_COPIES) end_copies();
        at++;
        if (at < DEPTH) return;
        at = 0;
        is_odd ^= 1;
    }
};
