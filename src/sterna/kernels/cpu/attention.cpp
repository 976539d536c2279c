// Paged attention for any mix of prompt chunks, decodes and drafts.
//
// For one query row i:  s_j = scale * q_i.k_j (softcap), visible j only;  out_i = softmax(s) V.
// The keys are walked in tiles of TILE from position 0 with an online softmax (running maximum m,
// sum l, output O), whatever chunk the query came in; a fully masked tile changes nothing. So an
// output never depends on chunking, on the batch or on which rows share a tile.
// Rows of one tile = query tokens x query heads that share a key/value head: both products run
// the micro-kernel of `linear` with keys (then values) as its B operand.
#include "kernels.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr int TILE = 64;      // keys of a softmax tile: four 16-lane vectors
constexpr int MAX_ROWS = 24;  // rows of a query tile: its state stays in the L1 cache
#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#else
constexpr int MR = 4, NV = 2;
#endif

struct Item {  // one query tile of one sequence and one range of query heads
  int seq, first_token, num_tokens, kv_head, first_head, num_heads;
  int rows() const { return num_tokens * num_heads; }
};

template <class T>
struct State {  // scratch of one item
  T* q;         // [rows, C]
  T* p;         // [rows, TILE]
  float* s;     // [rows, TILE]
  float* o;     // [rows, Cp]
  float *m, *l; // [rows]
};

int round_up(int n, int to) { return (n + to - 1) / to * to; }

template <class T>
State<T> carve(char* scratch, int head_dim) {
  int64_t padded = round_up(head_dim, 64) + 64;
  State<T> st;
  st.s = reinterpret_cast<float*>(scratch);
  st.o = st.s + MAX_ROWS * TILE;
  st.m = st.o + MAX_ROWS * padded;
  st.l = st.m + MAX_ROWS;
  st.q = reinterpret_cast<T*>(st.l + MAX_ROWS);
  st.p = st.q + MAX_ROWS * padded;
  return st;
}

template <class T>
struct Work {
  const AttentionArgs& a;
  Item it;
  State<T> st;
  int first_position;  // position of the item's first query token
  int ldo() const { return round_up(a.head_dim, 16); }
  int position(int row) const { return first_position + row / it.num_heads; }
  const T* block(int key, bool values) const {
    int64_t per_head = kv_head_elems(a.block_size, a.head_dim), part = a.num_kv_heads * per_head;
    int index = key / a.block_size;
    int64_t id = index < a.table_width ? a.block_tables[int64_t(it.seq) * a.table_width + index] : 0;
    return static_cast<const T*>(a.cache) + (id * 2 + values) * part + it.kv_head * per_head;
  }
};

template <class T>
void gather_queries(const Work<T>& w) {
  int C = w.a.head_dim;
  for (int r = 0; r < w.it.rows(); ++r) {
    int64_t token = w.it.first_token + r / w.it.num_heads;
    int head = w.it.first_head + r % w.it.num_heads;
    const T* src = static_cast<const T*>(w.a.q) + token * w.a.q_stride + int64_t(head) * C;
    std::memcpy(w.st.q + int64_t(r) * C, src, C * sizeof(T));
    w.st.m[r] = -INFINITY;
    w.st.l[r] = 0.f;
  }
  std::memset(w.st.o, 0, sizeof(float) * w.it.rows() * w.ldo());
}

// s[row .. row + M] = q.k for NV vectors of keys from `key`.
template <class T, int M>
void scores(const Work<T>& w, int row, int key, int col) {
  constexpr int P = Elem<T>::P;
  const T* k[NV];
  for (int j = 0; j < NV; ++j) {
    int at = key + col + j * VW, offset = at % w.a.block_size;
    k[j] = w.block(at, false) + int64_t(offset / 16) * 16 * w.a.head_dim + offset % 16 * P;
  }
  vf acc[M][NV] = {};
  const T* q = w.st.q + int64_t(row) * w.a.head_dim;
  multiply<M, NV>(acc, q, w.a.head_dim, k, 16 * P, w.a.head_dim / P);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) store(w.st.s + (row + i) * TILE + col + j * VW, acc[i][j]);
}

