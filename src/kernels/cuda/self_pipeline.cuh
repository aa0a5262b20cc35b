// Pipelines that warps fill themselves: a warp refills a stage as soon as it has read it.
#pragma once

#include "kernels/cuda/pipeline.cuh"

// `SideData` is what the kernel's format needs for a step beside the weights: each lane copies WORDS words, which lie behind these.
template <class SideData, int DEPTH>
struct SelfPipeline {
    static constexpr int EXTRA_BYTES = 4 * LANES * SideData::WORDS;  // of a step
    static constexpr int STAGE_BYTES = ROWS_BYTES + STEPS_PER_STAGE * EXTRA_BYTES;
    static constexpr int BLOCK_THREADS = THREADS;
    struct Shared {};
    uint32_t stages;          // address of the first one
    uint32_t lane_offset;            // of the lane's first 16 bytes in a stage
    int at, n_filled;           // the next stage to read, and how many are filled from there on
    CopyCursor cursor;
    const uint8_t *from[2];  // two rows that the lane copies 16 bytes of
    SideData side_data;
    int copies;                 // bits: first row, second row (clear behind the block's last row), side data

    static __device__ __forceinline__ int bytes(int) { return DEPTH * STAGE_BYTES; }
    __device__ __forceinline__ int depth() const { return DEPTH; }
    // The interface of ProducerPipeline.
    static __device__ __forceinline__ void set_instructions_ready(Shared &, int) {}
    static __device__ __forceinline__ void wait_copied(const Shared &, int) {}
    static __device__ __forceinline__ void begin(Shared &, int) {}

    __device__ __forceinline__ void start(uint32_t pipelines, int, int, Shared &) {
        stages = pipelines + threadIdx.x / LANES * bytes(0);
        lane_offset = row_at(threadIdx.x % LANES / 8) + threadIdx.x % 8 * 16;
        at = n_filled = 0;
        cursor.start();
    }

    __device__ __forceinline__ void seek(const ResidentInstruction *instructions, int limit) {
        TileRows rows = {};
        if (!cursor.seek(instructions, limit, threadIdx.x / LANES, rows)) return;
        const int lane = threadIdx.x % LANES;
        // Each lane knows one of the rows; the lanes that copy it ask that one.
        copies = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int of_tile = lane / 8 + 4 * i;
            from[i] = (const uint8_t *)__shfl_sync(ALL_LANES, (unsigned long long)rows.from, of_tile) + lane % 8 * 16;
            copies |= (of_tile < rows.count) << i;
        }
        const Instruction &instruction = instructions[cursor.index % RESIDENT_INSTRUCTIONS].instruction;
        if (!SideData::WORDS || instruction.opcode != OPCODE_FORMAT) return;
        copies |= 4;
        const MatrixPart *parts = parts_of(instruction.matvec);
        const int asked = SideData::row_of(lane), index = __shfl_sync(ALL_LANES, (int)(rows.part - parts), asked);
        side_data.set(parts[index], rows.k, __shfl_sync(ALL_LANES, rows.row, asked), cursor.iterator.chunk);
    }

    // Instruction `done` is read to its end and may be overwritten in shared memory.
    __device__ __forceinline__ void leave(int done) {
        if (cursor.index > done) return;
        cursor.index = done + 1;
        cursor.iterator.run = -1;
    }

    // Fills a stage with the next steps: at least one, as many as fit.
    __device__ __forceinline__ void copy(int index) {
        const int n = min(cursor.iterator.steps, STEPS_PER_STAGE);
        const uint32_t to = stages + index * STAGE_BYTES;
        cursor.iterator.steps -= n;
        // All lanes have read the stage.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int step = 0; step < STEPS_PER_STAGE; step++)
                copy_streaming(to + lane_offset + 2 * i * ROW_BYTES + step * CHUNK_BYTES, from[i] + step * CHUNK_BYTES, step < n ? copies & 1 << i : 0);
            from[i] += n * CHUNK_BYTES;
        }
#pragma unroll
        for (int i = 0; i < (SideData::WORDS ? STEPS_PER_STAGE : 0); i++)
            if (copies & 4 && i < n) side_data.copy(to + ROWS_BYTES + i * EXTRA_BYTES);
    }

    // Fills all stages, until nothing is left. Each stage commits a group of copies, an empty one where nothing is left, so that DEPTH - 1
    // groups always follow the one that is waited for.
    __device__ __forceinline__ void fill(const ResidentInstruction *instructions, int limit) {
        int to = at + n_filled, missing = DEPTH - n_filled;
        if (to >= DEPTH) to -= DEPTH;
#pragma unroll 1
        for (;;) {
            if (cursor.iterator.steps == 0) seek(instructions, limit);
            if (missing == 0) break;
            if (cursor.iterator.steps > 0) {
                copy(to);
                to = to + 1 == DEPTH ? 0 : to + 1;
                n_filled++;
            }
            commit_copies();
            missing--;
        }
    }

    // Waits for the stage that is read next.
    __device__ __forceinline__ uint32_t next(const ResidentInstruction *instructions, int limit) {
        if (cursor.iterator.steps == 0 || n_filled < DEPTH) fill(instructions, limit);
        wait_copies<DEPTH - 1>();
        // Lanes read what other lanes have copied.
        __syncwarp();
        return stages + at * STAGE_BYTES;
    }

    // Releases the stage that was read and refills it.
    __device__ __forceinline__ void pass() {
        if (cursor.iterator.steps > 0) copy(at);
        else n_filled--;
        commit_copies();
        at++;
        if (at == DEPTH) at = 0;
    }
};
