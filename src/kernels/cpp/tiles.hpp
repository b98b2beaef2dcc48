// Matrix products of the size of a chunk on the CPU's bf16 matrix units (AMX), with sums in fp32 and almost fp32's accuracy.
//
// A number is the sum of two of bf16 (to 2^-17 of it), or of one where it is a bf16 number already. A product of sums leaves out
// the term of both second parts: errors are below 2^-15 of the sum of magnitudes, mostly far below, and no product is rounded. Operands are packed into tiles of 16 rows of 64 bytes, zeros around them; a right operand has
// two of its rows side by side, as the unit reads them.
//
// TILES 1: the CPU's instructions. TILES 2: the same in plain C++, to test what surrounds them on any CPU.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.hpp"
#include "products.hpp"

#ifndef TILES
#define TILES 0
#endif

constexpr int TILE_SIZE = 16, TILE_DEPTH = 32;            // rows, or columns of a result; numbers of a row
constexpr int TILE_NUMBERS = TILE_SIZE * TILE_DEPTH;      // bf16, 1 KiB
constexpr int tiles_of(int n, int size) { return (n + size - 1) / size; }

#if TILES == 1
#if !defined(__AMX_BF16__) || !defined(__linux__)
#error "this compiler does not know the CPU's bf16 matrix units"
#endif
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILE_ZERO(i) _tile_zero(i)
#define TILE_LOAD(i, from) _tile_loadd(i, from, 64)
#define TILE_MULTIPLY(to, a, b) _tile_dpbf16ps(to, a, b)
#define TILE_STORE(i, to) _tile_stored(i, to, 64)

// Linux gives a process the units' registers when it asks for them: ARCH_REQ_XCOMP_PERM, XTILEDATA
inline bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// what was written is in memory: g++ does not tell all these instructions to its optimiser as readers of memory
inline void memory_is_read(const void *at) { __asm__ volatile("" : : "r"(at) : "memory"); }

// all tiles of full size, for the thread and the life of this; then as it was: other libraries configure theirs once
class TileConfiguration {
  alignas(64) unsigned char before[64];

 public:
  TileConfiguration() {
    alignas(64) unsigned char mine[64] = {1};  // palette
    for (int tile = 0; tile < 8; ++tile) {
      mine[16 + 2 * tile] = 64;         // bytes of a row
      mine[48 + tile] = TILE_SIZE;      // rows
    }
    memory_is_read(mine);
    _tile_storeconfig(before);
    _tile_loadconfig(mine);
  }
  ~TileConfiguration() {
    memory_is_read(before);
    _tile_loadconfig(before);  // of palette 0: releases
  }
  TileConfiguration(const TileConfiguration &) = delete;
  TileConfiguration &operator=(const TileConfiguration &) = delete;
};
#else
inline thread_local float emulated_tiles[8][TILE_SIZE * TILE_SIZE];
__attribute__((noinline)) inline void emulated_multiply(int to, int a, int b) {
  const auto *left = (const bfloat16 *)emulated_tiles[a], *right = (const bfloat16 *)emulated_tiles[b];
  for (int m = 0; m < TILE_SIZE; ++m)
    for (int pair = 0; pair < TILE_SIZE; ++pair)
      for (int half = 0; half < 2; ++half) {
        const float x = widened(left[m * TILE_DEPTH + 2 * pair + half]);
        for (int n = 0; n < TILE_SIZE; ++n)
          emulated_tiles[to][m * TILE_SIZE + n] += x * widened(right[pair * TILE_DEPTH + 2 * n + half]);
      }
}
#define TILE_ZERO(i) std::memset(emulated_tiles[i], 0, 1024)
#define TILE_LOAD(i, from) std::memcpy(emulated_tiles[i], from, 1024)
#define TILE_MULTIPLY(to, a, b) emulated_multiply(to, a, b)
#define TILE_STORE(i, to) std::memcpy(to, emulated_tiles[i], 1024)
inline bool tiles_permitted() { return true; }
inline void memory_is_read(const void *) {}
struct TileConfiguration {
  TileConfiguration() {}
  ~TileConfiguration() {}
};
#endif

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float with_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// the upper half of these bits is a number's first part, rounded to bf16, and the second, of what that leaves
constexpr uint32_t UPPER = 0xffff0000u;
inline uint32_t first_part(float x) { return bits_of(x) + 0x8000u; }
inline uint32_t second_part(float x) { return first_part(x - with_bits(first_part(x) & UPPER)); }

