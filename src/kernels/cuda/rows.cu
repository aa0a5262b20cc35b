// Operations of a plan over many rows: prompts, encoders, pictures. Matrices between them go through cuBLAS.
// fp16 activations, fp32 residual stream and sums; one thread an element unless said otherwise.

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/place.cuh"

// Threads of a block that owns a row.
constexpr int WIDE_THREADS = 1024;

// All launches here overlap the one before but those that say otherwise.
__device__ __forceinline__ void begin_overlapping() {
    let_next_start();
    wait_for_launch_before();
}

// The sum over the block, in every thread.
template <int THREADS>
__device__ __forceinline__ float row_sum(float value) {
    __shared__ float room[THREADS / LANES];
    const int lane = threadIdx.x % LANES;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) room[threadIdx.x / LANES] = value;
    __syncthreads();
    return warp_sum(lane < THREADS / LANES ? room[lane] : 0.0f);
}

// out[t] = scale * table[token_t]; rows of the token `image` take the next row of the features instead. A block owns a row.
extern "C" __global__ void embed_rows(const int *tokens, const int *feature_of_row, const __half *table, const __half *features,
                                      float *out, float scale, int image, int stride, int width) {
    begin_overlapping();
    int row = blockIdx.x, token = tokens[row];
    float *to = out + (long long)row * width;
    if (token == image) {
        const __half *from = features + (long long)feature_of_row[row] * width;
        for (int at = threadIdx.x; at < width; at += blockDim.x) to[at] = __half2float(from[at]);
    } else {
        const __half *from = table + (long long)token * stride;
        for (int at = threadIdx.x; at < width; at += blockDim.x) to[at] = __half2float(from[at]) * scale;
    }
}

// A token as a step finds it: its embedding, scale * row [width] in tagged fp32 without a tag, and the state. One block.
extern "C" __global__ void place_token(const __half *row, uint2 *embedding, float scale, int width, int *state, int token, int position, int step) {
    for (int at = threadIdx.x; at < width; at += blockDim.x) embedding[at] = make_uint2(__float_as_uint(__half2float(row[at]) * scale), 0);
    if (threadIdx.x == 0) state[0] = token, state[1] = position, state[2] = step;
}

// x[t] += table[t % period]
extern "C" __global__ void add_table_rows(float *x, const __half *table, int stride, int width, int period) {
    begin_overlapping();
    const long long row = blockIdx.x % period;
    for (int at = threadIdx.x; at < width; at += blockDim.x) x[(long long)blockIdx.x * width + at] += __half2float(table[row * stride + at]);
}

// out[s] = scale * x[s, rows - 1]: what the head reads of each sequence. A block owns a sequence.
extern "C" __global__ void last_rows(const __half *x, __half *out, float scale, int rows, int width) {
    begin_overlapping();
    const __half *from = x + ((long long)blockIdx.x * rows + rows - 1) * width;
    for (int at = threadIdx.x; at < width; at += blockDim.x) out[(long long)blockIdx.x * width + at] = __float2half_rn(__half2float(from[at]) * scale);
}

// A product whose bias and whose addition to the residual are deferred.
struct Addend {
    const void *values;  // [t, n], or null for none
    const float *bias;   // [n], or null
    int is_float;        // values are fp32, else fp16
    float scale;         // that multiplies values and bias
};

// A half plus its bias, rounded as add_bias_rows rounds it.
__device__ __forceinline__ float biased(__half y, const float *bias, int column) {
    return bias ? __half2float(__float2half_rn(__half2float(y) + bias[column])) : __half2float(y);
}

__device__ __forceinline__ float added(const Addend &addend, long long at, int column) {
    if (!addend.is_float) return biased(((const __half *)addend.values)[at], addend.bias, column) * addend.scale;
    float y = ((const float *)addend.values)[at];
    return (addend.bias ? y + addend.bias[column] : y) * addend.scale;
}

// Values of a row that a thread keeps in registers: the whole row of most models, so that one latency covers them.
constexpr int NORM_HELD = 8;

