// Tile layout v1 of quantised weights, read: bytes -> codes -> values.
//
// A tile is 16 rows x 64 k in 128 * bits bytes. A word (row r, q, j) is four codes, by byte:
// k = 16j + 2q + 8, 16j + 2q, 16j + 2q + 9, 16j + 2q + 1; a vector (q, j) is the words of the 16
// rows. Its odd bytes, looked up, are the bf16 pair (k, k + 1) of each row and its even bytes the
// pair (k + 8, k + 9): operands of a dot whose lanes are rows. The *walk order* of the pairs of a
// tile is q, then j, then the odd, then the even bytes.
//
// Codes are left dirty above their width where that saves work: tables repeat to be read so.
#pragma once
#include "args.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {

constexpr int TILE_K = 64;  // k a tile
constexpr int BLOCK = 16;   // output rows a tile

typedef uint32_t words __attribute__((vector_size(64)));  // one word a row

static inline INLINE words each_byte(uint32_t byte) { return (words){} + byte * 0x01010101u; }

// Bits of a where the mask is 1, of b elsewhere; the mask repeats in every byte.
static inline INLINE words pick(uint32_t byte_mask, words a, words b) {
#if defined(__AVX512F__)
  __m512i mask = _mm512_set1_epi32(int(byte_mask * 0x01010101u));
  return (words)_mm512_ternarylogic_epi32(mask, (__m512i)a, (__m512i)b, 0xca);
#else
  return (a & each_byte(byte_mask)) | (b & ~each_byte(byte_mask));
#endif
}

// The four vectors (q, 0..3) of a tile as codes, dirty above BITS.
template <int BITS>
struct Codes;

template <>
struct Codes<8> {
  static constexpr int Q_BYTES = 256;
  static inline INLINE void load(const uint8_t* p, words (&c)[4]) {
    for (int j = 0; j < 4; ++j) c[j] = load_as<words>(p + 64 * j);
  }
};

template <>
struct Codes<6> {
  static constexpr int Q_BYTES = 192;
  static inline INLINE void load(const uint8_t* p, words (&c)[4]) {
    words a = load_as<words>(p), b = load_as<words>(p + 64), d = load_as<words>(p + 128);
    c[0] = pick(0x20, a >> 2, a);
    c[1] = pick(0x20, b >> 2, b);
    c[2] = pick(0x20, d >> 2, d);
    c[3] = pick(0x30, d >> 1, pick(0x03, a >> 5, b >> 3));
  }
};

template <>
struct Codes<5> {
  static constexpr int Q_BYTES = 160;
  static inline INLINE words with_bit4(words low, const uint8_t* bits) {
#if defined(__AVX512BW__)
    __m512i c = _mm512_and_si512((__m512i)low, _mm512_set1_epi8(0x0f));
    __m512i high = _mm512_or_si512(c, _mm512_set1_epi8(0x10));
    return (words)_mm512_mask_blend_epi8(load_as<uint64_t>(bits), c, high);
#else
    uint64_t mask = load_as<uint64_t>(bits);
    words high;  // four bits of the mask to bit 4 of the four bytes of a word
    for (int r = 0; r < BLOCK; ++r)
      high[r] = (uint32_t(mask >> (4 * r) & 15) * 0x00204081u & 0x01010101u) << 4;
    return (low & each_byte(0x0f)) | high;
#endif
  }
  static inline INLINE void load(const uint8_t* p, words (&c)[4]) {
    words a = load_as<words>(p), b = load_as<words>(p + 64);
    c[0] = with_bit4(a, p + 128);
    c[1] = with_bit4(b, p + 136);
    c[2] = with_bit4(a >> 4, p + 144);
    c[3] = with_bit4(b >> 4, p + 152);
  }
};

template <>
struct Codes<4> {
  static constexpr int Q_BYTES = 128;
  static inline INLINE void load(const uint8_t* p, words (&c)[4]) {
    words a = load_as<words>(p), b = load_as<words>(p + 64);
    c[0] = a;
    c[1] = b;
    c[2] = a >> 4;
    c[3] = b >> 4;
  }
};

constexpr int TABLE = 256;  // entries, repeated, so that any byte is an index

// The values of the codes: float32, or the high half of it (every value is exact in bfloat16).
template <class T>
struct Values {
  alignas(64) T of[2][TABLE];
  explicit Values(const QuantWeight& w) {
    const int codes = 1 << w.bits;
    for (int t = 0; t < (w.row_formats ? 2 : 1); ++t) {
      narrow_all(of[t], w.table + t * codes, codes);
      for (int n = codes; n < USED; n *= 2) std::memcpy(of[t] + n, of[t], n * sizeof(T));
    }
  }

