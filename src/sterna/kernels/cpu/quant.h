// What the two paths of quant_linear share: how a call is cut into units.
#pragma once
#include "epilogue.h"
#include "walk.h"

namespace sterna {
namespace STERNA_ISA {

// Output blocks of a call; a gated call pairs block b of the gate with block b of up.
static inline int num_blocks(const QuantLinearArgs& a) {
  return (a.out_features + BLOCK - 1) / BLOCK;
}

// The gate of N vectors at once: side by side, so that their chains of 20 steps overlap. (A vector
// at a time: 576 x 1536 gated with 512 rows 2,400 us, like this 2,160.)
template <int N>
static inline INLINE void gate_all(int gate, vf (&g)[N], const vf (&u)[N]) {
  if (gate == ACT_SILU) {
    repeat<N>([&](auto i) INLINE { g[i] = vsilu(g[i]) * u[i]; });
  } else if (gate == ACT_GELU_TANH) {
    repeat<N>([&](auto i) INLINE { g[i] = vgelu_tanh(g[i]) * u[i]; });
  } else {
    repeat<N>([&](auto i) INLINE { g[i] = vgelu_exact(g[i]) * u[i]; });
  }
}

// Codes decoded in registers. At 128 rows the panel takes over: 170 against 176 us for 576 x 960,
// 636 against 650 gated, 17 rows 26 against 43.
constexpr int FEW_MAX = 128;
bool few_serves(const QuantLinearArgs& a, int rows);
int few_units(const QuantLinearArgs& a, int rows);
void few_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);

// A panel path's unit: rows [row, end) of a row block times two blocks of the weight (gated: of
// gate and of up); block[1] = -1 when there is no second.
constexpr int ROW_BLOCK = 256;  // rows that share a decoded chunk; their x chunk stays in L2
constexpr int CHUNK = 16;       // tiles decoded at a time
struct PairUnit {
  int row, end, block[2];
};
struct PairCut {
  int rows, blocks, pairs, row_blocks;
  PairCut(const QuantLinearArgs& a, int num_rows) : rows(num_rows), blocks(num_blocks(a)) {
    pairs = a.gate ? blocks : (blocks + 1) / 2;
    row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  }
  int units() const { return pairs * row_blocks; }
  PairUnit at(int unit, bool is_gated) const {
    int height = (rows + row_blocks - 1) / row_blocks;
    int row = unit / pairs * height, pair = unit % pairs;
    int end = row + height < rows ? row + height : rows;
    if (is_gated) return {row, end, {pair, blocks + pair}};
    return {row, end, {2 * pair, 2 * pair + 1 < blocks ? 2 * pair + 1 : -1}};
  }
};

// The scales of a chunk; a group past the end of the weight (half a tile of padding) gets 0.
static inline void copy_scales(const QuantWeight& w, const int (&block)[2], int first_tile,
                               float (&scales)[2 * CHUNK][PANEL]) {
  int first = w.group ? first_tile * TILE_K / w.group : 0;
  int left = num_groups(w) - first, most = w.group ? CHUNK * TILE_K / w.group : 1;
  std::memset(scales, 0, sizeof(scales));
  for (int i = 0; i < 2; ++i)
    for (int g = 0; block[i] >= 0 && g < (left < most ? left : most); ++g)
      store_as(scales[g] + i * BLOCK, scales_of(w, block[i], first + g));
}

// Stores rows [row, end), at most four, from their finished sums [.][PANEL].
template <class T>
void store_outputs(const QuantLinearArgs& a, const PairUnit& u, int row, int end,
                   const float* total) {
  constexpr int N = 4;
  for (int c = 0; c < BLOCK; c += VW) {
    vf first[N], second[N];
    repeat<N>([&](auto r) INLINE {
      const float* t = total + (row + r < end ? r : 0) * PANEL + c;
      first[r] = pinned(load(t));
      second[r] = pinned(load(t + BLOCK));
    });
    if (a.gate) gate_all(a.gate, first, second);
    int col = u.block[0] * BLOCK + c;
    for (int r = 0; r < N && row + r < end; ++r) {
      finish<T>(a, row + r, col, first[r]);
      if (!a.gate && u.block[1] >= 0) finish<T>(a, row + r, col + BLOCK, second[r]);
    }
  }
}

// Integer activations.
int int8_units(const QuantLinearArgs& a, int rows);
void int8_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit);
bool int8_few_serves(const QuantLinearArgs& a, int rows);
int int8_few_units(const QuantLinearArgs& a, int rows);
void int8_few_run(const QuantLinearArgs& a, int rows, int unit);

}  // namespace STERNA_ISA
}  // namespace sterna