// numbers of a packed (rows, depth) or (depth, columns) operand
constexpr size_t packed_size(int rows, int depth, int terms) {
  return size_t(terms) * tiles_of(rows, TILE_SIZE) * tiles_of(depth, TILE_DEPTH) * TILE_NUMBERS;
}

// A (M, K), rows in one piece, to [term][tile of M][tile of K][16][32]
template <int TERMS> void pack_left(int M, int K, const float *a, ptrdiff_t a_row, uint16_t *to) {
  const int deep = tiles_of(K, TILE_DEPTH);
  const size_t term = packed_size(M, K, 1);
  if (M % TILE_SIZE || K % TILE_DEPTH) std::memset(to, 0, TERMS * term * sizeof *to);
  for (int m = 0; m < M; ++m)
    for (int tile = 0; tile < deep; ++tile) {
      const float *__restrict from = a + m * a_row + tile * TILE_DEPTH;
      uint16_t *__restrict first = to + (size_t(m / TILE_SIZE) * deep + tile) * TILE_NUMBERS + m % TILE_SIZE * TILE_DEPTH;
      const int columns = std::min(TILE_DEPTH, K - tile * TILE_DEPTH);
      for (int k = 0; k < columns; ++k) first[k] = uint16_t(first_part(from[k]) >> 16);
      if constexpr (TERMS == 2) {
        uint16_t *__restrict second = first + term;
        for (int k = 0; k < columns; ++k) second[k] = uint16_t(second_part(from[k]) >> 16);
      }
    }
}

// B (K, N), rows in one piece, to [term][tile of N][tile of K][16 pairs of rows][16][2]
template <int TERMS> void pack_right(int K, int N, const float *b, ptrdiff_t b_row, uint16_t *to) {
  const int deep = tiles_of(K, TILE_DEPTH);
  const size_t term = packed_size(N, K, 1);
  if (N % TILE_SIZE || K % TILE_DEPTH) std::memset(to, 0, TERMS * term * sizeof *to);
  static const float zeros[TILE_SIZE] = {};
  for (int k = 0; k < K; k += 2)
    for (int n = 0; n < N; n += TILE_SIZE) {
      const float *__restrict even = b + k * b_row + n, *__restrict odd = k + 1 < K ? even + b_row : zeros;
      uint16_t *place = to + (size_t(n / TILE_SIZE) * deep + k / TILE_DEPTH) * TILE_NUMBERS + k % TILE_DEPTH * TILE_SIZE;
      const int columns = std::min(TILE_SIZE, N - n);
      uint32_t *__restrict first = (uint32_t *)place;
      for (int j = 0; j < columns; ++j) first[j] = first_part(even[j]) >> 16 | (first_part(odd[j]) & UPPER);
      if constexpr (TERMS == 2) {
        uint32_t *__restrict second = (uint32_t *)(place + term);
        for (int j = 0; j < columns; ++j) second[j] = second_part(even[j]) >> 16 | (second_part(odd[j]) & UPPER);
      }
    }
}

// q (M, K) of bf16 as a left operand, k (N, K) of bf16 as the right operand k'
inline void pack_left(int M, int K, const bfloat16 *q, ptrdiff_t q_row, uint16_t *to) {
  const int deep = tiles_of(K, TILE_DEPTH);
  if (M % TILE_SIZE || K % TILE_DEPTH) std::memset(to, 0, packed_size(M, K, 1) * sizeof *to);
  for (int m = 0; m < M; ++m)
    for (int tile = 0; tile < deep; ++tile)
      std::memcpy(to + (size_t(m / TILE_SIZE) * deep + tile) * TILE_NUMBERS + m % TILE_SIZE * TILE_DEPTH,
                  q + m * q_row + tile * TILE_DEPTH, std::min(TILE_DEPTH, K - tile * TILE_DEPTH) * sizeof *q);
}
inline void pack_right_transposed(int N, int K, const bfloat16 *k, ptrdiff_t k_row, uint16_t *to) {
  const int deep = tiles_of(K, TILE_DEPTH), pairs = K / 2;
  if (N % TILE_SIZE || K % TILE_DEPTH) std::memset(to, 0, packed_size(N, K, 1) * sizeof *to);
  for (int n = 0; n < N; ++n) {
    uint16_t *place = to + size_t(n / TILE_SIZE) * deep * TILE_NUMBERS + n % TILE_SIZE * 2;
    for (int pair = 0; pair < pairs; ++pair) std::memcpy(place + pair * TILE_DEPTH, k + n * k_row + 2 * pair, 4);
    if (K % 2) std::memcpy(place + pairs * TILE_DEPTH, k + n * k_row + K - 1, 2);
  }
}

