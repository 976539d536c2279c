// Row ops of quantised models: embedding rows out of tiles, activation rows to int8.
#include "kernels.h"
#include "tiles.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int64_t UNIT_ELEMS = 8192;  // as in rows.cpp

int rows_a_unit(int width) { return int(UNIT_ELEMS / width > 1 ? UNIT_ELEMS / width : 1); }
int num_units(int rows, int width) { return (rows + rows_a_unit(width) - 1) / rows_a_unit(width); }

template <class F>
void each_row(int unit, int rows, int width, F f) {
  int row = unit * rows_a_unit(width), end = row + rows_a_unit(width);
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
  for (int t = 0; t < num_tiles(w); ++t) {
    for (int q = 0; q < 4; ++q) {
      words c[4];
      Codes<BITS>::load(tile_at(w, block, t) + q * Codes<BITS>::Q_BYTES, c);
      for (int i = 0; i < 16; ++i) {
        int k = t * TILE_K + k_of(q, i / 4, i % 4), group = w.group ? k / w.group : 0;
        if (k >= w.in_features) continue;
        float v = table[c[i / 4][lane] >> (i % 4 * 8) & 255] * scales_of(w, block, group)[lane];
        store_one(out + k, a.scale == 1.f ? v : v * a.scale);
      }
    }
  }
}

template <class T>
void embed_unit(const QuantEmbedArgs& a, int rows, int unit) {
  Values<float> values(a.w);
  each_row(unit, rows, a.w.in_features, [&](int row) {
    T* out = static_cast<T*>(a.out) + int64_t(row) * a.w.in_features;
    switch (a.w.bits) {
      case 4: return embed_row<T, 4>(a, values, a.tokens[row], out);
      case 5: return embed_row<T, 5>(a, values, a.tokens[row], out);
      case 6: return embed_row<T, 6>(a, values, a.tokens[row], out);
      default: return embed_row<T, 8>(a, values, a.tokens[row], out);
    }
  });
}

}  // namespace

Kernel<QuantEmbedArgs> quant_embed_kernel() {
  return {[](const QuantEmbedArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.w.in_features);
          },
          [](const QuantEmbedArgs& a, const Step& step, const Worker&, int unit) {
            int rows = step.num_rows[a.rows_kind];
            a.dtype ? embed_unit<bf16>(a, rows, unit) : embed_unit<float>(a, rows, unit);
          }};
}

Kernel<QuantRowsArgs> quant_rows_kernel() {
  return {[](const QuantRowsArgs&, const Step&) { return 0; },
          [](const QuantRowsArgs&, const Step&, const Worker&, int) {}};
}

}  // namespace STERNA_ISA
}  // namespace sterna
