// The router's choice among the experts of a layer: the `top_k` largest scores, the lowest index first where several tie, and a softmax of them.
//
// Every block chooses for itself, and puts the parts of the chosen experts where its next instructions find them (`chosen_experts`). Until then no
// weights of these instructions are copied: `gate` of `run_step`. Bytes moved: 8 for each expert and 168 for each chosen one, a block.
#pragma once

#include "kernels/cuda/matvec.cuh"

static_assert(MAX_EXPERTS <= THREADS, "a thread for each expert");

// Every thread calls `ahead` once. Dynamic shared memory keeps what the router has read: the gates reuse it.
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
    ahead();
    const int own = threadIdx.x, fours = (op.n_experts + 3) / 4;
    if (own < 4 * fours) {
        // Behind the last expert stands what comes before none.
        keys[own] = own < op.n_experts ? ordered_bits(wait_float(op.scores + own, ExpectedTag(tags, op.written_by))) : 0;
    }
    stamp(instruction, STAMP_READY);
    barrier_sync();
    if (own < op.n_experts) {
        // Its rank: how many come before it.
        const uint32_t key = keys[own];
        int before = 0;
#pragma unroll 4
        for (int at = 0; at < fours; at++) {
            const uint4 four = ((const uint4 *)keys)[at];
            auto comes_before = [&](uint32_t other, int index) { return other > key || (other == key && index < own); };
            before += comes_before(four.x, 4 * at) + comes_before(four.y, 4 * at + 1) + comes_before(four.z, 4 * at + 2) + comes_before(four.w, 4 * at + 3);
        }
        if (before < op.top_k) chosen.experts[before] = own;
    }
    barrier_sync();
    if (own < LANES) {
        const float first = score_of(chosen.experts[0]);
        float sum = 0.0f;
        if (op.is_over_all) {
#pragma unroll 1
            for (int expert = own; expert < op.n_experts; expert += LANES) sum += __expf(score_of(expert) - first);
            sum = warp_sum(sum);
        } else {
#pragma unroll 1
            for (int at = 0; at < op.top_k; at++) sum += __expf(score_of(chosen.experts[at]) - first);
        }
        if (own < op.top_k) chosen.weights[own] = __expf(score_of(chosen.experts[own]) - first) / sum;
    }
#pragma unroll 1
    for (int at = threadIdx.x; at < 3 * op.top_k * WORDS; at += THREADS) {
        const int part = (unsigned)at / WORDS, word = at - part * WORDS, expert = part / 3, which = part - 3 * expert;
        const uint32_t *from = (const uint32_t *)(op.experts + chosen.experts[expert] * 3 + which);
        uint32_t *to = (uint32_t *)(chosen.parts + (which == 2 ? 2 * MAX_CHOSEN + expert : 2 * expert + which));
        to[word] = __ldg(from + word);
    }
    barrier_sync();
    if ((int)threadIdx.x < 2 * op.top_k) chosen.parts[threadIdx.x].out = op.hidden + (long long)(threadIdx.x / 2) * op.rows_of_expert;
    stamp_rest(instruction, STAMP_READ);
}