// x += first + second, where there are any; out = scale * norm(x), fp16. A block owns a row.
extern "C" __global__ void __launch_bounds__(WIDE_THREADS) norm_rows(
    float *x, const Addend first, const Addend second, const float *weight, const float *bias, __half *out, float epsilon, float scale, int width) {
    begin_overlapping();
    const long long start = (long long)blockIdx.x * width;
    float *row = x + start;
    float held[NORM_HELD] = {};
    auto for_held = [&](auto change) {
#pragma unroll
        for (int i = 0; i < NORM_HELD; i++) {
            const int at = threadIdx.x + i * WIDE_THREADS;
            if (at < width) change(held[i], at);
        }
    };
    auto for_rest = [&](auto change) {
        for (int at = threadIdx.x + NORM_HELD * WIDE_THREADS; at < width; at += WIDE_THREADS) change(row[at], at);
    };
    for_held([&](float &value, int at) { value = row[at]; });
    if (first.values) {
        auto add = [&](float &value, int at) {
            value += added(first, start + at, at);
            if (second.values) value += added(second, start + at, at);
        };
        for_held([&](float &value, int at) {
            add(value, at);
            row[at] = value;
        });
        // Each thread reads back what it has written itself.
        for_rest(add);
    }
    float mean = 0.0f;
    if (bias) {
        float sum = 0.0f;
        auto add = [&](float value, int) { sum += value; };
        for_held(add);
        for_rest(add);
        mean = row_sum<WIDE_THREADS>(sum) / width;
    }
    float squares = 0.0f;
    auto square = [&](float value, int) { squares += (value - mean) * (value - mean); };
    for_held(square);
    for_rest(square);
    float factor = rsqrtf(row_sum<WIDE_THREADS>(squares) / width + epsilon);
    auto store = [&](float value, int at) {
        float y = (value - mean) * factor * weight[at];
        out[start + at] = __float2half_rn((bias ? y + bias[at] : y) * scale);
    };
    for_held(store);
    for_rest(store);
}

// y[t] += bias in place, fp16 or fp32.
extern "C" __global__ void add_bias_rows(void *y, const float *bias, int is_float, int n, long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float b = bias[at % n];
    if (is_float)
        ((float *)y)[at] += b;
    else
        ((__half *)y)[at] = __float2half_rn(__half2float(((__half *)y)[at]) + b);
}

// out = a + first + second in fp32, where there is a second.
extern "C" __global__ void add_rows(const float *a, const Addend first, const Addend second, float *out, int n, long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int column = first.bias || second.bias ? (int)(at % n) : 0;
    float sum = a[at] + added(first, at, column);
    out[at] = second.values ? sum + added(second, at, column) : sum;
}

__device__ __forceinline__ float activated(int kind, float x) {
    if (kind == 1) return x / (1.0f + __expf(-x));
    if (kind == 2) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    return x > 0.0f || isnan(x) ? x : 0.0f;
}

// out = act(gate + bias), times scale * up where there is one.
extern "C" __global__ void activate_rows(const __half *gate, const float *bias, const __half *up, __half *out, float scale, int kind, int n,
                                         long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    __half y = __float2half_rn(activated(kind, biased(gate[at], bias, bias ? (int)(at % n) : 0)));
    out[at] = up ? __float2half_rn(__half2float(y) * __half2float(__float2half_rn(__half2float(up[at]) * scale))) : y;
}

