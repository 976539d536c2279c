// quant_linear for few rows on AVX-512 BF16: codes go from memory through a table lookup straight
// into the dot, and a decoded vector feeds every row. Several output blocks at a time, so that
// enough independent sums hide the latency of the dot (5.8 cycles; two start a cycle).
//
// Per 256 codes of 6 bits: 3 loads, 10 shifts, 8 vpermi2w (those two kinds share two ports: 9
// cycles), 5 ternary logic, and 8 dots a row on two other ports. 192 bytes in 9 cycles is 85 GB/s
// a core, twice what memory gives to both, and 8 rows take 32 cycles: still about memory speed.
#include "few.h"

namespace sterna {
namespace STERNA_ISA {

#if defined(__AVX512BF16__)
namespace {

constexpr int MAX_BLOCKS = 6, MAX_MR = 8;

// Output blocks a unit: 6 sums for one row, 16 registers of sums for more.
constexpr int blocks_for(int rows) { return rows == 1 ? 6 : rows <= 4 ? 4 : 2; }
// One unit: `block` of the weight times all rows. The values of the codes, and the last, partial
// tile of x (zero padded [rows][64]; null when whole), are made once.
struct Few {
  const QuantLinearArgs& a;
  const bf16* tail;
  int first_block, block[MAX_BLOCKS];
  Values<bf16> values;
};

// A pair of x in every lane.
typedef int32_t __attribute__((may_alias)) pair_bits;
static inline INLINE __m512bh broadcast(const bf16* x) {
  __m512i v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const pair_bits*>(x)));
  return (__m512bh)v;
}

// sum[HALVES][MR][NB] += one tile. `ahead`: from a tile to the bytes wanted next. Blocks go two by
// two, so that a broadcast feeds two dots: with one each, loads would be the limit.
template <int BITS, bool MIXED, bool HALVES, int MR, int NB>
static inline INLINE void few_tile(__m512 (&sum)[HALVES ? 2 : 1][MR][NB],
                                   const uint8_t* const (&tile)[NB],
                                   const Lookup<BITS, MIXED>& lookup,
                                   const __mmask16 (&second)[NB], const bf16* x, int64_t lda,
                                   int64_t ahead) {
  Lookup<BITS, MIXED> look = lookup;
  for (int q = 0; q < 4; ++q) {
    repeat<NB / 2>([&](auto half) INLINE {
      constexpr int b = 2 * decltype(half)::value;
      words c[2][4];
      repeat<2>([&](auto i) INLINE {
        const uint8_t* p = tile[b + i] + q * Codes<BITS>::Q_BYTES;
        for (int at = 0; at < Codes<BITS>::Q_BYTES; at += 64) __builtin_prefetch(p + ahead + at);
        Codes<BITS>::load(p, c[i]);
      });
      repeat<8>([&](auto i) INLINE {
        if (MIXED) look.second = second[b];
        __m512bh w0 = (__m512bh)look.pair(c[0], i);
        if (MIXED) look.second = second[b + 1];
        __m512bh w1 = (__m512bh)look.pair(c[1], i);
        repeat<MR>([&](auto r) INLINE {
          __m512* s = sum[HALVES ? i / 4 : 0][r] + b;
          __m512bh pair = broadcast(x + r * lda + 2 * q + 8 * i);
          s[0] = _mm512_dpbf16_ps(s[0], w0, pair);
          s[1] = _mm512_dpbf16_ps(s[1], w1, pair);
        });
      });
    });
  }
}

template <int BITS, bool MIXED, bool HALVES, int MR, int NB>
void few_sums(const Few& f, int row, vf (&total)[MR][NB]) {
  const QuantWeight& w = f.a.w;
  const Lookup<BITS, MIXED> lookup(f.values);
  const bf16* rows = static_cast<const bf16*>(f.a.x) + int64_t(row) * w.in_features;
  const int tiles = num_tiles(w), groups = num_groups(w);
  const int size = HALVES || !w.group ? (HALVES ? 1 : tiles) : w.group / TILE_K;
  const uint8_t* tile[NB];
  __mmask16 second[NB] = {};
  for (int b = 0; b < NB; ++b) {
    tile[b] = tile_at(w, f.block[b], 0);
    prefetch_scales(w, f.block[b]);
    if (MIXED) second[b] = __mmask16(second_table_rows(w, f.block[b]));
  }
  constexpr int64_t TILE_BYTES = 128 * BITS;
  constexpr int64_t AHEAD = (AHEAD_BYTES + NB * TILE_BYTES - 1) / (NB * TILE_BYTES);
  const int64_t next_unit = int64_t(f.a.gate ? NB / 2 - 1 : NB - 1) * tiles * TILE_BYTES;
  auto ahead = [&](int t) { return AHEAD * TILE_BYTES + (t + AHEAD < tiles ? 0 : next_unit); };
  for (int first = 0; first < tiles; first += size) {
    __m512 sum[HALVES ? 2 : 1][MR][NB] = {};
    for (int t = first; t < first + size && t < tiles; ++t) {
      bool is_tail = f.tail && t + 1 == tiles;
      const bf16* x = is_tail ? f.tail + row * TILE_K : rows + int64_t(t) * TILE_K;
      few_tile<BITS, MIXED, HALVES, MR, NB>(sum, tile, lookup, second, x,
                                            is_tail ? TILE_K : w.in_features, ahead(t));
      for (int b = 0; b < NB; ++b) tile[b] += 128 * BITS;
    }
    for (int h = 0; h < (HALVES ? 2 : 1); ++h) {
      int group = HALVES ? 2 * first + h : first / size;
      if (group >= groups) break;
      repeat<NB>([&](auto b) INLINE {
        vf scale = (vf)scales_of(w, f.block[b], group);
        repeat<MR>([&](auto r) INLINE {
          vf part = (vf)sum[h][r][b];
          total[r][b] = w.group ? multiply_add(part, scale, total[r][b]) : part * scale;
        });
      });
    }
  }
}

// Rows [row, row + MR).
template <int BITS, bool MIXED, bool HALVES, int MR, int NB>
void few_height(const Few& f, int row) {
  const int blocks = num_blocks(f.a), outs = f.a.gate ? NB / 2 : NB;
  vf total[MR][NB] = {};
  few_sums<BITS, MIXED, HALVES, MR, NB>(f, row, total);
  for (int b = 0; b < outs && f.first_block + b < blocks; ++b) {
    vf out[MR], up[MR];
    for (int r = 0; r < MR; ++r) {
      out[r] = pinned(total[r][b]);
      up[r] = pinned(total[r][(b + NB / 2) % NB]);
    }
    if (f.a.gate) gate_all(f.a.gate, out, up);
    for (int r = 0; r < MR; ++r) finish<bf16>(f.a, row + r, (f.first_block + b) * BLOCK, out[r]);
  }
}

template <int BITS, bool MIXED, bool HALVES, int NB, int MR, int LEAST>
void few_pick(const Few& f, int row, int height) {
  if (height == MR) return few_height<BITS, MIXED, HALVES, MR, NB>(f, row);
  if constexpr (MR > LEAST) few_pick<BITS, MIXED, HALVES, NB, MR - 1, LEAST>(f, row, height);
}

// All rows, in groups of nearly equal height: codes are decoded once a group, from the cache.
template <int BITS, bool MIXED, bool HALVES, int NB, int MOST, int LEAST>
void few_rows(const Few& f, int num_rows) {
  int row = 0;
  for (int left = (num_rows + MOST - 1) / MOST; left > 0; --left) {
    int height = (num_rows - row + left - 1) / left;
    few_pick<BITS, MIXED, HALVES, NB, MOST, LEAST>(f, row, height);
    row += height;
  }
}

template <int BITS, bool MIXED, bool HALVES>
void few_unit(const Few& f, int rows) {
  if (rows == 1) return few_height<BITS, MIXED, HALVES, 1, 6>(f, 0);
  rows <= 4 ? few_rows<BITS, MIXED, HALVES, 4, 4, 2>(f, rows)
            : few_rows<BITS, MIXED, HALVES, 2, MAX_MR, 4>(f, rows);
}

template <int BITS, bool MIXED>
void few_bits(const Few& f, int rows) {
  f.a.w.group == 32 ? few_unit<BITS, MIXED, true>(f, rows) : few_unit<BITS, MIXED, false>(f, rows);
}

const bf16* padded_tail(const QuantLinearArgs& a, int rows, const Worker& w) {
  int k = a.w.in_features, count = k % TILE_K;
  if (!count) return nullptr;
  bf16* out = reinterpret_cast<bf16*>(w.scratch);
  std::memset(out, 0, sizeof(bf16) * rows * TILE_K);
  for (int r = 0; r < rows; ++r)
    std::memcpy(out + r * TILE_K, static_cast<const bf16*>(a.x) + int64_t(r + 1) * k - count,
                sizeof(bf16) * count);
  return out;
}

// Blocks past the end repeat the last; their sums are dropped.
Few few_of(const QuantLinearArgs& a, int rows, const Worker& w, int unit) {
  const int size = blocks_for(rows), outs = a.gate ? size / 2 : size, blocks = num_blocks(a);
  Few f{a, padded_tail(a, rows, w), unit * outs, {}, Values<bf16>(a.w)};
  for (int b = 0; b < size; ++b) {
    int block = f.first_block + b % outs;
    block = block < blocks ? block : blocks - 1;
    f.block[b] = b >= outs ? blocks + block : block;
  }
  return f;
}

}  // namespace

bool few_serves(const QuantLinearArgs& a, int rows) { return a.dtype && rows <= FEW_MAX; }

int few_units(const QuantLinearArgs& a, int rows) {
  if (!rows) return 0;
  int size = blocks_for(rows) / (a.gate ? 2 : 1);
  return (num_blocks(a) + size - 1) / size;
}

void few_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit) {
  Few f = few_of(a, rows, w, unit);
  switch (a.w.bits * 2 + (a.w.row_formats != nullptr)) {
    case 8: return few_bits<4, false>(f, rows);
    case 10: return few_bits<5, false>(f, rows);
    case 12: return few_bits<6, false>(f, rows);
    case 13: return few_bits<6, true>(f, rows);
    case 16: return few_bits<8, false>(f, rows);
    default: return;  // the binding admits no other widths
  }
}
#else
bool few_serves(const QuantLinearArgs&, int) { return false; }
int few_units(const QuantLinearArgs&, int) { return 0; }
void few_run(const QuantLinearArgs&, int, const Worker&, int) {}
#endif

}  // namespace STERNA_ISA
}  // namespace sterna
