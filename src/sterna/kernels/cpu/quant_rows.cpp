// Row ops of quantised models: embedding rows out of tiles, activation rows to int8.
#include "kernels.h"
#include "walk.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int64_t UNIT_ELEMS = 8192;  // as in rows.cpp

// To int8: about 0.3 ns an element, and 8 rows of 576 should keep two threads busy.
constexpr int64_t INT8_UNIT_ELEMS = 1024;

int rows_a_unit(int width, int64_t elems) { return int(elems / width > 1 ? elems / width : 1); }
int num_units(int rows, int width, int64_t elems) {
  int height = rows_a_unit(width, elems);
  return (rows + height - 1) / height;
}

template <class F>
void each_row(int unit, int rows, int width, int64_t elems, F f) {
  int row = unit * rows_a_unit(width, elems), end = row + rows_a_unit(width, elems);
  for (; row < (end < rows ? end : rows); ++row) f(row);
}

// k of byte b of word (q, j) within a tile.
int k_of(int q, int j, int b) { return 16 * j + 2 * q + (b % 2 ? 0 : 8) + b / 2; }

// The four vectors of q hold 16 rows; all are decoded and one is used. An embedding reads one row
// a token, about 2 us for 576 values: not worth a second decoder.
template <class T, int BITS>
void embed_row(const QuantEmbedArgs& a, const Values<float>& values, int token, T* out) {
  const QuantWeight& w = a.w;
  int block = token / BLOCK, lane = token % BLOCK;
  const float* table = values.of[w.row_formats ? w.row_formats[token] & 1 : 0];
  float scale = 0.f;
  int scale_group = -1;  // the group of `scale`
  for (int t = 0; t < num_tiles(w); ++t) {
    for (int q = 0; q < 4; ++q) {
      words c[4];
      Codes<BITS>::load(tile_at(w, block, t) + q * Codes<BITS>::Q_BYTES, c);
      for (int i = 0; i < 16; ++i) {
        int k = t * TILE_K + k_of(q, i / 4, i % 4), group = w.group ? k / w.group : 0;
        if (k >= w.in_features) continue;
        if (group != scale_group) scale = scales_of(w, block, scale_group = group)[lane];
        float v = table[c[i / 4][lane] >> (i % 4 * 8) & 255] * scale;
        store_one(out + k, a.scale == 1.f ? v : v * a.scale);
      }
    }
  }
}

template <class T>
void embed_unit(const QuantEmbedArgs& a, int rows, int unit) {
  Values<float> values(a.w);
  each_row(unit, rows, a.w.in_features, UNIT_ELEMS, [&](int row) {
    T* out = static_cast<T*>(a.out) + int64_t(row) * a.w.in_features;
    switch (a.w.bits) {
      case 4: return embed_row<T, 4>(a, values, a.tokens[row], out);
      case 5: return embed_row<T, 5>(a, values, a.tokens[row], out);
      case 6: return embed_row<T, 6>(a, values, a.tokens[row], out);
      default: return embed_row<T, 8>(a, values, a.tokens[row], out);
    }
  });
}

// 64 codes to the byte order of a tile: word (q, j), byte b.
struct Order {
  alignas(64) uint8_t at[TILE_K];
  Order() {
    for (int i = 0; i < TILE_K; ++i) at[i] = uint8_t(k_of(i / 16, i / 4 % 4, i % 4));
  }
};

// round(v * inverse) to integers, ties to even. The product is rounded by itself, as the reference
// does, not fused with the addition.
template <class T>
vi rounded(const T* x, float inverse) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  return __builtin_convertvector((pinned(load(x) * splat(inverse)) + magic) - magic, vi);
}

