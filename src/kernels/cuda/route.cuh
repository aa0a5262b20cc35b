// The router's choice among the experts of a layer: the `top_k` largest scores, the lowest index first where several tie, and a softmax of them.
//
// Every block chooses for itself, and puts the parts of the chosen experts where its next instructions find them (`chosen_experts`). Until then no
// weights of these instructions are copied: `gate` of `run_step`. Bytes moved: 8 for each expert and 168 for each chosen one, a block.
#pragma once

#include "kernels/cuda/matvec.cuh"

static_assert(MAX_EXPERTS <= THREADS, "a thread for each expert");
// Threads that find an expert's rank together, where there are few experts.
constexpr int RANKING_THREADS = 4;

// The choice is whole behind the next barrier. Every thread calls `ahead` once. Dynamic shared memory keeps what the router has read: the gates reuse it.
template <class Ahead>
__device__ __forceinline__ void route(const Route &op, const Tags &tags, int instruction, Ahead ahead) {
    constexpr int WORDS = sizeof(MatrixPart) / sizeof(uint32_t);
    // Scores as bits in their order.
    __shared__ __align__(16) uint32_t keys[MAX_EXPERTS];
    auto score_of = [&](int expert) {
        const uint32_t key = keys[expert];
        return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
    };
    Chosen &chosen = chosen_experts();
    stamp(instruction, STAMP_BEGUN);
    // The table of experts comes from memory while the scores are waited for: each block fetches other lines of it.
    const int lines = (op.n_experts * 3 * (int)sizeof(MatrixPart) + CHUNK_BYTES - 1) / CHUNK_BYTES;
    for (int line = threadIdx.x * gridDim.x + blockIdx.x; line < lines; line += THREADS * gridDim.x) prefetch((const uint8_t *)op.experts + line * CHUNK_BYTES);
    ahead();
    const int fours = (op.n_experts + 3) / 4;
    // A key is at least 1, so that 1 can be taken from it. Behind the last expert stands 0, which comes before none.
    if ((int)threadIdx.x < 4 * fours)
        keys[threadIdx.x] = (int)threadIdx.x < op.n_experts ? max(ordered_bits(wait_float(op.scores + threadIdx.x, ExpectedTag(tags, op.written_by))), 1u) : 0;
    stamp(instruction, STAMP_READY);
    barrier_sync();
    // An expert's rank is how many come before it. RANKING_THREADS neighbours count them together, or one thread alone where there are too many experts.
    const int neighbours = op.n_experts * RANKING_THREADS <= THREADS ? RANKING_THREADS : 1, own = threadIdx.x / neighbours;
    int before = 0;
    if (own < op.n_experts) {
        const uint32_t key = keys[own];
#pragma unroll 4
        for (int at = threadIdx.x % neighbours; at < fours; at += neighbours) {
            const uint4 four = ((const uint4 *)keys)[at];
            // Of equal keys the lower index comes first.
            auto comes_before = [&](uint32_t other, int index) { return other > key - (index < own); };
            before += comes_before(four.x, 4 * at) + comes_before(four.y, 4 * at + 1) + comes_before(four.z, 4 * at + 2) + comes_before(four.w, 4 * at + 3);
        }
    }
#pragma unroll
    for (int distance = 1; distance < RANKING_THREADS; distance *= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, before, distance);
        if (distance < neighbours) before += other;
    }
    if (own < op.n_experts && before < op.top_k) chosen.experts[before] = own;
    barrier_sync();
    if (threadIdx.x < LANES) {
        const int lane = threadIdx.x;
        const float first = score_of(chosen.experts[0]), weight = lane < op.top_k ? __expf(score_of(chosen.experts[lane]) - first) : 0.0f;
        float sum = 0.0f;
        if (op.is_over_all) {
#pragma unroll 1
            for (int expert = lane; expert < op.n_experts; expert += LANES) sum += __expf(score_of(expert) - first);
            sum = warp_sum(sum);
        } else {
            sum = warp_sum(weight);
        }
        if (lane < op.top_k) chosen.weights[lane] = weight / sum;
    }
    constexpr int OUT_WORD = offsetof(MatrixPart, out) / sizeof(uint32_t);
#pragma unroll 1
    for (int at = threadIdx.x; at < 3 * op.top_k * WORDS; at += THREADS) {
        const int part = (unsigned)at / WORDS, word = at - part * WORDS, expert = part / 3, which = part - 3 * expert;
        const uint32_t *from = (const uint32_t *)(op.experts + chosen.experts[expert] * 3 + which) + word;
        // The gates' results lie one expert behind the other.
        const unsigned long long out = (unsigned long long)(op.hidden + (long long)expert * op.rows_of_expert);
        const uint32_t value = word == OUT_WORD ? (uint32_t)out : word == OUT_WORD + 1 ? (uint32_t)(out >> 32) : __ldg(from);
        ((uint32_t *)(chosen.parts + (which == 2 ? 2 * MAX_CHOSEN + expert : 2 * expert + which)))[word] = value;
    }
    stamp_rest(instruction, STAMP_READ);
}
