// One token of every sequence of a batch through a whole language model: embedding, blocks, norm, head, the likeliest token.
//
// Weights are read where they lie, rows (out, in) in one piece, fp32 or bf16 widened in registers; everything else is fp32. For
// few sequences the time is that of reading the weights once. A number is summed in the same order whatever the batch and the
// number of threads are, so that the bits of a sequence depend on neither.
//
// A step is a sequence of phases, a phase a number of pieces: rows of a product, columns of a state. Threads take pieces as they
// come and wait for the last one, not for each other: a thread that the system has put aside is waited for once a step.
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <thread>

#include "row_products.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

struct Block {
  const float *mixing_norm;             // (d)
  const void *qkv, *output_gate, *out;  // (columns of q, k, v; d), (H d_v, d) or null, (d, H d_v)
  const float *gates, *gate_bias;       // (2 H, d), (2 H): input gates, forget gates; null in attention blocks
  const float *head_norm;               // (H d_v), or null
  const float *ffn_norm;                // (d)
  const void *gate_up, *down;           // (2 F, d), (d, F)
  void *memory, *keys, *values;         // mLSTM: C (B, H, d_qk, d_v), n (B, H, d_qk), m (B, H), fp32; attention: null and the
};                                      // cache (B, H, room, d_v), in the dtype of the weights
struct Model {
  int64_t low, blocks, B, d, F, V, room, threads;        // low: weights of products in bf16
  int64_t cell_H, cell_d_qk, cell_d_v, heads, head_dim;  // of mLSTM blocks and of attention blocks; 0 heads: there are none
  double norm_eps, cell_eps, gate_cap, logit_cap;        // logit_cap 0: none
  const float *embedding, *norm;                         // (V, d), (d)
  const void *head;                                      // (V, d)
  const float *frequency;                                // (head_dim / 2) radians a position, or null
  const Block *block;
  float *scratch;                                                       // of decode_scratch() floats
};

