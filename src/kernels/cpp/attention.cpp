// Causal attention with rotary positions, forward and backward, one head after the other in the caches of a core.
//
// A head's q, k, v are read from the product of a layer, q and k rotated as they are read; softmax in blocks of keys with a running
// maximum (Milakov & Gimelshein, 2018; Dao et al., FlashAttention, 2022), its logarithm kept for the backward pass, which computes
// the weights again. Query t sees the keys first[t] ... t: what belongs to its document.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "numbers.hpp"
#include "products.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

struct Problem {
  int64_t B, T, H, d, threads;
  const float *qkv;         // (B, T, 3, H, d)
  const float *cosine, *sine;  // (T, d)
  const int64_t *first;     // (B, T), or null: 0
  float *out, *log_sum;     // (B, T, H, d), (B, H, T)
  const float *d_out;       // (B, T, H, d)
  float *d_qkv;             // (B, T, 3, H, d)
};

constexpr int QUERIES = 60, KEYS = 128;  // of a block: whole tiles; two blocks of weights and what they meet fit the L2 cache

struct Head {
  const Problem &p;
  const int T, d, row, keys_row;
  const int64_t token, batch_token;
  const float scale;

  explicit Head(const Problem &p)
      : p(p), T(int(p.T)), d(int(p.d)), row(row_stride<float>(int(p.d))), keys_row(row_stride<float>(KEYS)), token(3 * p.H * p.d),
        batch_token(p.H * p.d), scale(1.0f / std::sqrt(float(p.d))) {}

  int blocks() const { return (T + KEYS - 1) / KEYS; }
  size_t transposed() const { return size_t(blocks()) * d * keys_row; }
  size_t whole() const { return size_t(T) * row; }

  // to (T, d) = rotated part of q, k (0, 1), times factor; v (2) as it is
  void load(int64_t r, int part, float factor, float *__restrict to) const {
    const float *x = p.qkv + (r / p.H) * T * token + (part * p.H + r % p.H) * d;
    for (int t = 0; t < T; ++t, x += token, to += row) {
      if (part == 2) {
        std::copy(x, x + d, to);
        continue;
      }
      const float *__restrict c = p.cosine + t * d, *__restrict s = p.sine + t * d;
      const int half = d / 2;
      for (int j = 0; j < half; ++j) {
        to[j] = (x[j] * c[j] - x[j + half] * s[j]) * factor;
        to[j + half] = (x[j + half] * c[j + half] + x[j] * s[j + half]) * factor;
      }
    }
  }
  // back from the gradient of what was loaded
  void store(int64_t r, int part, float factor, const float *__restrict from) const {
    float *x = p.d_qkv + (r / p.H) * T * token + (part * p.H + r % p.H) * d;
    for (int t = 0; t < T; ++t, x += token, from += row) {
      if (part == 2) {
        std::copy(from, from + d, x);
        continue;
      }
      const float *__restrict c = p.cosine + t * d, *__restrict s = p.sine + t * d;
      const int half = d / 2;
      for (int j = 0; j < half; ++j) {
        x[j] = (from[j] * c[j] + from[j + half] * s[j + half]) * factor;
        x[j + half] = (from[j + half] * c[j + half] - from[j] * s[j]) * factor;
      }
    }
  }
  // blocks of (d, KEYS)
  void transpose_blocks(const float *x, float *to) const {
    for (int start = 0; start < T; start += KEYS, to += size_t(d) * keys_row)
      transpose(std::min(KEYS, T - start), d, x + size_t(start) * row, row, to, keys_row);
  }
  const int64_t *first(int64_t r) const { return p.first ? p.first + (r / p.H) * T : nullptr; }

  size_t forward_size() const { return 3 * whole() + transposed() + size_t(QUERIES) * (keys_row + row) + 2 * QUERIES; }

  void forward(int64_t r, float *scratch) const {
    float *q = scratch, *k = q + whole(), *v = k + whole(), *k_t = v + whole(), *P = k_t + transposed();
    float *sum = P + size_t(QUERIES) * keys_row, *maximum = sum + size_t(QUERIES) * row, *total_ = maximum + QUERIES;
    const int64_t *begin = first(r);
    load(r, 0, scale, q);
    load(r, 1, 1.0f, k);
    load(r, 2, 1.0f, v);
    transpose_blocks(k, k_t);
    for (int i = 0; i < T; i += QUERIES) {
      const int rows = std::min(QUERIES, T - i), end = i + rows;
      std::fill(maximum, maximum + rows, -std::numeric_limits<float>::infinity());
      std::fill(total_, total_ + rows, 0.0f);
      const int start = begin ? int(begin[i]) / KEYS * KEYS : 0;  // documents begin later for later queries
      for (int j = start; j < end; j += KEYS) {
        const int keys = std::min(KEYS, end - j);
        product<Part::all>(rows, padded<float>(keys), d, {q + size_t(i) * row, row, 1}, k_t + size_t(j / KEYS) * d * keys_row, keys_row,
                           (const float *)nullptr, P, keys_row);
        for (int m = 0; m < rows; ++m) {
          float *__restrict w = P + m * keys_row;
          const int low = begin ? std::max(0, int(begin[i + m]) - j) : 0, high = std::min(keys, i + m + 1 - j);
          if (low >= high) {
            std::fill(w, w + keys, 0.0f);
            continue;
          }
          float most = maximum[m], part = 0;
#pragma omp simd reduction(max : most)
          for (int n = low; n < high; ++n) most = w[n] > most ? w[n] : most;
          std::fill(w, w + low, 0.0f);
          std::fill(w + high, w + keys, 0.0f);
#pragma omp simd reduction(+ : part)
          for (int n = low; n < high; ++n) part += w[n] = exponential(w[n] - most);
          if (most > maximum[m]) {
            const float factor = j == start || total_[m] == 0 ? 0.0f : exponential(maximum[m] - most);
            total_[m] *= factor;
            if (j > start)
              for (int n = 0; n < d; ++n) sum[m * row + n] *= factor;
            maximum[m] = most;
          }
          total_[m] += part;
        }
        product<Part::all>(rows, padded<float>(d), keys, {P, keys_row, 1}, v + size_t(j) * row, row, j > start ? sum : (const float *)nullptr,
                           sum, row);
      }
      for (int m = 0; m < rows; ++m) {
        float *out = p.out + ((r / p.H) * T + i + m) * batch_token + (r % p.H) * d;
        const float inverse = 1.0f / total_[m];
        for (int n = 0; n < d; ++n) out[n] = sum[m * row + n] * inverse;
        if (p.log_sum) p.log_sum[r * T + i + m] = maximum[m] + std::log(total_[m]);
      }
    }
  }

