// mLSTM, chunkwise-parallel, forward and backward, one head after the other in the caches of a core.
//
// What chunkwise_cpu.py computes, with its notation: in a chunk of L tokens, queries q~ = q * query, keys k~ = k * key, state
// C, n before it; P = lower(q~ k~'), numerator = P v + q~ C, denominator = P 1 + q~ n, h = numerator * inverse,
// inverse = 1 / (max(|denominator|, floor) + eps); the state after it is (C + k~' v, n + k~' 1) * decay of the next chunk.
// Inputs of 16 bits are widened as they are read; everything between is of type T: float, or double for doubles. Where the CPU
// multiplies bf16 in tiles (tiles.hpp), the products of bf16 inputs are made there: P of q and k as they are, its weights after
// it, so that the denominator is as exact as elsewhere; other products of numbers in two parts.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "numbers.hpp"
#include "products.hpp"
#include "tiles.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

// (B, H, T, columns) with columns in one piece
struct Tokens {
  void *data;
  int64_t batch, head, token;  // strides in elements
};

struct Problem {
  int64_t heads;  // H of R = B * H
  int64_t R, T, L, N, d_qk, d_v, state_row, threads;
  int64_t past, future;  // there is an initial state; there is a gradient of the last one
  double eps;
  Tokens q, k, v, h;
  const void *query, *key, *floor;  // (N, R, L)
  const void *decay;                // (N + 1, R)
  void *states, *normalisers;       // (N + 1, R, d_qk, state_row), (N + 1, R, d_qk): before each chunk, and the last; or two of them
  int64_t keep;                     // states of all chunks
  void *denominator, *inverse;      // (N, R, L)
  // backward
  Tokens dh, dq, dk, dv;
  void *dC, *dn;                    // (R, d_qk, state_row), (R, d_qk): of the last state, then of the first
  void *leaving, *crossing, *dh_h;  // (N, R, L): mass that leaves a token, that crosses it; dh . h
  void *end;                        // (R,): mass that crosses the end
};

template <class T> struct Scratch {
  T *next;
  T *take(size_t size) { return (next += size) - size; }
};

template <class X> const X *at(const Tokens &x, int64_t H, int64_t r, int64_t t) {
  return (const X *)x.data + (r / H) * x.batch + (r % H) * x.head + t * x.token;
}
template <class X> X *at_(const Tokens &x, int64_t H, int64_t r, int64_t t) { return const_cast<X *>(at<X>(x, H, r, t)); }

// to (rows, columns) = x * weight of its row
template <class X, class T> void load(int rows, int columns, const X *__restrict x, int64_t x_row, const T *weight, T *__restrict to, int to_row) {
  for (int t = 0; t < rows; ++t) {
    const T w = weight ? weight[t] : T(1);
    for (int d = 0; d < columns; ++d) to[t * to_row + d] = T(widened(x[t * x_row + d])) * w;
  }
}
template <class X, class T> void store(int rows, int columns, const T *__restrict from, int from_row, const T *weight, X *__restrict x, int64_t x_row) {
  for (int t = 0; t < rows; ++t) {
    const T w = weight ? weight[t] : T(1);
    for (int d = 0; d < columns; ++d) narrow(from[t * from_row + d] * w, x[t * x_row + d]);
  }
}
// what lies above the diagonal becomes 0
template <class T> void clear_upper(int rows, T *x, int row) {
  for (int t = 0; t < rows; ++t) std::fill(x + t * row + t + 1, x + (t + 1) * row, T(0));
}

