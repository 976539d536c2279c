// y = x W^T (+ bias) (+ residual), or act(gate) * up, for 1..many rows on packed or plain weights.
//
// Few rows (decode): bound by memory; two panels at a time, so that enough independent sums hide
// the latency of the dot. Many rows: tiles of MAX_MR rows against one panel that stays in the
// L1/L2 cache.
// Road not taken: lanes along K with a horizontal sum at the end. It reads plain [N, K] weights
// directly, but 512 rows then need another order than 1 row, or lose half the speed.
#include "epilogue.h"
#include "kernels.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MAX_MR = 12, FEW_MR = 6, NV = 2;  // 24 accumulators of 32 registers
#else
constexpr int MAX_MR = 4, FEW_MR = 4, NV = 2;  // 8 accumulators of 16 registers
#endif
constexpr int FEW_ROWS = 16;   // up to here the call is bound by memory
constexpr int ROW_BLOCK = 96;  // rows that share a panel while it is in L2
constexpr int GROUP = NV * VW; // outputs of one accumulator group

template <class T>
struct Job {
  const LinearArgs& a;
  const Worker& w;
  int steps() const { return (a.in_features + Elem<T>::P - 1) / Elem<T>::P; }
  int64_t panel_elems() const { return int64_t(steps()) * PANEL * Elem<T>::P; }
  int num_panels() const { return (a.out_features + PANEL - 1) / PANEL; }
};

