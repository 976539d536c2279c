// Low-rank adapters: s (x A^T) B^T added to the rows that have one. Every sum is float32 and walks
// in one order, whatever rows stand beside it.
//
// lora_down: each row times A, a dot with lanes along K. lora_up: B is turned into a panel of ranks
// by outputs once for a run of rows of one adapter, whose lanes run along the outputs.
// Road not taken: the linear kernel a group of rows at a time. It wants a call and a packed weight
// for each adapter of a step, and its panels of 32 outputs are mostly padding at rank 8.
#include "epilogue.h"
#include "kernels.h"
#include "walk.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MAX_MR = 4;
#else
constexpr int MAX_MR = 2;  // 16 registers
#endif
constexpr int NV = 4, COLS = NV * VW;
constexpr int ROW_BLOCK = 64;  // rows a unit: share A in cache, and a panel of B
constexpr int RANKS = 8;       // ranks a unit of lora_down

struct Rows { int first, end; };

int num_row_blocks(int rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

Rows block_of(int block, int rows) {
  int first = block * ROW_BLOCK;
  return {first, first + ROW_BLOCK < rows ? first + ROW_BLOCK : rows};
}

int slot_of(const int32_t* slots, int row) { return slots ? slots[row] : 0; }

// Calls f(slot, rows) for every run of rows of one slot; the base's slot is -1.
template <class F>
void each_run(const int32_t* slots, Rows rows, F f) {
  for (int row = rows.first; row < rows.end;) {
    int slot = slot_of(slots, row), end = row + 1;
    while (end < rows.end && slot_of(slots, end) == slot) ++end;
    f(slot, Rows{row, end});
    row = end;
  }
}

template <class T, int MR, int NR>
void dots(const T* x, const float* a, int64_t k_size, float* out, int64_t ld_out) {
  vf acc[MR][NR] = {};
  int64_t k = 0;
  for (; k + VW <= k_size; k += VW) {
    vf w[NR];
    repeat<NR>([&](auto j) INLINE { w[j] = load(a + j * k_size + k); });
    repeat<MR>([&](auto i) INLINE {
      vf v = load(x + i * k_size + k);
      repeat<NR>([&](auto j) INLINE { acc[i][j] = multiply_add(v, w[j], acc[i][j]); });
    });
  }
  if (int left = int(k_size - k)) {
    repeat<MR>([&](auto i) INLINE {
      vf v = load_cols(x + i * k_size + k, left);
      repeat<NR>([&](auto j) INLINE {
        acc[i][j] = multiply_add(v, load_cols(a + j * k_size + k, left), acc[i][j]);
      });
    });
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) out[i * ld_out + j] = sum(acc[i][j]);
}

// Rows [row, row + MR) times ranks [first, end) of A.
template <class T, int MR>
void down_rows(const LoraDownArgs& a, const float* weight, int row, int first, int end, float* out,
               int64_t ld_out) {
  const int64_t k = a.in_features;
  const T* x = static_cast<const T*>(a.x) + row * k;
  int j = first;
  if constexpr (MR == 1)
    for (; j + 8 <= end; j += 8) dots<T, MR, 8>(x, weight + j * k, k, out + j, ld_out);
  for (; j + 4 <= end; j += 4) dots<T, MR, 4>(x, weight + j * k, k, out + j, ld_out);
  for (; j < end; ++j) dots<T, MR, 1>(x, weight + j * k, k, out + j, ld_out);
}

template <class T>
void down(const LoraDownArgs& a, Rows block, int part_idx, int first_rank) {
  const LoraPart& part = a.parts[part_idx];
  const int64_t ld_out = int64_t(a.parts.size()) * a.max_rank;
  each_run(a.slots, block, [&](int slot, Rows rows) {
    if (slot < 0 || part.scales[slot] == 0.f) return;
    int rank = part.ranks[slot], end = rank < first_rank + RANKS ? rank : first_rank + RANKS;
    const float* weight = part.a + slot * part.a_stride;
    for (int row = rows.first; row < rows.end;) {
      float* out = a.inner + row * ld_out + part_idx * a.max_rank;
      if (row + MAX_MR <= rows.end) {
        down_rows<T, MAX_MR>(a, weight, row, first_rank, end, out, ld_out);
        row += MAX_MR;
      } else {
        down_rows<T, 1>(a, weight, row, first_rank, end, out, ld_out);
        ++row;
      }
    }
  });
}

int rank_groups(const LoraDownArgs& a) { return (a.max_rank + RANKS - 1) / RANKS; }

// B [n, rank] of outputs [col, col + COLS) as [rank, COLS], zero past the last.
void turn(const LoraPart& part, int slot, int rank, int col, float* panel) {
  const float* b = part.b + slot * part.b_stride + int64_t(col) * rank;
  int cols = part.size - col < COLS ? part.size - col : COLS;
  for (int j = 0; j < rank; ++j) {
    for (int c = 0; c < cols; ++c) panel[j * COLS + c] = b[int64_t(c) * rank + j];
    for (int c = cols; c < COLS; ++c) panel[j * COLS + c] = 0.f;
  }
}

// s (x A^T) B^T of MR rows and COLS outputs.
template <int MR>
void products(const float* inner, int64_t lda, int rank, const float* panel, float scale,
              float (*out)[COLS]) {
  vf acc[MR][NV] = {};
  for (int j = 0; j < rank; ++j) {
    vf b[NV];
    repeat<NV>([&](auto v) INLINE { b[v] = load(panel + j * COLS + v * VW); });
    repeat<MR>([&](auto i) INLINE {
      vf u = splat(inner[i * lda + j]);
      repeat<NV>([&](auto v) INLINE { acc[i][v] = multiply_add(u, b[v], acc[i][v]); });
    });
  }
  repeat<MR>([&](auto i) INLINE {
    repeat<NV>([&](auto v) INLINE { store(out[i] + v * VW, pinned(acc[i][v] * splat(scale))); });
  });
}

// One part's share of a unit: its panel of B, and the products of up to MAX_MR rows.
struct Side {
  const LoraUpArgs& a;
  int part_idx, col;
  float* panel;
  float delta[MAX_MR][COLS];
  float scale;
  int rank;

  const LoraPart& part() const { return a.parts[part_idx]; }
  bool begin(int slot) {
    scale = slot < 0 ? 0.f : part().scales[slot];
    if (scale == 0.f) return false;
    rank = part().ranks[slot];
    turn(part(), slot, rank, col, panel);
    return true;
  }
  void fill(int row, int count) {
    const int64_t lda = int64_t(a.parts.size()) * a.max_rank;
    const float* inner = a.inner + row * lda + part_idx * a.max_rank;
    if (count == MAX_MR) return products<MAX_MR>(inner, lda, rank, panel, scale, delta);
    products<1>(inner, lda, rank, panel, scale, delta);
  }
};

// y += delta, in place.
template <class T>
void up(const LoraUpArgs& a, Rows block, int part_idx, int col, float* scratch) {
  Side side{a, part_idx, col, scratch, {}, 0.f, 0};
  const int cols = side.part().size - col, start = side.part().start + col;
  each_run(a.slots, block, [&](int slot, Rows rows) {
    if (!side.begin(slot)) return;
    for (int row = rows.first, count; row < rows.end; row += count) {
      count = row + MAX_MR <= rows.end ? MAX_MR : 1;
      side.fill(row, count);
      for (int i = 0; i < count; ++i) {
        T* y = static_cast<T*>(a.y) + int64_t(row + i) * a.out_features + start;
        for (int c = 0; c < COLS && c < cols; c += VW)
          store_cols(y + c, load_cols(y + c, cols - c) + load(side.delta[i] + c), cols - c);
      }
    }
  });
}

// out = act(gate + delta) * (up + delta), of a float32 product [rows, stride]; gate is part 0.
template <class T>
void up_gated(const LoraUpArgs& a, Rows block, int col, float* scratch) {
  Side gate{a, 0, col, scratch, {}, 0.f, 0};
  Side rise{a, 1, col, scratch + int64_t(a.max_rank) * COLS, {}, 0.f, 0};
  const int cols = a.out_features - col;
  each_run(a.slots, block, [&](int slot, Rows rows) {
    bool has_gate = gate.begin(slot), has_rise = rise.begin(slot);
    for (int row = rows.first, count; row < rows.end; row += count) {
      count = row + MAX_MR <= rows.end ? MAX_MR : 1;
      if (has_gate) gate.fill(row, count);
      if (has_rise) rise.fill(row, count);
      for (int i = 0; i < count; ++i) {
        const float* x = a.product + int64_t(row + i) * a.stride + col;
        T* out = static_cast<T*>(a.y) + int64_t(row + i) * a.out_features + col;
        for (int c = 0; c < COLS && c < cols; c += VW) {
          vf g = load_cols(x + c, cols - c), u = load_cols(x + a.half + c, cols - c);
          if (has_gate) g += load(gate.delta[i] + c);
          if (has_rise) u += load(rise.delta[i] + c);
          store_cols(out + c, gated<T>(a.gate, pinned(g), pinned(u)), cols - c);
        }
      }
    }
  });
}

int num_cols(int size) { return (size + COLS - 1) / COLS; }

int col_units(const LoraUpArgs& a) {
  if (a.gate) return num_cols(a.out_features);
  int count = 0;
  for (const LoraPart& part : a.parts) count += num_cols(part.size);
  return count;
}

template <class T>
void up_unit(const LoraUpArgs& a, Rows block, int unit, float* scratch) {
  if (a.gate) return up_gated<T>(a, block, unit * COLS, scratch);
  int part = 0;
  for (; unit >= num_cols(a.parts[part].size); ++part) unit -= num_cols(a.parts[part].size);
  up<T>(a, block, part, unit * COLS, scratch);
}

}  // namespace

