// Jobs near the running one, and the weights that each warp copies ahead, across the ends of jobs.
//
// Work: a block takes neighbouring rows, of all parts in turn. A tile is 8 of them, or as many less as makes a block's tiles
// equal but for one row; a step is one chunk of a tile. All steps over one matrix in one tile are a run, and the block's warps
// split the steps of all its runs evenly, wherever one begins or ends:
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

// A block's part of a job, and where its warps enter. Without steps for attention.
struct Share {
    int first_row, rows;       // of all parts, counted through
    int tiles, of_tile, more;  // rows of a tile, and how many of the first ones have one more
    int runs;                  // of a tile: 1 or 2
    int chunks[2];             // of a run, first and second of a tile
    int steps, of_warp;
    float per_of_warp;  // 1 / of_warp
    int enter_run[WARPS], enter_chunk[WARPS];
};

struct Held {
    Job job;
    Share share;
};

__device__ __forceinline__ int tile_of(const Share &share, int run) { return run >> (share.runs - 1); }
__device__ __forceinline__ int is_second(const Share &share, int run) { return run & (share.runs - 1); }

// A warp's way through its steps of a job, run by run. Whoever copies weights and whoever reads them go the same.
struct Walk {
    int run;  // negative where the job has not been entered
    int second, chunk;
    int steps;  // of the run, from that chunk on: none behind the last run
    int left;   // of the job, behind these
    __device__ __forceinline__ void next(const Share &share) {
        if (run < 0) {
            const int warp = threadIdx.x / LANES;
            run = share.enter_run[warp];
            chunk = share.enter_chunk[warp];
            left = min(share.of_warp, share.steps - warp * share.of_warp);
        } else {
            run++;
            chunk = 0;
        }
        steps = 0;
        if (left <= 0) return;
        second = is_second(share, run);
        steps = min(left, share.chunks[second] - chunk);
        left -= steps;
    }
};

// a / b for `per_b` = 1 / b, where the quotient's rounding is off by one at most.
__device__ __forceinline__ int quotient(int a, int b, float per_b) {
    const int near = (int)((float)a * per_b), rest = a - near * b;
    return near + (rest >= b) - (rest < 0);
}

__device__ __forceinline__ int part_of(const Matvec &job, int row) {
    int part = 0;
    for (int i = 1; i < MAX_PARTS; i++)
        if (row >= job.parts[i].first_row) part = i;
    return part;
}

// Rows of a tile, and the first one.
__device__ __forceinline__ int rows_of(const Share &share, int tile) { return share.of_tile + (tile < share.more); }
__device__ __forceinline__ int first_row_of(const Share &share, int tile) { return share.first_row + tile * share.of_tile + min(tile, share.more); }

// Of the part that a run reads in row `row` of all parts, and where there.
__device__ __forceinline__ const Part &part_at(const Held &held, int second, int &row) {
    const Matvec &job = held.job.matvec;
    const Part &part = job.parts[job.mode == MODE_PARTS ? part_of(job, row) : second];
    if (job.mode == MODE_PARTS) row -= part.first_row;
    return part;
}

// One warp brings a job near, in the background where the chip can.
__device__ __forceinline__ void fetch(Held &held, const Job &job) {
#pragma unroll
    for (int at = threadIdx.x % LANES; at < JOB_WORDS; at += LANES)
        copy_word(shared_address((uint32_t *)&held.job + at), (const uint32_t *)&job + at);
}