namespace {

constexpr int KEYS = 512;       // of a piece of attention
constexpr int MAX_HEAD = 1024;  // channels of a head of attention
constexpr int GRAIN = 16;       // rows of a piece are a multiple of this: a line of the caches
constexpr int64_t LEAST = 1 << 14, MOST = 1 << 17;  // bytes of weights of a piece: worth a counter; memory likes long ones
constexpr int64_t COLUMNS = 64;  // of a state, in a piece
constexpr int PATIENCE = 1000;   // looks at a counter before other threads are let run

struct Phase {
  alignas(64) int64_t next, done;  // pieces taken, pieces finished
};

// the heads of a kind of block, and its columns: of q k v, output gate, gates, all of these
struct Mixing {
  int64_t H, d_qk, d_v, qkv, gate, gates, mixed;
  Mixing(int64_t H, int64_t d_qk, int64_t d_v, bool gated)
      : H(H), d_qk(d_qk), d_v(d_v), qkv(H * (2 * d_qk + d_v)), gate(gated ? H * d_v : 0), gates(gated ? 2 * H : 0), mixed(qkv + gate + gates) {}
};

// the scratch of a step, in floats
struct Sizes {
  Mixing cells, attention;
  int64_t row, splits;  // columns of a thread's rows; pieces of attention
  size_t stream, wide, parts, angles, own;
  Sizes(const Model &p, int64_t slots)
      : cells(p.cell_H, p.cell_d_qk, p.cell_d_v, true), attention(p.heads, p.head_dim, p.head_dim, false), splits((slots + KEYS - 1) / KEYS) {
    row = std::max({p.d, cells.H * cells.d_v, attention.H * attention.d_v});
    stream = aligned(p.B * p.d), wide = aligned(p.B * std::max({cells.mixed, attention.mixed, 2 * p.F}));
    parts = aligned(p.B * std::max(cells.H * (cells.d_v + 2), attention.H * splits * (attention.d_v + 2)));
    angles = aligned(p.B * attention.d_v), own = aligned(p.B * row);
  }
  const Mixing &of(const Block &k) const { return k.gates ? cells : attention; }
  static size_t aligned(int64_t floats) { return size_t(floats + 63) / 64 * 64 + 64; }
  // phases of a block: three times rows for all, three products into the stream or from it, the cell, the feed-forward
  static int64_t phases(const Model &p) { return 8 * p.blocks + 4; }
  size_t total(const Model &p) const {
    return phases(p) * sizeof(Phase) / sizeof(float) + 2 * stream + wide + parts + angles + own * (p.threads + 1);
  }
};

template <class W> struct Step {
  const Model &p;
  const Sizes s;
  const int64_t *tokens, length, *padding;
  float *logits;
  Phase *now;                                      // the phase that this thread is in
  float *x, *added, *wide, *parts, *angles, *own;  // residual stream and what is added, products, sums of heads, cos and sin, rows
  int thread = 0, threads = 1;

  Step(const Model &p, const Sizes &s, const int64_t *tokens, int64_t length, const int64_t *padding, float *logits)
      : p(p), s(s), tokens(tokens), length(length), padding(padding), logits(logits), now((Phase *)p.scratch),
        x((float *)(now + Sizes::phases(p))), added(x + s.stream), wide(added + s.stream), parts(wide + s.wide), angles(parts + s.parts),
        own(angles + s.angles) {
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
  }

  // body(i) for every i < pieces, by whichever thread; returns when all are done. A body may read what earlier phases wrote
  template <class F> void phase(int64_t pieces, F body) {
    Phase &c = *now++;
    for (int64_t i; (i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < pieces;) {
      body(i);
      __atomic_fetch_add(&c.done, 1, __ATOMIC_RELEASE);
    }
    for (int looks = 0; __atomic_load_n(&c.done, __ATOMIC_ACQUIRE) < pieces; ++looks)
      if (looks > PATIENCE) std::this_thread::yield();
  }
  // body(first, last) for all rows of matrices whose rows have `bytes`
  template <class F> void rows_of(int64_t rows, int64_t bytes, F body) {
    const int64_t wanted = std::min(MOST, std::max(LEAST, rows * bytes / (4 * threads)));
    const int64_t piece = threads > 1 ? (wanted / bytes / GRAIN + 1) * GRAIN : rows;
    phase((rows + piece - 1) / piece, [&](int64_t i) { body(i * piece, std::min(rows, (i + 1) * piece)); });
  }

  // Rows (B) that a product reads whole: for few sequences, a thread that takes a piece makes all of them; for many they are
  // shared, and a phase of their own. Returns how a piece gets them.
  template <class F> auto rows(F make) {
    const bool shared = p.B >= threads && threads > 1;
    float *to = own + (shared ? 0 : s.own * (thread + 1));
    if (shared) phase(p.B, [&](int64_t b) { make(b, to + b * s.row); });
    return [this, make, to, made = shared]() mutable {
      for (int64_t b = 0; !made && b < p.B; ++b) make(b, to + b * s.row);
      made = true;
      return (const float *)to;
    };
  }
  auto normed(const float *weight) {
    return rows([this, weight](int64_t b, float *__restrict to) {
      const float *__restrict from = x + b * p.d;
      const float scale = 1.0f / std::sqrt(dot(int(p.d), from, from) / float(p.d) + float(p.norm_eps));
      for (int64_t j = 0; j < p.d; ++j) to[j] = from[j] * scale * weight[j];
    });
  }
  // x += y wᵀ, y (B, K)
  template <class Y> void add_to_stream(const W *w, int64_t K, Y y, int64_t y_row, float *from = nullptr, float *to = nullptr) {
    rows_of(p.d, K * sizeof(W), [&](int64_t first, int64_t last) {
      product_of_rows(first, last, p.B, K, w, y(), y_row, added, p.d);
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t j = first; j < last; ++j) x[b * p.d + j] += added[b * p.d + j];
      if (first == 0 && from)  // m was read by all pieces of the phase before
        for (int64_t i = 0; i < p.B * s.cells.H; ++i) to[i] = from[i * (s.cells.d_v + 2)];
    });
  }

  void cell(const Block &k, int64_t head, int64_t first, int64_t last);
  void attend(const Block &k, int64_t b, int64_t h, int64_t split);
  void rotate(const float *from, int64_t b, float *to);
  auto gated_heads(const Block &k);
  auto attended();

  void block(const Block &k) {
    const Mixing &a = s.of(k);
    auto y = normed(k.mixing_norm);
    rows_of(a.mixed, p.d * sizeof(W), [&](int64_t from, int64_t to) {
      auto part = [&](auto *w, int64_t start, int64_t count) {
        const int64_t first = std::max<int64_t>(0, from - start), last = std::min(count, to - start);
        if (first < last) product_of_rows(first, last, p.B, p.d, w, y(), s.row, wide + start, a.mixed);
      };
      part((const W *)k.qkv, 0, a.qkv);
      part((const W *)k.output_gate, a.qkv, a.gate);
      part(k.gates, a.qkv + a.gate, a.gates);
    });
    if (k.gates) {
      const int64_t columns = p.B * a.H >= 4 * threads ? a.d_v : COLUMNS, pieces = (a.d_v + columns - 1) / columns;
      phase(p.B * a.H * pieces, [&](int64_t i) {
        cell(k, i / pieces, i % pieces * columns, std::min(a.d_v, (i % pieces + 1) * columns));
      });
      add_to_stream((const W *)k.out, a.H * a.d_v, gated_heads(k), s.row, parts + a.d_v + 1, (float *)k.values);
    } else {
      phase(p.B * a.H * s.splits, [&](int64_t i) { attend(k, i / (a.H * s.splits), i / s.splits % a.H, i % s.splits); });
      add_to_stream((const W *)k.out, a.H * a.d_v, attended(), s.row);
    }
    auto z = normed(k.ffn_norm);
    rows_of(p.F, 2 * p.d * sizeof(W), [&](int64_t first, int64_t last) {
      product_of_rows(first, last, p.B, p.d, (const W *)k.gate_up, z(), s.row, wide, 2 * p.F);
      product_of_rows(first, last, p.B, p.d, (const W *)k.gate_up + p.F * p.d, z(), s.row, wide + p.F, 2 * p.F);
      for (int64_t b = 0; b < p.B; ++b) {
        float *__restrict g = wide + b * 2 * p.F;
        const float *__restrict up = g + p.F;
        for (int64_t j = first; j < last; ++j) g[j] *= sigmoid(g[j]) * up[j];
      }
    });
    add_to_stream((const W *)k.down, p.F, [this] { return wide; }, 2 * p.F);
  }

  void run(int64_t *best) {
    phase(p.B, [&](int64_t b) {
      std::copy(p.embedding + tokens[b] * p.d, p.embedding + (tokens[b] + 1) * p.d, x + b * p.d);
      const int64_t half = s.attention.d_v / 2;
      for (int64_t j = 0; j < half; ++j) {
        const float angle = float(length - (padding ? padding[b] : 0)) * p.frequency[j];
        angles[2 * b * half + j] = std::cos(angle);
        angles[(2 * b + 1) * half + j] = std::sin(angle);
      }
    });
    for (int64_t i = 0; i < p.blocks; ++i) block(p.block[i]);
    auto y = normed(p.norm);
    rows_of(p.V, p.d * sizeof(W), [&](int64_t first, int64_t last) {
      product_of_rows(first, last, p.B, p.d, (const W *)p.head, y(), s.row, logits, p.V);
      const float cap = float(p.logit_cap), scale = cap > 0 ? float(1 / p.logit_cap) : 0;
      for (int64_t b = 0; cap > 0 && b < p.B; ++b)
        for (int64_t j = first; j < last; ++j) logits[b * p.V + j] = cap * hyperbolic_tangent(logits[b * p.V + j] * scale);
    });
    if (best) phase(p.B, [&](int64_t b) { best[b] = likeliest(p.V, logits + b * p.V); });
  }
};

// columns first ... last of a head's C; n stays with the first of them, and the new m waits in the scratch
template <class W> void Step<W>::cell(const Block &k, int64_t head, int64_t first, int64_t last) {
  const int64_t H = s.cells.H, d_qk = s.cells.d_qk, d_v = s.cells.d_v, h = head % H, b = head / H, count = last - first;
  const float scale = 1.0f / std::sqrt(float(d_qk)), cap = float(p.gate_cap);
  const float *mixed = wide + b * s.cells.mixed, *q = mixed + h * d_qk, *key = mixed + (H + h) * d_qk;
  const float *value = mixed + 2 * H * d_qk + h * d_v, *gates = mixed + s.cells.mixed - s.cells.gates;
  const float i = cap * std::tanh((gates[h] + k.gate_bias[h]) / cap), f = cap * std::tanh((gates[H + h] + k.gate_bias[H + h]) / cap);
  float *m = (float *)k.values + head, *n = (float *)k.keys + head * d_qk, *part = parts + head * (d_v + 2);
  const float log_f = f < 0 ? f - std::log1p(std::exp(f)) : -std::log1p(std::exp(-f)), most = std::max(log_f + *m, i);
  const float forget = std::exp(log_f + *m - most), input = std::exp(i - most);
  float *C = (float *)k.memory + head * d_qk * d_v + first, *__restrict sum = part + first;
  const float *__restrict v = value + first;
  std::fill(sum, sum + count, 0.0f);
  int64_t j = 0;
  for (; j + 4 <= d_qk; j += 4, C += 4 * d_v) {
    float *__restrict C0 = C, *__restrict C1 = C + d_v, *__restrict C2 = C + 2 * d_v, *__restrict C3 = C + 3 * d_v;
    const float k0 = input * key[j], k1 = input * key[j + 1], k2 = input * key[j + 2], k3 = input * key[j + 3];
    const float q0 = scale * q[j], q1 = scale * q[j + 1], q2 = scale * q[j + 2], q3 = scale * q[j + 3];
    for (int64_t c = 0; c < count; ++c) {
      const float x0 = forget * C0[c] + k0 * v[c], x1 = forget * C1[c] + k1 * v[c];
      const float x2 = forget * C2[c] + k2 * v[c], x3 = forget * C3[c] + k3 * v[c];
      C0[c] = x0, C1[c] = x1, C2[c] = x2, C3[c] = x3;
      sum[c] += (q0 * x0 + q1 * x1) + (q2 * x2 + q3 * x3);
    }
  }
  for (; j < d_qk; ++j, C += d_v) {
    float *__restrict C0 = C;
    for (int64_t c = 0; c < count; ++c) sum[c] += scale * q[j] * (C0[c] = forget * C0[c] + input * key[j] * v[c]);
  }
  if (first == 0) {
    for (int64_t c = 0; c < d_qk; ++c) n[c] = forget * n[c] + input * key[c];
    part[d_v] = std::max(std::fabs(scale * dot(int(d_qk), q, n)), std::exp(-most)) + float(p.cell_eps);
    part[d_v + 1] = most;
  }
}

// σ(o) LayerNorm(h) of every head, (B, H d_v)
template <class W> auto Step<W>::gated_heads(const Block &k) {
  return rows([this, &k](int64_t b, float *__restrict to) {
    const int64_t H = s.cells.H;
    const int d_v = int(s.cells.d_v);
    const float *gate = wide + b * s.cells.mixed + s.cells.qkv;
    for (int64_t h = 0; h < H; ++h) {
      const float *__restrict part = parts + (b * H + h) * (d_v + 2), *__restrict o = gate + h * d_v, *__restrict w = k.head_norm + h * d_v;
      float *__restrict y = to + h * d_v;
      const float inverse = 1.0f / part[d_v];
      for (int j = 0; j < d_v; ++j) y[j] = part[j] * inverse;
      const float mean = total(d_v, y) / float(d_v);
      for (int j = 0; j < d_v; ++j) y[j] -= mean;
      const float factor = 1.0f / std::sqrt(dot(d_v, y, y) / float(d_v) + float(p.norm_eps));
      for (int j = 0; j < d_v; ++j) y[j] *= factor * w[j] * sigmoid(o[j]);
    }
  });
}

template <class W> void Step<W>::rotate(const float *from, int64_t b, float *to) {
  const int64_t half = s.attention.d_v / 2;
  const float *c = angles + 2 * b * half, *sine = c + half;
  for (int64_t j = 0; j < half; ++j) {
    to[j] = from[j] * c[j] - from[j + half] * sine[j];
    to[j + half] = from[j + half] * c[j] + from[j] * sine[j];
  }
}

// one head's query on KEYS slots of the cache: sum of values, sum of weights, their maximum
template <class W> void Step<W>::attend(const Block &k, int64_t b, int64_t h, int64_t split) {
  const int64_t H = s.attention.H, d = s.attention.d_v, begin = (padding ? padding[b] : 0) + split * KEYS, end = std::min(begin + KEYS, length + 1);
  if (begin >= end) return;
  const int64_t head = b * H + h, n = end - begin;
  const float *mixed = wide + b * s.attention.mixed + h * d;
  W *keys = (W *)k.keys + (head * p.room + begin) * d, *values = (W *)k.values + (head * p.room + begin) * d;
  float *part = parts + (head * s.splits + split) * (d + 2), score[KEYS], query[MAX_HEAD];
  rotate(mixed, b, query);
  if (end == length + 1) {  // the new token
    float key[MAX_HEAD];
    rotate(mixed + H * d, b, key);
    for (int64_t j = 0; j < d; ++j) {
      narrow(key[j], keys[(n - 1) * d + j]);
      narrow(mixed[2 * H * d + j], values[(n - 1) * d + j]);
    }
  }
  product_of_rows(0, n, 1, d, keys, query, d, score, KEYS);
  const float scale = 1.0f / std::sqrt(float(d));
  float most = -std::numeric_limits<float>::infinity(), weights = 0;
#pragma omp simd reduction(max : most)
  for (int64_t t = 0; t < n; ++t) most = score[t] > most ? score[t] : most;
#pragma omp simd reduction(+ : weights)
  for (int64_t t = 0; t < n; ++t) weights += score[t] = exponential((score[t] - most) * scale);
  int64_t j = 0;
  for (; j + 4 * N <= d; j += 4 * N) {  // four vectors of the sum in registers
    Vector<float> sum[4] = {};
    for (int64_t t = 0; t < n; ++t)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[c] += score[t] * vector_at(values + t * d + j + c * N);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) put(part + j + c * N, sum[c]);
  }
  for (; j + N <= d; j += N) {
    Vector<float> sum = {};
    for (int64_t t = 0; t < n; ++t) sum += score[t] * vector_at(values + t * d + j);
    put(part + j, sum);
  }
  for (; j < d; ++j) {
    float sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += score[t] * widened(values[t * d + j]);
    part[j] = sum;
  }
  part[d] = weights;
  part[d + 1] = most * scale;
}
// the pieces of every head together, (B, H d_v)
template <class W> auto Step<W>::attended() {
  return rows([this](int64_t b, float *__restrict to) {
    const int64_t H = s.attention.H, d = s.attention.d_v, slots = length + 1 - (padding ? padding[b] : 0), used = (slots + KEYS - 1) / KEYS;
    for (int64_t h = 0; h < H; ++h) {
      const float *part = parts + (b * H + h) * s.splits * (d + 2);
      float most = -std::numeric_limits<float>::infinity(), weights = 0;
      for (int64_t i = 0; i < used; ++i) most = std::max(most, part[i * (d + 2) + d + 1]);
      float *__restrict y = to + h * d;
      std::fill(y, y + d, 0.0f);
      for (int64_t i = 0; i < used; ++i, part += d + 2) {
        const float factor = exponential(part[d + 1] - most);
        weights += factor * part[d];
        for (int64_t j = 0; j < d; ++j) y[j] += factor * part[j];
      }
      for (int64_t j = 0; j < d; ++j) y[j] /= weights;
    }
  });
}

