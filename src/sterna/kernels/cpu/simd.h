// Vectors of VW floats for one instruction set. Every kernel file is compiled once per set with
// another STERNA_ISA name, so all of this lives in a namespace of that name.
//
// GCC/Clang vector extensions carry the arithmetic (also on aarch64); only the bf16 dot product,
// which the language cannot express, is written with an intrinsic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sterna {
namespace STERNA_ISA {

#if defined(__AVX512F__)
constexpr int VW = 16;
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));

typedef uint16_t bf16;

template <class V, class T>
static inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
static inline void store_as(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }

static inline vf splat(float x) { return x - (vf){}; }
static inline vf load(const float* p) { return load_as<vf>(p); }
static inline void store(float* p, vf v) { store_as(p, v); }

static inline float to_float(bf16 h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline float to_float(float f) { return f; }

// Round to nearest even; a NaN stays a NaN (its payload could otherwise round to infinity).
static inline bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline vf load(const bf16* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
static inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  store_as(p, (__m256i)_mm512_cvtneps_pbh((__m512)v));  // also even; flushes denormals to zero
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vi is_nan = (vi)(v != v);
  vu out = (vu)(is_nan ? (vi)quiet : (vi)rounded) & 0xffffu;
  store_as(p, __builtin_convertvector(out, vh));
#endif
}
static inline void store_one(float* p, float v) { *p = v; }
static inline void store_one(bf16* p, float v) { *p = to_bf16(v); }

// Fixed tree, so that a sum never depends on how a loop was unrolled.
static inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float lanes[VW];
  store(lanes, v);
  for (int width = VW / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float lanes[VW];
  store(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < VW; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// exp(x) for x <= ~88: 2^n * p(r), |r| <= ln2/2, degree-6 polynomial (relative error < 2e-7).
// Below -87.3 it returns 0 exactly, which is what masked keys need.
static inline vf vexp(vf x) {
  const vf lowest = splat(-87.3f), highest = splat(88.3f);
  vi under = (vi)(x < lowest);
  vf c = x < lowest ? lowest : x;
  c = c > highest ? highest : c;
  vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = (c * splat(1.44269504088896341f) + magic) - magic;
  vf r = c - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  vi e = __builtin_convertvector(n, vi);
  vf scale = (vf)((e + 127) << 23);
  vi out = (vi)(p * scale);
  vi nan = (vi)(x != x);
  out = out & ~under;
  return (vf)(nan ? (vi)x : out);
}

// 2^x for x <= 0 (softmax): 0 exactly for -infinity, NaN for NaN. Relative error < 2e-7, or 3e-06
// when SHORT (for results that are rounded to bfloat16, 2e-3).
template <bool SHORT = false>
static inline vf vexp2(vf x) {
  const vf lowest = splat(-200.f);
#if defined(__AVX512F__)
  x = (vf)_mm512_max_ps((__m512)lowest, (__m512)x);  // the second operand wins when it is NaN
  vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < lowest ? lowest : x;
  vf magic = splat(12582912.f);
  vf n = (x + magic) - magic;
#endif
  vf r = x - n, p;
  if (SHORT) {
    p = splat(9.600395517e-03f);
    p = p * r + splat(5.591689383e-02f);
    p = p * r + splat(2.402371846e-01f);
    p = p * r + splat(6.931219948e-01f);
  } else {
    p = splat(1.5353361871e-4f);
    p = p * r + splat(1.3398874458e-3f);
    p = p * r + splat(9.6184373577e-3f);
    p = p * r + splat(5.5503324549e-2f);
    p = p * r + splat(2.4022648453e-1f);
    p = p * r + splat(6.9314720006e-1f);
  }
  p = p * r + splat(1.f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi e = __builtin_convertvector(n, vi);
  vi under = (vi)(x < splat(-126.f));
  vf out = p * (vf)((e + 127) << 23);
  vf kept = (vf)((vi)out & ~under);
  return x != x ? x : kept;
#endif
}
static inline float sexp2(float x) {
  float lanes[VW];
  store(lanes, vexp2(splat(x)));
  return lanes[0];
}
static inline vf vsigmoid(vf x) { return splat(1.f) / (splat(1.f) + vexp(-x)); }
static inline vf vtanh(vf x) { return splat(1.f) - splat(2.f) / (splat(1.f) + vexp(x + x)); }
static inline vf vsilu(vf x) { return x * vsigmoid(x); }
static inline vf vgelu_tanh(vf x) {
  vf inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
  return splat(0.5f) * x * (splat(1.f) + vtanh(inner));
}

}  // namespace STERNA_ISA
}  // namespace sterna
