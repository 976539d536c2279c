// quant_linear with int8 activations (rows of QuantRowsArgs): integer dots, exact sums, and one
// float32 product with the scale a group; few rows take quant_int8_few.cpp. Row x of the result = sum over groups of
// (integer sum) * scale, times the row's scale and the unit of the weight values.
//
// AVX-512 VNNI: vpdpbusd multiplies unsigned by signed bytes, four k a lane. The weight is the
// unsigned side, 128 too high; sums start at -128 times the sum of their activations, which comes
// with the rows. Values beyond a byte (e3m2: up to 448 sixteenths) are two planes, 16 * high + low.
// Other sets: 16-bit weights and plain multiplications.
#include "int8.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

#if defined(STERNA_INT8_DOTS)
constexpr int MAX_MR = 12;
constexpr int AHEAD = 4096;  // bytes asked of memory before they are decoded; see quant_few.cpp

struct Panel {
  static constexpr int WORD = 128;  // bytes: 64 of each block
  alignas(64) uint8_t data[CHUNK * 16 * WORD * MAX_PLANES];
  uint8_t* at(int planes, int word) { return data + int64_t(word) * WORD * planes; }
};

// One plane of tiles of one block; a word is [plane][block][64].
template <int BITS, bool MIXED>
void decode_plane(const QuantWeight& w, const Int8Values& values, int plane, int block, int tile,
                  int count, uint8_t* out) {
  const ByteLookup<BITS> first(values.of[0][plane]), other(values.of[1][plane]);
  const __mmask16 second = MIXED ? __mmask16(second_table_rows(w, block)) : 0;
  const int word_bytes = Panel::WORD * values.planes;
  const bool halves = w.group == 32;
  for (int t = 0; t < count; ++t, out += 16 * word_bytes)
    for (int q = 0; q < 4; ++q) {
      const uint8_t* p = tile_at(w, block, tile + t) + q * Codes<BITS>::Q_BYTES;
      for (int at = 0; at < Codes<BITS>::Q_BYTES; at += 64) __builtin_prefetch(p + AHEAD + at);
      words c[4];
      Codes<BITS>::load(p, c);
      repeat<4>([&](auto j) INLINE {
        __m512i v = first(c[j]);
        if constexpr (MIXED) v = _mm512_mask_blend_epi32(second, v, other(c[j]));
        _mm512_storeu_si512(out + word_at(halves, q, j) * word_bytes, v);
      });
    }
}

template <int BITS>
void decode(const QuantWeight& w, const Int8Values& values, int block, int half, int tile,
            int count, Panel& panel) {
  for (int p = 0; p < values.planes; ++p) {
    uint8_t* out = panel.data + p * Panel::WORD + half * 64;
    if (w.row_formats) decode_plane<BITS, true>(w, values, p, block, tile, count, out);
    else decode_plane<BITS, false>(w, values, p, block, tile, count, out);
  }
}

// Integer sums of words [0, 4 * NW) of a panel: NW words a q.
template <int MR, int PLANES, int NW>
static inline INLINE void dots(__m512i (&acc)[MR][2 * PLANES], const int8_t* x, int64_t stride,
                               const uint8_t* panel) {
  for (int q = 0; q < 4; ++q) {
    repeat<NW>([&](auto j) INLINE {
      const uint8_t* w = panel + int64_t(q * NW + j) * Panel::WORD * PLANES;
      __m512i v[2 * PLANES];
      repeat<2 * PLANES>([&](auto i) INLINE { v[i] = _mm512_loadu_si512(w + 64 * i); });
      repeat<MR>([&](auto r) INLINE {
        __m512i word = _mm512_set1_epi32(load_as<int32_t>(x + r * stride + (q * 4 + j) * 4));
        repeat<2 * PLANES>([&](auto i) INLINE { dot(acc[r][i], v[i], word); });
      });
    });
  }
}

