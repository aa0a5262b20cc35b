// The instructions near the running one, and each warp's pipeline of weights, which runs on from instruction to instruction.
//
// A block takes neighbouring rows of all parts. A tile is 8 of them, or fewer, so that a block's tiles differ by one row at most. A step
// is one chunk of a tile. A run is all steps of one matrix in one tile. The block's warps split the steps of all runs evenly; a split may
// lie inside a run:
//
//   steps    |run 0 ....|run 1 ....|run 2 ....|
//   warps    |0 ..|1 ..|2 ..|3 ..|4 ..|5 ..|6 .|
//
// Weights depend on no other instruction. A warp that has finished its steps copies those of the next instructions while it waits for
// values of other blocks, so that the memory is read without a pause.
#pragma once

#include "kernels/cuda/instruction.cuh"

constexpr int TILE_ROWS = 8;
constexpr int CHUNK_BYTES = 128;
// Instructions in shared memory: the running one and those whose weights may be copied ahead. Turing has 64 KB for everything.
#if __CUDA_ARCH__ >= 800
constexpr int RESIDENT_INSTRUCTIONS = 8;
#else
constexpr int RESIDENT_INSTRUCTIONS = 4;
#endif
constexpr int INSTRUCTION_WORDS = sizeof(Instruction) / sizeof(uint32_t);

// What a block's last OPCODE_ROUTE has chosen: gate and up of each expert in turn, then each down; their weights.
struct Chosen {
    MatrixPart parts[3 * MAX_CHOSEN];
    float weights[MAX_CHOSEN];
    int experts[MAX_CHOSEN];
};
__device__ __forceinline__ Chosen &chosen_experts() {
    __shared__ Chosen chosen;
    return chosen;
}

// A block's part of an instruction, and the step at which each warp starts. Instructions without weights have no steps.
struct BlockShare {
    int first_row, rows;       // in the rows of all parts
    int tiles, of_tile, extra_rows;  // rows of a tile, and how many of the first tiles have one more
    int runs;                  // of a tile: 1 or 2, or one for each chosen expert
    int shift;                 // runs are counted through in steps of 1 << shift a tile
    int chunks[2];             // of a tile's first run, and of each other one
    int steps, of_warp;
    float per_of_warp;  // 1 / of_warp
    int enter_run[WARPS], enter_chunk[WARPS];
};

struct ResidentInstruction {
    Instruction instruction;
    BlockShare share;
};

// a / b for `per_b` = 1 / b, whose product is off by one at most.
__device__ __forceinline__ int quotient(int a, int b, float per_b) {
    const int near = (int)((float)a * per_b), rest = a - near * b;
    return near + (rest >= b) - (rest < 0);
}

__device__ __forceinline__ int tile_of(const BlockShare &share, int run) { return run >> share.shift; }
// Of a tile's runs, which one.
__device__ __forceinline__ int place_of(const BlockShare &share, int run) { return run & ((1 << share.shift) - 1); }
__device__ __forceinline__ int chunks_of(const BlockShare &share, int in_tile) { return share.chunks[HAS_EXPERTS ? min(in_tile, 1) : in_tile]; }

// Iterates over a warp's steps of an instruction, run by run. The copies and the reads of weights use the same order.
struct RunIterator {
    int run;  // negative before the first one
    int in_tile, chunk;
    int steps;  // of the run, from that chunk on; none behind the last run
    int left;   // of the instruction, behind these
    __device__ __forceinline__ void next(const BlockShare &share, int warp) {
        if (run < 0) {
            run = share.enter_run[warp];
            chunk = share.enter_chunk[warp];
            left = min(share.of_warp, share.steps - warp * share.of_warp);
        } else {
            run++;
            // Behind the last of the chosen experts comes the next tile.
            if (HAS_EXPERTS && place_of(share, run) == share.runs) run = (tile_of(share, run) + 1) << share.shift;
            chunk = 0;
        }
        steps = 0;
        if (left <= 0) return;
        in_tile = place_of(share, run);
        steps = min(left, chunks_of(share, in_tile) - chunk);
        left -= steps;
    }
};

__device__ __forceinline__ int part_of(const Matvec &matvec, int row) {
    int part = 0;
    for (int i = 1; i < MAX_PARTS; i++)
        if (row >= matvec.parts[i].first_row) part = i;
    return part;
}

