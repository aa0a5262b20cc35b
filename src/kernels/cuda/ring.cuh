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
    __device__ __forceinline__ void next(const Share &share, int warp) {
        if (run < 0) {
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

// The rows of a tile that a run reads, and of them the lane's, `lane % TILE_ROWS` or the last one.
struct Rows {
    int count;
    const Part *part;
    int row;              // of the part
    int k;                // elements
    const uint8_t *from;  // the run's first step
};

// The steps that are copied next, to the ring of a warp.
struct Source {
    int job;
    Walk walk;  // there; its steps are those not copied yet
    __device__ __forceinline__ void start() {
        job = walk.steps = 0;
        walk.run = -1;
    }
    // Goes on to the next steps of jobs before `limit`; false without any left, and `walk` has none.
    __device__ __forceinline__ bool seek(const Held *jobs, int limit, int warp, Rows &rows) {
#pragma unroll 1
        for (; job < limit; job++, walk.run = -1) {
            const Held &held = jobs[job % JOBS_HELD];
            walk.next(held.share, warp);
            if (walk.steps == 0) continue;
            const Matvec &matvec = held.job.matvec;
            const int input = matvec.mode == MODE_JOINED ? walk.second : 0, tile = tile_of(held.share, walk.run);
            rows.count = rows_of(held.share, tile);
            rows.row = first_row_of(held.share, tile) + min((int)threadIdx.x % TILE_ROWS, rows.count - 1);
            rows.part = &part_at(held, walk.second, rows.row);
            rows.k = matvec.inputs[input].k;
            const long long stride = input ? matvec.stride_1 : matvec.stride;
            rows.from = rows.part->weight + rows.row * stride + walk.chunk * CHUNK_BYTES;
            return true;
        }
        return false;
    }
};
