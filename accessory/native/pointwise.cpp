// Norm, gate and rotation of a block in one pass each, forward and backward.

#include "common.h"

extern "C" {

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

// y = gate / (1 + exp(-gate)) * up of each row [width], width a multiple of 16; the gate's part is rounded first.
void swiglu(const uint16_t* gate, const uint16_t* up, long stride, uint16_t* y, long rows, long width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= FEW)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += 16) {
            const __m512 g = load(gate + r * stride + i), part = narrowed(_mm512_mul_ps(g, opened(g)));
            _mm256_storeu_si256((__m256i*)(y + r * width + i), rounded(_mm512_mul_ps(part, load(up + r * stride + i))));
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
}