// The same warp awaits the job and finds the block's share of it.
__device__ __forceinline__ void find_share(Held &held) {
    const int lane = threadIdx.x % LANES;
    await_all_copies();
    __syncwarp();
    Share &share = held.share;
    if (held.job.kind == KIND_ATTENTION) {
        if (lane == 0) share.steps = share.of_warp = 0;
        return;
    }
    const Matvec &matvec = held.job.matvec;
    const Deal &first_deal = matvec.deals[0];
    const bool is_first = (int)blockIdx.x < first_deal.blocks;
    const Deal &deal = matvec.deals[is_first ? 0 : 1];
    const int block = blockIdx.x - (is_first ? 0 : first_deal.blocks), with_more = block - (deal.blocks - deal.more);
    const int rows = deal.of_block + (with_more >= 0 ? 1 : 0), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int chunks_0 = matvec.inputs[0].chunks;
    const int chunks_1 = matvec.mode == MODE_PARTS ? 0 : matvec.mode == MODE_JOINED ? matvec.inputs[1].chunks : chunks_0;
    const int of_tile = chunks_0 + chunks_1, steps = tiles * of_tile, of_warp = (steps + WARPS - 1) / WARPS;
    if (lane < WARPS) {
        const int begin = lane * of_warp, tile = quotient(begin, of_tile, __frcp_rn((float)of_tile)), in_tile = begin - tile * of_tile;
        const bool second = in_tile >= chunks_0;
        share.enter_run[lane] = tile * (chunks_1 ? 2 : 1) + second;
        share.enter_chunk[lane] = in_tile - (second ? chunks_0 : 0);
    }
    if (lane == 0) {
        share.first_row = block * deal.of_block + max(0, with_more) + (is_first ? 0 : first_deal.blocks * first_deal.of_block + first_deal.more);
        share.rows = rows;
        share.tiles = tiles;
        share.of_tile = tiles ? quotient(rows, tiles, __frcp_rn((float)tiles)) : 0;
        share.more = rows - share.of_tile * tiles;
        share.runs = chunks_1 ? 2 : 1;
        share.chunks[0] = chunks_0;
        share.chunks[1] = chunks_1;
        share.steps = steps;
        share.of_warp = of_warp;
        share.per_of_warp = __frcp_rn((float)of_warp);
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
// copies WORDS words, which lie behind them. IS_BULK: a unit of its own copies the rows.
template <class Place, int DEPTH, bool IS_BULK>
struct Ring {
    static constexpr int SLOTS_AHEAD = DEPTH;
    static constexpr int EXTRA_BYTES = 4 * LANES * Place::WORDS;  // of a step
    static constexpr int SLOT_BYTES = ROWS_BYTES + STEPS_OF_SLOT * EXTRA_BYTES;
    static constexpr int BYTES = DEPTH * SLOT_BYTES;
    // Arrivals of a slot's barrier.
    static constexpr int ARRIVALS = 1 + (Place::WORDS ? LANES : 0);

    uint32_t slots, barriers;  // the first ones
    uint32_t own;              // where the lane's first 16 bytes lie in a slot, where lanes copy by themselves
    int at, ahead;             // the next slot to read, and how many are copied from there on
    uint32_t is_odd;           // the phase of its barrier
    int job;                   // of the source
    Walk source;               // there; its steps are those not copied yet
    const uint8_t *from[2];    // of the lane's row, or two where lanes copy by themselves
    Place place;
    int has;                   // bits: first row, second row (they are not behind the block's last one), place; rows from bit 8 on

    // `room` is the ring's shared memory, `of_warp` its barriers.
    __device__ __forceinline__ void start(uint32_t room, uint32_t of_warp) {
        slots = room;
        barriers = of_warp;
        own = row_at(threadIdx.x % LANES / 8) + threadIdx.x % 8 * 16;
        at = ahead = job = source.steps = 0;
        is_odd = 0;
        source.run = -1;
        const int lane = threadIdx.x % LANES;
        if (IS_BULK && lane < DEPTH) start_barrier(barriers + 8 * lane, ARRIVALS);
    }

    __device__ __forceinline__ uint32_t slot(int index) const { return slots + index * SLOT_BYTES; }

    // The next steps of jobs before `limit`; without any left, none.
    __device__ __forceinline__ void seek(const Held *jobs, int limit) {
        const int lane = threadIdx.x % LANES;
#pragma unroll 1
        for (; job < limit; job++, source.run = -1) {
            const Held &held = jobs[job % JOBS_HELD];
            source.next(held.share);
            if (source.steps == 0) continue;
            const Matvec &matvec = held.job.matvec;
            const int second = source.second, input = matvec.mode == MODE_JOINED ? second : 0;
            const int tile = tile_of(held.share, source.run), rows = rows_of(held.share, tile);
            const long long stride = input ? matvec.stride_1 : matvec.stride;
            // Each lane finds one of the rows; whoever copies it asks that lane.
            int row = first_row_of(held.share, tile) + min(lane % TILE_ROWS, rows - 1);
            const Part &part = part_at(held, second, row);
            const uint8_t *begin = part.weight + row * stride + source.chunk * CHUNK_BYTES;
            if (IS_BULK) {
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
            place.set(matvec.parts[index], matvec.inputs[input].k, __shfl_sync(ALL_LANES, row, asked), source.chunk);
            return;
        }
    }

    // Job `done` is read to its end: its place among the held ones may be taken.
    __device__ __forceinline__ void leave(int done) {
        if (job > done) return;
        job = done + 1;
        source.run = -1;
    }

    // Copies the next steps to a slot, as many as it holds or are left, at least one.
    __device__ __forceinline__ void copy(int index) {
        const int lane = threadIdx.x % LANES, n = min(source.steps, STEPS_OF_SLOT);
        const uint32_t to = slot(index), barrier = barriers + 8 * index;
        source.steps -= n;
        // All lanes have read what was there.
        __syncwarp();
        if (IS_BULK) {
            if (lane == 0) announce(barrier, (has >> 8) * n * CHUNK_BYTES);
            if (has & 1) copy_bulk(to + row_at(lane), from[0], n * CHUNK_BYTES, barrier);
            from[0] += n * CHUNK_BYTES;
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int step = 0; step < STEPS_OF_SLOT; step++)
                    copy_streaming(to + own + 2 * i * ROW_BYTES + step * CHUNK_BYTES, from[i] + step * CHUNK_BYTES, step < n ? has & 1 << i : 0);
                from[i] += n * CHUNK_BYTES;
            }
        }
        if constexpr (Place::WORDS > 0) {
#pragma unroll
            for (int i = 0; i < STEPS_OF_SLOT; i++)
                if (has & 4 && i < n) place.copy(to + ROWS_BYTES + i * EXTRA_BYTES);
            if (IS_BULK) arrive_behind_copies(barrier);
        }
    }

    // Copies until the ring is full or nothing is left. Where lanes copy by themselves, each copied slot ends a batch, and each
    // missing one an empty batch, so that DEPTH - 1 batches always follow the one that is waited for.
    __device__ __forceinline__ void fill(const Held *jobs, int limit) {
        int to = at + ahead, missing = DEPTH - ahead;
        if (to >= DEPTH) to -= DEPTH;
#pragma unroll 1
        for (;;) {
            if (source.steps == 0) seek(jobs, limit);
            if (missing == 0) break;
            if (source.steps > 0) {
                copy(to);
                to = to + 1 == DEPTH ? 0 : to + 1;
                ahead++;
            }
            if (!IS_BULK) end_copies();
            missing--;
        }
    }

    // The slot that is read next, once it is there.
    __device__ __forceinline__ uint32_t await() const {
        if (IS_BULK) {
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
        if (!IS_BULK) end_copies();
        at++;
        if (at < DEPTH) return;
        at = 0;
        is_odd ^= 1;
    }
};
