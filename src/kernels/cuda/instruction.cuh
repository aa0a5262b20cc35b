// The instruction set of the step kernel. kernels/cuda/{program,matvec,attention,norm_add,route}.rs mirror these structs.
//
// All blocks of a launch run the same instructions in order, each block at its own pace. There is no grid barrier: a block waits only for
// the values that it reads.
//
// A value that other blocks wait for is one word with a tag, which names the instruction and the step that wrote it:
//   fp16: |value|tag|    4 bytes          fp32: |value    |tag      |    8 bytes
// A reader polls the word until it finds the expected tag. Value and tag arrive together, so that no fence and no counter is needed.
//
// A buffer is overwritten without a check at run time: kernels/cuda/program.rs has checked for write-after-read hazards.
#pragma once

#include "kernels/cuda/device.cuh"

// Threads that compute.
constexpr int THREADS = 512;
constexpr int WARPS = THREADS / LANES;
// Producer warps: some kernels have warps behind the others that only copy weights. Registers of their threads, and of the others'.
constexpr int PRODUCER_WARPS = 4;
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 112;

// Builds of the step kernel, each with few registers for what it has. The first has what OPCODE_HALF to OPCODE_ATTENTION need of llama, phi, t5 and
// gemma; the second also norms of heads, windows, caps, sinks, norms behind products and casts (STEP_FEATURED); the third the choice of experts
// too (STEP_EXPERTS). program.rs picks one.
#ifdef STEP_EXPERTS
constexpr bool HAS_EXPERTS = true, HAS_FEATURES = true;
#elif defined(STEP_FEATURED)
constexpr bool HAS_EXPERTS = false, HAS_FEATURES = true;
#else
constexpr bool HAS_EXPERTS = false, HAS_FEATURES = false;
#endif

// A barrier of all threads but those of producer warps.
__device__ __forceinline__ void barrier_sync() { barrier_sync_first<THREADS>(); }
constexpr int MAX_PARTS = 4;
constexpr int MAX_INPUTS = 2;
// Experts of a token, and experts that there are.
constexpr int LOG_MAX_CHOSEN = 3, MAX_CHOSEN = 1 << LOG_MAX_CHOSEN, MAX_EXPERTS = 512;
// Vectors that a matvec multiplies: its inputs, or what the gates of the chosen experts have made.
constexpr int MAX_VECTORS = HAS_EXPERTS ? MAX_CHOSEN : MAX_INPUTS;

// NORM_CAST: none, but fp32 values of a residual, which are cast to fp16.
enum Norm { NORM_NONE, NORM_RMS, NORM_LAYER, NORM_CAST };
// ACT_CAP: softcap * tanh(y / softcap), in fp32. ACT_CLAMPED: gpt-oss' gate, whose limit is softcap.
enum Activation { ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_RELU, ACT_CAP, ACT_CLAMPED };
enum Mode {
    MODE_PARTS,   // every part is a matrix of its own over input 0
    MODE_GATED,   // two runs a tile, parts 0 and 1 over input 0: out = act(part 0) * part 1
    MODE_JOINED,  // a run for each input, part i over input i; the products of the same row add up
    MODE_WEIGHED, // a run for each chosen expert: its down over its vector of input 0, which holds one behind the other; the products of the same
                  // row are weighed and add up
};

// One matrix.
struct MatrixPart {
    const uint8_t *weight;
    const void *scales;   // int8: row absmax [n] fp32; nf4: blocks' absmax, 8-bit codes or fp32
    const float *nested;  // nf4: absmax of absmax codes
    const float *bias;    // [n] or null
    void *out;            // [n], of `output_type`
    float offset;         // nf4: mean of absmax
    int n;
    int first_row;  // MODE_PARTS: in the rows of all parts; behind all of them where there is no such part. Else less than 0 where the part
                    // is the rows of a matrix from -first_row on.
    int activation;
};

