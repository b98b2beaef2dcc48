// What lies between the matrix products of a model, a row in one pass: gated SiLU, RMS norm with residual, head norm with gate,
// softmax of a cross entropy. Rows are read in their dtype, fp32 or bf16; everything else is fp32. Gradients of weights are summed
// over blocks of rows, then over blocks, so that bits do not depend on the number of threads.
#include <vector>

#include "numbers.hpp"

constexpr int64_t BLOCK = 128;  // rows

// Loops over 16-bit numbers vectorise where nothing else happens: rows are widened to scratch, worked on, and narrowed.
template <class X> const float *read(int n, const X *__restrict x, float *__restrict scratch) {
  if constexpr (sizeof(X) == sizeof(float)) return (const float *)x;
  for (int j = 0; j < n; ++j) scratch[j] = float(widened(x[j]));
  return scratch;
}
// where to write a row of floats that write() then narrows to x
template <class X> float *place(X *x, float *scratch) { return sizeof(X) == sizeof(float) ? (float *)x : scratch; }
template <class X> void write(int n, const float *__restrict from, X *__restrict x) {
  if constexpr (sizeof(X) == sizeof(float)) return;
  else
    for (int j = 0; j < n; ++j) narrow(from[j], x[j]);
}
inline int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

// body(block, first row, row after the last, scratch of this size) for every block
template <class F> void for_blocks(int64_t rows, int threads, size_t scratch, F body) {
  const int64_t blocks = blocks_of(rows);
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1)
  {
    std::vector<float> memory(scratch);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) body(b, b * BLOCK, std::min(rows, (b + 1) * BLOCK), memory.data());
  }
}
// to = sum of the parts of all blocks, in their order
inline void add_blocks(int64_t blocks, int n, const float *parts, float *__restrict to) {
  std::fill(to, to + n, 0.0f);
  for (int64_t b = 0; b < blocks; ++b)
    for (int j = 0; j < n; ++j) to[j] += parts[b * n + j];
}

template <class X> void gated_silu(int64_t rows, int F, const X *x, X *y, int threads) {
  for_blocks(rows, threads, 3 * F, [=](int64_t, int64_t first, int64_t last, float *scratch) {
    for (int64_t t = first; t < last; ++t) {
      const float *gate_up = read(2 * F, x + 2 * t * F, scratch);
      const float *__restrict gate = gate_up, *__restrict up = gate_up + F;
      float *__restrict to = place(y + t * F, scratch + 2 * F);
      for (int j = 0; j < F; ++j) to[j] = gate[j] * sigmoid(gate[j]) * up[j];
      write(F, to, y + t * F);
    }
  });
}
template <class X> void gated_silu_gradient(int64_t rows, int F, const X *x, const X *dy, X *dx, int threads) {
  for_blocks(rows, threads, 5 * F, [=](int64_t, int64_t first, int64_t last, float *scratch) {
    for (int64_t t = first; t < last; ++t) {
      const float *gate_up = read(2 * F, x + 2 * t * F, scratch);
      const float *__restrict gate = gate_up, *__restrict up = gate_up + F;
      const float *__restrict d = read(F, dy + t * F, scratch + 2 * F);
      float *to = place(dx + 2 * t * F, scratch + 3 * F);
      float *__restrict d_gate = to, *__restrict d_up = to + F;
      for (int j = 0; j < F; ++j) {
        const float s = sigmoid(gate[j]);
        d_gate[j] = d[j] * up[j] * s * (1 + gate[j] * (1 - s));
        d_up[j] = d[j] * gate[j] * s;
      }
      write(2 * F, to, dx + 2 * t * F);
    }
  });
}

// sum: x + residual, rounded to the dtype of rows, or null without a residual; scale: 1 / rms of each row
template <class X>
void rms_norm(int64_t rows, int d, const X *x, const X *residual, const float *weight, float eps, X *y, X *sum, float *scale, int threads) {
  for_blocks(rows, threads, 3 * d, [=](int64_t, int64_t first, int64_t last, float *scratch) {
    for (int64_t t = first; t < last; ++t) {
      const float *__restrict in = read(d, x + t * d, scratch);
      if (residual) {
        const float *__restrict add = read(d, residual + t * d, scratch + d);
        float *__restrict both = place(sum + t * d, scratch + 2 * d);
        for (int j = 0; j < d; ++j) both[j] = in[j] + add[j];
        write(d, both, sum + t * d);
        in = read(d, sum + t * d, scratch);
      }
      const float r = scale[t] = 1 / std::sqrt(dot(d, in, in) / d + eps);
      float *__restrict to = place(y + t * d, scratch + d);
      for (int j = 0; j < d; ++j) to[j] = in[j] * r * weight[j];
      write(d, to, y + t * d);
    }
  });
}
// d_sum: what reaches the sum by another way, or null; parts (blocks, d)
template <class X>
void rms_norm_gradient(int64_t rows, int d, const X *sum, const float *weight, const float *scale, const X *dy, const X *d_sum, X *dx,
                       float *d_weight, float *parts, int threads) {
  for_blocks(rows, threads, 4 * d, [=](int64_t b, int64_t first, int64_t last, float *scratch) {
    float *__restrict part = parts + b * d;
    std::fill(part, part + d, 0.0f);
    for (int64_t t = first; t < last; ++t) {
      const float *__restrict in = read(d, sum + t * d, scratch), *__restrict g = read(d, dy + t * d, scratch + d);
      const float r = scale[t];
      float product = 0;
#pragma omp simd reduction(+ : product)
      for (int j = 0; j < d; ++j) {
        const float x = in[j] * r * g[j];
        part[j] += x;
        product += x * weight[j];
      }
      const float back = product * r / d;
      float *__restrict to = place(dx + t * d, scratch + 2 * d);
      if (d_sum) {
        const float *__restrict add = read(d, d_sum + t * d, scratch + 3 * d);
        for (int j = 0; j < d; ++j) to[j] = r * (g[j] * weight[j] - back * in[j]) + add[j];
      } else {
        for (int j = 0; j < d; ++j) to[j] = r * (g[j] * weight[j] - back * in[j]);
      }
      write(d, to, dx + t * d);
    }
  });
  add_blocks(blocks_of(rows), d, parts, d_weight);
}