// o[row .. row + M] += p V over the first `num_keys` keys of the tile, N vectors from column c.
template <class T, int M, int N>
void values(const Work<T>& w, int row, int key, int num_keys, int c) {
  constexpr int P = Elem<T>::P;
  vf acc[M][N];
  float* o = w.st.o + int64_t(row) * w.ldo() + c;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = load(o + i * w.ldo() + j * VW);
  for (int at = 0; at < num_keys; at += 16) {
    int offset = (key + at) % w.a.block_size, n = num_keys - at < 16 ? num_keys - at : 16;
    const T* base = w.block(key + at, true) + int64_t(offset / P) * P * w.a.head_dim;
    const T* v[N];
    for (int j = 0; j < N; ++j) v[j] = base + int64_t(c + j * VW) * P;
    multiply<M, N>(acc, w.st.p + row * TILE + at, TILE, v, int64_t(w.a.head_dim) * P,
                   (n + P - 1) / P);
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) store(o + i * w.ldo() + j * VW, acc[i][j]);
}

template <class T, int M>
void values_of_rows(const Work<T>& w, int row, int key, int num_keys) {
  int c = 0;
  for (; c + NV * VW <= w.ldo(); c += NV * VW) values<T, M, NV>(w, row, key, num_keys, c);
  for (; c < w.ldo(); c += VW) values<T, M, 1>(w, row, key, num_keys, c);
}

// Scores in units of log2, so that the softmax is a 2^x; only border tiles need a mask.
template <bool MASKED>
vf scaled_scores(const AttentionArgs& a, float* s, int key, int first, int last) {
  vi lane;
  for (int i = 0; i < VW; ++i) lane[i] = i;
  vf best = splat(-INFINITY), scale = splat(a.softcap > 0.f ? a.scale : a.scale * LOG2E);
  for (int j = 0; j < TILE; j += VW) {
    vf v = load(s + j) * scale;
    if (a.softcap > 0.f) v = splat(a.softcap * LOG2E) * vtanh(v * splat(1.f / a.softcap));
    if (MASKED) {
      vi at = lane + (key + j);
      vi visible = (at <= last) & (at >= first);
      v = visible ? v : splat(-INFINITY);
    }
    store(s + j, v);
    best = vmax(best, v);
  }
  return best;
}

// Scores -> probabilities, and the online-softmax update of m, l and O.
template <class T>
void soften(const Work<T>& w, int row, int key) {
  const AttentionArgs& a = w.a;
  int last = w.position(row), first = a.window > 0 ? last - a.window + 1 : 0;
  float* s = w.st.s + row * TILE;
  bool inside = key >= first && key + TILE - 1 <= last;
  vf best = inside ? scaled_scores<false>(a, s, key, first, last)
                   : scaled_scores<true>(a, s, key, first, last);
  float m = max_of(best), old = w.st.m[row];
  m = m > old ? m : old;
  T* p = w.st.p + row * TILE;
  if (m == -INFINITY) {
    std::memset(p, 0, TILE * sizeof(T));
    return;
  }
  vf total = {};
  for (int j = 0; j < TILE; j += VW) {
    vf e = vexp2(load(s + j) - splat(m));
    total += e;
    store(p + j, e);
  }
  float alpha = m == old ? 1.f : sexp2(old - m);
  w.st.l[row] = w.st.l[row] * alpha + sum(total);
  w.st.m[row] = m;
  if (alpha == 1.f) return;
  float* o = w.st.o + int64_t(row) * w.ldo();
  for (int c = 0; c < w.ldo(); c += VW) store(o + c, load(o + c) * splat(alpha));
}

template <class T, int M>
void rows_of(const Work<T>& w, int m, int row, int key, int num_keys, bool first_pass) {
  if (m == M) {
    if (!first_pass) return values_of_rows<T, M>(w, row, key, num_keys);
    for (int col = 0; col < num_keys; col += NV * VW) scores<T, M>(w, row, key, col);
    return;
  }
  if constexpr (M > 1) rows_of<T, M - 1>(w, m, row, key, num_keys, first_pass);
}

