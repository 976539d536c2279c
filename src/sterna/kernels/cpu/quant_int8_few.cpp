// quant_linear with int8 activations for few rows on AVX-512 VNNI: the plan of quant_few.cpp with a
// byte lookup and an integer dot. 256 codes of 6 bits take 6 shifts, 4 vpermb and 4 dots a row,
// half of what bfloat16 takes: 8 rows are 16 cycles for 192 bytes, twice as fast as memory.
// Integer sums are exact, so the bits are those of quant_int8.cpp whatever the order. Weights of two
// planes (e3m2) stay with its panels.
#include "few.h"
#include "int8.h"

namespace sterna {
namespace STERNA_ISA {

#if defined(STERNA_INT8_DOTS)
namespace {

constexpr int FEW_ROWS_MAX = 128, MAX_BLOCKS = 8;

// Output blocks a unit: 8 sums for one row, 16 registers of sums for more.
constexpr int blocks_for(int rows) { return rows == 1 ? 8 : rows <= 4 ? 4 : 2; }

// One unit: `block` of the weight times all rows.
struct Few {
  const QuantLinearArgs& a;
  Int8Rows x;
  int first_block, block[MAX_BLOCKS];
  Int8Values values;
};

// sum[part][row][block]; a part is half a tile where groups are.
template <bool HALVES, int MR, int NB>
struct Sums {
  static constexpr int PARTS = HALVES ? 2 : 1;
  __m512i of[PARTS][MR][NB];
};

// Adds one tile. `ahead`: from a tile to the bytes wanted next. Blocks go two by two, so that a
// broadcast feeds two dots.
template <int BITS, bool HALVES, int MR, int NB>
static inline INLINE void few_tile(Sums<HALVES, MR, NB>& sum, const uint8_t* const (&tile)[NB],
                                   const ByteLookup<BITS>& look, const int8_t* x, int64_t stride,
                                   int64_t ahead) {
  constexpr int Q_BYTES = Codes<BITS>::Q_BYTES;
  for (int q = 0; q < 4; ++q) {
    repeat<NB / 2>([&](auto half) INLINE {
      constexpr int b = 2 * decltype(half)::value;
      words c[2][4];
      repeat<2>([&](auto i) INLINE {
        const uint8_t* p = tile[b + i] + q * Q_BYTES;
        for (int at = 0; at < Q_BYTES; at += 64) __builtin_prefetch(p + ahead + at);
        Codes<BITS>::load(p, c[i]);
      });
      repeat<4>([&](auto j) INLINE {
        __m512i w0 = look(c[0][j]), w1 = look(c[1][j]);
        repeat<MR>([&](auto r) INLINE {
          __m512i* s = sum.of[HALVES ? j / 2 : 0][r] + b;
          __m512i word = _mm512_set1_epi32(load_as<int32_t>(x + r * stride + (q * 4 + j) * 4));
          dot(s[0], w0, word);
          dot(s[1], w1, word);
        });
      });
    });
  }
}

// The sums of half tiles [first, stop) begin at what the 128 too much of the weights adds.
template <int MR, int NB>
static inline INLINE void start(__m512i (&sum)[MR][NB], const Int8Rows& x, int row, int first,
                                int stop) {
  repeat<MR>([&](auto r) INLINE {
    int32_t codes = x.sum_before(row + r, stop) - x.sum_before(row + r, first);
    __m512i offset = _mm512_set1_epi32(-128 * codes);
    repeat<NB>([&](auto b) INLINE { sum[r][b] = offset; });
  });
}

template <int MR, int NB>
static inline INLINE void add_group(vf (&total)[MR][NB], const __m512i (&sum)[MR][NB],
                                    const Few& f, int group) {
  repeat<NB>([&](auto b) INLINE {
    vf scale = (vf)scales_of(f.a.w, f.block[b], group);
    repeat<MR>([&](auto r) INLINE {
      total[r][b] = multiply_add((vf)_mm512_cvtepi32_ps(sum[r][b]), scale, total[r][b]);
    });
  });
}

template <int BITS, bool HALVES, int MR, int NB>
void few_sums(const Few& f, int row, vf (&total)[MR][NB]) {
  using Parts = Sums<HALVES, MR, NB>;
  const QuantWeight& w = f.a.w;
  const ByteLookup<BITS> look(f.values.of[0][0]);
  const int tiles = num_tiles(w), groups = num_groups(w);
  const int size = HALVES ? 1 : w.group ? w.group / TILE_K : tiles;
  constexpr int64_t TILE_BYTES = 128 * BITS;
  constexpr int64_t AHEAD = (AHEAD_BYTES + NB * TILE_BYTES - 1) / (NB * TILE_BYTES);
  const int64_t next_unit = int64_t(f.a.gate ? NB / 2 - 1 : NB - 1) * tiles * TILE_BYTES;
  const uint8_t* tile[NB];
  for (int b = 0; b < NB; ++b) {
    tile[b] = tile_at(w, f.block[b], 0);
    prefetch_scales(w, f.block[b]);
  }
  for (int first = 0; first < tiles; first += size) {
    const int stop = first + size < tiles ? first + size : tiles;
    Parts sum;
    repeat<Parts::PARTS>([&](auto h) INLINE {
      start(sum.of[h], f.x, row, 2 * first + h, HALVES ? 2 * first + h + 1 : 2 * stop);
    });
    for (int t = first; t < stop; ++t) {
      int64_t ahead = AHEAD * TILE_BYTES + (t + AHEAD < tiles ? 0 : next_unit);
      few_tile<BITS, HALVES>(sum, tile, look, f.x.codes(row, t), f.x.row_bytes, ahead);
      for (int b = 0; b < NB; ++b) tile[b] += TILE_BYTES;
    }
    repeat<Parts::PARTS>([&](auto h) INLINE {
      int group = HALVES ? 2 * first + h : first / size;
      if (group < groups) add_group(total, sum.of[h], f, group);
    });
  }
}

// Rows [row, row + MR).
template <int BITS, bool HALVES, int NB, int MR>
void few_height(const Few& f, int row) {
  const int blocks = num_blocks(f.a), outs = f.a.gate ? NB / 2 : NB;
  vf total[MR][NB] = {};
  few_sums<BITS, HALVES>(f, row, total);
  for (int b = 0; b < outs && f.first_block + b < blocks; ++b) {
    vf out[MR], up[MR];
    for (int r = 0; r < MR; ++r) {
      vf factor = splat(f.x.scale(row + r) * f.a.int8_unit);
      out[r] = pinned(total[r][b] * factor);
      up[r] = pinned(total[r][(b + NB / 2) % NB] * factor);
    }
    if (f.a.gate) gate_all(f.a.gate, out, up);
    for (int r = 0; r < MR; ++r) {
      int col = (f.first_block + b) * BLOCK;
      f.a.dtype ? finish<bf16>(f.a, row + r, col, out[r]) : finish<float>(f.a, row + r, col, out[r]);
    }
  }
}

template <int BITS, bool HALVES, int NB, int MR, int LEAST>
void few_pick(const Few& f, int row, int height) {
  if (height == MR) return few_height<BITS, HALVES, NB, MR>(f, row);
  if constexpr (MR > LEAST) few_pick<BITS, HALVES, NB, MR - 1, LEAST>(f, row, height);
}

// All rows, in groups of nearly equal height: codes are decoded once a group, from the cache.
template <int BITS, bool HALVES, int NB, int MOST, int LEAST>
void few_rows(const Few& f, int num_rows) {
  int row = 0;
  for (int left = (num_rows + MOST - 1) / MOST; left > 0; --left) {
    int height = (num_rows - row + left - 1) / left;
    few_pick<BITS, HALVES, NB, MOST, LEAST>(f, row, height);
    row += height;
  }
}

template <int BITS, bool HALVES>
void few_unit(const Few& f, int rows) {
  if (rows == 1) return few_height<BITS, HALVES, 8, 1>(f, 0);
  rows <= 4 ? few_rows<BITS, HALVES, 4, 4, 2>(f, rows) : few_rows<BITS, HALVES, 2, 8, 4>(f, rows);
}

template <int BITS>
void few_bits(const Few& f, int rows) {
  f.a.w.group == 32 ? few_unit<BITS, true>(f, rows) : few_unit<BITS, false>(f, rows);
}

// Blocks past the end repeat the last; their sums are dropped.
Few few_of(const QuantLinearArgs& a, int rows, int unit) {
  const int size = blocks_for(rows), outs = a.gate ? size / 2 : size, blocks = num_blocks(a);
  Few f{a, Int8Rows(a), unit * outs, {}, Int8Values(a.w, a.int8_unit)};
  for (int b = 0; b < size; ++b) {
    int block = f.first_block + b % outs;
    block = block < blocks ? block : blocks - 1;
    f.block[b] = b >= outs ? blocks + block : block;
  }
  return f;
}

}  // namespace

bool int8_few_serves(const QuantLinearArgs& a, int rows) {
  return rows <= FEW_ROWS_MAX && !a.w.row_formats && Int8Values::num_planes(a.w, a.int8_unit) == 1;
}

int int8_few_units(const QuantLinearArgs& a, int rows) {
  if (!rows) return 0;
  int size = blocks_for(rows) / (a.gate ? 2 : 1);
  return (num_blocks(a) + size - 1) / size;
}

void int8_few_run(const QuantLinearArgs& a, int rows, int unit) {
  Few f = few_of(a, rows, unit);
  switch (a.w.bits) {
    case 4: return few_bits<4>(f, rows);
    case 5: return few_bits<5>(f, rows);
    case 6: return few_bits<6>(f, rows);
    case 8: return few_bits<8>(f, rows);
    default: return;  // the binding admits no other widths
  }
}
#else
bool int8_few_serves(const QuantLinearArgs&, int) { return false; }
int int8_few_units(const QuantLinearArgs&, int) { return 0; }
void int8_few_run(const QuantLinearArgs&, int, int) {}
#endif

}  // namespace STERNA_ISA
}  // namespace sterna