// to (M, N) = scale * (add + A (M, K) B (K, N)), A and B packed; add has the strides of to, may be to, may be null
template <Part PART, int A_TERMS, int B_TERMS>
void tile_product(int M, int N, int K, const uint16_t *a, const uint16_t *b, const float *add, float *to, ptrdiff_t to_row, float scale) {
  const int deep = tiles_of(K, TILE_DEPTH), tall = tiles_of(M, TILE_SIZE), wide = tiles_of(N, TILE_SIZE);
  const size_t strip = size_t(deep) * TILE_NUMBERS, a_term = tall * strip, b_term = wide * strip;
  alignas(64) float sums[4][TILE_SIZE * TILE_SIZE];
  memory_is_read(a);
  for (int j = 0; j < wide; j += 2)
    for (int i = 0; i < tall; i += 2) {
      const int rows = std::min(2 * TILE_SIZE, M - i * TILE_SIZE), columns = std::min(2 * TILE_SIZE, N - j * TILE_SIZE);
      if (PART == Part::lower_result && j * TILE_SIZE >= i * TILE_SIZE + rows) continue;
      const int first = PART == Part::upper_a ? i * TILE_SIZE / TILE_DEPTH : 0;
      const int last = PART == Part::lower_a ? std::min(deep, tiles_of(i * TILE_SIZE + rows, TILE_DEPTH)) : deep;
      const bool below = i + 1 < tall, beside = j + 1 < wide;
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
      const auto multiply = [&] {  // A's tiles 4, 5 by B's 6, 7
        TILE_MULTIPLY(0, 4, 6);
        if (beside) TILE_MULTIPLY(1, 4, 7);
        if (below) TILE_MULTIPLY(2, 5, 6);
        if (below && beside) TILE_MULTIPLY(3, 5, 7);
      };
      const auto load_left = [&](const uint16_t *from) {
        TILE_LOAD(4, from);
        if (below) TILE_LOAD(5, from + strip);
      };
      const auto load_right = [&](const uint16_t *from) {
        TILE_LOAD(6, from);
        if (beside) TILE_LOAD(7, from + strip);
      };
      for (int k = first; k < last; ++k) {
        const uint16_t *left = a + i * strip + size_t(k) * TILE_NUMBERS, *right = b + j * strip + size_t(k) * TILE_NUMBERS;
        load_left(left);
        if constexpr (B_TERMS == 2) {
          load_right(right + b_term);
          multiply();
        }
        load_right(right);
        multiply();
        if constexpr (A_TERMS == 2) {
          load_left(left + a_term);
          multiply();
        }
      }
      TILE_STORE(0, sums[0]);
      TILE_STORE(1, sums[1]);
      TILE_STORE(2, sums[2]);
      TILE_STORE(3, sums[3]);
      for (int m = 0; m < rows; ++m)
        for (int half = 0; half <= int(beside); ++half) {
          const float *__restrict sum = sums[m / TILE_SIZE * 2 + half] + m % TILE_SIZE * TILE_SIZE;
          float *at = to + (i * TILE_SIZE + m) * to_row + (j + half) * TILE_SIZE;
          const float *more = add ? add + (at - to) : nullptr;
          const int n = std::min(TILE_SIZE, columns - half * TILE_SIZE);
          for (int c = 0; c < n; ++c) at[c] = scale * (sum[c] + (more ? more[c] : 0.0f));
        }
    }
}
