// Tiles -> a panel of two blocks (32 outputs) in walk order, for the micro-kernels.
#pragma once
#include "quant.h"

namespace sterna {
namespace STERNA_ISA {

constexpr int PAIR = 2 * PANEL;  // elements of a step: 32 outputs x 2 k

// One tile of one block into `dst`, steps PAIR apart: [step][32 outputs][2] for bfloat16,
// [step][2][32 outputs] for float32. dst points at the block's first output.
template <class T, int BITS, bool MIXED, class L>
static inline INLINE void decode_tile(const uint8_t* tile, const L& lookup, bool halves, T* dst) {
  for (int q = 0; q < 4; ++q) {
    words c[4];
    Codes<BITS>::load(tile + q * Codes<BITS>::Q_BYTES, c);
    repeat<8>([&](auto i) INLINE {
      T* out = dst + step_of(halves, q, i) * PAIR;
      lookup.put(out, c, i);
    });
  }
}

#if defined(__AVX512BW__)
template <class T, int BITS, bool MIXED>
struct PanelLookup {
  Lookup<BITS, MIXED> lookup;
  PanelLookup(const Values<bf16>& values, uint32_t second) : lookup(values) {
    lookup.second = __mmask16(second);
  }
  inline INLINE void put(T* out, const words (&c)[4], int i) const {
    __m512i pair = lookup.pair(c, i);
    if constexpr (sizeof(T) == 2) return _mm512_storeu_si512(out, pair);
    _mm512_storeu_si512(out, _mm512_slli_epi32(pair, 16));
    _mm512_storeu_si512(out + PANEL, _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))));
  }
};
#else
template <class T, int BITS, bool MIXED>
struct PanelLookup {
  const T* of[BLOCK];  // the table of each row
  PanelLookup(const Values<T>& values, uint32_t second) {
    for (int r = 0; r < BLOCK; ++r) of[r] = values.of[MIXED ? second >> r & 1 : 0];
  }
  inline INLINE void put(T* out, const words (&c)[4], int i) const {
    for (int r = 0; r < BLOCK; ++r) {
      uint32_t word = i % 2 ? c[i / 2][r] : c[i / 2][r] >> 8;
      T lo = of[r][word & 255], hi = of[r][word >> 16 & 255];
      if (sizeof(T) == 2) {
        out[2 * r] = lo;
        out[2 * r + 1] = hi;
      } else {
        out[r] = lo;
        out[PANEL + r] = hi;
      }
    }
  }
};
#endif

#if defined(__AVX512BW__)
template <class T> using PanelValues = Values<bf16>;
#else
template <class T> using PanelValues = Values<T>;
#endif

template <class T, int BITS, bool MIXED>
void decode_block(const QuantWeight& w, const PanelValues<T>& values, int block, int tile,
                  int count, T* dst) {
  PanelLookup<T, BITS, MIXED> lookup(values, MIXED ? second_table_rows(w, block) : 0);
  for (int t = 0; t < count; ++t)
    decode_tile<T, BITS, MIXED>(tile_at(w, block, tile + t), lookup, w.group == 32,
                                dst + int64_t(t) * 32 * PAIR);
}

// Tiles [tile, tile + count) of a block; `half` says which of the panel's two blocks it is.
template <class T>
void decode_chunk(const QuantWeight& w, const PanelValues<T>& values, int block, int half,
                  int tile, int count, T* panel) {
  T* dst = panel + half * BLOCK * (sizeof(T) == 2 ? 2 : 1);
  bool mixed = w.row_formats != nullptr;
  switch (w.bits * 2 + mixed) {
    case 8: return decode_block<T, 4, false>(w, values, block, tile, count, dst);
    case 10: return decode_block<T, 5, false>(w, values, block, tile, count, dst);
    case 12: return decode_block<T, 6, false>(w, values, block, tile, count, dst);
    case 13: return decode_block<T, 6, true>(w, values, block, tile, count, dst);
    case 16: return decode_block<T, 8, false>(w, values, block, tile, count, dst);
    default: return;  // the binding admits no other widths
  }
}

}  // namespace STERNA_ISA
}  // namespace sterna