template <class X, class T> struct Head {
  static constexpr bool TILED = TILES && std::is_same_v<X, bfloat16>;
  const Problem &p;
  const int L, dq, dv, L_row, q_row, v_row;  // row strides
  const int64_t c_row, state_size;

  explicit Head(const Problem &p)
      : p(p), L(int(p.L)), dq(int(p.d_qk)), dv(int(p.d_v)), L_row(row_stride<T>(L)), q_row(row_stride<T>(dq)),
        v_row(row_stride<T>(dv)), c_row(p.state_row), state_size(p.d_qk * p.state_row) {}

  T *tokens(void *x, int64_t c, int64_t r) const { return (T *)x + (c * p.R + r) * L; }
  const T *tokens(const void *x, int64_t c, int64_t r) const { return (const T *)x + (c * p.R + r) * L; }
  T *state(int64_t c, int64_t r) const { return (T *)p.states + ((p.keep ? c : 0) * p.R + r) * state_size; }
  T *normaliser(int64_t c, int64_t r) const { return (T *)p.normalisers + ((p.keep ? c : 0) * p.R + r) * dq; }
  T decay(int64_t c, int64_t r) const { return ((const T *)p.decay)[c * p.R + r]; }

  // operands of one product on the tiles
  struct Operands {
    uint16_t *left = nullptr, *right = nullptr;
    T *flipped = nullptr;
  };
  size_t packed() const {
    const int most = std::max({L, dq, dv});
    return TILED ? packed_size(most, most, 2) * sizeof(uint16_t) / sizeof(T) : 0;
  }
  size_t flipped() const { return TILED ? size_t(std::max(L_row, q_row)) * L_row : 0; }
  size_t operands_size() const { return 2 * packed() + flipped(); }
  Operands operands(Scratch<T> &scratch) const {
    T *left = scratch.take(packed()), *right = scratch.take(packed());
    return {(uint16_t *)left, (uint16_t *)right, scratch.take(flipped())};
  }

  // what product() computes; on the tiles A and B are taken in so many parts, 1 where they hold what was bf16
  template <Part PART, int A_PARTS, int B_PARTS>
  void multiply(const Operands &operands, int M, int N, int K, Left<T> a, const T *b, ptrdiff_t b_row, const T *add, T *to,
                ptrdiff_t to_row, T scale = 1) const {
    if constexpr (TILED) {
      if (a.column != 1) {
        transpose(K, M, a.data, a.column, operands.flipped, L_row);
        a = {operands.flipped, L_row, 1};
      }
      pack_left<A_PARTS>(M, K, a.data, a.row, operands.left);
      pack_right<B_PARTS>(K, N, b, b_row, operands.right);
      tile_product<PART, A_PARTS, B_PARTS>(M, N, K, operands.left, operands.right, add, to, to_row, scale);
    } else {
      product<PART>(M, N, K, a, b, b_row, add, to, to_row, scale);
    }
  }

  // P of l tokens from start, 0 above the diagonal. q, k_t: weighted
  void scores(const Operands &operands, int64_t c, int64_t r, int64_t start, int l, const T *q, const T *k_t, T *P) const {
    if constexpr (TILED) {
      const T *query = tokens(p.query, c, r), *key = tokens(p.key, c, r);
      pack_left(l, dq, at<X>(p.q, p.heads, r, start), p.q.token, operands.left);
      pack_right_transposed(l, dq, at<X>(p.k, p.heads, r, start), p.k.token, operands.right);
      tile_product<Part::lower_result, 1, 1>(l, l, dq, operands.left, operands.right, (const T *)nullptr, P, L_row, T(1));
      for (int t = 0; t < l; ++t)
        for (int s = 0; s <= t; ++s) P[t * L_row + s] *= query[t] * key[s];
    } else {
      product<Part::lower_result>(l, padded<T>(l), dq, {q, q_row, 1}, k_t, L_row, (const T *)nullptr, P, L_row);
    }
    clear_upper(l, P, L_row);
  }

  size_t forward_size() const {
    return size_t(2) * L_row * q_row + size_t(q_row) * L_row + size_t(L_row) * (2 * v_row + L_row) + operands_size();
  }

  void forward(int64_t r, Scratch<T> &scratch) const {
    T *q = scratch.take(L_row * q_row), *k = scratch.take(L_row * q_row), *k_t = scratch.take(q_row * L_row);
    T *v = scratch.take(L_row * v_row), *out = scratch.take(L_row * v_row), *P = scratch.take(L_row * L_row);
    const Operands packed = operands(scratch);
    for (int64_t c = 0; c < p.N; ++c) {
      const int64_t start = c * L;
      const int l = int(std::min<int64_t>(L, p.T - start));
      T *C = state(c, r), *n = normaliser(c, r), *C_next = state(c + 1, r), *n_next = normaliser(c + 1, r);
      load(l, dq, at<X>(p.q, p.heads, r, start), p.q.token, tokens(p.query, c, r), q, q_row);
      load(l, dq, at<X>(p.k, p.heads, r, start), p.k.token, tokens(p.key, c, r), k, q_row);
      load<X, T>(l, dv, at<X>(p.v, p.heads, r, start), p.v.token, nullptr, v, v_row);
      if (l < L) std::fill(k_t, k_t + q_row * L_row, T(0));
      transpose(l, dq, k, q_row, k_t, L_row);
      scores(packed, c, r, start, l, q, k_t, P);
      const bool past = c || p.past;
      multiply<Part::lower_a, 2, 1>(packed, l, padded<T>(dv), l, {P, L_row, 1}, v, v_row, nullptr, out, v_row);
      if (past) multiply<Part::all, 2, 2>(packed, l, padded<T>(dv), dq, {q, q_row, 1}, C, c_row, out, out, v_row);
      T *denominator = tokens(p.denominator, c, r), *inverse = tokens(p.inverse, c, r);
      const T *floor = tokens(p.floor, c, r);
      for (int t = 0; t < l; ++t) {
        denominator[t] = total(t + 1, P + t * L_row) + (past ? dot(dq, q + t * q_row, n) : T(0));
        inverse[t] = T(1) / (std::max(std::abs(denominator[t]), floor[t]) + T(p.eps));
      }
      store(l, dv, out, v_row, inverse, at_<X>(p.h, p.heads, r, start), p.h.token);
      // in place if the states are not kept
      const T factor = decay(c + 1, r);
      multiply<Part::all, 2, 1>(packed, dq, padded<T>(dv), l, {k_t, L_row, 1}, v, v_row, C, C_next, c_row, factor);
      for (int d = 0; d < dq; ++d) n_next[d] = (n[d] + total(l, k_t + d * L_row)) * factor;
    }
  }

  size_t backward_size() const {
    return size_t(L_row) * (5 * q_row + 5 * v_row + 2 * L_row) + size_t(2) * v_row * q_row + 2 * L_row + operands_size();
  }

  void backward(int64_t r, Scratch<T> &scratch) const {
    T *q = scratch.take(L_row * q_row), *k = scratch.take(L_row * q_row), *k_t = scratch.take(q_row * L_row);
    T *part = scratch.take(L_row * q_row), *grad = scratch.take(L_row * q_row);
    T *v = scratch.take(L_row * v_row), *v_t = scratch.take(v_row * L_row), *out = scratch.take(L_row * v_row);
    T *h = scratch.take(L_row * v_row), *wide = scratch.take(L_row * v_row);
    T *P = scratch.take(L_row * L_row), *dP = scratch.take(L_row * L_row);
    T *C_t = scratch.take(v_row * q_row), *dC_t = scratch.take(v_row * q_row);
    T *dden = scratch.take(L_row), *column = scratch.take(L_row);
    const Operands packed = operands(scratch);
    const int lanes_v = padded<T>(dv), lanes_q = padded<T>(dq);
    T *dC = (T *)p.dC + r * state_size, *dn = (T *)p.dn + r * dq;
    for (int64_t j = 0; j < state_size; ++j) dC[j] *= decay(p.N, r);
    for (int j = 0; j < dq; ++j) dn[j] *= decay(p.N, r);
    for (int64_t c = p.N - 1; c >= 0; --c) {
      const int64_t start = c * L;
      const int l = int(std::min<int64_t>(L, p.T - start)), lanes_l = padded<T>(l);
      const bool past = c || p.past, future = c + 1 < p.N || p.future;
      const T *C = state(c, r), *n = normaliser(c, r);
      const T *query = tokens(p.query, c, r), *key = tokens(p.key, c, r), *floor = tokens(p.floor, c, r);
      const T *denominator = tokens(p.denominator, c, r), *inverse = tokens(p.inverse, c, r);
      T *leaving = tokens(p.leaving, c, r), *crossing = tokens(p.crossing, c, r), *dh_h = tokens(p.dh_h, c, r);
      load(l, dq, at<X>(p.q, p.heads, r, start), p.q.token, query, q, q_row);
      load(l, dq, at<X>(p.k, p.heads, r, start), p.k.token, key, k, q_row);
      load<X, T>(l, dv, at<X>(p.v, p.heads, r, start), p.v.token, nullptr, v, v_row);
      load(l, dv, at<X>(p.dh, p.heads, r, start), p.dh.token, inverse, out, v_row);  // gradient of the numerator
      load<X, T>(l, dv, at<X>(p.h, p.heads, r, start), p.h.token, nullptr, h, v_row);
      if (l < L) {
        std::fill(k_t, k_t + q_row * L_row, T(0));
        std::fill(v_t, v_t + v_row * L_row, T(0));
      }
      if constexpr (!TILED) transpose(l, dq, k, q_row, k_t, L_row);
      transpose(l, dv, v, v_row, v_t, L_row);
      for (int t = 0; t < l; ++t) {
        dh_h[t] = dot(dv, out + t * v_row, h + t * v_row);
        const T sign = std::abs(denominator[t]) > floor[t] ? (denominator[t] > 0 ? T(-1) : T(1)) : T(0);
        dden[t] = dh_h[t] * sign;
      }
      // pairs within the chunk
      scores(packed, c, r, start, l, q, k_t, P);
      multiply<Part::lower_result, 2, 1>(packed, l, lanes_l, dv, {out, v_row, 1}, v_t, L_row, nullptr, dP, L_row);
      // The mass of a pair is P dP. Across token t go the pairs of s < t with t' >= t: going up the rows, column[s] is what s
      // has with the rows so far.
      std::fill(column, column + L_row, T(0));
      for (int t = l - 1; t >= 0; --t) {
        T *__restrict dp = dP + t * L_row;
        const T *__restrict weight = P + t * L_row;
        const T add = dden[t];
        T sum = 0;
        for (int s = 0; s <= t; ++s) dp[s] += add;
        std::fill(dp + t + 1, dp + L_row, T(0));
        leaving[t] = column[t] + dp[t] * weight[t];
#pragma omp simd reduction(+ : sum)
        for (int s = 0; s < t; ++s) sum += column[s] += dp[s] * weight[s];
        crossing[t] = sum;
      }
      T through = 0;  // from before the chunk to after it
      if (past && future) {
        through = dot(dq, dn, n);
        for (int d = 0; d < dq; ++d) through += dot(dv, dC + d * c_row, C + d * c_row);
      }
      // queries: from the past, then from the chunk
      if (past) {
        transpose(dq, dv, C, c_row, C_t, q_row);
        multiply<Part::all, 2, 2>(packed, l, lanes_q, dv, {out, v_row, 1}, C_t, q_row, nullptr, part, q_row);
        T sum = 0;  // mass from the past to t and later
        for (int t = l - 1; t >= 0; --t) {
          for (int d = 0; d < dq; ++d) part[t * q_row + d] += dden[t] * n[d];
          sum += dot(dq, part + t * q_row, q + t * q_row);
          crossing[t] += sum;
        }
      }
      multiply<Part::lower_a, 2, 2>(packed, l, lanes_q, l, {dP, L_row, 1}, k, q_row, past ? part : nullptr, grad, q_row);
      store(l, dq, grad, q_row, query, at_<X>(p.dq, p.heads, r, start), p.dq.token);
      // keys: from the future, then from the chunk
      if (future) {
        transpose(dq, dv, dC, c_row, dC_t, q_row);
        multiply<Part::all, 1, 2>(packed, l, lanes_q, dv, {v, v_row, 1}, dC_t, q_row, nullptr, part, q_row);
        T sum = through;  // and from before t to the future
        for (int t = 0; t < l; ++t) {
          for (int d = 0; d < dq; ++d) part[t * q_row + d] += dn[d];
          const T mass = dot(dq, part + t * q_row, k + t * q_row);
          leaving[t] += mass;
          crossing[t] += sum;
          sum += mass;
        }
        if (c + 1 == p.N) ((T *)p.end)[r] = sum;
      }
      multiply<Part::upper_a, 2, 2>(packed, l, lanes_q, l, {dP, 1, L_row}, q, q_row, future ? part : nullptr, grad, q_row);
      store(l, dq, grad, q_row, key, at_<X>(p.dk, p.heads, r, start), p.dk.token);
      // values
      multiply<Part::upper_a, 2, 2>(packed, l, lanes_v, l, {P, 1, L_row}, out, v_row, nullptr, wide, v_row);
      if (future) multiply<Part::all, 2, 2>(packed, l, lanes_v, dq, {k, q_row, 1}, dC, c_row, wide, wide, v_row);
      store<X, T>(l, dv, wide, v_row, nullptr, at_<X>(p.dv, p.heads, r, start), p.dv.token);
      // the state before the chunk
      if (past) {
        const T factor = decay(c, r);
        multiply<Part::all, 2, 2>(packed, dq, lanes_v, l, {q, 1, q_row}, out, v_row, dC, dC, c_row, factor);
        for (int t = 0; t < l; ++t)
          for (int d = 0; d < dq; ++d) dn[d] += dden[t] * q[t * q_row + d];
        for (int d = 0; d < dq; ++d) dn[d] *= factor;
      }
    }
  }
};

