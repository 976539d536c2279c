// quant_linear for few rows on AVX-512 BF16: codes go from memory through a table lookup straight
// into the dot, and a decoded vector feeds every row. Several output blocks at a time, so that
// enough independent sums hide the latency of the dot (5.8 cycles; two start a cycle).
//
// Per 256 codes of 6 bits: 3 loads, 10 shifts, 8 vpermi2w (those two kinds share two ports: 9
// cycles), 5 ternary logic, and 8 dots a row on two other ports. 192 bytes in 9 cycles is 85 GB/s
// a core, twice what memory gives to both, and 8 rows take 32 cycles: still about memory speed.
#include "quant.h"

namespace sterna {
namespace STERNA_ISA {

#if defined(__AVX512BF16__)
namespace {

constexpr int MAX_BLOCKS = 6;
// Bytes asked of memory before they are used. 4, 8 and 16 KB: 8 rows of 2048 x 5632 take 245, 220
// and 226 us; the hardware alone, 580: each block is a stream too short for it.
constexpr int AHEAD_BYTES = 8192;

// Blocks a unit: 6 sums for one row; as many as keep sums within 16 registers for more.
constexpr int blocks_for(int rows) { return rows == 1 ? 6 : rows <= 4 ? 4 : 2; }

struct Few {
  const QuantLinearArgs& a;
  const bf16* tail;  // [rows][64]: the last, partial tile of x, zero padded; null when whole
  int block[MAX_BLOCKS];
};

// A pair of x in every lane. In assembly: the compiler would otherwise load it once for all blocks,
// hold every row's pairs in registers and push the sums out to memory (8 rows: 250 GFLOP/s a core
// instead of 440).
typedef int32_t __attribute__((may_alias)) pair_bits;
INLINE __m512bh broadcast(const bf16* x) {
  __m512i v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const pair_bits*>(x)));
  return (__m512bh)v;
}

// sum[HALVES][MR][NB] += one tile. `ahead`: from a tile to the bytes wanted next. Blocks go two by
// two, so that a broadcast feeds two dots: with one each, loads would be the limit.
template <int BITS, bool MIXED, bool HALVES, int MR, int NB>
INLINE void few_tile(__m512 (&sum)[HALVES ? 2 : 1][MR][NB], const uint8_t* const (&tile)[NB],
                     const Lookup<BITS, MIXED>& lookup, const __mmask16 (&second)[NB],
                     const bf16* x, int64_t lda, int64_t ahead) {
  Lookup<BITS, MIXED> look = lookup;
  for (int q = 0; q < 4; ++q) {
    UNROLL for (int b = 0; b < NB; b += 2) {
      words c[2][4];
      UNROLL for (int i = 0; i < 2; ++i) {
        const uint8_t* p = tile[b + i] + q * Codes<BITS>::Q_BYTES;
        UNROLL for (int at = 0; at < Codes<BITS>::Q_BYTES; at += 64)
          __builtin_prefetch(p + ahead + at);
        Codes<BITS>::load(p, c[i]);
      }
      UNROLL for (int i = 0; i < 8; ++i) {
        if (MIXED) look.second = second[b];
        __m512bh w0 = (__m512bh)look.pair(c[0], i);
        if (MIXED) look.second = second[b + 1];
        __m512bh w1 = (__m512bh)look.pair(c[1], i);
        UNROLL for (int r = 0; r < MR; ++r) {
          __m512* s = sum[HALVES ? i / 4 : 0][r] + b;
          __m512bh pair = broadcast(x + r * lda + 2 * q + 8 * i);
          s[0] = _mm512_dpbf16_ps(s[0], w0, pair);
          s[1] = _mm512_dpbf16_ps(s[1], w1, pair);
        }
      }
    }
  }
}

template <int BITS, bool MIXED, bool HALVES, int MR, int NB>
void few_sums(const Few& f, vf (&total)[MR][NB]) {
  const QuantWeight& w = f.a.w;
  const Values<bf16> values(w);
  const Lookup<BITS, MIXED> lookup(values);
  const int tiles = num_tiles(w), groups = num_groups(w);
  const int size = HALVES || !w.group ? (HALVES ? 1 : tiles) : w.group / TILE_K;
  const uint8_t* tile[NB];
  __mmask16 second[NB] = {};
  for (int b = 0; b < NB; ++b) {
    tile[b] = tile_at(w, f.block[b], 0);
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
      const bf16* x = is_tail ? f.tail : static_cast<const bf16*>(f.a.x) + int64_t(t) * TILE_K;
      few_tile<BITS, MIXED, HALVES, MR, NB>(sum, tile, lookup, second, x,
                                            is_tail ? TILE_K : w.in_features, ahead(t));
      for (int b = 0; b < NB; ++b) tile[b] += 128 * BITS;
    }
    for (int h = 0; h < (HALVES ? 2 : 1); ++h) {
      int group = HALVES ? 2 * first + h : first / size;
      if (group >= groups) break;
      UNROLL for (int b = 0; b < NB; ++b) {
        vf scale = (vf)scales_of(w, f.block[b], group);
        UNROLL for (int r = 0; r < MR; ++r) {
          vf part = (vf)sum[h][r][b];
          total[r][b] = w.group ? multiply_add(part, scale, total[r][b]) : part * scale;
        }
      }
    }
  }
}

