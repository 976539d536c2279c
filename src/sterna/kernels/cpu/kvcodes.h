// One byte an element of a quantised cache: to codes when a token is stored, back when a tile of
// keys is read. The formats and their limits: kernels/kv_codes.py.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "args.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {

template <CacheFormat F>
constexpr float LARGEST_CODE = F == CACHE_INT8 ? 127.f : 448.f;

static inline float magnitude(float x) { return x < 0.f ? -x : x; }

// To an integer, halves to even; exact below 2^22. No rounding instruction in the baseline set.
static inline float round_even(float x) { return (x + 12582912.f) - 12582912.f; }

// e4m3 of |x| <= 448: 3 mantissa bits, halves to even, steps of 2^-9 below 2^-6.
static inline uint8_t to_e4m3(float x) {
  float y = magnitude(x);
  uint32_t u;
  std::memcpy(&u, &y, 4);
  uint32_t normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - ((127 - 7) << 3);
  uint32_t tiny = uint32_t(int32_t(round_even((y < 1.f ? y : 0.f) * 512.f)));
  uint32_t code = y < 0.015625f ? tiny : normal;
  return uint8_t(code | (x < 0.f ? 0x80u : 0u));
}

template <CacheFormat F>
static inline uint8_t to_code(float x) {
  constexpr float limit = LARGEST_CODE<F>;
  x = x > limit ? limit : x < -limit ? -limit : x;
  if constexpr (F == CACHE_INT8) return uint8_t(int8_t(int32_t(round_even(x))));
  return to_e4m3(x);
}

// Codes of x [n]; returns their scale. NaN where an element is not finite, so that it shows.
template <CacheFormat F>
float quantise(const float* x, int n, uint8_t* codes) {
  float largest = 0.f, fault = 0.f;
  for (int c = 0; c < n; ++c) {
    float y = magnitude(x[c]);
    largest = y > largest ? y : largest;
    fault += x[c] * 0.f;  // NaN for infinity and NaN
  }
  float scale = largest / LARGEST_CODE<F>;
  if (fault != 0.f || !(scale > 0.f)) {
    std::memset(codes, 0, n);
    return fault != 0.f ? NAN : 0.f;
  }
  for (int c = 0; c < n; ++c) codes[c] = to_code<F>(x[c] / scale);
  return scale;
}

// VW signed bytes, each widened to a lane. By intrinsics: GCC 12 widens a byte vector lane by lane, which
// made attention 4 times slower.
static inline vi widen(const uint8_t* p) {
#if defined(__AVX512F__)
  __m128i x = load_as<__m128i>(p);
  return (vi)_mm512_cvtepi8_epi32(x);
#elif defined(__AVX2__)
  __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vi)_mm256_cvtepi8_epi32(x);
#else
  vi lanes;
  for (int i = 0; i < VW; ++i) lanes[i] = int8_t(p[i]);
  return lanes;
#endif
}

template <CacheFormat F>
static inline vf decode(const uint8_t* codes) {
  vi x = widen(codes);
  if constexpr (F == CACHE_INT8) return __builtin_convertvector(x, vf);
  // Code bits as the top of a float whose exponent is 120 too small. Never NaN: 0x7f reads as 480.
  vu bits = ((vu)x << 20) & 0x87f00000u;
  return (vf)bits * splat(0x1p120f);
}

template <class T>
static inline void store_two(T* p, vf a, vf b) {
  store(p, a);
  store(p + VW, b);
}
#if defined(__AVX512BF16__)
static inline void store_two(bf16* p, vf a, vf b) {
  store_as(p, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif

// `count` codes, a multiple of 16, to elements (exact), while `ahead` is asked for.
template <class T, CacheFormat F>
void decode_run(const uint8_t* codes, const uint8_t* ahead, int count, T* out) {
  int i = 0;
  for (; i + 64 <= count; i += 64) {
    __builtin_prefetch(ahead + i, 0, 2);
    repeat<32 / VW>([&](auto j) INLINE {
      int at = i + j * 2 * VW;
      store_two(out + at, decode<F>(codes + at), decode<F>(codes + at + VW));
    });
  }
  for (; i < count; i += VW) store(out + i, decode<F>(codes + i));
}

}  // namespace STERNA_ISA
}  // namespace sterna
