// What a decode step is told: a program of jobs. kernels/cuda/{matvec,attention,program}.rs mirror these structs.
// All blocks of a launch run the same jobs one after the other; a job waits until all have ended the one that it depends on.
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
    void *out;            // [n], fp32 where `out_is_float`, else fp16
    float offset;         // nf4: mean of absmax
    int n;
    int first_row;  // behind all rows where there is no such part
    int activation;
};

struct Input {
    const void *x;             // [k]: fp32 where it is normed, fp16 otherwise
    const float *norm_weight;  // [k]
    const float *norm_bias;    // [k]
    float epsilon;
    float scale;  // of what the norm gives
    float per_k;  // 1 / k
    int norm;
    int k;
    int chunks;    // of a row
    int padded;    // elements of these chunks
};

// Rows for neighbouring blocks: `of_block` each, one more for the last `more` of them.
struct Deal {
    int blocks, of_block, more;
};

struct Matvec {
    Part parts[MAX_PARTS];
    Input inputs[MAX_INPUTS];
    float *residual;                      // [n]: added, and replaced by the sum; or null
    float *logits;                        // [n] of a head, null for every other matrix
    unsigned long long *outlier_columns;  // int8: those found are added; or null
    float threshold;                      // int8: NaN where outlier columns are off
    int stride;                           // bytes from row to row of part 0; of part 1 where inputs are joined: stride_1
    int stride_1;
    int n_inputs, mode, out_is_float;
    int keeps;      // whether the job before has read the same inputs, so that they are in shared memory
    Deal deals[2];  // first rows to the first blocks, then the rest to the others
};

struct Attention {
    const __half *q;  // [h, d]
    const __half *k;  // [g, d]: null where nothing is appended
    const __half *v;
    __half *keys;  // [g, capacity, d_pad]
    __half *values;
    __half *out;           // [h, d]
    const float2 *angles;  // [capacity, rotary / 2] cosine and sine, null where nothing rotates
    const float *bias;    // [h, 2 * reach + 1] by key - query, null without
    const int *position;  // of the query, where something is appended
    const int *length;    // keys, where nothing is
    float *partials;      // [h, splits, 2 + d]
    int *arrived;         // [h], zero between steps
    float scale;
    int kv_heads, group, d, d_pad, rotary, reach, capacity, span, splits;
};

// Whose decoder reads a job's matrices: those every kernel has, or the kernel's own.
enum Kind { KIND_HALF, KIND_FLOAT, KIND_OWN, KIND_ATTENTION };

struct Job {
    int after;     // the job that all blocks have to end before this one begins; none where negative
    int tells;     // whether some job waits for this one: each block counts up when it has ended it
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
    float *embedding;          // [hidden]
    float table_scale;
    int table_stride, hidden, host_slots, advance;
};

struct Program {
    Job only;           // where `jobs` is null
    const Job *jobs;    // [n_jobs]
    const float *code;  // nf4: values of the 16 codes, then of the 256 absmax codes
    int *ended;         // blocks that have ended, then arrivals of each job: zero between launches; null for a single job without a head
    Head head;
    int n_jobs;
    int slots;  // of a ring that copiers fill
};
