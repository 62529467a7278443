// Products and attention of processors that multiply bf16 themselves (AVX512-BF16), over plain memory.
//
// Must not know Python or torch. All sums are fp32 and run over the inner dimension in one order, whatever the number
// of rows, so that a row's result never depends on its neighbours. bf16 values are passed as uint16_t.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

constexpr long PANEL = 64;  // outputs that one task computes: four registers of 16
constexpr long FEW = 1 << 15;  // numbers, below which threads take longer to wake than to work
constexpr long ROWS = 6;    // rows at once: 6 x 4 sums, 4 weights and an input fill the 32 registers

inline __m512 add_products(__m512 sum, __m512i weights, __m512i pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)pair);
}

inline __mmask16 first(long count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

inline __m512 widened(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// What the next task reads, brought into the second cache while this one computes.
struct Ahead {
    const char* at;
    long bytes;  // per step of two inputs; 0: nothing
};

// y[R][columns] = x[R][2 * pairs] times one panel, whose weights lie as [pairs][PANEL][2].
template <int R>
void tile(const uint16_t* x, long x_stride, const uint16_t* panel, long pairs, const uint16_t* bias, uint16_t* y,
          long y_stride, long columns, Ahead ahead) {
    __m512 sums[R][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) sums[r][j] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        const uint16_t* w = panel + k * 2 * PANEL;
        const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 32);
        const __m512i w2 = _mm512_loadu_si512(w + 64), w3 = _mm512_loadu_si512(w + 96);
        for (long b = 0; b < ahead.bytes; b += 64) _mm_prefetch(ahead.at + k * ahead.bytes + b, _MM_HINT_T1);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int32_t two;
            memcpy(&two, x + r * x_stride + 2 * k, sizeof two);
            const __m512i pair = _mm512_set1_epi32(two);
            sums[r][0] = add_products(sums[r][0], w0, pair);
            sums[r][1] = add_products(sums[r][1], w1, pair);
            sums[r][2] = add_products(sums[r][2], w2, pair);
            sums[r][3] = add_products(sums[r][3], w3, pair);
        }
    }
    for (int j = 0; j < 4 && columns > 16 * j; j++) {
        const __mmask16 kept = first(columns - 16 * j);
        const __m512 plus = bias ? widened(_mm256_maskz_loadu_epi16(kept, bias + 16 * j)) : _mm512_setzero_ps();
        for (int r = 0; r < R; r++) {
            const __m512 sum = bias ? _mm512_add_ps(sums[r][j], plus) : sums[r][j];
            _mm256_mask_storeu_epi16(y + r * y_stride + 16 * j, kept, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

inline __m512 load(const uint16_t* at) { return widened(_mm256_loadu_si256((const __m256i*)at)); }

inline __m256i rounded(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

using Tile = void (*)(const uint16_t*, long, const uint16_t*, long, const uint16_t*, uint16_t*, long, long, Ahead);
const Tile TILES[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// exp(x) for x <= 0: 2^n times a polynomial in what is left (relative error 2e-7); NaN stays NaN.
inline __m512 exponential(__m512 x) {
    const __m512 scaled = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(scaled, whole);
    __m512 sum = _mm512_set1_ps(1.535336188e-4f);
    for (float c : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(sum, whole);
}

// x in bf16's precision.
inline __m512 narrowed(__m512 x) { return widened(rounded(x)); }

// 1 / (1 + exp(-x)), by the exponential of what is negative.
inline __m512 opened(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    const __m512 e = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(x)));
    const __m512 top = _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), e);
    return _mm512_div_ps(top, _mm512_add_ps(one, e));
}

// Scores of `count` keys to their softmax, in place; the sum that they are still to be divided by is returned.
float softmax(float* scores, long count) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (long s = 0; s < count; s += 16)
        most = _mm512_mask_max_ps(most, first(count - s), most, _mm512_loadu_ps(scores + s));
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
    for (long s = 0; s < count; s += 16) {
        const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), highest));
        _mm512_storeu_ps(scores + s, e);
        total = _mm512_mask_add_ps(total, first(count - s), total, e);
    }
    return _mm512_reduce_add_ps(total);
}

