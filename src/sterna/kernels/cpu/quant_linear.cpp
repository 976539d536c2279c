// y = x W^T for weights in tiles: a panel of 32 outputs is decoded into scratch, a chunk of K at a
// time, and multiplied by all rows of a row block; sums wait in scratch between chunks. Few rows
// on AVX-512 BF16 take quant_few.cpp, which decodes in registers; both walk K in one order.
//
// The order (the numeric contract): per scale group one float32 sum over its pairs in walk order,
// then total = fma(sum, scale, total) in the order of groups, then the epilogue of linear.cpp.
// Road not taken: decoding once a call and sharing it between units. A panel costs 4 % of its
// multiplication with 96 rows, and sharing needs a stage of its own with a barrier after it.
#include "quant.h"

#include "kernels.h"
#include "panel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MAX_MR = 12, NV = 2;
#else
constexpr int MAX_MR = 4, NV = 2;
#endif

// Scratch of a unit.
template <class T>
struct Scratch {
  alignas(64) T panel[CHUNK * 32 * PAIR];
  alignas(64) float scales[CHUNK * 2][PANEL];
  alignas(64) float state[ROW_BLOCK][PANEL];   // between chunks: totals, or the sum of a row scale
  alignas(64) T tail[ROW_BLOCK][2 * TILE_K];   // the end of x, zero padded to whole tiles
};
static_assert(sizeof(Scratch<float>) + 64 <= SCRATCH_BYTES, "scratch");

template <class T>
struct Unit : PairUnit {
  const QuantLinearArgs& a;
  Scratch<T>& s;
};

// Tiles [first, first + count) for all rows of a unit. The last `tail` of them come from Scratch.
struct Span {
  int first, count, tail;
  bool is_last;
};

// acc[MR][NV] of outputs [col, col + NV * VW) of the panel, over a run of tiles of a chunk.
template <class T, int MR>
struct Run {
  static constexpr int P = Elem<T>::P;
  const Unit<T>& u;
  const T* x;
  int64_t lda;
  int col;

  // Half-tiles (NI = 4) or tiles (NI = 8) [first, stop) of the chunk; x is at the first.
  template <int NI>
  inline INLINE void sum(vf (&acc)[MR][NV], const T* x, int first, int stop) const {
    for (int i = first; i < stop; ++i, x += 8 * NI) {
      const T* b[NV];
      const T* panel = u.s.panel + int64_t(i) * 4 * NI * PAIR + col * P;
      repeat<NV>([&](auto j) INLINE { b[j] = panel + j * VW * P; });
      multiply_tile<NI>(acc, x, lda, b, PAIR / 2 * P);
    }
  }
  template <int NI>
  inline INLINE void grouped(vf (&total)[MR][NV], int first, int stop) const {
    int size = NI == 4 ? 1 : u.a.w.group / TILE_K;
    for (int i = first; i < stop; i += size) {
      vf part[MR][NV] = {};
      sum<NI>(part, x + int64_t(i - first) * 8 * NI, i, i + size < stop ? i + size : stop);
      const float* scale = u.s.scales[i / size] + col;
      repeat<MR>([&](auto r) INLINE {
        repeat<NV>([&](auto j) INLINE {
          total[r][j] = multiply_add(part[r][j], load(scale + j * VW), total[r][j]);
        });
      });
    }
  }
  inline INLINE void operator()(vf (&acc)[MR][NV], int first, int stop) const {
    if (u.a.w.group == 0) return sum<8>(acc, x, first, stop);
    u.a.w.group == 32 ? grouped<4>(acc, 2 * first, 2 * stop) : grouped<8>(acc, first, stop);
  }
};

