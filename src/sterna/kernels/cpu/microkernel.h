// The one matrix micro-kernel: acc[MR][NV] += A[MR rows] * B[NV vectors of outputs].
//
// Lanes run over outputs and the walk over K is sequential, one fused multiply-add (or bf16 pair
// dot) at a time, so an output has the same bits for 1 row and for 512. A is row-major; B gives
// NV * VW outputs for each k step. P = elements a step: 2 for bfloat16, 1 for float32.
#pragma once
#include <utility>

#include "simd.h"

namespace sterna {
namespace STERNA_ISA {

template <class T> struct Elem;
template <> struct Elem<float> { static constexpr int P = 1; };
template <> struct Elem<bf16> { static constexpr int P = 2; };

#define INLINE __attribute__((always_inline))

// f(0), f(1), ... f(N - 1) with constant arguments. A loop with an unroll pragma is unrolled only
// after GCC has decided which arrays live in registers: accumulators then went to the stack.
template <int N, class F>
static inline INLINE void repeat(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) INLINE {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// float32 sums are taken in runs of this many products, then added up: the rounding error of a
// sum grows with its length, and one chain of 1,536 strays 1.6e-4 from the exact logits of
// SmolLM2 where 1e-4 is the bound.
constexpr int RUN = 16;

// Memory to ask for while multiplying: one cache line of each of LINES streams a k step, into the
// level-2 cache (LEVEL 2) or the first as well (3): what `__builtin_prefetch` calls locality.
template <int LINES, int LEVEL = 2>
struct Ahead {
  const char* at[LINES ? LINES : 1];
  static INLINE Ahead streams(const char* first, int64_t distance) {
    Ahead ahead = {};
    repeat<LINES>([&](auto i) INLINE { ahead.at[i] = first + i * distance; });
    return ahead;
  }
  INLINE void step(int k) const {
    repeat<LINES>([&](auto i) INLINE { __builtin_prefetch(at[i] + int64_t(k) * 64, 0, LEVEL); });
  }
};

// b[j] points at vector j of k step 0; b_step is the distance of k steps in elements.
template <int MR, int NV, int LINES = 0, int LEVEL = 2>
static inline INLINE void multiply(vf (&acc)[MR][NV], const float* a, int64_t lda,
                                   const float* const (&b)[NV], int64_t b_step, int num_steps,
                                   Ahead<LINES, LEVEL> ahead = {}) {
  for (int first = 0; first < num_steps; first += RUN) {
    int last = num_steps - first < RUN ? num_steps : first + RUN;
    vf run[MR][NV] = {};
    for (int k = first; k < last; ++k) {
      ahead.step(k);
      vf w[NV];
      repeat<NV>([&](auto j) INLINE { w[j] = load(b[j] + k * b_step); });
      repeat<MR>([&](auto i) INLINE {
        vf x = splat(a[i * lda + k]);
        repeat<NV>([&](auto j) INLINE { run[i][j] += x * w[j]; });
      });
    }
    repeat<MR>([&](auto i) INLINE {
      repeat<NV>([&](auto j) INLINE { acc[i][j] += run[i][j]; });
    });
  }
}

template <int MR, int NV, int LINES = 0, int LEVEL = 2>
static inline INLINE void multiply(vf (&acc)[MR][NV], const bf16* a, int64_t lda,
                                   const bf16* const (&b)[NV], int64_t b_step, int num_steps,
                                   Ahead<LINES, LEVEL> ahead = {}) {
  for (int k = 0; k < num_steps; ++k) {
    ahead.step(k);
#if defined(__AVX512BF16__)
    __m512bh w[NV];
    repeat<NV>([&](auto j) INLINE {
      w[j] = (__m512bh)_mm512_loadu_si512(b[j] + k * b_step);
    });
    repeat<MR>([&](auto i) INLINE {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + 2 * k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      repeat<NV>([&](auto j) INLINE {
        acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], w[j], x);
      });
    });
#else
    vf lo[NV], hi[NV];
    repeat<NV>([&](auto j) INLINE {
      vu w = load_as<vu>(b[j] + k * b_step);
      lo[j] = (vf)(w << 16);
      hi[j] = (vf)(w & 0xffff0000u);
    });
    repeat<MR>([&](auto i) INLINE {
      vf x_lo = splat(to_float(a[i * lda + 2 * k]));
      vf x_hi = splat(to_float(a[i * lda + 2 * k + 1]));
      repeat<NV>([&](auto j) INLINE {
        acc[i][j] += x_lo * lo[j];
        acc[i][j] += x_hi * hi[j];
      });
    });
#endif
  }
}

}  // namespace STERNA_ISA
}  // namespace sterna