// Rows of a tile, and the first one.
__device__ __forceinline__ int rows_of(const BlockShare &share, int tile) { return share.of_tile + (tile < share.extra_rows); }
__device__ __forceinline__ int first_row_of(const BlockShare &share, int tile) { return share.first_row + tile * share.of_tile + min(tile, share.extra_rows); }

// The parts that an instruction reads: its own, or those of the chosen experts.
__device__ __forceinline__ const MatrixPart *parts_of(const Matvec &matvec) { return HAS_EXPERTS && matvec.chosen ? chosen_experts().parts : matvec.parts; }

// The vectors that a matvec multiplies: its inputs, or those of the chosen experts, which are all alike.
__device__ __forceinline__ bool is_weighed(const Matvec &matvec) { return HAS_EXPERTS && matvec.mode == MODE_WEIGHED; }
__device__ __forceinline__ int vectors_of(const Matvec &matvec) { return is_weighed(matvec) ? matvec.chosen : matvec.n_inputs; }
__device__ __forceinline__ const InputDesc &vector_at(const Matvec &matvec, int vector) { return matvec.inputs[is_weighed(matvec) ? 0 : vector]; }
__device__ __forceinline__ int vector_of_run(const Matvec &matvec, int in_tile) { return matvec.mode == MODE_JOINED || is_weighed(matvec) ? in_tile : 0; }
// Elements of all vectors' chunks.
__device__ __forceinline__ int padded_of(const Matvec &matvec) {
    if (is_weighed(matvec)) return matvec.chosen * matvec.inputs[0].padded;
    return matvec.inputs[0].padded + (matvec.n_inputs > 1 ? matvec.inputs[1].padded : 0);
}

// The part that a run reads for row `row` of all parts; `row` becomes the row of that part.
__device__ __forceinline__ const MatrixPart &part_at(const ResidentInstruction &resident, int in_tile, int &row) {
    const Matvec &matvec = resident.instruction.matvec;
    if (HAS_EXPERTS && matvec.chosen) {
        if (matvec.mode == MODE_WEIGHED) return chosen_experts().parts[2 * MAX_CHOSEN + in_tile];
        const int expert = (unsigned)row / (unsigned)matvec.rows_of_expert;
        row -= expert * matvec.rows_of_expert;
        return chosen_experts().parts[2 * expert + in_tile];
    }
    const MatrixPart &part = matvec.parts[matvec.mode == MODE_PARTS ? part_of(matvec, row) : in_tile];
    row -= part.first_row;
    return part;
}

// One warp copies an instruction to shared memory, asynchronously where the chip can.
__device__ __forceinline__ void fetch_instruction(ResidentInstruction &resident, const Instruction &instruction) {
#pragma unroll
    for (int at = threadIdx.x % LANES; at < INSTRUCTION_WORDS; at += LANES)
        copy_word(shared_address((uint32_t *)&resident.instruction + at), (const uint32_t *)&instruction + at);
}

// The same warp waits for the instruction and computes the block's share of it.
__device__ __forceinline__ void compute_share(ResidentInstruction &resident) {
    const int lane = threadIdx.x % LANES;
    wait_all_copies();
    __syncwarp();
    BlockShare &share = resident.share;
    if (resident.instruction.opcode >= OPCODE_ATTENTION) {
        if (lane == 0) share.steps = share.of_warp = 0;
        return;
    }
    const Matvec &matvec = resident.instruction.matvec;
    const RowPartition &first_partition = matvec.partitions[0];
    const bool is_first = (int)blockIdx.x < first_partition.blocks;
    const RowPartition &partition = matvec.partitions[is_first ? 0 : 1];
    const int block = blockIdx.x - (is_first ? 0 : first_partition.blocks), with_more = block - (partition.blocks - partition.extra_rows);
    const int rows = partition.rows_per_block + (with_more >= 0 ? 1 : 0), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int chunks_0 = matvec.inputs[0].chunks;
    const int runs = is_weighed(matvec) ? matvec.chosen : matvec.mode == MODE_PARTS ? 1 : 2;
    const int shift = is_weighed(matvec) ? LOG_MAX_CHOSEN : runs - 1;
    const int chunks_1 = runs == 1 ? 0 : matvec.mode == MODE_JOINED ? matvec.inputs[1].chunks : chunks_0;
    const int of_tile = chunks_0 + (runs - 1) * chunks_1, steps = tiles * of_tile, of_warp = (steps + WARPS - 1) / WARPS;
    if (lane < WARPS) {
        const int begin = lane * of_warp, tile = quotient(begin, of_tile, __frcp_rn((float)of_tile)), step = begin - tile * of_tile;
        const int later = step < chunks_0 ? 0 : is_weighed(matvec) ? quotient(step, chunks_0, __frcp_rn((float)chunks_0)) : 1;
        share.enter_run[lane] = (tile << shift) + later;
        share.enter_chunk[lane] = step - later * chunks_0;
    }
    if (lane == 0) {
        share.first_row = block * partition.rows_per_block + max(0, with_more) + (is_first ? 0 : first_partition.blocks * first_partition.rows_per_block + first_partition.extra_rows);
        share.rows = rows;
        share.tiles = tiles;
        share.of_tile = tiles ? quotient(rows, tiles, __frcp_rn((float)tiles)) : 0;
        share.extra_rows = rows - share.of_tile * tiles;
        share.runs = runs;
        share.shift = shift;
        share.chunks[0] = chunks_0;
        share.chunks[1] = chunks_1;
        share.steps = steps;
        share.of_warp = of_warp;
        share.per_of_warp = __frcp_rn((float)of_warp);
    }
}