// h: heads of d numbers with strides of batch, token and head; gate and y: rows of heads * d; mean, scale (rows, heads)
struct Heads {
  int64_t tokens, heads, d, batch_stride, token_stride, head_stride;
  template <class X> X *row(X *h, int64_t t, int64_t head) const {
    return h + t / tokens * batch_stride + t % tokens * token_stride + head * head_stride;
  }
};
template <class X>
void head_norm_gate(int64_t rows, Heads s, const X *h, const X *gate, const float *weight, float eps, X *y, float *mean, float *scale,
                    int threads) {
  const int d = int(s.d);
  for_blocks(rows, threads, 3 * d, [=](int64_t, int64_t first, int64_t last, float *scratch) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t at = (t * s.heads + head) * d;
        const float *__restrict in = read(d, s.row(h, t, head), scratch), *__restrict g = read(d, gate + at, scratch + d);
        const float *__restrict w = weight + head * d;
        const float m = total(d, in) / d;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int j = 0; j < d; ++j) squares += (in[j] - m) * (in[j] - m);
        const float r = 1 / std::sqrt(squares / d + eps);
        mean[t * s.heads + head] = m;
        scale[t * s.heads + head] = r;
        float *__restrict to = place(y + at, scratch + 2 * d);
        for (int j = 0; j < d; ++j) to[j] = sigmoid(g[j]) * ((in[j] - m) * r) * w[j];
        write(d, to, y + at);
      }
  });
}
// dh, d_gate: rows of heads * d; parts (blocks, heads * d)
template <class X>
void head_norm_gate_gradient(int64_t rows, Heads s, const X *h, const X *gate, const float *weight, const float *mean, const float *scale,
                             const X *dy, X *dh, X *d_gate, float *d_weight, float *parts, int threads) {
  const int d = int(s.d), width = int(s.heads) * d;
  for_blocks(rows, threads, 7 * d, [=](int64_t b, int64_t first, int64_t last, float *scratch) {
    float *part = parts + b * width;
    float *__restrict normed = scratch, *__restrict grad = scratch + d;
    std::fill(part, part + width, 0.0f);
    for (int64_t t = first; t < last; ++t)
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t at = (t * s.heads + head) * d;
        const float *__restrict in = read(d, s.row(h, t, head), scratch + 2 * d), *__restrict g = read(d, gate + at, scratch + 3 * d);
        const float *__restrict dj = read(d, dy + at, scratch + 4 * d), *__restrict w = weight + head * d;
        float *__restrict dw = part + head * d, *__restrict to_gate = place(d_gate + at, scratch + 5 * d);
        float *__restrict to = place(dh + at, scratch + 6 * d);
        const float m = mean[t * s.heads + head], r = scale[t * s.heads + head];
        float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
        for (int j = 0; j < d; ++j) {
          const float x = (in[j] - m) * r, open = sigmoid(g[j]), y = dj[j] * open;
          normed[j] = x;
          dw[j] += y * x;
          to_gate[j] = y * (1 - open) * x * w[j];
          grad[j] = y * w[j];
          sum += grad[j];
          product += grad[j] * x;
        }
        sum /= d, product /= d;
        for (int j = 0; j < d; ++j) to[j] = r * (grad[j] - sum - normed[j] * product);
        write(d, to_gate, d_gate + at);
        write(d, to, dh + at);
      }
  });
  add_blocks(blocks_of(rows), width, parts, d_weight);
}