template <class W> int run(const Model &p, const int64_t *tokens, int64_t length, const int64_t *padding, float *logits, int64_t *best) {
  int64_t least = length;
  for (int64_t b = 0; b < p.B; ++b) {
    if (tokens[b] < 0 || tokens[b] >= p.V) return 2;
    least = std::min(least, padding ? padding[b] : 0);
  }
  if (p.heads && (length >= p.room || least < 0)) return 3;
  const Sizes sizes(p, p.heads ? length + 1 - least : 1);
  std::memset(p.scratch, 0, Sizes::phases(p) * sizeof(Phase));
#pragma omp parallel num_threads(int(p.threads)) if (p.threads > 1)
  {
    Step<W> step(p, sizes, tokens, length, padding, logits);
    step.run(best);
  }
  return 0;
}
}  // namespace

extern "C" {
// floats of a model's scratch
int64_t decode_scratch(const Model *p) { return int64_t(Sizes(*p, p->room).total(*p)); }
// 0; 2: a token outside the vocabulary, 3: the cache is full. length: tokens before this one; padding (B) or null:
// slots of the cache before the first token of a sequence; logits (B, V) fp32; best (B): the likeliest token, or null
int decode_step(const Model *p, const int64_t *tokens, int64_t length, const int64_t *padding, float *logits, int64_t *best) {
  return p->low ? run<bfloat16>(*p, tokens, length, padding, logits, best) : run<float>(*p, tokens, length, padding, logits, best);
}
}