// sum[MR][2 blocks] of half tiles [first, stop) of the chunk that begins at `tile`; with groups of
// 32 that is one half, else whole tiles.
template <int MR, int PLANES>
static inline INLINE void integer_sums(ints (&sum)[MR][2], const Int8Rows& x, int row, int tile,
                                       int first, int stop, Panel& panel) {
  __m512i acc[MR][2 * PLANES];
  repeat<MR>([&](auto r) INLINE {
    int32_t before = x.sum_before(row + r, 2 * tile + first);
    int32_t codes = x.sum_before(row + r, 2 * tile + stop) - before;
    repeat<2 * PLANES>([&](auto i) INLINE {
      acc[r][i] = _mm512_set1_epi32(i < 2 ? -128 * codes : 0);
    });
  });
  if (stop - first == 1)
    dots<MR, PLANES, 2>(acc, x.codes(row, tile + first / 2) + first % 2 * 8, x.row_bytes,
                        panel.at(PLANES, first * 8));
  else
    for (int t = first / 2; t < stop / 2; ++t)
      dots<MR, PLANES, 4>(acc, x.codes(row, tile + t), x.row_bytes, panel.at(PLANES, t * 16));
  repeat<MR>([&](auto r) INLINE { repeat<2>([&](auto b) INLINE {
      __m512i v = acc[r][b];
      if (PLANES == 2) v = _mm512_add_epi32(_mm512_slli_epi32(v, 4), acc[r][2 * PLANES - 2 + b]);
      sum[r][b] = (ints)v;
    }); });
}
#else
constexpr int MAX_MR = 4, MAX_PLANES = 1;

struct Int8Values {
  int16_t of[2][1][TABLE];
  int planes = 1;
  Int8Values(const QuantWeight& w, float unit) {
    const int codes = 1 << w.bits;
    for (int t = 0; t < (w.row_formats ? 2 : 1); ++t)
      for (int i = 0; i < TABLE; ++i)
        of[t][0][i] = int16_t(w.table[t * codes + i % codes] * (1.f / unit));
  }
};

struct Panel {
  int16_t data[CHUNK * 16 * 4][PANEL];  // [word, byte of it][output]
};

template <int BITS>
void decode(const QuantWeight& w, const Int8Values& values, int block, int half, int tile,
            int count, Panel& panel) {
  const uint32_t second = w.row_formats ? second_table_rows(w, block) : 0;
  for (int t = 0; t < count; ++t)
    for (int q = 0; q < 4; ++q) {
      words c[4];
      Codes<BITS>::load(tile_at(w, block, tile + t) + q * Codes<BITS>::Q_BYTES, c);
      for (int j = 0; j < 4; ++j)
        for (int b = 0; b < 4; ++b) {
          int16_t* out = panel.data[(t * 16 + word_at(w.group == 32, q, j)) * 4 + b];
          for (int r = 0; r < BLOCK; ++r)
            out[half * BLOCK + r] = values.of[second >> r & 1][0][c[j][r] >> (8 * b) & 255];
        }
    }
}

template <int MR, int PLANES>
static inline INLINE void integer_sums(ints (&sum)[MR][2], const Int8Rows& x, int row, int tile,
                                       int first, int stop, Panel& panel) {
  const int size = stop - first == 1 ? 2 : 4;  // words a q
  for (int r = 0; r < MR; ++r) {
    int32_t acc[PANEL] = {};
    for (int t = first / 2; t < (stop + 1) / 2; ++t)
      for (int i = 0; i < 4 * size; ++i) {
        int word = size == 4 ? i : i / 2 * 4 + first % 2 * 2 + i % 2;  // of the activations
        const int8_t* codes = x.codes(row + r, tile + t) + word * 4;
        const int16_t(*w)[PANEL] = panel.data + (t * 16 + (size == 4 ? 0 : first % 2 * 8) + i) * 4;
        for (int b = 0; b < 4; ++b)
          for (int o = 0; o < PANEL; ++o) acc[o] += int32_t(w[b][o]) * codes[b];
      }
    std::memcpy(sum[r], acc, sizeof(acc));
  }
}
#endif

struct Scratch {
  Panel panel;
  alignas(64) float scales[2 * CHUNK][PANEL];
  alignas(64) float state[ROW_BLOCK][PANEL];  // totals; or, of a row scale, integer sums
};
static_assert(sizeof(Scratch) + 64 <= SCRATCH_BYTES, "scratch");

struct Unit : PairUnit {
  const QuantLinearArgs& a;
  Int8Rows x;
  Scratch& s;
};
struct Span {
  int first, count;
  bool is_last;
};

// What a block's 16 integer sums come to: lanes of VW floats at a time.
static inline INLINE void add_group(float* total, const ints& sum, const float* scale) {
#if defined(__AVX512F__)
  vf v = __builtin_convertvector((vi)sum, vf);
  return store(total, multiply_add(v, load(scale), load(total)));
#endif
  alignas(64) int32_t lanes[BLOCK];
  store_as(lanes, sum);
  for (int c = 0; c < BLOCK; c += VW) {
    vf v = __builtin_convertvector(load_as<vi>(lanes + c), vf);
    store(total + c, multiply_add(v, load(scale + c), load(total + c)));
  }
}