template <int BITS, bool MIXED, bool HALVES, int MR>
void few_unit(const QuantLinearArgs& a, const bf16* tail, int first_block) {
  constexpr int NB = blocks_for(MR), OUT = NB / 2;
  const int blocks = num_blocks(a), outs = a.gate ? OUT : NB;
  Few f{a, tail, {}};
  for (int b = 0; b < NB; ++b) {  // blocks past the end repeat the last; their sums are dropped
    int block = first_block + (a.gate ? b % OUT : b);
    block = block < blocks ? block : blocks - 1;
    f.block[b] = a.gate && b >= OUT ? blocks + block : block;
  }
  vf total[MR][NB] = {};
  few_sums<BITS, MIXED, HALVES, MR, NB>(f, total);
  for (int b = 0; b < outs && first_block + b < blocks; ++b)
    for (int r = 0; r < MR; ++r) {
      vf v = pinned(total[r][b]);
      if (a.gate) v = gated(a.gate, v, pinned(total[r][(b + OUT) % NB]));
      finish<bf16>(a, r, (first_block + b) * BLOCK, v);
    }
}

template <int BITS, bool MIXED, bool HALVES, int MR = FEW_MAX>
void few_rows(const QuantLinearArgs& a, int rows, const bf16* tail, int first_block) {
  if (rows == MR) return few_unit<BITS, MIXED, HALVES, MR>(a, tail, first_block);
  if constexpr (MR > 1) few_rows<BITS, MIXED, HALVES, MR - 1>(a, rows, tail, first_block);
}

template <int BITS, bool MIXED>
void few_bits(const QuantLinearArgs& a, int rows, const bf16* tail, int first_block) {
  a.w.group == 32 ? few_rows<BITS, MIXED, true>(a, rows, tail, first_block)
                  : few_rows<BITS, MIXED, false>(a, rows, tail, first_block);
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

}  // namespace

bool few_serves(const QuantLinearArgs& a, int rows) { return a.dtype && rows <= FEW_MAX; }

int few_units(const QuantLinearArgs& a, int rows) {
  if (!rows) return 0;
  int size = blocks_for(rows) / (a.gate ? 2 : 1);
  return (num_blocks(a) + size - 1) / size;
}

void few_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit) {
  int first_block = unit * (blocks_for(rows) / (a.gate ? 2 : 1));
  const bf16* tail = padded_tail(a, rows, w);
  switch (a.w.bits * 2 + (a.w.row_formats != nullptr)) {
    case 8: return few_bits<4, false>(a, rows, tail, first_block);
    case 10: return few_bits<5, false>(a, rows, tail, first_block);
    case 12: return few_bits<6, false>(a, rows, tail, first_block);
    case 13: return few_bits<6, true>(a, rows, tail, first_block);
    case 16: return few_bits<8, false>(a, rows, tail, first_block);
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
