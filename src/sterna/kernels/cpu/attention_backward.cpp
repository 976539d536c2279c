// The gradient of packed causal attention: a tile of QT queries of one head against all its keys.
//
//   S = s Q K^T    P = softmax(S)    dV = P^T dO    dP = dO V^T    dS = P (dP - sum_j P dP)
//   dQ = s dS K    dK = s dS^T Q
//
// S and dP of a tile are held transposed, [keys][QT], so that lanes run over queries: the softmax
// and its sums need no shuffle, and K and V are read row by row as they lie. All five products are
// one micro-kernel C[m][n] += A(m, k) B[k][n] with lanes over n. float32 throughout: the forward's
// scores are float32 too, and bfloat16 ones would move a probability by 2^-9 of the score.
//
// A unit is a document, a key/value head and a part of the query heads that share it; it owns its
// rows of the partial dK and dV. Memory: 2 * QT floats a key and thread, beside these.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int QT = 32, KEYS = 64;
constexpr float LOG2E = 1.44269504088896341f;
#if defined(__AVX512F__)
constexpr int MR = 12;  // times two vectors: 24 accumulators of 32 registers
#else
constexpr int MR = 4;
#endif

int padded(int head_dim) { return attention_grad_width(head_dim); }

// C[m][0, 2 VW) += A(m, k) B[k][0, 2 VW) for R rows.
template <int R>
inline INLINE void multiply_rows(int depth, const float* a, int64_t a_row, int64_t a_k,
                                 const float* b, int64_t ldb, float* c, int64_t ldc) {
  vf lo[R], hi[R];
  repeat<R>([&](auto r) INLINE {
    lo[r] = load(c + r * ldc);
    hi[r] = load(c + r * ldc + VW);
  });
  for (int k = 0; k < depth; ++k) {
    vf b_lo = load(b + k * ldb), b_hi = load(b + k * ldb + VW);
    const float* ak = a + k * a_k;
    repeat<R>([&](auto r) INLINE {
      vf v = splat(ak[r * a_row]);
      lo[r] += v * b_lo;
      hi[r] += v * b_hi;
    });
  }
  repeat<R>([&](auto r) INLINE {
    store(c + r * ldc, lo[r]);
    store(c + r * ldc + VW, hi[r]);
  });
}

template <int R>
void multiply_rest(int rows, int depth, const float* a, int64_t a_row, int64_t a_k, const float* b,
                   int64_t ldb, float* c, int64_t ldc) {
  if constexpr (R > 0) {
    if (rows == R) multiply_rows<R>(depth, a, a_row, a_k, b, ldb, c, ldc);
    else multiply_rest<R - 1>(rows, depth, a, a_row, a_k, b, ldb, c, ldc);
  }
}

// C [rows][cols] += A B; cols a multiple of 2 VW.
void multiply(int rows, int cols, int depth, const float* a, int64_t a_row, int64_t a_k,
              const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int n = 0; n < cols; n += 2 * VW) {
    int m = 0;
    for (; m + MR <= rows; m += MR)
      multiply_rows<MR>(depth, a + m * a_row, a_row, a_k, b + n, ldb, c + m * ldc + n, ldc);
    multiply_rest<MR - 1>(rows - m, depth, a + m * a_row, a_row, a_k, b + n, ldb,
                          c + m * ldc + n, ldc);
  }
}

// `rows` rows of head_dim elements, `stride` apart, as floats [rows][width], padded by zeros.
template <class T>
void to_rows(const T* x, int64_t stride, int rows, int dim, int width, float* out) {
  for (int r = 0; r < rows; ++r) {
    int c = 0;
    for (; c + VW <= dim; c += VW) store(out + r * width + c, load(x + r * stride + c));
    for (; c < width; ++c) out[r * width + c] = c < dim ? to_float(x[r * stride + c]) : 0.f;
  }
}

// The rows [rows][width] as columns [width][QT]; columns past `rows` become zero.
void to_columns(const float* x, int rows, int width, float* out) {
  for (int c = 0; c < width; ++c)
    for (int r = 0; r < QT; ++r) out[c * QT + r] = r < rows ? x[r * width + c] : 0.f;
}