struct InputDesc {
    const void *x;             // [k]: tagged fp32 where it is normed or cast, fp16 otherwise
    const float *norm_weight;  // [k]
    const float *norm_bias;    // [k]
    float epsilon;
    float scale;  // of the norm's result
    float per_k;  // 1 / k
    int norm;
    int k;
    int chunks;      // of a row
    int padded;      // elements of these chunks
    int is_tagged;   // whether fp16 is
    int written_by;  // the instruction of this launch that writes it; negative where it was there before
};

enum OutputType { OUTPUT_HALVES, OUTPUT_FLOATS, OUTPUT_TAGGED_HALVES, OUTPUT_TAGGED_FLOATS };

// Rows of neighbouring blocks: `rows_per_block` each, and one more for the last `extra_rows` of the blocks.
struct RowPartition {
    int blocks, rows_per_block, extra_rows;
};

struct Matvec {
    MatrixPart parts[MAX_PARTS];
    InputDesc inputs[MAX_INPUTS];
    uint2 *residual;                      // [n] tagged fp32: the products are added to it; or null
    float *logits;                        // [n] of the LM head, null for every other matrix
    unsigned long long *outlier_columns;  // int8: a count that the outlier columns are added to; or null
    float threshold;                      // int8: NaN where outlier columns are off
    float softcap;                        // of ACT_CAP and ACT_CLAMPED
    int stride;                           // bytes from row to row of part 0; of part 1 where inputs are joined: stride_1
    int stride_1;
    int n_inputs, mode, output_type;
    int reuses_input;            // the matvec before has read the same inputs, which are still in shared memory
    int keeps_input;             // the matvec behind reuses them: blocks without rows read them too
    RowPartition partitions[2];  // the first rows for the first blocks, the rest for the others
    // Matrices of so many experts that the OPCODE_ROUTE before has chosen, in the place of `parts`; 0 where there are none. MODE_GATED: their gates and
    // what these gate, `rows_of_expert` rows each. MODE_WEIGHED: their downs.
    int chosen, rows_of_expert;
    // Exact powers of two that keep fp16 in range: of what MODE_GATED stores, of products that a format rounds to fp16, and by which products are
    // multiplied in the end.
    float out_scale, rounded_scale, product_scale;
};

struct Attention {
    const uint32_t *q;  // [h, d] tagged fp16
    const uint32_t *k;  // [g, d]: null where nothing is appended
    const uint32_t *v;
    __half *keys;  // [g, capacity, d_pad]
    __half *values;
    uint32_t *out;         // [h, d]
    const float2 *angles;  // [capacity, rotary / 2] cosine and sine, null without a rotation
    const float *bias;     // [h, 2 * reach + 1] by key - query, null without
    const int *position;   // of the query, where something is appended
    const int *length;     // keys, where nothing is
    float *partials;       // [h, splits, 2 + d]
    int *arrived;          // [h], zero between steps
    float scale;
    int kv_heads, group, d, d_pad, rotary, reach, capacity, span, splits;
    int written_by[3];  // the instructions of this launch that write q, k and v
    // Of OPCODE_FEATURED_ATTENTION alone.
    const float *sinks;   // [h]: scores that join the softmax and weigh no value; null without
    const float *q_norm;  // weights of rms norms before the rotation, [d], or [h, d] over all heads; null without
    const float *k_norm;  // [d] or [g, d]
    float softcap;        // of scores: softcap * tanh(score / softcap); 0 for none
    float epsilon;        // of the norms
    int window;           // positions that the query sees, itself the last; 0 for all
    int norms_all_heads;  // one norm over all heads of q, and one over those of k
};

// x += norm(y), an rms norm.
struct NormAdd {
    const uint2 *y;       // [n] tagged fp32
    uint2 *x;             // [n] tagged fp32
    const float *weight;  // [n]
    float epsilon;
    int n;
    int written_by[2];  // the instructions of this launch that write y and x
};

