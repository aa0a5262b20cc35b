// The next token: the largest logit, its embedding, and the state of the next step.
#pragma once

#include "kernels/cuda/instruction.cuh"

// Bits that order as the values do. NaN never wins, as in a comparison.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
    const uint32_t bits = __float_as_uint(value);
    return isnan(value) ? 0u : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

// A key that orders as the logits do and, among equals, puts the lower index first.
__device__ __forceinline__ unsigned long long rank_of(float logit, int index) { return (unsigned long long)ordered_bits(logit) << 32 | (uint32_t)~index; }

__device__ __forceinline__ unsigned long long block_best(unsigned long long best, unsigned long long *room) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
        best = other > best ? other : best;
    }
    barrier_sync();
    if (threadIdx.x % LANES == 0) room[threadIdx.x / LANES] = best;
    barrier_sync();
#pragma unroll 1
    for (int warp = 0; warp < WARPS; warp++) best = room[warp] > best ? room[warp] : best;
    return best;
}

// Called by the last block that ends: picks the token, writes it to the host, and fetches its embedding for the next step.
__device__ __forceinline__ void write_token(const TokenOutput &output, unsigned long long *room) {
    unsigned long long best = 0;
#pragma unroll 1
    for (int block = threadIdx.x; block < gridDim.x; block += THREADS) {
        unsigned long long other = __ldcg(output.best + block);
        best = other > best ? other : best;
    }
    best = block_best(best, room);
    int token = (int)~(uint32_t)best;
    const __half *row = output.table + (long long)token * output.table_stride;
#pragma unroll 1
    for (int at = threadIdx.x; at < output.hidden; at += THREADS)
        output.embedding[at] = tagged(__half2float(row[at]) * output.table_scale, 0);
    if (threadIdx.x == 0) {
        int step = output.state[2] + 1;
        output.state[0] = token;
        output.state[1] += output.advance;
        output.state[2] = step;
        store_to_host(output.host + (step & (output.host_slots - 1)), (unsigned long long)step << 32 | (uint32_t)token);
    }
}
