// What a decode step is told: a program of jobs. kernels/cuda/{matvec,attention,program}.rs mirror these structs.
// All blocks of a launch run the same jobs one after the other, each at its own pace: nobody waits for a block, but for values.
//
// A value that others wait for is one word with the tag of the job that wrote it, another one in each step:
//   fp16: |value|tag|    4 bytes          fp32: |value    |tag      |    8 bytes
// Who finds the tag has the value, without a fence on one side or a counter between the two.
//
// What has been read is written anew without asking: whoever writes it has, through the jobs between, what each reader made of it
// (kernels/cuda/program.rs checks that).
#pragma once

#include "kernels/cuda/device.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / LANES;
// Warps of some kernels that only copy weights, behind the others, and what is theirs of the registers.
constexpr int COPIERS = 4;
constexpr int REGISTERS_OF_COPIER = 32, REGISTERS_BESIDE_COPIERS = 112;

// All threads but those of copiers meet.
__device__ __forceinline__ void meet() { meet_first<THREADS>(); }
constexpr int MAX_PARTS = 4;
constexpr int MAX_INPUTS = 2;

enum Norm { NORM_NONE, NORM_RMS, NORM_LAYER };
enum Activation { ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_RELU };
enum Mode {
    MODE_PARTS,   // every part is a matrix of its own over input 0
    MODE_GATED,   // two runs a tile, parts 0 and 1 over input 0: out = act(part 0) * part 1
    MODE_JOINED,  // a run for each input, part i over input i; the products of the same row add up
};

// One matrix.
struct Part {
    const uint8_t *weight;
    const void *scales;   // int8: row absmax [n] fp32; nf4: blocks' absmax, 8-bit codes or fp32
    const float *nested;  // nf4: absmax of absmax codes
    const float *bias;    // [n] or null
    void *out;            // [n], as `puts` says
    float offset;         // nf4: mean of absmax
    int n;
    int first_row;  // behind all rows where there is no such part
    int activation;
};

struct Input {
    const void *x;             // [k]: tagged fp32 where it is normed, fp16 otherwise
    const float *norm_weight;  // [k]
    const float *norm_bias;    // [k]
    float epsilon;
    float scale;  // of what the norm gives
    float per_k;  // 1 / k
    int norm;
    int k;
    int chunks;    // of a row
    int padded;     // elements of these chunks
    int is_tagged;  // whether fp16 is
    int of_job;     // that writes it in this launch, negative where it was there before
};

// How results lie.
enum Puts { PUTS_HALVES, PUTS_FLOATS, PUTS_TAGGED_HALVES };

// Rows for neighbouring blocks: `of_block` each, one more for the last `more` of them.
struct Deal {
    int blocks, of_block, more;
};

struct Matvec {
    Part parts[MAX_PARTS];
    Input inputs[MAX_INPUTS];
    uint2 *residual;                      // [n] tagged fp32: added, and replaced by the sum; or null
    float *logits;                        // [n] of a head, null for every other matrix
    unsigned long long *outlier_columns;  // int8: those found are added; or null
    float threshold;                      // int8: NaN where outlier columns are off
    int stride;                           // bytes from row to row of part 0; of part 1 where inputs are joined: stride_1
    int stride_1;
    int n_inputs, mode, puts;
    int keeps;      // whether the job before has read the same inputs, so that they are in shared memory
    Deal deals[2];  // first rows to the first blocks, then the rest to the others
};

struct Attention {
    const uint32_t *q;  // [h, d] tagged fp16
    const uint32_t *k;  // [g, d]: null where nothing is appended
    const uint32_t *v;
    __half *keys;  // [g, capacity, d_pad]
    __half *values;
    uint32_t *out;         // [h, d]
    const float2 *angles;  // [capacity, rotary / 2] cosine and sine, null where nothing rotates
    const float *bias;    // [h, 2 * reach + 1] by key - query, null without
    const int *position;  // of the query, where something is appended
    const int *length;    // keys, where nothing is
    float *partials;      // [h, splits, 2 + d]
    int *arrived;         // [h], zero between steps
    float scale;
    int kv_heads, group, d, d_pad, rotary, reach, capacity, span, splits;
    int of_job[3];  // those that write q, k and v in this launch
};

// Whose decoder reads a job's matrices: those every kernel has, or the kernel's own.
enum Kind { KIND_HALF, KIND_FLOAT, KIND_OWN, KIND_ATTENTION };

struct Job {
    int kind;
    union {
        Matvec matvec;
        Attention attention;
    };
};

// Where the token goes.
struct Head {
    unsigned long long *best;  // [blocks], null where no job is a head
    int *state;                // token, position, step
    unsigned long long *host;  // ring of the host
    const __half *table;       // [vocab, table_stride]: embeddings
    uint2 *embedding;          // [hidden] tagged fp32
    float table_scale;
    int table_stride, hidden, host_slots, advance;
};

struct Program {
    Job only;           // where `jobs` is null
    const Job *jobs;    // [n_jobs]
    const float *code;  // nf4: values of the 16 codes, then of the 256 absmax codes
    uint32_t *ended;    // blocks that have ended, zero between launches, and launches of jobs; null for a single job without a head
    Head head;
    int n_jobs;
    int slots;  // of a ring that copiers fill
};

// A launch's.
struct Tags {
    uint32_t first;
    __device__ __forceinline__ uint32_t of(int job) const { return first + job; }
};

__device__ __forceinline__ uint32_t tagged(__half value, uint32_t tag) { return __half_as_ushort(value) | tag << 16; }
__device__ __forceinline__ uint2 tagged(float value, uint32_t tag) { return make_uint2(__float_as_uint(value), tag); }
__device__ __forceinline__ __half untagged(uint32_t word) { return __ushort_as_half((unsigned short)word); }

// What a reader expects.
struct Awaited {
    uint32_t tag, looked_at;  // nothing where all was there before
    __device__ __forceinline__ Awaited(const Tags &tags, int of_job) : tag(tags.of(of_job)), looked_at(of_job < 0 ? 0 : ~0u) {}
    // Whether words that differ from the tag by these bits, or'ed, are all there: of fp32 their tags, of fp16 the words.
    __device__ __forceinline__ bool are_there(uint32_t off) const { return (off & looked_at) == 0; }
    __device__ __forceinline__ uint32_t off(uint32_t tag_found) const { return tag_found ^ tag; }
    __device__ __forceinline__ uint32_t off_half(uint32_t word) const { return (word ^ tag << 16) & 0xffff0000; }
};

// A tagged half, once it is there.
__device__ __forceinline__ __half await_half(const uint32_t *at, const Awaited &awaited) {
    uint32_t word = look(at);
    while (!awaited.are_there(awaited.off_half(word))) {
        pause();
        word = look(at);
    }
    return untagged(word);
}