#if defined(__AVX512F__)
// 16 rows x 16 columns of 32-bit words: row r of `src` becomes column r of `dst`.
inline void transpose16(const uint32_t* const (&src)[16], int64_t at, uint32_t* dst) {
  __m512i a[16], b[16];
  repeat<16>([&](auto i) INLINE { a[i] = _mm512_loadu_si512(src[i] + at); });
  repeat<8>([&](auto i) INLINE {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  repeat<4>([&](auto i) INLINE {  // a[4i + j]: column 4l + j of rows 4i .. 4i + 3 in lane l
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  });
  repeat<4>([&](auto j) INLINE {
    __m512i even0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    __m512i odd0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    __m512i even1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    __m512i odd1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(dst + j * PANEL, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(dst + (4 + j) * PANEL, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(dst + (8 + j) * PANEL, _mm512_shuffle_i32x4(even0, even1, 0xdd));
    _mm512_storeu_si512(dst + (12 + j) * PANEL, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  });
}
#endif

// Copies 32 plain weight rows of `words` into a packed panel; rows past the end become zero. A step
// of the dot (two bfloat16 or one float) is a 32-bit word, so this is a transpose of words. Weights
// in training are read this way, so a decode step costs it for every weight: 90 ms element by
// element, a few by registers.
void pack_words(const uint32_t* weight, int64_t words, int first_row, int end_row, uint32_t* out) {
  static const uint32_t zeros[16] = {};
  for (int half = 0; half < PANEL; half += 16) {
    const uint32_t* src[16];
    [[maybe_unused]] bool whole = first_row + half + 16 <= end_row;
    for (int r = 0; r < 16; ++r) {
      bool real = first_row + half + r < end_row;
      src[r] = real ? weight + (first_row + half + r) * words : zeros;
    }
    int64_t k = 0;
#if defined(__AVX512F__)
    for (; whole && k + 16 <= words; k += 16) transpose16(src, k, out + k * PANEL + half);
#endif
    for (int r = 0; r < 16; ++r) {
      bool real = first_row + half + r < end_row;
      for (int64_t j = k; j < words; ++j) {
        uint32_t word = 0;
        if (real) std::memcpy(&word, src[r] + j, 4);
        out[j * PANEL + half + r] = word;
      }
    }
  }
}

// Panel `index` of the first (gate or only) or second (up) half of the weight. A gated weight has
// 2N rows: packed as the panels of the gate, then the panels of up.
template <class T>
const T* panel(const Job<T>& job, int index, bool second, int slot) {
  if (job.a.packed) {
    int64_t at = index + (second ? job.num_panels() : 0);
    return static_cast<const T*>(job.a.weight) + at * job.panel_elems();
  }
  int base = second ? job.a.out_features : 0;
  T* dst = reinterpret_cast<T*>(job.w.scratch) + slot * job.panel_elems();
  pack_words(static_cast<const uint32_t*>(job.a.weight), job.steps(), base + index * PANEL,
             base + job.a.out_features, reinterpret_cast<uint32_t*>(dst));
  return dst;
}

// The sums of a gated output before they become one.
template <class T>
void store_pre(const LinearArgs& a, int row, int col, vf gate, vf up) {
  int cols = a.out_features - col;
  if (cols <= 0) return;
  T* at = static_cast<T*>(a.pre) + int64_t(row) * 2 * a.out_features + col;
  store_cols(at, gate, cols);
  store_cols(at + a.out_features, up, cols);
}

// MR rows x NP panels, all column groups. For a gated call b[0] is the gate and b[1] is up.
template <class T, int MR, int NP, int LINES>
void tile(const Job<T>& job, int row, int col0, const T* const (&b)[NP], const char* ahead) {
  constexpr int P = Elem<T>::P, N = NP * NV;
  const T* x = static_cast<const T*>(job.a.x) + int64_t(row) * job.a.in_features;
  for (int g = 0; g < PANEL; g += GROUP) {
    const T* cols[N];
    repeat<N>([&](auto j) INLINE { cols[j] = b[j / NV] + (g + j % NV * VW) * P; });
    vf acc[MR][N] = {};
    multiply<MR, N>(acc, x, job.a.in_features, cols, PANEL * P, job.a.in_features / P,
                    Ahead<LINES>::streams(ahead, job.panel_elems() / 2 * sizeof(T)));
    repeat<MR>([&](auto i) INLINE {
      if (NP == 2 && job.a.gate) {
        repeat<NV>([&](auto j) INLINE {
          if (job.a.pre)
            store_pre<T>(job.a, row + i, col0 + g + j * VW, acc[i][j], acc[i][(NP - 1) * NV + j]);
          finish<T>(job.a, row + i, col0 + g + j * VW,
                    gated<T>(job.a.gate, acc[i][j], acc[i][(NP - 1) * NV + j]));
        });
      } else {
        repeat<N>([&](auto j) INLINE {
          finish<T>(job.a, row + i, col0 + j / NV * PANEL + g + j % NV * VW, acc[i][j]);
        });
      }
    });
  }
}

template <class T, int NP, int LINES, int MR>
void tile_of(const Job<T>& job, int mr, int row, int col0, const T* const (&b)[NP],
             const char* ahead) {
  if (mr == MR) return tile<T, MR, NP, LINES>(job, row, col0, b, ahead);
  if constexpr (MR > 1) tile_of<T, NP, LINES, MR - 1>(job, mr, row, col0, b, ahead);
}

// Rows [row, end) in tiles of nearly equal height, at most MR each. While a tile is computed, a
// piece of the next unit's panels is asked for: half a panel, or a whole one when the only panel has
// a single tile. With tiles to spare the first asks for nothing, it may still wait for its own.
template <class T, int NP, int MR>
void tiles(const Job<T>& job, int row, int end, int col0, const T* const (&b)[NP],
           int64_t to_next) {
  int count = (end - row + MR - 1) / MR;
  int halves = count == 1 && NP == 1 ? 2 : 1, first = count > 2 * NP ? 1 : 0;
  for (int t = 0; t < count; ++t) {
    int height = (end - row + count - t - 1) / (count - t), half = (t - first) * halves;
    if (half < 0 || half >= 2 * NP || count < 2 * NP - 1) {
      tile_of<T, NP, 0, MR>(job, height, row, col0, b, nullptr);
    } else {
      const T* next = b[half / 2] + to_next + half % 2 * job.panel_elems() / 2;
      auto ahead = reinterpret_cast<const char*>(next);
      if (halves == 1)
        tile_of<T, NP, 1, MR>(job, height, row, col0, b, ahead);
      else
        tile_of<T, NP, 2, MR>(job, height, row, col0, b, ahead);
    }
    row += height;
  }
}

// How a call is cut. Few rows: units are single panels or pairs, in the order of memory. Many
// rows: panel by panel within a block of rows.
struct Cut {
  int rows, panels, panels_a_unit, blocks;
  Cut(const LinearArgs& a, const Step& step) {
    rows = step.num_rows[a.rows_kind];
    panels = (a.out_features + PANEL - 1) / PANEL;
    panels_a_unit = !a.gate && rows <= FEW_MR ? 2 : 1;
    blocks = rows <= FEW_ROWS ? 1 : (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  }
  int units_a_block() const { return (panels + panels_a_unit - 1) / panels_a_unit; }
  int units() const { return rows ? units_a_block() * blocks : 0; }
};

template <class T>
void run_unit(const LinearArgs& a, const Cut& cut, const Worker& w, int unit) {
  Job<T> job{a, w};
  int per_block = (cut.rows + cut.blocks - 1) / cut.blocks;
  int row = unit / cut.units_a_block() * per_block, end = row + per_block;
  if (end > cut.rows) end = cut.rows;
  int index = unit % cut.units_a_block() * cut.panels_a_unit, col = index * PANEL;
  const T* first = panel(job, index, false, 0);
  bool has_second = a.gate || (cut.panels_a_unit == 2 && index + 1 < cut.panels);
  if (has_second) {
    const T* second = a.gate ? panel(job, index, true, 1) : panel(job, index + 1, false, 1);
    const T* const both[2] = {first, second};
    return tiles<T, 2, FEW_MR>(job, row, end, col, both, cut.panels_a_unit * job.panel_elems());
  }
  const T* const only[1] = {first};
  tiles<T, 1, MAX_MR>(job, row, end, col, only, job.panel_elems());
}

}  // namespace

Kernel<LinearArgs> linear_kernel() {
  return {[](const LinearArgs& a, const Step& step) { return Cut(a, step).units(); },
          [](const LinearArgs& a, const Step& step, const Worker& w, int unit) {
            Cut cut(a, step);
            a.dtype ? run_unit<bf16>(a, cut, w, unit) : run_unit<float>(a, cut, w, unit);
          }};
}

Kernel<PackArgs> pack_kernel() {
  return {[](const PackArgs& a, const Step&) { return (a.rows + PANEL - 1) / PANEL; },
          [](const PackArgs& a, const Step&, const Worker&, int unit) {
            int64_t words = int64_t(a.cols) * a.elem_bytes / 4;
            pack_words(static_cast<const uint32_t*>(a.weight), words, unit * PANEL, a.rows,
                       static_cast<uint32_t*>(a.out) + int64_t(unit) * PANEL * words);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
