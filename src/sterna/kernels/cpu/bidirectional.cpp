// Attention of packed sequences in which every token sees the others: no cache, no padding.
//
// A unit is one head and up to QUERIES tokens of one sequence. Keys and values come straight from
// the rows of qkv, KEYS at a time, and are laid out as the micro-kernel's B operand in scratch
// (16 x 16 words are transposed in registers); rows go MR at a time through q.K, an online softmax
// and p.V while both stay in the L1 or L2 cache. Keys are walked from position 0 of the sequence,
// so an output depends on nothing but its own sequence.
#include "kernels.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr int KEYS = 256, QUERIES = 256;
#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int BLOCK = 16;  // keys of a panel

inline int up(int n, int to) { return (n + to - 1) / to * to; }
inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

// The scratch and the place of one unit.
template <class T>
struct Unit {
  const BidirectionalArgs& a;
  int length, first_query, end_query, head;
  const T *q, *k, *v;  // position 0 of the sequence, of this head
  T* out;
  int64_t stride, out_stride;
  T *keys, *values, *p;  // [KEYS / 16][C / P][16][P], [KEYS / P][Cp][P], [MR][KEYS]
  float *s, *o, *m, *l;  // [MR][KEYS], [QUERIES][Cp], [QUERIES]
  int cp() const { return up(a.head_dim, BLOCK); }
  bool is_single() const { return length <= KEYS; }  // all keys at once: no state between tiles
};

