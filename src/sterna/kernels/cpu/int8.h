// What the two paths of int8 activations share: activation rows, weight values as bytes, the dot.
#pragma once
#include "int8_table.h"
#include "quant.h"

namespace sterna {
namespace STERNA_ISA {

typedef int32_t ints __attribute__((vector_size(64)));  // one a row of a block

// Rows of QuantRowsArgs.
struct Int8Rows {
  explicit Int8Rows(const QuantLinearArgs& a)
      : x(static_cast<const char*>(a.x)),
        row_bytes(int8_row_bytes(a.w.in_features)),
        tiles(num_tiles(a.w)) {}
  const char* x;
  int64_t row_bytes, tiles;
  const int8_t* codes(int row, int tile) const {
    return reinterpret_cast<const int8_t*>(x + row * row_bytes + tile * TILE_K);
  }
  // Sum of the codes of half tiles [0, half).
  int32_t sum_before(int row, int half) const {
    return load_as<int32_t>(x + row * row_bytes + tiles * TILE_K + 4 * half);
  }
  float scale(int row) const {
    return load_as<float>(x + row * row_bytes + tiles * TILE_K + 4 * (2 * tiles + 1));
  }
};

// Word (q, j) of a decoded tile; the words of a scale group of 32 are kept together.
static inline INLINE int word_at(bool halves, int q, int j) {
  return halves ? j / 2 * 8 + q * 2 + j % 2 : q * 4 + j;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define STERNA_INT8_DOTS 1
constexpr int MAX_PLANES = 2;

// A code's value in units, as the unsigned bytes of its planes: 64 of them, repeated, or 256.
struct Int8Values {
  alignas(64) uint8_t of[2][MAX_PLANES][TABLE];
  int planes;
  // By vectors: as scalars it was 1 us a unit, of which a call of 12 us has several.
  Int8Values(const QuantWeight& w, float unit) : planes(num_planes(w, unit)) {
    const int codes = 1 << w.bits, all = codes * (w.row_formats ? 2 : 1);
    for (int i = 0; i < all; i += 16) {
      uint8_t(&out)[MAX_PLANES][TABLE] = of[i >= codes];
      __m512i v = value(w, unit, i), high = planes == 1 ? v : _mm512_srai_epi32(v, 4);  // floor
      put(out[0] + i % codes, _mm512_add_epi32(high, _mm512_set1_epi32(128)));
      put(out[1] + i % codes, _mm512_and_si512(v, _mm512_set1_epi32(INT8_PLANE - 1)));
    }
    for (int t = 0; t < all / codes; ++t)
      for (int p = 0; p < planes; ++p)
        for (int n = codes; n < 64; n *= 2) std::memcpy(of[t][p] + n, of[t][p], n);
  }
  static int num_planes(const QuantWeight& w, float unit) {
    __m512i most = {};
    for (int i = 0; i < (1 << w.bits) * (w.row_formats ? 2 : 1); i += 16)
      most = _mm512_max_epi32(most, beyond_zero(value(w, unit, i)));
    return _mm512_reduce_max_epi32(most) <= 127 ? 1 : 2;
  }

 private:
  // v, or -v - 1 when negative: at most 127 for what a byte holds, -128 included (a code that
  // exists in int8 and is never written; two planes for its sake halved the speed).
  static inline INLINE __m512i beyond_zero(__m512i v) {
    return _mm512_xor_si512(v, _mm512_srai_epi32(v, 31));
  }
  // Of codes i to i + 15; the unit is a power of two.
  static inline INLINE __m512i value(const QuantWeight& w, float unit, int i) {
    return _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w.table + i), _mm512_set1_ps(1 / unit)));
  }
  static inline INLINE void put(uint8_t* out, __m512i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(v));
  }
};

// A table in registers: one of 64 bytes, or four for 8 bits.
template <int BITS>
struct ByteLookup {
  static constexpr int N = BITS == 8 ? 4 : 1;
  __m512i t[N];
  explicit ByteLookup(const uint8_t* table) {
    for (int i = 0; i < N; ++i) t[i] = _mm512_load_si512(table + 64 * i);
  }
  inline INLINE __m512i operator()(words codes) const {
    __m512i code = (__m512i)codes;
    if constexpr (BITS < 8) return _mm512_permutexvar_epi8(code, t[0]);
    else
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code),
                                    _mm512_permutex2var_epi8(t[0], code, t[1]),
                                    _mm512_permutex2var_epi8(t[2], code, t[3]));
  }
};

// In assembly: GCC 12 does not tie the intrinsic's sum to its result and copies 24 of them between
// registers and the stack at every turn (512 rows of 576 x 960: 453 us, like this 366).
static inline INLINE void dot(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

#endif

}  // namespace STERNA_ISA
}  // namespace sterna
