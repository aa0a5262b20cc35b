// The next token of each sequence of a batch: the largest of its logits. A block owns a sequence. Bytes moved: the products once, the logits once.

#include "kernels/cuda/place.cuh"
#include "kernels/cuda/token_output.cuh"

struct Choice {
    const void *products;      // [sequences, n], fp32 or fp16; fp32 may lie where the logits do
    float *logits;             // [sequences, n]
    const float *bias;         // [n] or null
    int *tokens;               // [sequences]
    Place *places;             // [sequences]
    unsigned long long *host;  // [host_slots, host_sequences], from the call's first sequence on
    float softcap;             // softcap * tanh(logit / softcap); 0 for none
    int is_float, n, advance, host_slots, host_sequences;
};

extern "C" __global__ void __launch_bounds__(THREADS) choose_tokens(const __grid_constant__ Choice op) {
    let_next_start();
    wait_for_launch_before();
    __shared__ unsigned long long room[WARPS];
    const long long begin = (long long)blockIdx.x * op.n;
    unsigned long long best = 0;
#pragma unroll 4
    for (int at = threadIdx.x; at < op.n; at += THREADS) {
        float logit = op.is_float ? ((const float *)op.products)[begin + at] : __half2float(((const __half *)op.products)[begin + at]);
        if (op.bias) logit += op.bias[at];
        if (op.softcap > 0.0f) logit = op.softcap * tanhf(logit / op.softcap);
        op.logits[begin + at] = logit;
        const unsigned long long rank = rank_of(logit, at);
        best = rank > best ? rank : best;
    }
    best = block_best(best, room);
    if (threadIdx.x != 0) return;
    const int token = (int)~(uint32_t)best;
    Place &place = op.places[blockIdx.x];
    const int step = place.step + 1;
    place.step = step;
    place.position += op.advance;
    op.tokens[blockIdx.x] = token;
    store_to_host(op.host + (long long)(step & (op.host_slots - 1)) * op.host_sequences + blockIdx.x, (unsigned long long)step << 32 | (uint32_t)token);
}