 private:
#if defined(__AVX512BW__)
  static constexpr int USED = sizeof(T) == 2 ? 64 : TABLE;  // Lookup reads no more of six bits
  static void narrow_all(uint16_t* out, const float* v, int n) {  // n: a multiple of 16
    for (int i = 0; i < n; i += 16) {
      __m512i high = _mm512_srli_epi32(_mm512_loadu_si512(v + i), 16);
      store_as(out + i, _mm512_cvtepi32_epi16(high));
    }
  }
#else
  static constexpr int USED = TABLE;
  static void narrow_all(uint16_t* out, const float* v, int n) {
    for (int i = 0; i < n; ++i) out[i] = uint16_t(load_as<uint32_t>(v + i) >> 16);
  }
#endif
  static void narrow_all(float* out, const float* v, int n) { std::memcpy(out, v, n * sizeof(T)); }
};

// Which rows of a block use the second table, a bit a row.
static inline INLINE uint32_t second_table_rows(const QuantWeight& w, int block) {
  uint32_t mask = 0;
  for (int r = 0; r < BLOCK; ++r) mask |= uint32_t(w.row_formats[block * BLOCK + r] & 1) << r;
  return mask;
}

static inline int num_tiles(const QuantWeight& w) {
  return (w.in_features + TILE_K - 1) / TILE_K;
}
static inline INLINE int num_groups(const QuantWeight& w) {
  return w.group ? (w.in_features + w.group - 1) / w.group : 1;
}
static inline INLINE const uint8_t* tile_at(const QuantWeight& w, int block, int tile) {
  return w.tiles + (int64_t(block) * num_tiles(w) + tile) * (128 * w.bits);
}

typedef float floats __attribute__((vector_size(64)));  // one a row
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

// The scales of the 16 rows of a block for one group.
static inline INLINE floats scales_of(const QuantWeight& w, int block, int group) {
  int64_t at = (int64_t(block) * num_groups(w) + group) * BLOCK;
  if (w.scale_kind == SCALE_F32) return load_as<floats>(static_cast<const float*>(w.scales) + at);
  if (w.scale_kind == SCALE_E8M0) {  // 2^(e - 127); 2^-127 is a subnormal float32
    bytes e = load_as<bytes>(static_cast<const uint8_t*>(w.scales) + at);
    words u = __builtin_convertvector(e, words) << 23;
    return (floats)(u | ((words)(u == 0) & 0x00400000u));
  }
  words half = __builtin_convertvector(
      load_as<shorts>(static_cast<const uint16_t*>(w.scales) + at), words);
  floats v = (floats)((half & 0x7fffu) << 13) * 0x1p112f;  // a finite float16, exponent rebiased
  return (floats)((words)v | (half & 0x8000u) << 16);
}

// Where pair i = 2j + (even bytes) of q comes in a decoded tile. A scale group of 32 k is half a
// tile (j < 2 or j >= 2): its pairs are then kept together.
static inline INLINE int step_of(bool halves, int q, int i) {
  return halves ? i / 4 * 16 + q * 4 + i % 4 : q * 8 + i;
}

#if defined(__AVX512BW__)
// 16-bit values of the low bytes of 16-bit elements.
template <int BITS, bool MIXED>
struct Lookup {
  static constexpr int N = BITS == 8 ? 8 : 2;
  __m512i t[MIXED ? 2 * N : N];
  __mmask16 second = 0;
  explicit Lookup(const Values<bf16>& values) {
    for (int i = 0; i < N; ++i) t[i] = _mm512_load_si512(values.of[0] + 32 * i);
    if constexpr (MIXED)
      for (int i = 0; i < N; ++i) t[N + i] = _mm512_load_si512(values.of[1] + 32 * i);
  }
  static inline INLINE __m512i of_64(__m512i index, const __m512i* t) {
    return _mm512_permutex2var_epi16(t[0], index, t[1]);
  }
  inline INLINE __m512i operator()(__m512i index) const {
    if constexpr (BITS == 8) {
      __mmask32 m6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
      __mmask32 m7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
      __m512i low = _mm512_mask_blend_epi16(m6, of_64(index, t), of_64(index, t + 2));
      __m512i high = _mm512_mask_blend_epi16(m6, of_64(index, t + 4), of_64(index, t + 6));
      return _mm512_mask_blend_epi16(m7, low, high);
    }
    __m512i v = of_64(index, t);
    if constexpr (MIXED) v = _mm512_mask_blend_epi32(second, v, of_64(index, t + N));
    return v;
  }
  // Pair i of q: i odd = the even bytes.
  inline INLINE __m512i pair(const words (&c)[4], int i) const {
    __m512i v = (__m512i)c[i / 2];
    return (*this)(i % 2 ? v : _mm512_srli_epi16(v, 8));
  }
};
#endif

}  // namespace STERNA_ISA
}  // namespace sterna