template <class T>
Unit<T> unit_of(const BidirectionalArgs& a, int seq, int head, int first, char* scratch) {
  int begin = a.query_starts[seq], length = a.query_starts[seq + 1] - begin, C = a.head_dim;
  int64_t stride = int64_t(a.num_heads + 2 * a.num_kv_heads) * C, out_stride = int64_t(a.num_heads) * C;
  int kv = head / (a.num_heads / a.num_kv_heads);
  const T* row = static_cast<const T*>(a.qkv) + begin * stride;
  Unit<T> u{a, length, first, least(first + QUERIES, length), head, row + int64_t(head) * C,
            row + int64_t(a.num_heads + kv) * C, row + int64_t(a.num_heads + a.num_kv_heads + kv) * C,
            static_cast<T*>(a.out) + begin * out_stride + int64_t(head) * C, stride, out_stride,
            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  float* at = reinterpret_cast<float*>((uintptr_t(scratch) + 63) / 64 * 64);
  u.s = at;
  u.o = u.s + MR * KEYS;
  u.m = u.o + int64_t(QUERIES) * u.cp();
  u.l = u.m + QUERIES;
  u.keys = reinterpret_cast<T*>(u.l + QUERIES);
  u.values = u.keys + int64_t(KEYS) * up(C, 2);
  u.p = u.values + int64_t(KEYS) * u.cp() + 64;
  return u;
}

// dst[w * 16 + j] = word w of row j; rows past `count` are zero.
inline void transpose(const char* src, int64_t row_bytes, int count, int words, uint32_t* dst) {
  int w = 0;
#if defined(__AVX512F__)
  for (; w + 16 <= words; w += 16) {
    __m512i r[16], t[16];
    repeat<16>([&](auto j) INLINE {
      r[j] = j < count ? _mm512_loadu_si512(src + j * row_bytes + w * 4) : _mm512_setzero_si512();
    });
    repeat<8>([&](auto j) INLINE {
      t[2 * j] = _mm512_unpacklo_epi32(r[2 * j], r[2 * j + 1]);
      t[2 * j + 1] = _mm512_unpackhi_epi32(r[2 * j], r[2 * j + 1]);
    });
    repeat<4>([&](auto j) INLINE {
      r[4 * j] = _mm512_unpacklo_epi64(t[4 * j], t[4 * j + 2]);
      r[4 * j + 1] = _mm512_unpackhi_epi64(t[4 * j], t[4 * j + 2]);
      r[4 * j + 2] = _mm512_unpacklo_epi64(t[4 * j + 1], t[4 * j + 3]);
      r[4 * j + 3] = _mm512_unpackhi_epi64(t[4 * j + 1], t[4 * j + 3]);
    });
    repeat<4>([&](auto j) INLINE {
      t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
      t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
      t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
      t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    });
    repeat<4>([&](auto j) INLINE {
      _mm512_storeu_si512(dst + (w + j) * 16, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
      _mm512_storeu_si512(dst + (w + 8 + j) * 16, _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
      _mm512_storeu_si512(dst + (w + 4 + j) * 16, _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88));
      _mm512_storeu_si512(dst + (w + 12 + j) * 16, _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd));
    });
  }
#endif
  for (; w < words; ++w)
    for (int j = 0; j < 16; ++j) {
      dst[w * 16 + j] = 0;
      if (j < count) std::memcpy(dst + w * 16 + j, src + j * row_bytes + w * 4, 4);
    }
}

template <class T>
void lay_keys(const Unit<T>& u, int first, int count) {
  int words = u.a.head_dim / Elem<T>::P;
  for (int j = 0; j < count; j += BLOCK)
    transpose(reinterpret_cast<const char*>(u.k + (first + j) * u.stride), u.stride * sizeof(T),
              least(count - j, BLOCK), words,
              reinterpret_cast<uint32_t*>(u.keys + int64_t(j) * u.a.head_dim));
}

// bfloat16: rows in pairs, [n / 2][Cp][2]; an odd last row is paired with zeros.
void lay_values(const Unit<bf16>& u, int first, int count) {
  int C = u.a.head_dim, cp = u.cp();
  for (int j = 0; j < count; j += 2) {
    const bf16 *a = u.v + (first + j) * u.stride, *b = a + u.stride;
    bf16* dst = u.values + int64_t(j) * cp;
    bool both = j + 1 < count;
    int c = 0;
    for (; c + VW <= C; c += VW) {
      vu low = __builtin_convertvector(load_as<vh>(a + c), vu), high = {};
      if (both) high = __builtin_convertvector(load_as<vh>(b + c), vu);
      store_as(dst + 2 * c, low | high << 16);
    }
    for (; c < cp; ++c) {
      dst[2 * c] = c < C ? a[c] : 0;
      dst[2 * c + 1] = both && c < C ? b[c] : 0;
    }
  }
}
void lay_values(const Unit<float>& u, int first, int count) {
  int C = u.a.head_dim, cp = u.cp();
  for (int j = 0; j < count; ++j) {
    float* dst = u.values + int64_t(j) * cp;
    std::memcpy(dst, u.v + (first + j) * u.stride, C * sizeof(float));
    for (int c = C; c < cp; ++c) dst[c] = 0.f;
  }
}

// Columns [from, to) of s for rows [row, row + M): from and to are multiples of 16.
template <class T, int M>
void scores(const Unit<T>& u, int row, int from, int to) {
  constexpr int P = Elem<T>::P;
  const T* q = u.q + row * u.stride;
  int steps = u.a.head_dim / P;
  auto columns = [&](int col, auto n) INLINE {
    constexpr int N = n;
    const T* k[N];
    repeat<N>([&](auto j) INLINE {
      int at = col + j * VW;
      k[j] = u.keys + int64_t(at / BLOCK * BLOCK) * u.a.head_dim + at % BLOCK * P;
    });
    vf acc[M][N] = {};
    multiply<M, N>(acc, q, u.stride, k, BLOCK * P, steps);
    repeat<M>([&](auto i) INLINE {
      repeat<N>([&](auto j) INLINE { store(u.s + i * KEYS + col + j * VW, acc[i][j]); });
    });
  };
  int col = from;
  for (; col + NV * VW <= to; col += NV * VW) columns(col, std::integral_constant<int, NV>{});
  for (; col < to; col += VW) columns(col, std::integral_constant<int, 1>{});
}

// Scores -> probabilities of row `row`, and its running maximum, sum and output.
template <class T, bool SINGLE>
void soften(const Unit<T>& u, int i, int row, int first, int from, int to, int count) {
  float* s = u.s + i * KEYS;
  T* p = u.p + i * KEYS;
  int low = 0, high = count;  // visible columns
  if (u.a.window > 0) {
    low = most(row - u.a.window - first, 0);
    high = least(row + u.a.window + 1 - first, count);
  }
  if (low > from || high < to) {
    vi lane;
    for (int j = 0; j < VW; ++j) lane[j] = j;
    for (int j = from; j < to; j += VW) {
      vi at = lane + j;
      store(s + j, ((at >= low) & (at < high)) ? load(s + j) : splat(-INFINITY));
    }
  }
  vf best = load(s + from);
  for (int j = from + VW; j < to; j += VW) best = vmax(best, load(s + j));
  float factor = u.a.scale * LOG2E, old = u.m[row - u.first_query];
  float m = max_of(best) * factor;
  if constexpr (!SINGLE) {
    m = m > old ? m : old;
    if (m == -INFINITY) {
      std::memset(p + from, 0, (to - from) * sizeof(T));
      return;
    }
  }
  vf total = {};
  for (int j = from; j < to; j += VW) {
    vf e = vexp2<Elem<T>::P == 2>(load(s + j) * splat(factor) - splat(m));
    total += e;
    store(p + j, e);
  }
  if constexpr (SINGLE) {
    u.l[row - u.first_query] = sum(total);
    return;
  }
  float alpha = m == old ? 1.f : sexp2(old - m);
  float& l = u.l[row - u.first_query];
  l = l * alpha + sum(total);
  u.m[row - u.first_query] = m;
  if (alpha == 1.f) return;
  float* o = u.o + int64_t(row - u.first_query) * u.cp();
  for (int c = 0; c < u.cp(); c += VW) store(o + c, load(o + c) * splat(alpha));
}

template <class T>
inline void store_up_to(T* out, vf v, int cols) {
  if (cols >= VW) return store(out, v);
  float lanes[VW];
  store(lanes, v);
  for (int i = 0; i < cols; ++i) store_one(out + i, lanes[i]);
}

template <class T, int M, bool SINGLE>
void weigh(const Unit<T>& u, int row, int from, int count) {
  constexpr int P = Elem<T>::P;
  int cp = u.cp(), steps = (count - from + P - 1) / P;
  auto columns = [&](int c, auto n) INLINE {
    constexpr int N = n;
    vf acc[M][N] = {};
    const T* v[N];
    float* o = u.o + int64_t(row - u.first_query) * cp + c;
    if constexpr (!SINGLE)
      repeat<M>([&](auto i) INLINE {
        repeat<N>([&](auto j) INLINE { acc[i][j] = load(o + int64_t(i) * cp + j * VW); });
      });
    repeat<N>([&](auto j) INLINE { v[j] = u.values + int64_t(from) * cp + (c + j * VW) * P; });
    multiply<M, N>(acc, u.p + from, KEYS, v, int64_t(cp) * P, steps);
    repeat<M>([&](auto i) INLINE {
      if constexpr (SINGLE) {
        vf inverse = splat(1.f / u.l[row + i - u.first_query]);
        T* out = u.out + (row + i) * u.out_stride + c;
        repeat<N>([&](auto j) INLINE {
          store_up_to(out + j * VW, acc[i][j] * inverse, u.a.head_dim - c - j * VW);
        });
      } else {
        repeat<N>([&](auto j) INLINE { store(o + int64_t(i) * cp + j * VW, acc[i][j]); });
      }
    });
  };
  int c = 0;
  for (; c + NV * VW <= cp; c += NV * VW) columns(c, std::integral_constant<int, NV>{});
  for (; c < cp; c += VW) columns(c, std::integral_constant<int, 1>{});
}

template <class T, bool SINGLE, int M>
void rows_of(const Unit<T>& u, int height, int row, int first, int count) {
  if (height == M) {
    int from = 0, to = up(count, BLOCK);
    if (u.a.window > 0) {
      from = most(row - u.a.window - first, 0) / BLOCK * BLOCK;
      to = least(to, up(most(row + M + u.a.window - first, 0), BLOCK));
      if (from >= to) return;
    }
    scores<T, M>(u, row, from, to);
    for (int i = 0; i < M; ++i) soften<T, SINGLE>(u, i, row + i, first, from, to, count);
    return weigh<T, M, SINGLE>(u, row, from, least(to, count));
  }
  if constexpr (M > 1) rows_of<T, SINGLE, M - 1>(u, height, row, first, count);
}

// Rows in groups of nearly equal height, at most MR each.
template <class T, bool SINGLE>
void all_rows(const Unit<T>& u, int first, int count) {
  int row = u.first_query;
  for (int left = (u.end_query - row + MR - 1) / MR; left > 0; --left) {
    int height = (u.end_query - row + left - 1) / left;
    rows_of<T, SINGLE, MR>(u, height, row, first, count);
    row += height;
  }
}

template <class T>
void write_out(const Unit<T>& u) {
  int C = u.a.head_dim;
  for (int row = u.first_query; row < u.end_query; ++row) {
    const float* o = u.o + int64_t(row - u.first_query) * u.cp();
    T* out = u.out + row * u.out_stride;
    float inverse = 1.f / u.l[row - u.first_query];
    int c = 0;
    for (; c + VW <= C; c += VW) store(out + c, load(o + c) * splat(inverse));
    for (; c < C; ++c) store_one(out + c, o[c] * inverse);
  }
}

template <class T>
void run_unit(const BidirectionalArgs& a, int seq, int head, int first_query, char* scratch) {
  Unit<T> u = unit_of<T>(a, seq, head, first_query, scratch);
  if (u.is_single()) {
    lay_keys(u, 0, u.length);
    lay_values(u, 0, u.length);
    return all_rows<T, true>(u, 0, u.length);
  }
  int rows = u.end_query - first_query;
  std::memset(u.o, 0, sizeof(float) * rows * u.cp());
  for (int i = 0; i < rows; ++i) u.m[i] = -INFINITY, u.l[i] = 0.f;
  for (int first = 0; first < u.length; first += KEYS) {
    int count = least(u.length - first, KEYS);
    if (a.window > 0 && (first > u.end_query - 1 + a.window || first + count <= first_query - a.window))
      continue;
    lay_keys(u, first, count);
    lay_values(u, first, count);
    all_rows<T, false>(u, first, count);
  }
  write_out(u);
}

// Units in order: (sequence, block of queries, head).
int blocks_of(const BidirectionalArgs& a, int seq) {
  return (a.query_starts[seq + 1] - a.query_starts[seq] + QUERIES - 1) / QUERIES;
}

}  // namespace

Kernel<BidirectionalArgs> bidirectional_kernel() {
  return {[](const BidirectionalArgs& a, const Step& step) {
            int total = 0;
            for (int s = 0; s < step.num_seqs; ++s) total += blocks_of(a, s);
            return total * a.num_heads;
          },
          [](const BidirectionalArgs& a, const Step&, const Worker& w, int unit) {
            int block = unit / a.num_heads, seq = 0;
            for (; block >= blocks_of(a, seq); ++seq) block -= blocks_of(a, seq);
            auto run = a.dtype ? run_unit<bf16> : run_unit<float>;
            run(a, seq, unit % a.num_heads, block * QUERIES, w.scratch);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
