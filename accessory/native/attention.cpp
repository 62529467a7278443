// Attention over a cache whose rows are read as far as each goes, and what is stored there.

#include "common.h"

namespace {

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

// Queries of one row whose heads share keys and values: these as panels, and rows of scores.
struct Block {
    std::vector<uint16_t> keys, values, weights;
    std::vector<float> scores;

    // Keys [count][width] to panels of 64 of them, values to panels of 64 of their numbers.
    void hold(const uint16_t* k, const uint16_t* v, long count, long width) {
        const long panels = (count + PANEL - 1) / PANEL, pairs = (count + 1) / 2;
        keys.assign(panels * PANEL * width, 0);
        values.assign((width + PANEL - 1) / PANEL * PANEL * 2 * pairs, 0);
        for (long s = 0; s < count; s += 16) pack_group(k + s * width, width, count - s, width / 2, s, keys.data());
        for (long p = 0; p < pairs; p++)
            for (long d = 0; d < width; d += 16) {
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + 2 * p * width + d)));
                __m512i high = _mm512_setzero_si512();
                if (2 * p + 1 < count)
                    high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + (2 * p + 1) * width + d)));
                uint16_t* out = values.data() + (d / PANEL * pairs * PANEL + p * PANEL + d % PANEL) * 2;
                _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        pairs_of_values = pairs;
    }

    // `n` queries, each seeing `from[i]` .. `count[i]` - 1 of what is held, to y.
    void attend(const uint16_t* q, long q_stride, long n, long width, const long* from, const long* count, float scale,
                uint16_t* y) {
        const long most = *std::max_element(count, count + n), panels = (most + PANEL - 1) / PANEL;
        const long length = panels * PANEL;
        scores.resize(n * length + 16);
        weights.resize(n * length);
        for (long p = 0; p < panels; p++)
            SCORES[n](q, q_stride, keys.data() + p * PANEL * width, width / 2, scale, scores.data() + p * PANEL,
                      length);
        for (long i = 0; i < n; i++) {
            float* row = scores.data() + i * length;
            uint16_t* out = weights.data() + i * length;
            memset(out, 0, 2 * length);
            if (count[i] <= from[i]) continue;
            // a copy, as what softmax writes behind the last score belongs to the next query
            seen.assign(row + from[i], row + count[i]);
            seen.resize(count[i] - from[i] + 16);
            const __m512 share = _mm512_set1_ps(1.0f / softmax(seen.data(), count[i] - from[i]));
            for (long s = from[i]; s < count[i]; s += 16) {
                const __m256i part = rounded(_mm512_mul_ps(_mm512_loadu_ps(seen.data() + s - from[i]), share));
                _mm256_mask_storeu_epi16(out + s, first(count[i] - s), part);
            }
        }
        for (long d = 0; d < width; d += PANEL)
            TILES[n](weights.data(), length, values.data() + d * pairs_of_values * 2, (most + 1) / 2, nullptr, y + d,
                     q_stride, width - d, Ahead{nullptr, 0});
    }

   private:
    std::vector<float> seen;
    long pairs_of_values = 0;
};

}  // namespace

extern "C" {

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

// The same for many queries a row: blocks of them share the work on keys and values. Weights are rounded to bf16.
void attend_many(const uint16_t* q, const uint16_t* keys, const uint16_t* values, const int64_t* rows,
                 const int64_t* positions, uint16_t* y, long batch, long length, long heads, long kv_heads, long width,
                 long row_stride, long head_stride, long window, float scale, int threads) {
    constexpr long CHUNK = 16 * ROWS;  // queries of a task
    const long each = heads / kv_heads, chunks = (length + CHUNK - 1) / CHUNK, stride = heads * width;
#pragma omp parallel num_threads(threads)
    {
        Block block;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < batch * kv_heads * chunks; task++) {
            const long chunk = chunks - 1 - task % chunks;  // the longest first
            const long b = task / chunks / kv_heads, g = task / chunks % kv_heads;
            const long begin = chunk * CHUNK, end = std::min(begin + CHUNK, length);
            const int64_t* places = positions + b * length;
            const long most = *std::max_element(places + begin, places + end) + 1;
            const long least = *std::min_element(places + begin, places + end) + 1;
            const long low = window > 0 ? std::max(0L, least - window) : 0;  // nobody looks further back
            const long start = (rows ? rows[b] : b) * row_stride + g * head_stride + low * width;
            block.hold(keys + start, values + start, most - low, width);
            for (long h = g * each; h < (g + 1) * each; h++)
                for (long t = begin; t < end; t += ROWS) {
                    const long n = std::min(ROWS, end - t), at = (b * length + t) * stride + h * width;
                    long from[ROWS], count[ROWS];
                    for (long i = 0; i < n; i++) {
                        count[i] = places[t + i] + 1 - low;
                        from[i] = window > 0 ? std::max(0L, count[i] - window) : 0;
                    }
                    block.attend(q + at, stride, n, width, from, count, scale, y + at);
                }
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
