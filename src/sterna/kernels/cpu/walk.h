// The micro-kernel of quantised weights: one tile (or half a tile) of MR activation rows times NV
// vectors of outputs, in the walk order of tiles.h. An output has the same bits for every MR.
#pragma once
#include "tiles.h"
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace sterna {
namespace STERNA_ISA {

// NI pairs a q: 8 = a tile, 4 = half of one. b[j] points at vector j of the first pair, b_step
// elements from pair to pair; x at the first k, row to row lda.
template <int NI, int MR, int NV>
static inline INLINE void multiply_tile(vf (&sum)[MR][NV], const bf16* x, int64_t lda,
                                        const bf16* const (&b)[NV], int b_step) {
  for (int q = 0; q < 4; ++q) {
    repeat<NI>([&](auto i) INLINE {
      const int at = (q * NI + i) * b_step;
      const bf16* xk = x + 2 * q + 8 * i;
#if defined(__AVX512BF16__)
      __m512bh w[NV];
      repeat<NV>([&](auto j) INLINE { w[j] = (__m512bh)_mm512_loadu_si512(b[j] + at); });
      repeat<MR>([&](auto r) INLINE {
        __m512bh pair = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(xk + r * lda));
        repeat<NV>([&](auto j) INLINE { sum[r][j] = _mm512_dpbf16_ps(sum[r][j], w[j], pair); });
      });
#else
      vf lo[NV], hi[NV];
      repeat<NV>([&](auto j) INLINE {
        vu w = load_as<vu>(b[j] + at);
        lo[j] = (vf)(w << 16);
        hi[j] = (vf)(w & 0xffff0000u);
      });
      repeat<MR>([&](auto r) INLINE {
        vf x_lo = splat(to_float(xk[r * lda])), x_hi = splat(to_float(xk[r * lda + 1]));
        repeat<NV>([&](auto j) INLINE {
          sum[r][j] += x_lo * lo[j];
          sum[r][j] += x_hi * hi[j];
        });
      });
#endif
    });
  }
}

// float32: the products of a q are summed first, for the reason RUN gives in microkernel.h.
template <int NI, int MR, int NV>
static inline INLINE void multiply_tile(vf (&sum)[MR][NV], const float* x, int64_t lda,
                                        const float* const (&b)[NV], int b_step) {
  for (int q = 0; q < 4; ++q) {
    vf run[MR][NV] = {};
    repeat<2 * NI>([&](auto i) INLINE {
      const int at = (q * 2 * NI + i) * b_step;
      const float* xk = x + 2 * q + 8 * (i / 2) + i % 2;
      vf w[NV];
      repeat<NV>([&](auto j) INLINE { w[j] = load(b[j] + at); });
      repeat<MR>([&](auto r) INLINE {
        vf v = splat(xk[r * lda]);
        repeat<NV>([&](auto j) INLINE { run[r][j] += v * w[j]; });
      });
    });
    repeat<MR>([&](auto r) INLINE {
      repeat<NV>([&](auto j) INLINE { sum[r][j] += run[r][j]; });
    });
  }
}

// Keeps the compiler from fusing the product in v with what the epilogue adds: whether it does so
// must not depend on the path that made v.
static inline INLINE vf pinned(vf v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// a * b + c with one rounding where the set has it; never left to the compiler, which fuses or not
// as the code around it falls.
static inline INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < VW; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return pinned(a * b) + c;
#endif
}

}  // namespace STERNA_ISA
}  // namespace sterna