// 64 elements to codes in tile order, and the sums of the two halves.
template <class T>
void int8_tile(const T* x, float inverse, const Order& order, int8_t* out, int32_t (&sum)[2]) {
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
  __m512i v = {};
  repeat<4>([&](auto i) INLINE {
    __m128i part = _mm512_cvtepi32_epi8((__m512i)rounded(x + 16 * i, inverse));
    v = _mm512_mask_broadcast_i32x4(v, __mmask16(15 << 4 * i), part);
  });
  __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), v);
  sum[0] = _mm512_mask_reduce_add_epi32(0x00ff, fours);
  sum[1] = _mm512_mask_reduce_add_epi32(0xff00, fours);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi8(_mm512_load_si512(order.at), v));
#else
  int8_t codes[TILE_K];
  for (int k = 0; k < TILE_K; k += VW) {
    vi v = rounded(x + k, inverse);
    for (int i = 0; i < VW; ++i) codes[k + i] = int8_t(v[i]);
  }
  sum[0] = sum[1] = 0;
  for (int k = 0; k < TILE_K; ++k) sum[k / 32] += codes[k];
  for (int i = 0; i < TILE_K; ++i) out[i] = codes[order.at[i]];
#endif
}

// The largest |x| of a row; NaN when an element is not finite: magnitudes order like the integers
// of their bits, with infinity and NaN above all numbers.
template <class T>
float row_max(const T* x, int n) {
  vi most = {};
  int k = 0, tail = 0;
  for (; k + VW <= n; k += VW) {
    vi bits = (vi)load(x + k) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  for (; k < n; ++k) {
    float v = std::fabs(to_float(x[k]));
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    tail = bits > tail ? bits : tail;
  }
  for (int i = 0; i < VW; ++i) tail = most[i] > tail ? most[i] : tail;
  float out;
  std::memcpy(&out, &tail, 4);
  return tail < 0x7f800000 ? out : NAN;
}

template <class T>
void int8_row(const QuantRowsArgs& a, const Order& order, int row) {
  const int n = a.in_features, tiles = (n + TILE_K - 1) / TILE_K;
  const T* x = static_cast<const T*>(a.x) + int64_t(row) * n;
  uint8_t* out = a.out + row * int8_row_bytes(n);
  uint8_t* sums = out + tiles * TILE_K;
  float most = row_max(x, n), inverse = most > 1e-30f ? 127.f / most : 0.f;
  int32_t total = 0;
  T last[TILE_K] = {};  // the end of the row, zero padded
  if (n % TILE_K) std::memcpy(last, x + n / TILE_K * TILE_K, sizeof(T) * (n % TILE_K));
  for (int t = 0; t < tiles; ++t) {
    int32_t half[2];
    const T* from = (t + 1) * TILE_K <= n ? x + t * TILE_K : last;
    int8_tile(from, inverse, order, reinterpret_cast<int8_t*>(out) + t * TILE_K, half);
    store_as(sums + 8 * t, total);
    store_as(sums + 8 * t + 4, total + half[0]);
    total += half[0] + half[1];
  }
  store_as(sums + 8 * tiles, total);
  store_as(sums + 8 * tiles + 4, most / 127.f);  // NaN for a row that is not finite
}

}  // namespace

Kernel<QuantEmbedArgs> quant_embed_kernel() {
  return {[](const QuantEmbedArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.w.in_features, UNIT_ELEMS);
          },
          [](const QuantEmbedArgs& a, const Step& step, const Worker&, int unit) {
            int rows = step.num_rows[a.rows_kind];
            a.dtype ? embed_unit<bf16>(a, rows, unit) : embed_unit<float>(a, rows, unit);
          }};
}

Kernel<QuantRowsArgs> quant_rows_kernel() {
  return {[](const QuantRowsArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.in_features, INT8_UNIT_ELEMS);
          },
          [](const QuantRowsArgs& a, const Step& step, const Worker&, int unit) {
            static const Order order;
            each_row(unit, step.num_rows[a.rows_kind], a.in_features, INT8_UNIT_ELEMS, [&](int row) {
              a.dtype ? int8_row<bf16>(a, order, row) : int8_row<float>(a, order, row);
            });
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
