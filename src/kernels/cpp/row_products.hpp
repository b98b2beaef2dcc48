// Products of few vectors with matrices whose rows lie in one piece, fp32 or bf16: what decoding a token needs, bound by reading
// the matrix. Nothing is packed; each number is summed in the same order whatever the number of vectors is.
#pragma once
#include <limits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "numbers.hpp"
#include "products.hpp"

typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
constexpr int N = LANES<float>;

inline Vector<float> vector_at(const float *x) { return *(const Unaligned<float> *)x; }
inline Vector<float> vector_at(const bfloat16 *x) {
#if defined(__AVX512F__)
  return (Vector<float>)((Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)) << 16);
#elif defined(__AVX2__)  // g++ 12 makes four instructions of the line below
  return (Vector<float>)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)) << 16);
#else
  return (Vector<float>)(__builtin_convertvector(*(const Half *)x, Bits) << 16);
#endif
}
inline void put(float *to, Vector<float> x) { *(Unaligned<float> *)to = x; }
template <class V> inline float across(V x) {  // halves onto each other
  typedef float Four __attribute__((vector_size(16)));
  Four y;
  if constexpr (sizeof(V) == 16) {
    y = x;
  } else if constexpr (sizeof(V) == 32) {
    y = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  } else {
    typedef float Eight __attribute__((vector_size(32)));
    const Eight z = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    y = __builtin_shufflevector(z, z, 0, 1, 2, 3) + __builtin_shufflevector(z, z, 4, 5, 6, 7);
  }
  return (y[0] + y[2]) + (y[1] + y[3]);
}

// to[b, r] = x[b] · w[r] for ROWS rows of w and COLUMNS sequences; each sum in one vector, then across, then the rest
template <int ROWS, int COLUMNS, bool AHEAD = false, class W>
inline void dots(int64_t K, const W *w, const float *x, int64_t x_row, float *to, int64_t to_row) {
  Vector<float> sum[ROWS][COLUMNS] = {};
  const int64_t whole = K / N * N;
  for (int64_t k = 0; k < whole; k += N) {
    Vector<float> right[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) right[c] = vector_at(x + c * x_row + k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      if (AHEAD) __builtin_prefetch(w + (r + ROWS) * K + k);
      const Vector<float> left = vector_at(w + r * K + k);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      float total = across(sum[r][c]);
      for (int64_t k = whole; k < K; ++k) total += widened(w[r * K + k]) * x[c * x_row + k];
      to[c * to_row + r] = total;
    }
}
template <int ROWS, bool AHEAD, class W>
inline void dots_of_four(int64_t K, const W *w, const float *x, int64_t x_row, float *to, int64_t to_row) {
  constexpr int HALF = ROWS == 4 ? 2 : ROWS;
  for (int r = 0; r < ROWS; r += HALF) dots<HALF, 4, AHEAD>(K, w + r * K, x, x_row, to + r, to_row);
}
// Memory comes faster from four rows side by side than from two; four vectors leave registers for two rows only, so that the next
// two are fetched ahead, once.
template <int ROWS, class W>
inline void dots_of(int64_t B, int64_t K, const W *w, const float *x, int64_t x_row, float *to, int64_t to_row) {
  int64_t b = B / 4 * 4;
  if (b > 0) dots_of_four<ROWS, true>(K, w, x, x_row, to, to_row);
  for (int64_t c = 4; c < b; c += 4) dots_of_four<ROWS, false>(K, w, x + c * x_row, x_row, to + c * to_row, to_row);
  x += b * x_row, to += b * to_row, b = B - b;
  if (b >= 2) dots<ROWS, 2>(K, w, x, x_row, to, to_row);
  if (b % 2) dots<ROWS, 1>(K, w, x + (b - 1) * x_row, x_row, to + (b - 1) * to_row, to_row);
}
// to (B, first ... last of to's columns) = x (B, K) wᵀ for the rows first ... last of w (rows, K)
template <class W>
void product_of_rows(int64_t first, int64_t last, int64_t B, int64_t K, const W *w, const float *x, int64_t x_row, float *to, int64_t to_row) {
  int64_t r = first;
  for (; r + 4 <= last; r += 4) dots_of<4>(B, K, w + r * K, x, x_row, to + r, to_row);
  for (; r < last; ++r) dots_of<1>(B, K, w + r * K, x, x_row, to + r, to_row);
}

// to 2e-7 of itself: a series near 0, where the exponential would cancel
inline float hyperbolic_tangent(float x) {
  const float u = x * x, series = x * (1.0f + u * (-1.0f / 3 + u * (2.0f / 15 + u * (-17.0f / 315 + u * (62.0f / 2835)))));
  return u < 0.04f ? series : 2.0f * sigmoid(2.0f * x) - 1.0f;
}
// the first of the largest numbers
inline int64_t likeliest(int64_t n, const float *x) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) most = x[j] > most ? x[j] : most;
  const int64_t found = std::find(x, x + n, most) - x;
  return found < n ? found : 0;  // nothing but NaN
}