// The sums of 16 vectors, each in its lane.
inline __m512 sums_of(const __m512 (&x)[16]) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; i++) {
        const __m512 a = x[2 * i], b = x[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        const __m512d low = _mm512_unpacklo_pd(a, b), high = _mm512_unpackhi_pd(a, b);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    const auto joined = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return joined(joined(fours[0], fours[1]), joined(fours[2], fours[3]));
}

// One query over `count` keys and values that lie `stride` apart.
template <int D>
void attend_one(const uint16_t* q, const uint16_t* k, const uint16_t* v, long stride, long count, float scale,
                float* scores, uint16_t* y) {
    __m512i query[D / 32];
    for (int j = 0; j < D / 32; j++) query[j] = _mm512_loadu_si512(q + 32 * j);
    for (long s = 0; s < count; s += 16) {
        __m512 parts[16];
        for (int i = 0; i < 16; i++) {
            const uint16_t* key = k + std::min(s + i, count - 1) * stride;
            __m512 sum = _mm512_setzero_ps();
            for (int j = 0; j < D / 32; j++) sum = add_products(sum, _mm512_loadu_si512(key + 32 * j), query[j]);
            parts[i] = sum;
        }
        _mm512_storeu_ps(scores + s, _mm512_mul_ps(sums_of(parts), _mm512_set1_ps(scale)));
    }
    const float total = softmax(scores, count);
    __m512 even[D / 32], odd[D / 32];  // of each 32 numbers of the result
    for (int j = 0; j < D / 32; j++) even[j] = odd[j] = _mm512_setzero_ps();
    for (long s = 0; s < count; s++) {
        const __m512 weight = _mm512_set1_ps(scores[s]);
        for (int j = 0; j < D / 32; j++) {
            const __m512i two = _mm512_loadu_si512(v + s * stride + 32 * j);
            const __m512i high = _mm512_and_si512(two, _mm512_set1_epi32(0xffff0000));
            even[j] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), even[j]);
            odd[j] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(high), odd[j]);
        }
    }
    const __m512 share = _mm512_set1_ps(1.0f / total);
    for (int j = 0; j < D / 32; j++) {
        const __m512i low = _mm512_cvtepu16_epi32(rounded(_mm512_mul_ps(even[j], share)));
        const __m512i high = _mm512_cvtepu16_epi32(rounded(_mm512_mul_ps(odd[j], share)));
        _mm512_storeu_si512(y + 32 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

using Attend = void (*)(const uint16_t*, const uint16_t*, const uint16_t*, long, long, float, float*, uint16_t*);

Attend attend_of(long width) {
    switch (width) {
        case 32: return attend_one<32>;
        case 64: return attend_one<64>;
        case 96: return attend_one<96>;
        case 128: return attend_one<128>;
        case 256: return attend_one<256>;
        default: return nullptr;
    }
}

}  // namespace

extern "C" {

// The weight [outputs][inputs], inputs even, to panels [inputs / 2][PANEL][2], from output `start` of them on, which is
// a multiple of 16; what the last panel lacks stays as it is.
void pack(const uint16_t* weight, uint16_t* packed, long start, long outputs, long inputs, int threads) {
    const long pairs = inputs / 2, groups = (outputs + 15) / 16, per_panel = PANEL / 16, before = start / 16;
    const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(numbers, _mm512_set1_epi32((int)pairs));  // of 16 rows, in pairs
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long group = 0; group < groups; group++) {
        const __mmask16 there = first(outputs - 16 * group);
        const uint16_t* in = weight + 16 * group * inputs;
        const long at = before + group;
        uint16_t* out = packed + (at / per_panel * pairs * PANEL + at % per_panel * 16) * 2;
        for (long k = 0; k < pairs; k++) {
            const __m512i two = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, apart, in + 2 * k, 4);
            _mm512_storeu_si512(out + k * 2 * PANEL, two);
        }
    }
}