// Adds biases, if there are any, rotates q [t, h, d] in place and writes k, v [t, g, d] to the cache [sequences, g, capacity, d_pad], each
// sequence's `rows` rows from `first_position` and its place on. The blocks of a row share its elements.
extern "C" __global__ void append_rows(__half *q, const __half *k, const __half *v, const float *q_bias, const float *k_bias,
                                       const float *v_bias, __half *keys, __half *values, const float2 *angles, int heads, int kv_heads,
                                       int d, int d_pad, int rotary, int capacity, int first_position, int rows, const Place *places) {
    begin_overlapping();
    const int row = blockIdx.x, sequence = row / rows, half = rotary / 2, first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    const int position = (places ? places[sequence].position : first_position) + row - sequence * rows;
    for (int at = first; at < heads * half; at += step) {
        int head = at / half, pair = at % half;
        float2 angle = angles[(long long)position * half + pair];
        __half *of = q + ((long long)row * heads + head) * d;
        float a = biased(of[pair], q_bias, head * d + pair), b = biased(of[pair + half], q_bias, head * d + pair + half);
        of[pair] = __float2half_rn(a * angle.x - b * angle.y);
        of[pair + half] = __float2half_rn(b * angle.x + a * angle.y);
    }
    // Elements that do not rotate.
    for (int at = first; q_bias && at < heads * (d - rotary); at += step) {
        int column = at / (d - rotary) * d + rotary + at % (d - rotary);
        __half *of = q + (long long)row * heads * d + column;
        *of = __float2half_rn(biased(*of, q_bias, column));
    }
    for (int at = first; at < kv_heads * d; at += step) {
        int head = at / d, element = at % d;
        const __half *of = k + ((long long)row * kv_heads + head) * d;
        float value = biased(of[element], k_bias, at);
        if (element < rotary) {
            int pair = element < half ? element : element - half, partner = element < half ? element + half : pair;
            float2 angle = angles[(long long)position * half + pair];
            float other = biased(of[partner], k_bias, head * d + partner);
            value = element < half ? value * angle.x - other * angle.y : value * angle.x + other * angle.y;
        }
        long long to = (((long long)sequence * kv_heads + head) * capacity + position) * d_pad + element;
        keys[to] = __float2half_rn(value);
        values[to] = __float2half_rn(biased(v[((long long)row * kv_heads + head) * d + element], v_bias, at));
    }
}

// x = norm(x + bias), an rms norm of `len` neighbouring values of a row, which `weight` [len] multiplies; a block owns them. Values are rounded
// once with their bias, where there is one, and once at the end.
extern "C" __global__ void __launch_bounds__(128) norm_parts(__half *x, const float *bias, const float *weight, float epsilon, int len) {
    begin_overlapping();
    __half *of = x + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * len;
    const int column = blockIdx.y * len;
    float squares = 0.0f;
    for (int at = threadIdx.x; at < len; at += 128) {
        const float value = biased(of[at], bias, column + at);
        squares += value * value;
    }
    const float factor = rsqrtf(row_sum<128>(squares) / len + epsilon);
    for (int at = threadIdx.x; at < len; at += 128) of[at] = __float2half_rn(biased(of[at], bias, column + at) * factor * weight[at]);
}

// Columns start .. start + len of rows of n 16-bit values, one row behind the other.
extern "C" __global__ void copy_columns(const uint16_t *from, uint16_t *to, int n, int start, int len, long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) to[at] = from[at / len * n + start + at % len];
}

// fp32 to fp16.
extern "C" __global__ void narrow_rows(const float *from, __half *to, long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) to[at] = __float2half_rn(from[at]);
}

// fp16 to fp32, scaled.
extern "C" __global__ void widen_rows(const __half *from, float *to, float scale, long long count) {
    begin_overlapping();
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) to[at] = __half2float(from[at]) * scale;
}

// Reads `count` 16-byte words and writes almost nothing: measures the read bandwidth.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4 *from, uint32_t *out, long long count) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    long long step = (long long)gridDim.x * blockDim.x, at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; at + 7 * step < count; at += 8 * step) {
        uint4 words[8];
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] = load_streaming(from + at + i * step);
#pragma unroll
        for (int i = 0; i < 8; i++) sum.x ^= words[i].x, sum.y ^= words[i].y, sum.z ^= words[i].z, sum.w ^= words[i].w;
    }
    for (; at < count; at += step) {
        uint4 word = load_streaming(from + at);
        sum.x ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x5eed5eedu) out[0] = 1;
}