// The router's choice. The instructions behind it read the matrices of the experts that it has chosen.
struct Route {
    const uint2 *scores;        // [experts] tagged fp32
    const MatrixPart *experts;  // [experts, 3]: gate, up and down of each
    uint32_t *hidden;           // [top_k, rows_of_expert] tagged fp16: what the gates write
    int n_experts, top_k, rows_of_expert;
    int is_over_all;  // weights are a softmax over all scores, else over the chosen ones
    int next_gate;    // behind the next Route
    int written_by;   // the instruction of this launch that writes the scores
};

// The decoder of a matvec's weights is part of its opcode: fp16, fp32, or the one format that the kernel is compiled for.
enum Opcode { OPCODE_HALF, OPCODE_FLOAT, OPCODE_FORMAT, OPCODE_ATTENTION, OPCODE_FEATURED_ATTENTION, OPCODE_NORM_ADD, OPCODE_ROUTE };

struct Instruction {
    int opcode;
    union {
        Matvec matvec;
        Attention attention;
        NormAdd norm_add;
        Route route;
    };
};

// Where the next token goes.
struct TokenOutput {
    unsigned long long *best;  // [blocks], null where the program has no LM head
    int *state;                // token, position, step
    unsigned long long *host;  // [host_slots]: the host's ring buffer of tokens
    const __half *table;       // [vocab, table_stride]: embeddings
    uint2 *embedding;          // [hidden] tagged fp32
    float table_scale;
    int table_stride, hidden, host_slots, advance;
};

// The kernel's parameter.
struct Program {
    Instruction only;                 // the program's only instruction, where `instructions` is null
    const Instruction *instructions;  // [n_instructions]
    const float *constants;           // nf4: values of the 16 codes, then of the 256 absmax codes
    uint32_t *counters;               // blocks that have ended this launch, then launches; null for a single instruction without an LM head
    uint32_t *trace;                  // clock stamps of the traced build (trace.cuh); null where nothing is traced
    TokenOutput token_output;
    int n_instructions;
    int stages;  // of a pipeline that producer warps fill
    int gate;    // behind the first OPCODE_ROUTE: weights of later instructions are copied once it has ended
};

// Tags of one launch.
struct Tags {
    uint32_t first;
    __device__ __forceinline__ uint32_t of(int instruction) const { return first + instruction; }
};

__device__ __forceinline__ uint32_t tagged(__half value, uint32_t tag) { return __half_as_ushort(value) | tag << 16; }
__device__ __forceinline__ uint2 tagged(float value, uint32_t tag) { return make_uint2(__float_as_uint(value), tag); }
__device__ __forceinline__ __half untagged(uint32_t word) { return __ushort_as_half((unsigned short)word); }

// The tag that a reader polls for. `mask` is 0 for values that were there before the launch: they have no tag.
struct ExpectedTag {
    uint32_t tag, mask;
    __device__ __forceinline__ ExpectedTag(const Tags &tags, int written_by) : tag(tags.of(written_by)), mask(written_by < 0 ? 0 : ~0u) {}
    // Whether words are ready, given the `or` of their mismatches.
    __device__ __forceinline__ bool ready(uint32_t mismatch) const { return (mismatch & mask) == 0; }
    __device__ __forceinline__ uint32_t mismatch(uint32_t found) const { return found ^ tag; }
    __device__ __forceinline__ uint32_t mismatch_half(uint32_t word) const { return (word ^ tag << 16) & 0xffff0000; }
};

// Polls for a tagged half.
__device__ __forceinline__ __half wait_half(const uint32_t *at, const ExpectedTag &expected) {
    uint32_t word = load_relaxed(at);
    while (!expected.ready(expected.mismatch_half(word))) {
        backoff();
        word = load_relaxed(at);
    }
    return untagged(word);
}

// Polls for a tagged float.
__device__ __forceinline__ float wait_float(const uint2 *at, const ExpectedTag &expected) {
    uint2 word = load_relaxed(at);
    while (!expected.ready(expected.mismatch(word.y))) {
        backoff();
        word = load_relaxed(at);
    }
    return __uint_as_float(word.x);
}