// y [rows][outputs] = x [rows][inputs] W^T + bias, of a packed W; x lies x_stride apart, y without gaps.
void multiply(const uint16_t* x, long x_stride, const uint16_t* packed, const uint16_t* bias, uint16_t* y, long rows,
              long outputs, long inputs, int threads) {
    const long pairs = inputs / 2, panels = (outputs + PANEL - 1) / PANEL, size = pairs * 2 * PANEL;
    const long wanted = std::max(1L, std::min(4L * threads / panels, rows / (8 * ROWS)));
    const long block = ((rows + wanted - 1) / wanted + ROWS - 1) / ROWS * ROWS, blocks = (rows + block - 1) / block;
    const long sweeps = (std::min(rows, block) + ROWS - 1) / ROWS;
    const long share = sweeps < 3 ? 0 : sweeps == 3 ? 128 : 64;  // the first sweep reads its own panel from memory
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long task = 0; task < panels * blocks; task++) {
        const long p = task / blocks, stop = std::min(rows, (task % blocks + 1) * block);
        const uint16_t* panel = packed + p * size;
        const char* ahead = (const char*)(packed + std::min(p + threads, panels - 1) * size);
        const char* end = ahead + size * (long)sizeof(uint16_t);
        for (long start = task % blocks * block, sweep = 0; start < stop; start += ROWS, sweep++) {
            const long bytes = blocks == 1 && sweep && ahead < end ? share : 0;
            TILES[std::min(ROWS, stop - start)](x + start * x_stride, x_stride, panel, pairs,
                                                bias ? bias + p * PANEL : nullptr, y + start * outputs + p * PANEL,
                                                outputs, outputs - p * PANEL, Ahead{ahead, bytes});
            ahead += bytes * pairs;
        }
    }
}

// Whether `attend` knows heads of this width.
int attends(long width) { return attend_of(width) != nullptr; }

// softmax(q k^T scale) v of queries [batch][length][heads][width] -> y of the same shape.
//
// keys, values: [rows][kv_heads][positions][width] with the given strides (elements) of the first two; row b of the
// batch reads row rows[b] (rows null: b); its query t sees max(0, p - window + 1) .. p (window 0: from 0) there, where
// p = positions[b][t]. Where p is negative y is zero.
void attend(const uint16_t* q, const uint16_t* keys, const uint16_t* values, const int64_t* rows,
            const int64_t* positions, uint16_t* y, long batch, long length, long heads, long kv_heads, long width,
            long row_stride, long head_stride, long window, float scale, int threads) {
    const Attend one = attend_of(width);
    const long each = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < batch * kv_heads * length; task++) {
            const long b = task / length / kv_heads, g = task / length % kv_heads, token = b * length + task % length;
            const long count = positions[token] + 1;
            const long from = window > 0 ? std::max(0L, count - window) : 0;
            const long start = (rows ? rows[b] : b) * row_stride + g * head_stride + from * width;
            if (count > 0) scores.resize(count - from + 16);
            for (long h = g * each; h < (g + 1) * each; h++) {
                uint16_t* out = y + (token * heads + h) * width;
                if (count > 0)
                    one(q + (token * heads + h) * width, keys + start, values + start, width, count - from, scale,
                        scores.data(), out);
                else
                    memset(out, 0, width * sizeof *out);
            }
        }
    }
}

// y = x / rms(x) * weight of each row [width], width a multiple of 16: the quotient is rounded before it is scaled.
void norm(const uint16_t* x, long x_stride, const uint16_t* weight, uint16_t* y, long rows, long width, float eps,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= FEW)
    for (long r = 0; r < rows; r++) {
        const uint16_t* in = x + r * x_stride;
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) sum = _mm512_fmadd_ps(load(in + i), load(in + i), sum);
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / width + eps));
        for (long i = 0; i < width; i += 16) {
            const __m512 part = narrowed(_mm512_mul_ps(load(in + i), scale));
            _mm256_storeu_si256((__m256i*)(y + r * width + i), rounded(_mm512_mul_ps(part, load(weight + i))));
        }
    }
}

// y = gate / (1 + exp(-gate)) * up of each row [width], width a multiple of 16; the gate's part is rounded first.
void swiglu(const uint16_t* gate, const uint16_t* up, long stride, uint16_t* y, long rows, long width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= FEW)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += 16) {
            const __m512 g = load(gate + r * stride + i), part = narrowed(_mm512_mul_ps(g, opened(g)));
            _mm256_storeu_si256((__m256i*)(y + r * width + i), rounded(_mm512_mul_ps(part, load(up + r * stride + i))));
        }
}