template <class X, class T, bool BACKWARD> int run(const Problem &p) {
  if (Head<X, T>::TILED && !tiles_permitted()) return 2;  // a process asks for itself
  const Head<X, T> head(p);
  const size_t size = (BACKWARD ? head.backward_size() : head.forward_size()) * sizeof(T), bytes = (size + 4095) / 4096 * 4096;
  char *memory = (char *)std::aligned_alloc(4096, bytes * p.threads);
  if (!memory) return 1;
#pragma omp parallel num_threads(int(p.threads)) if (p.threads > 1)
  {
#ifdef _OPENMP
    char *mine = memory + bytes * omp_get_thread_num();
#else
    char *mine = memory;
#endif
    std::memset(mine, 0, bytes);
    [[maybe_unused]] const std::conditional_t<Head<X, T>::TILED, TileConfiguration, char> configuration{};
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.R; ++r) {
      Scratch<T> scratch{(T *)mine};
      BACKWARD ? head.backward(r, scratch) : head.forward(r, scratch);
    }
  }
  std::free(memory);
  return 0;
}

extern "C" {
// 0, 1 where there is no memory, 2 where the system refuses the tiles. type of q, k, v, h: 0 fp32, 1 bf16, 2 fp64
int mlstm_forward(const Problem *p, int type) {
  return type == 0 ? run<float, float, false>(*p) : type == 1 ? run<bfloat16, float, false>(*p) : run<double, double, false>(*p);
}
int mlstm_backward(const Problem *p, int type) {
  return type == 0 ? run<float, float, true>(*p) : type == 1 ? run<bfloat16, float, true>(*p) : run<double, double, true>(*p);
}
int vector_bytes() { return VECTOR_BYTES; }
}