// Buffers of one unit.
struct Memory {
  std::vector<float> q, d_o, q_cols, d_o_cols, d_q, keys, values, scores, slopes;
  Memory(int width, int length)
      : q(QT * width), d_o(QT * width), q_cols(QT * width), d_o_cols(QT * width),
        d_q(QT * width), keys(KEYS * width), values(KEYS * width),
        scores(int64_t(length) * QT), slopes(int64_t(length) * QT) {}
};

// One head of one document.
template <class T>
struct Head {
  const AttentionGradArgs& a;
  Memory& m;
  const T *q, *k, *v, *d_o;  // first row of the document
  T* d_q;
  float *d_k, *d_v;  // [length][width]
  int length, width;
  int64_t stride, d_o_stride;

  void run() {
    for (int first = 0; first < length; first += QT) tile(first, std::min(QT, length - first));
  }

  void tile(int first, int rows) {
    to_rows(q + first * stride, stride, rows, a.head_dim, width, m.q.data());
    to_rows(d_o + first * d_o_stride, d_o_stride, rows, a.head_dim, width, m.d_o.data());
    to_columns(m.q.data(), rows, width, m.q_cols.data());
    to_columns(m.d_o.data(), rows, width, m.d_o_cols.data());
    int begin = a.window ? std::max(0, first - a.window + 1) : 0, end = first + rows;
    for (int j = begin; j < end; j += KEYS) score(j, std::min(KEYS, end - j), begin);
    soften(begin, end, first);
    std::fill(m.d_q.begin(), m.d_q.end(), 0.f);
    for (int j = begin; j < end; j += KEYS) spread(j, std::min(KEYS, end - j), begin, rows);
    write_d_q(first, rows);
  }

  // S^T and dP^T of a block of keys.
  void score(int j, int count, int begin) {
    float* s = m.scores.data() + int64_t(j - begin) * QT;
    float* p = m.slopes.data() + int64_t(j - begin) * QT;
    std::fill(s, s + count * QT, 0.f);
    std::fill(p, p + count * QT, 0.f);
    to_rows(k + j * stride, stride, count, a.head_dim, width, m.keys.data());
    to_rows(v + j * stride, stride, count, a.head_dim, width, m.values.data());
    multiply(count, QT, width, m.keys.data(), width, 1, m.q_cols.data(), QT, s, QT);
    multiply(count, QT, width, m.values.data(), width, 1, m.d_o_cols.data(), QT, p, QT);
  }

  // In place: scores to P, dP to s dS (times the softcap's slope), for QT queries at once.
  void soften(int begin, int end, int first) {
    for (int lane = 0; lane < QT; lane += VW) {
      vi query = lane_positions(first + lane);
      vf top = splat(-INFINITY);
      for (int j = begin; j < end; ++j) {
        vf s = capped(load(m.scores.data() + at(j, begin, lane)));
        s = seen(query, j) ? s : splat(-INFINITY);
        store(m.scores.data() + at(j, begin, lane), s);
        top = vmax(top, s);
      }
      top = top == splat(-INFINITY) ? splat(0.f) : top;  // lanes past the last query
      differentiate(begin, end, lane, top);
    }
  }

  void differentiate(int begin, int end, int lane, vf top) {
    vf total = splat(0.f), dot = splat(0.f);
    for (int j = begin; j < end; ++j) {
      vf s = load(m.scores.data() + at(j, begin, lane));
      vf e = vexp2((s - top) * splat(LOG2E));
      total += e;
      dot += e * load(m.slopes.data() + at(j, begin, lane));
    }
    vf inverse = total > splat(0.f) ? splat(1.f) / total : splat(0.f);
    dot *= inverse;
    for (int j = begin; j < end; ++j) {
      float *s_at = m.scores.data() + at(j, begin, lane), *d_at = m.slopes.data() + at(j, begin, lane);
      vf s = load(s_at);
      vf p = vexp2((s - top) * splat(LOG2E)) * inverse;
      vf d = p * (load(d_at) - dot) * splat(a.scale);
      if (a.softcap > 0) {
        vf t = p > splat(0.f) ? s * splat(1.f / a.softcap) : splat(0.f);  // -inf where unseen
        d = d * (splat(1.f) - t * t);
      }
      store(s_at, p);
      store(d_at, d);
    }
  }