Kernel<LoraDownArgs> lora_down_kernel() {
  return {[](const LoraDownArgs& a, const Step& step) {
            return num_row_blocks(step.num_rows[a.rows_kind]) * int(a.parts.size()) * rank_groups(a);
          },
          [](const LoraDownArgs& a, const Step& step, const Worker&, int unit) {
            int groups = rank_groups(a), parts = int(a.parts.size());
            Rows block = block_of(unit / groups / parts, step.num_rows[a.rows_kind]);
            int part = unit / groups % parts, rank = unit % groups * RANKS;
            a.dtype ? down<bf16>(a, block, part, rank) : down<float>(a, block, part, rank);
          }};
}

Kernel<LoraUpArgs> lora_up_kernel() {
  return {[](const LoraUpArgs& a, const Step& step) {
            return num_row_blocks(step.num_rows[a.rows_kind]) * col_units(a);
          },
          [](const LoraUpArgs& a, const Step& step, const Worker& w, int unit) {
            int cols = col_units(a);
            Rows block = block_of(unit / cols, step.num_rows[a.rows_kind]);
            float* scratch = reinterpret_cast<float*>(w.scratch);
            a.dtype ? up_unit<bf16>(a, block, unit % cols, scratch)
                    : up_unit<float>(a, block, unit % cols, scratch);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
