// Matrix products of the size of a chunk: operands lie in the caches, nothing is packed. B and the result have rows in
// one piece whose length is a multiple of LANES<T>; A is read one element at a time, so it may have any strides.
#pragma once
#include <algorithm>
#include <cstddef>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 6;
#endif
constexpr int TILE_VECTORS = 2;

template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(T));
template <class T> struct Simd;
template <> struct Simd<float> {
  typedef float aligned __attribute__((vector_size(VECTOR_BYTES)));
  typedef float anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(float)), may_alias));
};
template <> struct Simd<double> {
  typedef double aligned __attribute__((vector_size(VECTOR_BYTES)));
  typedef double anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(double)), may_alias));
};
template <class T> using Vector = typename Simd<T>::aligned;
template <class T> using Unaligned = typename Simd<T>::anywhere;

// a number of columns that is a multiple of a vector's
template <class T> constexpr int padded(int columns) { return (columns + LANES<T> - 1) / LANES<T> * LANES<T>; }
// distance between rows: padded, and no multiple of 512 bytes, or rows would compete for few places in the L1 cache
template <class T> constexpr int row_stride(int columns) {
  int n = padded<T>(columns);
  return n * sizeof(T) % 512 ? n : n + LANES<T>;
}

template <class T> struct Left { const T *data; ptrdiff_t row, column; };  // A with its strides

// which elements matter: all; A[m, k] of k <= m; A[m, k] of k >= m; the result's [m, n] of n <= m
enum class Part { all, lower_a, upper_a, lower_result };

// to[m, n] = scale * (add[m, n] + sum of a[m, k] b[k, n] over first <= k < last)
template <class T, int ROWS, int VECTORS>
inline void tile(int first, int last, Left<T> a, const T *b, ptrdiff_t b_row, const T *add, T *to, ptrdiff_t to_row, T scale) {
  Vector<T> sum[ROWS][VECTORS] = {};
  const T *left = a.data + first * a.column;
  b += first * b_row;
  for (int k = first; k < last; ++k, left += a.column, b += b_row) {
    Vector<T> right[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) right[j] = *(const Unaligned<T> *)(b + j * LANES<T>);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const T x = left[m * a.row];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sum[m][j] += x * right[j];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      const ptrdiff_t at = m * to_row + j * LANES<T>;
      Vector<T> x = sum[m][j];
      if (add) x += *(const Unaligned<T> *)(add + at);
      *(Unaligned<T> *)(to + at) = x * scale;
    }
}

template <class T, int VECTORS, int ROWS = TILE_ROWS>
inline void rows_of_tile(int rows, int first, int last, Left<T> a, const T *b, ptrdiff_t b_row, const T *add, T *to, ptrdiff_t to_row,
                         T scale) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return rows_of_tile<T, VECTORS, ROWS - 1>(rows, first, last, a, b, b_row, add, to, to_row, scale);
  }
  tile<T, ROWS, VECTORS>(first, last, a, b, b_row, add, to, to_row, scale);
}

// to (M, N) = scale * (add + A (M, K) B (K, N)); add has the strides of to, may be to, may be null. N: a multiple of LANES
template <Part PART, class T>
void product(int M, int N, int K, Left<T> a, const T *b, ptrdiff_t b_row, const T *add, T *to, ptrdiff_t to_row, T scale = 1) {
  for (int n = 0; n < N; n += TILE_VECTORS * LANES<T>) {
    const bool wide = N - n >= TILE_VECTORS * LANES<T>;
    for (int m = 0; m < M; m += TILE_ROWS) {
      const int rows = std::min(TILE_ROWS, M - m);
      if (PART == Part::lower_result && n >= m + rows) continue;
      const int first = PART == Part::upper_a ? m : 0, last = PART == Part::lower_a ? std::min(K, m + rows) : K;
      const ptrdiff_t at = m * to_row + n;
      const Left<T> part{a.data + m * a.row, a.row, a.column};
      (wide ? rows_of_tile<T, TILE_VECTORS> : rows_of_tile<T, 1>)(rows, first, last, part, b + n, b_row, add ? add + at : nullptr,
                                                                   to + at, to_row, scale);
    }
  }
}

// to (columns, rows) = from (rows, columns)
template <class T> void transpose(int rows, int columns, const T *from, ptrdiff_t from_row, T *to, ptrdiff_t to_row) {
  const int whole_rows = rows / 4 * 4, whole_columns = sizeof(T) == 4 ? columns / 4 * 4 : 0;
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  // columns outside: what is written stays in the L1 cache, in four rows
  for (int c = 0; c < whole_columns; c += 4)
    for (int r = 0; r < whole_rows; r += 4) {
      const T *x = from + r * from_row + c;
      T *y = to + c * to_row + r;
      const Four a = *(const Four *)x, b = *(const Four *)(x + from_row);
      const Four d = *(const Four *)(x + 2 * from_row), e = *(const Four *)(x + 3 * from_row);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four de = __builtin_shufflevector(d, e, 0, 4, 1, 5), DE = __builtin_shufflevector(d, e, 2, 6, 3, 7);
      *(Four *)y = __builtin_shufflevector(ab, de, 0, 1, 4, 5);
      *(Four *)(y + to_row) = __builtin_shufflevector(ab, de, 2, 3, 6, 7);
      *(Four *)(y + 2 * to_row) = __builtin_shufflevector(AB, DE, 0, 1, 4, 5);
      *(Four *)(y + 3 * to_row) = __builtin_shufflevector(AB, DE, 2, 3, 6, 7);
    }
  for (int r = whole_rows; r < rows; ++r)
    for (int c = 0; c < whole_columns; ++c) to[c * to_row + r] = from[r * from_row + c];
  for (int c = whole_columns; c < columns; ++c)
    for (int r = 0; r < rows; ++r) to[c * to_row + r] = from[r * from_row + c];
}