template <class T>
void one_tile(const Work<T>& w, int key, int num_keys) {
  int rows = w.it.rows();
  for (int r = 0; r < rows; r += MR)
    rows_of<T, MR>(w, rows - r < MR ? rows - r : MR, r, key, num_keys, true);
  for (int r = 0; r < rows; ++r) soften(w, r, key);
  for (int r = 0; r < rows; r += MR)
    rows_of<T, MR>(w, rows - r < MR ? rows - r : MR, r, key, num_keys, false);
}

template <class T>
void write_out(const Work<T>& w) {
  int C = w.a.head_dim;
  for (int r = 0; r < w.it.rows(); ++r) {
    int64_t token = w.it.first_token + r / w.it.num_heads;
    int head = w.it.first_head + r % w.it.num_heads;
    T* out = static_cast<T*>(w.a.out) + (token * w.a.num_heads + head) * C;
    const float* o = w.st.o + int64_t(r) * w.ldo();
    float inv = 1.f / w.st.l[r];
    int c = 0;
    for (; c + VW <= C; c += VW) store(out + c, load(o + c) * splat(inv));
    for (; c < C; ++c) store_one(out + c, o[c] * inv);
  }
}

template <class T>
void run_item(const AttentionArgs& a, const Item& it, const Worker& worker) {
  int starts = a.query_starts[it.seq], new_tokens = a.query_starts[it.seq + 1] - starts;
  int cached = a.context_lens[it.seq] - new_tokens;
  Work<T> w{a, it, carve<T>(worker.scratch, a.head_dim), cached + it.first_token - starts};
  gather_queries(w);
  int end = w.first_position + it.num_tokens;
  int begin = a.window > 0 ? w.first_position - a.window + 1 : 0;
  for (int key = begin < 0 ? 0 : begin / TILE * TILE; key < end; key += TILE)
    one_tile(w, key, end - key < TILE ? end - key : TILE);
  write_out(w);
}

// How a step is cut into items: (sequence, query tile, key/value head), long tiles first.
struct Cut {
  const AttentionArgs& a;
  int heads, tokens_a_tile, per_tile;
  explicit Cut(const AttentionArgs& args) : a(args) {
    int group = a.num_heads / a.num_kv_heads;
    heads = group > MAX_ROWS ? 1 : group;
    tokens_a_tile = MAX_ROWS / heads;
    per_tile = a.num_heads / heads;
  }
  int tiles(int s) const {
    return (a.query_starts[s + 1] - a.query_starts[s] + tokens_a_tile - 1) / tokens_a_tile;
  }
  int units(const Step& step) const {
    if (step.num_rows[0] == step.num_seqs) return step.num_seqs * per_tile;  // decodes only
    int total = 0;
    for (int s = 0; s < step.num_seqs; ++s) total += tiles(s);
    return total * per_tile;
  }
  Item item(const Step& step, int unit) const {
    int local = unit / per_tile, seq = 0;
    if (step.num_rows[0] == step.num_seqs) {
      seq = local;
      local = 0;
    }
    for (; local >= tiles(seq); ++seq) local -= tiles(seq);
    int tile = tiles(seq) - 1 - local, first = a.query_starts[seq] + tile * tokens_a_tile;
    int head = unit % per_tile * heads, left = a.query_starts[seq + 1] - first;
    return {seq, first, left < tokens_a_tile ? left : tokens_a_tile,
            head / (a.num_heads / a.num_kv_heads), head, heads};
  }
};

}  // namespace

Kernel<AttentionArgs> attention_kernel() {
  return {[](const AttentionArgs& a, const Step& step) { return Cut(a).units(step); },
          [](const AttentionArgs& a, const Step& step, const Worker& w, int unit) {
            Item it = Cut(a).item(step, unit);
            a.dtype ? run_item<bf16>(a, it, w) : run_item<float>(a, it, w);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
