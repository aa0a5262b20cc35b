// The router's choice among the experts of a layer: the `top_k` largest scores, the lowest index first where several tie, and a softmax of them.
//
// Every block chooses for itself, and puts the parts of the chosen experts where its next instructions find them (`chosen_experts`). Until then no
// weights of these instructions are copied: `gate` of `run_step`. Bytes moved: 8 for each expert and 168 for each chosen one, a block.
#pragma once

#include "kernels/cuda/matvec.cuh"

// Every thread calls `ahead` once.
template <class Ahead>
__device__ __forceinline__ void route(const Route &op, const Tags &tags, int instruction, Ahead ahead) {
    constexpr int OF_LANE = MAX_EXPERTS / LANES, WORDS = sizeof(MatrixPart) / sizeof(uint32_t);
    stamp(instruction, STAMP_BEGUN);
    ahead();
    Chosen &chosen = chosen_experts();
    if (threadIdx.x < LANES) {
        const int lane = threadIdx.x;
        const ExpectedTag expected(tags, op.written_by);
        float scores[OF_LANE];
#pragma unroll
        for (int i = 0; i < OF_LANE; i++) {
            const int expert = i * LANES + lane;
            scores[i] = expert < op.n_experts ? wait_float(op.scores + expert, expected) : 0.0f;
        }
        stamp(instruction, STAMP_READY);
        uint32_t taken = 0;
        float first = 0.0f, sum = 0.0f;
#pragma unroll 1
        for (int at = 0; at < op.top_k; at++) {
            // No score ranks as low as none.
            unsigned long long best = 0;
#pragma unroll
            for (int i = 0; i < OF_LANE; i++) {
                const int expert = i * LANES + lane;
                const unsigned long long rank = expert < op.n_experts && !(taken >> i & 1) ? rank_of(scores[i], expert) : 0;
                best = rank > best ? rank : best;
            }
#pragma unroll
            for (int distance = LANES / 2; distance > 0; distance /= 2) {
                const unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
                best = other > best ? other : best;
            }
            const int expert = (int)~(uint32_t)best;
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < OF_LANE; i++)
                if (i == expert / LANES) score = scores[i];
            score = __shfl_sync(ALL_LANES, score, expert % LANES);
            if (expert % LANES == lane) taken |= 1u << expert / LANES;
            if (at == 0) first = score;
            const float weight = __expf(score - first);
            sum += weight;
            if (lane == 0) chosen.experts[at] = expert, chosen.weights[at] = weight;
        }
        if (op.is_over_all) {
            sum = 0.0f;
#pragma unroll
            for (int i = 0; i < OF_LANE; i++)
                if (i * LANES + lane < op.n_experts) sum += __expf(scores[i] - first);
            sum = warp_sum(sum);
        }
        __syncwarp();
        if (lane < op.top_k) chosen.weights[lane] = chosen.weights[lane] / sum;
    }
    barrier_sync();
#pragma unroll 1
    for (int at = threadIdx.x; at < 3 * op.top_k * WORDS; at += THREADS) {
        const int part = (unsigned)at / WORDS, word = at - part * WORDS, expert = part / 3, which = part - 3 * expert;
        const uint32_t *from = (const uint32_t *)(op.experts + chosen.experts[expert] * 3 + which);
        ((uint32_t *)(chosen.parts + (which == 2 ? 2 * MAX_CHOSEN + expert : 2 * expert + which)))[word] = __ldg(from + word);
    }
    barrier_sync();
    if (threadIdx.x == 0) chosen.hidden = op.top_k * op.rows_of_expert;
    if ((int)threadIdx.x < 2 * op.top_k) chosen.parts[threadIdx.x].out = op.hidden + (long long)(threadIdx.x / 2) * op.rows_of_expert;
    stamp_rest(instruction, STAMP_READ);
}