  // dV, dK and dQ of a block of keys.
  void spread(int j, int count, int begin, int rows) {
    const float* p = m.scores.data() + int64_t(j - begin) * QT;
    const float* d = m.slopes.data() + int64_t(j - begin) * QT;
    float *to_k = d_k + int64_t(j) * width, *to_v = d_v + int64_t(j) * width;
    multiply(count, width, rows, p, QT, 1, m.d_o.data(), width, to_v, width);
    multiply(count, width, rows, d, QT, 1, m.q.data(), width, to_k, width);
    to_rows(k + j * stride, stride, count, a.head_dim, width, m.keys.data());
    multiply(rows, width, count, d, 1, QT, m.keys.data(), width, m.d_q.data(), width);
  }

  void write_d_q(int first, int rows) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < a.head_dim; ++c)
        store_one(d_q + (first + r) * stride + c, m.d_q[r * width + c]);
  }

  static int64_t at(int j, int begin, int lane) { return int64_t(j - begin) * QT + lane; }

  static vi lane_positions(int first) {
    vi positions;
    for (int i = 0; i < VW; ++i) positions[i] = first + i;
    return positions;
  }

  vi seen(vi query, int j) const {
    vi key = j - (vi){};
    vi visible = (vi)(query >= key);
    return a.window ? visible & (vi)(query - a.window < key) : visible;
  }

  vf capped(vf s) const {
    s = s * splat(a.scale);
    return a.softcap > 0 ? splat(a.softcap) * vtanh(s * splat(1.f / a.softcap)) : s;
  }
};

// Unit -> (document, key/value head, part).
template <class T>
void run_unit(const AttentionGradArgs& a, int unit) {
  int owners = a.num_kv_heads * a.parts;
  int doc = unit / owners, owner = unit % owners, kv_head = owner / a.parts;
  int64_t first = a.query_starts[doc];
  int length = a.query_starts[doc + 1] - a.query_starts[doc];
  if (length == 0) return;
  int width = padded(a.head_dim), group = a.num_heads / a.num_kv_heads, own = group / a.parts;
  int64_t stride = int64_t(a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
  int64_t out_stride = int64_t(a.num_heads) * a.head_dim;
  float* d_k = a.partial + (int64_t(owner) * a.num_tokens + first) * width;
  float* d_v = d_k + int64_t(owners) * a.num_tokens * width;
  std::fill(d_k, d_k + int64_t(length) * width, 0.f);
  std::fill(d_v, d_v + int64_t(length) * width, 0.f);
  int span = a.window ? std::min(length, a.window + QT) : length;
  Memory memory(width, span);
  const T* row = static_cast<const T*>(a.qkv) + first * stride;
  for (int i = 0; i < own; ++i) {
    int head = kv_head * group + (owner % a.parts) * own + i;
    const T* k = row + int64_t(a.num_heads + kv_head) * a.head_dim;
    Head<T>{a, memory, row + int64_t(head) * a.head_dim, k,
            k + int64_t(a.num_kv_heads) * a.head_dim,
            static_cast<const T*>(a.grad) + first * out_stride + int64_t(head) * a.head_dim,
            static_cast<T*>(a.d_qkv) + first * stride + int64_t(head) * a.head_dim,
            d_k, d_v, length, width, stride, out_stride}.run();
  }
}

}  // namespace

Kernel<AttentionGradArgs> attention_grad_kernel() {
  return {[](const AttentionGradArgs& a, const Step& step) {
            return step.num_seqs * a.num_kv_heads * a.parts;
          },
          [](const AttentionGradArgs& a, const Step&, const Worker&, int unit) {
            a.dtype ? run_unit<bf16>(a, unit) : run_unit<float>(a, unit);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