// Steps of a pipeline stage, side by side: rows of 256 bytes keep the bulk-copy unit busy, rows of 128 do not.
constexpr int STEPS_PER_STAGE = HAS_BULK_COPIES ? 2 : 1;

// Stages of a warp's pipeline, as many as shared memory holds beside an instruction's data. Kernels with tables have fewer.
// kernels/cuda/program.rs counts the same.
#if __CUDA_ARCH__ >= 900
constexpr int STAGES = 3, STAGES_BESIDE_TABLES = 3;
#elif __CUDA_ARCH__ == 800
constexpr int STAGES = 6, STAGES_BESIDE_TABLES = 4;
#elif __CUDA_ARCH__ >= 800
constexpr int STAGES = 3, STAGES_BESIDE_TABLES = 2;
#else
constexpr int STAGES = 1, STAGES_BESIDE_TABLES = 1;
#endif

// Layout of a stage: even rows, then odd rows half a cache line further on, so that lanes that read the same half of neighbouring
// rows have no bank conflict.
constexpr int ROW_BYTES = STEPS_PER_STAGE * CHUNK_BYTES;
constexpr int ROWS_BYTES = TILE_ROWS * ROW_BYTES + CHUNK_BYTES / 2;
__device__ __forceinline__ uint32_t row_at(int row) { return row / 2 * ROW_BYTES + row % 2 * (TILE_ROWS / 2 * ROW_BYTES + CHUNK_BYTES / 2); }

// The rows of a tile that a run reads, and the lane's row, `lane % TILE_ROWS` or the last one.
struct TileRows {
    int count;
    const MatrixPart *part;
    int row;              // of the part
    int k;                // elements
    const uint8_t *from;  // the run's first step
};

// The steps that are copied next, for the pipeline of a warp.
struct CopyCursor {
    int index;
    RunIterator iterator;  // its steps are those not copied yet
    __device__ __forceinline__ void start() {
        index = iterator.steps = 0;
        iterator.run = -1;
    }
    // Moves to the next steps of instructions before `limit`; false where none are left.
    __device__ __forceinline__ bool seek(const ResidentInstruction *instructions, int limit, int warp, TileRows &rows) {
#pragma unroll 1
        for (; index < limit; index++, iterator.run = -1) {
            const ResidentInstruction &resident = instructions[index % RESIDENT_INSTRUCTIONS];
            iterator.next(resident.share, warp);
            if (iterator.steps == 0) continue;
            const Matvec &matvec = resident.instruction.matvec;
            const int vector = vector_of_run(matvec, iterator.in_tile), tile = tile_of(resident.share, iterator.run);
            rows.count = rows_of(resident.share, tile);
            rows.row = first_row_of(resident.share, tile) + min((int)threadIdx.x % TILE_ROWS, rows.count - 1);
            rows.part = &part_at(resident, iterator.in_tile, rows.row);
            rows.k = vector_at(matvec, vector).k;
            const long long stride = vector ? matvec.stride_1 : matvec.stride;
            rows.from = rows.part->weight + rows.row * stride + iterator.chunk * CHUNK_BYTES;
            return true;
        }
        return false;
    }
};
