// What the kernels share: bf16 numbers in vectors, the exponential, and products with packed weights.
//
// For processors that multiply bf16 themselves (AVX512-BF16), over plain memory; nothing here knows Python or torch.
// All sums are fp32 and run over the inner dimension in one order, whatever the number of rows, so that a row's result
// never depends on its neighbours. bf16 values are passed as uint16_t.

#pragma once

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

// sums[R][PANEL] of x[R][2 * pairs] times one panel, whose weights lie as [pairs][PANEL][2].
template <int R>
inline void multiply_panel(__m512 (&sums)[R][4], const uint16_t* x, long x_stride, const uint16_t* panel, long pairs,
                           Ahead ahead) {
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
}

// The same, plus a bias where there is one, to bf16 y[R][columns].
template <int R>
void tile(const uint16_t* x, long x_stride, const uint16_t* panel, long pairs, const uint16_t* bias, uint16_t* y,
          long y_stride, long columns, Ahead ahead) {
    __m512 sums[R][4];
    multiply_panel<R>(sums, x, x_stride, panel, pairs, ahead);
    for (int j = 0; j < 4 && columns > 16 * j; j++) {
        const __mmask16 kept = first(columns - 16 * j);
        const __m512 plus = bias ? widened(_mm256_maskz_loadu_epi16(kept, bias + 16 * j)) : _mm512_setzero_ps();
        for (int r = 0; r < R; r++) {
            const __m512 sum = bias ? _mm512_add_ps(sums[r][j], plus) : sums[r][j];
            _mm256_mask_storeu_epi16(y + r * y_stride + 16 * j, kept, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// The same to fp32 y[R][PANEL], scaled.
template <int R>
void score(const uint16_t* x, long x_stride, const uint16_t* panel, long pairs, float scale, float* y, long y_stride) {
    __m512 sums[R][4];
    multiply_panel<R>(sums, x, x_stride, panel, pairs, Ahead{nullptr, 0});
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++)
            _mm512_storeu_ps(y + r * y_stride + 16 * j, _mm512_mul_ps(sums[r][j], _mm512_set1_ps(scale)));
}

inline __m512 load(const uint16_t* at) { return widened(_mm256_loadu_si256((const __m256i*)at)); }

inline __m256i rounded(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

using Tile = void (*)(const uint16_t*, long, const uint16_t*, long, const uint16_t*, uint16_t*, long, long, Ahead);
const Tile TILES[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

using Score = void (*)(const uint16_t*, long, const uint16_t*, long, float, float*, long);
const Score SCORES[ROWS + 1] = {nullptr, score<1>, score<2>, score<3>, score<4>, score<5>, score<6>};

// Rows of a matrix [outputs][2 * pairs], `stride` apart, to panels [pairs][PANEL][2], from output `start` of them on.
void pack_group(const uint16_t* rows, long stride, long outputs, long pairs, long start, uint16_t* packed) {
    const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(numbers, _mm512_set1_epi32((int)stride));  // of 16 rows
    uint16_t* out = packed + (start / PANEL * pairs * PANEL + start % PANEL) * 2;
    for (long k = 0; k < pairs; k++) {
        const __m512i two = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first(outputs), apart, rows + 2 * k, 2);
        _mm512_storeu_si512(out + k * 2 * PANEL, two);
    }
}

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

}  // namespace