template <int MR, int PLANES>
void rows_of(const Unit& u, const Span& span, int row) {
  const int group = u.a.w.group ? u.a.w.group / 32 : 2 * span.count;  // half tiles
  float(*state)[PANEL] = u.s.state + (row - u.row);
  if (!span.first) std::memset(state, 0, sizeof(float) * PANEL * MR);
  for (int first = 0; first < 2 * span.count; first += group) {
    int stop = first + group < 2 * span.count ? first + group : 2 * span.count;
    ints sum[MR][2];
    integer_sums<MR, PLANES>(sum, u.x, row, span.first, first, stop, u.s.panel);
    const float* scale = u.s.scales[u.a.w.group ? first / group : 0];
    repeat<MR>([&](auto r) INLINE { repeat<2>([&](auto b) INLINE {
        float* out = state[r] + b * BLOCK;
        if (u.a.w.group) add_group(out, sum[r][b], scale + b * BLOCK);
        else store_as(out, load_as<ints>(out) + sum[r][b]);
      }); });
  }
}

template <int PLANES, int MR>
void rows_of_height(const Unit& u, const Span& span, int row, int height) {
  if (height == MR) return rows_of<MR, PLANES>(u, span, row);
  if constexpr (MR > 1) rows_of_height<PLANES, MR - 1>(u, span, row, height);
}

// Integer sums of a row scale to totals; then the scale of the activation row.
void scale_row(const Unit& u, int row) {
  float* state = u.s.state[row - u.row];
  if (!u.a.w.group)
    for (int b = 0; b < 2; ++b) {
      ints sum = load_as<ints>(state + b * BLOCK);
      std::memset(state + b * BLOCK, 0, sizeof(float) * BLOCK);
      add_group(state + b * BLOCK, sum, u.s.scales[0] + b * BLOCK);
    }
  vf factor = splat(u.x.scale(row) * u.a.int8_unit);
  for (int c = 0; c < PANEL; c += VW) store(state + c, load(state + c) * factor);
}

template <class T>
void finish_rows(const Unit& u, int row, int end) {
  for (int r = row; r < end; ++r) scale_row(u, r);
  for (int r = row; r < end; r += 4) store_outputs<T>(u.a, u, r, end, u.s.state[r - u.row]);
}

void multiply_rows(const Unit& u, const Span& span, int planes) {
  const int most = planes == 1 ? MAX_MR : MAX_MR / 2;
  int row = u.row;
  for (int left = (u.end - row + most - 1) / most; left > 0; --left) {
    int height = (u.end - row + left - 1) / left;
    if constexpr (MAX_PLANES == 2)
      if (planes == 2) rows_of_height<2, MAX_MR / 2>(u, span, row, height);
    if (planes == 1) rows_of_height<1, MAX_MR>(u, span, row, height);
    if (span.is_last)
      (u.a.dtype ? finish_rows<bf16> : finish_rows<float>)(u, row, row + height);
    row += height;
  }
}

void decode_chunk(const QuantWeight& w, const Int8Values& values, int block, int half, int tile,
                  int count, Panel& panel) {
  switch (w.bits) {
    case 4: return decode<4>(w, values, block, half, tile, count, panel);
    case 5: return decode<5>(w, values, block, half, tile, count, panel);
    case 6: return decode<6>(w, values, block, half, tile, count, panel);
    default: return decode<8>(w, values, block, half, tile, count, panel);
  }
}

}  // namespace

int int8_units(const QuantLinearArgs& a, int rows) {
  return int8_few_serves(a, rows) ? int8_few_units(a, rows) : PairCut(a, rows).units();
}

void int8_run(const QuantLinearArgs& a, int rows, const Worker& worker, int unit) {
  if (int8_few_serves(a, rows)) return int8_few_run(a, rows, unit);
  const QuantWeight& w = a.w;
  const Int8Values values(w, a.int8_unit);
  Scratch& s = *reinterpret_cast<Scratch*>((uintptr_t(worker.scratch) + 63) / 64 * 64);
  Unit u{PairCut(a, rows).at(unit, a.gate), a, Int8Rows(a), s};
  const int tiles = num_tiles(w);
  for (int first = 0; first < tiles; first += CHUNK) {
    int count = tiles - first < CHUNK ? tiles - first : CHUNK;
    for (int i = 0; i < 2; ++i)
      if (u.block[i] >= 0) decode_chunk(w, values, u.block[i], i, first, count, s.panel);
    copy_scales(w, u.block, first, s.scales);
    multiply_rows(u, {first, count, first + count == tiles}, values.planes);
  }
}

}  // namespace STERNA_ISA
}  // namespace sterna