template <class T, int MR>
void rows_of(const Unit<T>& u, const Span& span, int row) {
  const int64_t lda = u.a.w.in_features;
  const T* x = static_cast<const T*>(u.a.x) + row * lda + int64_t(span.first) * TILE_K;
  const int whole = span.count - span.tail;
  for (int col = 0; col < PANEL; col += NV * VW) {
    vf acc[MR][NV] = {};
    float* state = u.s.state[row - u.row] + col;
    // By constant index throughout: one loop over rows sends the sums to the stack for good.
    auto each = [&](auto f) INLINE {
      repeat<MR>([&](auto r) INLINE { repeat<NV>([&](auto j) INLINE { f(r, j); }); });
    };
    if (span.first) each([&](auto r, auto j) INLINE { acc[r][j] = load(state + r * PANEL + j * VW); });
    Run<T, MR>{u, x, lda, col}(acc, 0, whole);
    if (span.tail) Run<T, MR>{u, u.s.tail[row - u.row], 2 * TILE_K, col}(acc, whole, span.count);
    if (span.is_last && !u.a.w.group)
      each([&](auto r, auto j) INLINE { acc[r][j] *= load(u.s.scales[0] + col + j * VW); });
    each([&](auto r, auto j) INLINE { store(state + r * PANEL + j * VW, acc[r][j]); });
  }
}

template <class T, int MR>
void rows_of_height(const Unit<T>& u, const Span& span, int row, int height) {
  if (height == MR) return rows_of<T, MR>(u, span, row);
  if constexpr (MR > 1) rows_of_height<T, MR - 1>(u, span, row, height);
}

// All rows of the unit in tiles of nearly equal height.
template <class T>
void multiply_rows(const Unit<T>& u, const Span& span) {
  int row = u.row;
  for (int left = (u.end - row + MAX_MR - 1) / MAX_MR; left > 0; --left) {
    int height = (u.end - row + left - 1) / left;
    rows_of_height<T, MAX_MR>(u, span, row, height);
    if (span.is_last)
      for (int r = row; r < row + height; r += 4)
        store_outputs<T>(u.a, u, r, row + height, u.s.state[r - u.row]);
    row += height;
  }
}

template <class T>
void copy_tail(const Unit<T>& u, int first_k) {
  int count = u.a.w.in_features - first_k;
  for (int row = u.row; row < u.end; ++row) {
    const T* x = static_cast<const T*>(u.a.x) + int64_t(row) * u.a.w.in_features + first_k;
    T* out = u.s.tail[row - u.row];
    std::memset(out, 0, sizeof(T) * 2 * TILE_K);
    std::memcpy(out, x, sizeof(T) * count);
  }
}

template <class T>
void run_unit(const Unit<T>& u) {
  const QuantWeight& w = u.a.w;
  const PanelValues<T> values(w);
  const int tiles = num_tiles(w);
  for (int first = 0; first < tiles; first += CHUNK) {
    Span span{first, tiles - first < CHUNK ? tiles - first : CHUNK, 0, tiles - first <= CHUNK};
    if (span.is_last && w.in_features % TILE_K) {
      span.tail = w.group == 128 && tiles % 2 == 0 ? 2 : 1;  // never part of a group
      copy_tail(u, (tiles - span.tail) * TILE_K);
    }
    for (int i = 0; i < 2; ++i)
      if (u.block[i] >= 0)
        decode_chunk(w, values, u.block[i], i, first, span.count, u.s.panel);
    copy_scales(w, u.block, first, u.s.scales);
    multiply_rows(u, span);
  }
}

template <class T>
void panel_run(const QuantLinearArgs& a, int rows, const Worker& w, int unit) {
  Scratch<T>& s = *reinterpret_cast<Scratch<T>*>((uintptr_t(w.scratch) + 63) / 64 * 64);
  run_unit(Unit<T>{PairCut(a, rows).at(unit, a.gate), a, s});
}

}  // namespace

Kernel<QuantLinearArgs> quant_linear_kernel() {
  return {[](const QuantLinearArgs& a, const Step& step) {
            int rows = step.num_rows[a.rows_kind];
            if (a.int8_unit != 0.f) return int8_units(a, rows);
            return few_serves(a, rows) ? few_units(a, rows) : PairCut(a, rows).units();
          },
          [](const QuantLinearArgs& a, const Step& step, const Worker& w, int unit) {
            int rows = step.num_rows[a.rows_kind];
            if (a.int8_unit != 0.f) return int8_run(a, rows, w, unit);
            if (few_serves(a, rows)) return few_run(a, rows, w, unit);
            a.dtype ? panel_run<bf16>(a, rows, w, unit) : panel_run<float>(a, rows, w, unit);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