  size_t backward_size() const { return 6 * whole() + 2 * transposed() + size_t(QUERIES) * (2 * keys_row + 2 * row) + QUERIES; }

  void backward(int64_t r, float *scratch) const {
    float *q = scratch, *k = q + whole(), *v = k + whole(), *dq = v + whole(), *dk = dq + whole(), *dv = dk + whole();
    float *k_t = dv + whole(), *v_t = k_t + transposed(), *P = v_t + transposed(), *dP = P + size_t(QUERIES) * keys_row;
    float *g = dP + size_t(QUERIES) * keys_row, *delta = g + size_t(QUERIES) * row;
    const int64_t *begin = first(r);
    load(r, 0, scale, q);
    load(r, 1, 1.0f, k);
    load(r, 2, 1.0f, v);
    transpose_blocks(k, k_t);
    transpose_blocks(v, v_t);
    std::fill(dk, dk + whole(), 0.0f);
    std::fill(dv, dv + whole(), 0.0f);
    const int wide = padded<float>(d);
    for (int i = 0; i < T; i += QUERIES) {
      const int rows = std::min(QUERIES, T - i), end = i + rows;
      for (int m = 0; m < rows; ++m) {
        const int64_t at = ((r / p.H) * T + i + m) * batch_token + (r % p.H) * d;
        std::copy(p.d_out + at, p.d_out + at + d, g + m * row);
        delta[m] = dot(d, p.d_out + at, p.out + at);
      }
      const int start = begin ? int(begin[i]) / KEYS * KEYS : 0;
      float *dq_i = dq + size_t(i) * row, *q_i = q + size_t(i) * row;
      for (int j = start; j < end; j += KEYS) {
        const int keys = std::min(KEYS, end - j), lanes = padded<float>(keys);
        const size_t block = size_t(j / KEYS) * d * keys_row;
        product<Part::all>(rows, lanes, d, {q_i, row, 1}, k_t + block, keys_row, (const float *)nullptr, P, keys_row);
        product<Part::all>(rows, lanes, d, {g, row, 1}, v_t + block, keys_row, (const float *)nullptr, dP, keys_row);
        for (int m = 0; m < rows; ++m) {
          float *__restrict w = P + m * keys_row, *__restrict dw = dP + m * keys_row;
          const int low = begin ? std::max(0, int(begin[i + m]) - j) : 0, high = std::min(keys, i + m + 1 - j);
          const int from = std::min(low, keys), to = std::max(from, high);
          std::fill(w, w + from, 0.0f);
          std::fill(dw, dw + from, 0.0f);
          const float log_sum = p.log_sum[r * T + i + m], shift = delta[m];
#pragma omp simd
          for (int n = from; n < to; ++n) {
            w[n] = exponential(w[n] - log_sum);
            dw[n] = w[n] * (dw[n] - shift);
          }
          std::fill(w + to, w + keys, 0.0f);
          std::fill(dw + to, dw + keys, 0.0f);
        }
        float *dv_j = dv + size_t(j) * row, *dk_j = dk + size_t(j) * row;
        product<Part::all>(keys, wide, rows, {P, 1, keys_row}, g, row, dv_j, dv_j, row);
        product<Part::all>(keys, wide, rows, {dP, 1, keys_row}, q_i, row, dk_j, dk_j, row);
        product<Part::all>(rows, wide, keys, {dP, keys_row, 1}, k + size_t(j) * row, row, j > start ? dq_i : (const float *)nullptr, dq_i, row);
      }
    }
    store(r, 0, scale, dq);
    store(r, 1, 1.0f, dk);
    store(r, 2, 1.0f, dv);
  }
};

template <bool BACKWARD> int run(const Problem &p) {
  const Head head(p);
  const size_t size = (BACKWARD ? head.backward_size() : head.forward_size()) * sizeof(float), bytes = (size + 4095) / 4096 * 4096;
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
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.B * p.H; ++r) BACKWARD ? head.backward(r, (float *)mine) : head.forward(r, (float *)mine);
  }
  std::free(memory);
  return 0;
}

extern "C" {
// 0, or 1 where there is no memory
int attention_forward(const Problem *p) { return run<false>(*p); }
int attention_backward(const Problem *p) { return run<true>(*p); }
}
