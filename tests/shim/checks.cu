// Kernels that show what the shim itself does: one conversion, faults that it has to find, and blocks that run at once.

#include "kernels/cuda/device.cuh"

extern "C" __global__ void to_half(const float *from, __half *to, int count) {
    for (int at = threadIdx.x; at < count; at += blockDim.x) to[at] = __float2half_rn(from[at]);
}

// Reads one element too many.
extern "C" __global__ void read_outside(const float *from, float *to, int count) {
    if (threadIdx.x <= count) to[0] = from[threadIdx.x];
}

extern "C" __global__ void read_askew(const float *from, float *to, int) {
    if (threadIdx.x == 0) to[0] = (float)load_l2((const void *)(from + 1)).x;
}

// Half of the first warp comes to the shuffle.
extern "C" __global__ void part_at_a_shuffle(const float *, float *to, int) {
    if (threadIdx.x < 16) to[threadIdx.x] = warp_sum(1.0f);
}

// One warp sums while the other waits for it at a barrier that the first does not come to.
extern "C" __global__ void part_at_a_barrier(const float *, float *to, int) {
    if (threadIdx.x >= 32) __syncthreads();
    to[threadIdx.x] = 1.0f;
}

extern "C" __global__ void mix_operations(const float *, float *to, int) {
    if (threadIdx.x % 2) to[0] = warp_sum(1.0f);
    else to[1] = (float)__ballot_sync(ALL_LANES, true);
}

// The neighbour's value without the barrier that it needs.
extern "C" __global__ void forget_a_barrier(const float *, float *to, int) {
    __shared__ float values[64];
    values[threadIdx.x] = (float)threadIdx.x;
    to[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}

extern "C" __global__ void read_unwritten(const float *, float *to, int) {
    __shared__ float values[64];
    if (threadIdx.x < 32) values[threadIdx.x] = 1.0f;
    __syncthreads();
    to[threadIdx.x] = values[threadIdx.x];
}

// Reads what a copy brings without awaiting it; a chip before 800 has no such copies.
extern "C" __global__ void forget_to_wait(const float *from, float *to, int) {
    __shared__ float values[64];
    copy_word(shared_address(values + threadIdx.x), from + threadIdx.x);
    commit_copies();
    to[threadIdx.x] = __uint_as_float(load_copied(shared_address(values + threadIdx.x)));
}

// A warp fills a stage for another one, which reads it at once, or once it is full.
extern "C" __global__ void fill_for_another(const float *from, float *to, int) {
    __shared__ unsigned long long full;
    __shared__ __align__(16) float slot[64];
    if (threadIdx.x == 0) mbarrier_init(shared_address(&full), 1);
    __syncthreads();
    if (threadIdx.x == 32) {
        mbarrier_arrive_expect(shared_address(&full), sizeof slot);
        copy_bulk(shared_address(slot), from, sizeof slot, shared_address(&full));
    }
    if (threadIdx.x >= 32) return;
    while (!mbarrier_has_completed(shared_address(&full), 1)) backoff();
    const float early = slot[threadIdx.x];
    mbarrier_wait(shared_address(&full), 0);
    to[threadIdx.x] = slot[threadIdx.x];
    to[32 + threadIdx.x] = early;
}

// A stage that nobody fills.
extern "C" __global__ void wait_for_nobody(const float *, float *, int) {
    __shared__ unsigned long long full;
    if (threadIdx.x == 0) mbarrier_init(shared_address(&full), 1);
    __syncthreads();
    mbarrier_wait(shared_address(&full), 0);
}

// The first warp meets by itself, the second with nobody.
extern "C" __global__ void sync_apart(const float *, float *to, int) {
    if (threadIdx.x < 32) barrier_sync_first<32>();
    to[threadIdx.x] = 1.0f;
}

extern "C" __global__ void sync_as_a_stranger(const float *, float *, int) { barrier_sync_first<32>(); }

extern "C" __global__ void exceed_dynamic(const float *, float *to, int count) {
    DYNAMIC_SHARED(float, values);
    if (threadIdx.x == 0) to[0] = values[count];
}

extern "C" __global__ void exceed_shared_address(const float *, float *to, int count) {
    DYNAMIC_SHARED(float, values);
    if (threadIdx.x == 0) to[0] = __uint_as_float(load_shared(shared_address(values) + 4 * count));
}

// Two blocks hand a number back and forth, and each adds one; poison is -1.
extern "C" __global__ void hand_over(const float *, float *to, int count) {
    uint32_t *number = (uint32_t *)to;
    if (threadIdx.x != 0) return;
    for (int turn = blockIdx.x; turn < count; turn += 2) {
        while (load_relaxed(number) != (uint32_t)turn - 1) backoff();
        store_relaxed(number, turn);
    }
}

// What half a warp of the second block looks at together stays poison.
extern "C" __global__ void wait_in_vain(const float *, float *to, int) {
    if (blockIdx.x == 1 && threadIdx.x >= 48)
        while (!__ballot_sync(0xffff0000, load_relaxed((const uint32_t *)to) == 0)) backoff();
}

// Each block keeps its number in shared memory of both kinds while the other one does.
extern "C" __global__ void keep_apart(const float *, float *to, int) {
    DYNAMIC_SHARED(int, in_dynamic);
    __shared__ int in_static;
    int *words = (int *)to;
    if (threadIdx.x == 0) {
        in_dynamic[0] = in_static = blockIdx.x;
        store_relaxed((uint32_t *)words + blockIdx.x, 0);
        while (load_relaxed((const uint32_t *)words + 1 - blockIdx.x) != 0) backoff();
    }
    __syncthreads();
    if (threadIdx.x != 1) return;
    words[2 + 2 * blockIdx.x] = in_static;
    words[3 + 2 * blockIdx.x] = in_dynamic[0];
}