// loss of each row, and to = d loss / d logits unless null. cap 0: none. logits are overwritten, and may be to.
// Softly capped logits cannot overflow an exponential: then (safe) no maximum is subtracted.
template <class X>
void softmax_loss(int64_t rows, int V, float *logits, const int64_t *targets, float cap, int safe, double *loss, X *to, int threads) {
  for_blocks(rows, threads, 2 * V, [=](int64_t, int64_t first, int64_t last, float *scratch) {
    float *__restrict weight = scratch;
    for (int64_t t = first; t < last; ++t) {
      float *__restrict x = logits + t * V;
      const float slope = cap ? 2 / cap : 0, factor = cap ? cap : 1;
      if (cap)  // x becomes tanh(x / cap)
        for (int j = 0; j < V; ++j) x[j] = 1 - 2 / (1 + exponential(slope * x[j]));
      float largest = 0, sum = 0;
      if (!safe) {
        largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int j = 0; j < V; ++j) largest = x[j] > largest ? x[j] : largest;
        largest *= factor;
      }
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < V; ++j) {
        weight[j] = exponential(factor * x[j] - largest);
        sum += weight[j];
      }
      const int64_t target = targets[t];
      loss[t] = std::log(double(sum)) + largest - double(factor * x[target]);
      if (!to) continue;
      const float inverse = 1 / sum, at_target = (weight[target] * inverse - 1) * (cap ? 1 - x[target] * x[target] : 1);
      float *grad = place(to + t * V, scratch + V);
      if (cap)
        for (int j = 0; j < V; ++j) weight[j] *= 1 - x[j] * x[j];
      for (int j = 0; j < V; ++j) grad[j] = weight[j] * inverse;
      grad[target] = at_target;
      write(V, grad, to + t * V);
    }
  });
}

// low: rows are bf16, else fp32
#define EITHER(CALL_FLOAT, CALL_LOW) low ? CALL_LOW : CALL_FLOAT
typedef bfloat16 Low;
extern "C" {
int64_t block_rows() { return BLOCK; }
void gated_silu_forward(int low, int64_t rows, int F, const void *x, void *y, int threads) {
  EITHER(gated_silu(rows, F, (const float *)x, (float *)y, threads), gated_silu(rows, F, (const Low *)x, (Low *)y, threads));
}
void gated_silu_backward(int low, int64_t rows, int F, const void *x, const void *dy, void *dx, int threads) {
  EITHER(gated_silu_gradient(rows, F, (const float *)x, (const float *)dy, (float *)dx, threads),
         gated_silu_gradient(rows, F, (const Low *)x, (const Low *)dy, (Low *)dx, threads));
}
void rms_norm_forward(int low, int64_t rows, int d, const void *x, const void *residual, const float *weight, double eps, void *y,
                      void *sum, float *scale, int threads) {
  EITHER(rms_norm(rows, d, (const float *)x, (const float *)residual, weight, float(eps), (float *)y, (float *)sum, scale, threads),
         rms_norm(rows, d, (const Low *)x, (const Low *)residual, weight, float(eps), (Low *)y, (Low *)sum, scale, threads));
}
void rms_norm_backward(int low, int64_t rows, int d, const void *sum, const float *weight, const float *scale, const void *dy,
                       const void *d_sum, void *dx, float *d_weight, float *parts, int threads) {
  EITHER(rms_norm_gradient(rows, d, (const float *)sum, weight, scale, (const float *)dy, (const float *)d_sum, (float *)dx, d_weight,
                           parts, threads),
         rms_norm_gradient(rows, d, (const Low *)sum, weight, scale, (const Low *)dy, (const Low *)d_sum, (Low *)dx, d_weight, parts,
                           threads));
}
void head_norm_gate_forward(int low, int64_t rows, const Heads *s, const void *h, const void *gate, const float *weight, double eps,
                            void *y, float *mean, float *scale, int threads) {
  EITHER(head_norm_gate(rows, *s, (const float *)h, (const float *)gate, weight, float(eps), (float *)y, mean, scale, threads),
         head_norm_gate(rows, *s, (const Low *)h, (const Low *)gate, weight, float(eps), (Low *)y, mean, scale, threads));
}
void head_norm_gate_backward(int low, int64_t rows, const Heads *s, const void *h, const void *gate, const float *weight,
                             const float *mean, const float *scale, const void *dy, void *dh, void *d_gate, float *d_weight, float *parts,
                             int threads) {
  EITHER(head_norm_gate_gradient(rows, *s, (const float *)h, (const float *)gate, weight, mean, scale, (const float *)dy, (float *)dh,
                                 (float *)d_gate, d_weight, parts, threads),
         head_norm_gate_gradient(rows, *s, (const Low *)h, (const Low *)gate, weight, mean, scale, (const Low *)dy, (Low *)dh,
                                 (Low *)d_gate, d_weight, parts, threads));
}
void softmax_loss_rows(int low, int64_t rows, int V, float *logits, const int64_t *targets, double cap, int safe, double *loss, void *to,
                       int threads) {
  EITHER(softmax_loss(rows, V, logits, targets, float(cap), safe, loss, (float *)to, threads),
         softmax_loss(rows, V, logits, targets, float(cap), safe, loss, (Low *)to, threads));
}
}