// The gradients of `norm`: with n = x / rms and g = dy weight, dx = (g - n mean(g n)) / rms; where `parts`
// [threads][width] is given, each thread's sum of dy n is added to its row of it.
void norm_backward(const uint16_t* x, const uint16_t* weight, const uint16_t* dy, uint16_t* dx, float* parts, long rows,
                   long width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const uint16_t *in = x + r * width, *grad = dy + r * width;
        __m512 squares = _mm512_setzero_ps(), products = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) {
            const __m512 v = load(in + i);
            squares = _mm512_fmadd_ps(v, v, squares);
            products = _mm512_fmadd_ps(_mm512_mul_ps(load(grad + i), load(weight + i)), v, products);
        }
        const float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
        const __m512 by = _mm512_set1_ps(scale);
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(products) * scale / width);
        float* part = parts ? parts + omp_get_thread_num() * width : nullptr;
        for (long i = 0; i < width; i += 16) {
            const __m512 n = _mm512_mul_ps(load(in + i), by), d = load(grad + i);
            const __m512 g = _mm512_mul_ps(d, load(weight + i));
            const __m512 out = _mm512_mul_ps(_mm512_fnmadd_ps(n, mean, g), by);
            _mm256_storeu_si256((__m256i*)(dx + r * width + i), rounded(out));
            if (part) _mm512_storeu_ps(part + i, _mm512_fmadd_ps(d, n, _mm512_loadu_ps(part + i)));
        }
    }
}

// The gradients of `swiglu`, everything without gaps: of silu(g) u with s = 1 / (1 + exp(-g)).
void swiglu_backward(const uint16_t* gate, const uint16_t* up, const uint16_t* dy, uint16_t* dgate, uint16_t* dup,
                     long count, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        const __m512 g = load(gate + i), d = load(dy + i), s = opened(g);
        const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        const __m512 left = _mm512_mul_ps(_mm512_mul_ps(d, load(up + i)), slope);
        _mm256_storeu_si256((__m256i*)(dgate + i), rounded(left));
        _mm256_storeu_si256((__m256i*)(dup + i), rounded(_mm512_mul_ps(d, _mm512_mul_ps(g, s))));
    }
}

// Turn the pairs of each head [width], width a multiple of 16, of tokens whose heads lie one behind the other: pair i
// of token t by (turns[t][i][0], turns[t][i][1]), a cosine and a sine; y lies without gaps.
void rotate(const uint16_t* x, long x_stride, const float* turns, uint16_t* y, long tokens, long heads, long width,
            int backwards, int threads) {
    const __m512 sign = _mm512_set1_ps(backwards ? -1.0f : 1.0f);
    const __m512i swap = _mm512_set_epi32(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * width >= FEW)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += 16) {
            const __m512 turn = _mm512_loadu_ps(turns + t * width + i);
            const __m512 cosine = _mm512_moveldup_ps(turn), sine = _mm512_mul_ps(sign, _mm512_movehdup_ps(turn));
            for (long h = 0; h < heads; h++) {
                const __m512 pair = load(x + t * x_stride + h * width + i);
                const __m512 other = _mm512_mul_ps(_mm512_permutexvar_ps(swap, pair), sine);
                _mm256_storeu_si256((__m256i*)(y + (t * heads + h) * width + i),
                                    rounded(_mm512_fmaddsub_ps(pair, cosine, other)));
            }
        }
}

// Store new keys and values [batch][length][kv_heads][width] in a cache like `attend`'s: token t of row b at
// positions[b][t], which a negative one counts from the end of the row's `slots`.
void store(const uint16_t* k, const uint16_t* v, long k_stride, long v_stride, uint16_t* keys, uint16_t* values,
           const int64_t* rows, const int64_t* positions, long batch, long length, long kv_heads, long width,
           long row_stride, long head_stride, long slots, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * length * kv_heads * width >= FEW)
    for (long token = 0; token < batch * length; token++) {
        const long b = token / length, p = positions[token] < 0 ? positions[token] + slots : positions[token];
        const long start = (rows ? rows[b] : b) * row_stride + p * width;
        for (long g = 0; g < kv_heads; g++) {
            memcpy(keys + start + g * head_stride, k + token * k_stride + g * width, 2 * width);
            memcpy(values + start + g * head_stride, v + token * v_stride + g * width, 2 * width);
        }
    }
}
}
