// Paged attention for any mix of prompt chunks, decodes and drafts.
//
// For one query row i:  s_j = scale * q_i.k_j (softcap), visible j only;  out_i = softmax(s) V.
// The keys are walked in tiles of TILE from position 0 with an online softmax (running maximum m,
// sum l, output O), whatever chunk the query came in; a fully masked tile changes nothing. So an
// output never depends on chunking, on the batch or on which rows share a tile.
// Rows of one tile = query tokens x query heads that share a key/value head: both products run
// the micro-kernel of `linear` with keys (then values) as its B operand.
// A quantised tile is decoded into scratch first, keys and then values over them; the scale of a
// key multiplies its scores and that of a value its probabilities, before they are rounded.
#include "kernels.h"
#include "kvcodes.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr int TILE = 128;     // keys of a softmax tile
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
  float *k_scales, *v_scales;  // [TILE] of a quantised tile
  T* decoded;   // [TILE, C] and a vector that may be read beyond
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
  st.k_scales = st.l + MAX_ROWS;
  st.v_scales = st.k_scales + TILE;
  st.decoded = reinterpret_cast<T*>(st.v_scales + TILE);
  st.q = st.decoded + TILE * padded;
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
  // The keys that any of the rows sees, from a multiple of TILE on.
  int end() const { return first_position + it.num_tokens; }
  int begin() const {
    int first = a.window > 0 ? first_position - a.window + 1 : 0;
    return first < 0 ? 0 : first / TILE * TILE;
  }
  const char* block(int key, bool values) const {
    int index = key / a.block_size;
    int64_t id = index < a.table_width ? a.block_tables[int64_t(it.seq) * a.table_width + index] : 0;
    return static_cast<const char*>(a.cache) + kv_head_offset(a, id, it.kv_head, values);
  }
};

// Where the keys and values of one tile are, 16 keys a piece: found once, used by all rows.
// E = T, or uint8_t for codes; their scales lie behind the codes of the whole block.
template <class E>
struct Tile {
  int first, count;  // keys
  const E *k[TILE / 16], *v[TILE / 16];
  const float *k_scales[TILE / 16], *v_scales[TILE / 16];
  template <class T>
  Tile(const Work<T>& w, int key, int end)
      : first(key), count(end - key < TILE ? end - key : TILE) {
    for (int i = 0; i < TILE / 16; ++i) {
      int at = key + 16 * i, offset = at % w.a.block_size;
      const E* keys = reinterpret_cast<const E*>(w.block(at, false));
      const E* values = reinterpret_cast<const E*>(w.block(at, true));
      k[i] = keys + int64_t(offset) * w.a.head_dim;
      v[i] = values + int64_t(offset) * w.a.head_dim;
      if constexpr (sizeof(E) == 1) {
        int64_t elems = int64_t(w.a.block_size) * w.a.head_dim;
        k_scales[i] = reinterpret_cast<const float*>(keys + elems) + offset;
        v_scales[i] = reinterpret_cast<const float*>(values + elems) + offset;
      }
    }
  }
  // The tile once more, with keys and values (by turns) in scratch.
  template <class T>
  Tile(const Work<T>& w, const Tile<uint8_t>& codes) : first(codes.first), count(codes.count) {
    for (int i = 0; i < TILE / 16; ++i) k[i] = v[i] = w.st.decoded + i * 16 * w.a.head_dim;
  }
};

struct Nothing {};  // stands for the next tile where none is asked for

// Scales of the tile into scratch. Those beyond its keys become 0: memory that an earlier owner
// left may read as NaN, and a masked probability of 0 would not stay 0.
template <class T>
void gather_scales(const Work<T>& w, const Tile<uint8_t>& tile, const Tile<uint8_t>& next) {
  for (int i = 0; i < TILE / 16; ++i) {
    int n = tile.count - 16 * i < 0 ? 0 : tile.count - 16 * i < 16 ? tile.count - 16 * i : 16;
    std::memset(w.st.k_scales + 16 * i, 0, 64);
    std::memset(w.st.v_scales + 16 * i, 0, 64);
    if (n == 0) continue;
    std::memcpy(w.st.k_scales + 16 * i, tile.k_scales[i], n * sizeof(float));
    std::memcpy(w.st.v_scales + 16 * i, tile.v_scales[i], n * sizeof(float));
    __builtin_prefetch(next.k_scales[i], 0, 2);
    __builtin_prefetch(next.v_scales[i], 0, 2);
  }
}

// The pieces that hold keys of the tile, decoded; `ahead` holds those of the next tile.
template <class T, CacheFormat F>
void decode_tile(const Work<T>& w, const uint8_t* const (&codes)[TILE / 16],
                 const uint8_t* const (&ahead)[TILE / 16], int count) {
  int run = 16 * w.a.head_dim;
  for (int i = 0; i * 16 < count; ++i)
    decode_run<T, F>(codes[i], ahead[i], run, w.st.decoded + i * run);
}

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

// Few rows are bound by memory: while 16 keys (then values) are read, those that this thread reads
// DISTANCE pieces later are asked for, in this tile or the next (blocks lie apart, so the hardware's
// own prefetching stops every 2 KiB). 32 streams of 176 keys: 198 -> 115 us a layer.
constexpr int PIECES = TILE / 16;
constexpr int DISTANCE = 8;

template <class T>
const char* ahead_of(const Tile<T>& tile, const Tile<T>& next, int piece) {
  int i = piece + DISTANCE;
  const T* p = i < PIECES       ? tile.k[i]
               : i < 2 * PIECES ? tile.v[i - PIECES]
                                : next.k[i - 2 * PIECES];
  return reinterpret_cast<const char*>(p);
}

template <int M, class Next>
constexpr int LINES = M <= 4 && !std::is_same_v<Next, Nothing> ? 4 : 0;

// s[row .. row + M] = q.k for NV vectors of keys from column `col` of the tile.
template <class T, int M, class Next>
void scores(const Work<T>& w, const Tile<T>& tile, const Next& next, int row, int col) {
  constexpr int P = Elem<T>::P;
  const T* k[NV];
  repeat<NV>([&](auto j) INLINE {
    k[j] = tile.k[(col + j * VW) / 16] + (col + j * VW) % 16 * P;
  });
  vf acc[M][NV] = {};
  const T* q = w.st.q + int64_t(row) * w.a.head_dim;
  if constexpr (constexpr int N = LINES<M, Next>; N > 0) {
    Ahead<N, 3> ahead;
    for (int i = 0; i < N; ++i) ahead.at[i] = ahead_of(tile, next, col / 16 + i * NV * VW / 64);
    multiply<M, NV>(acc, q, w.a.head_dim, k, 16 * P, w.a.head_dim / P, ahead);
  } else {
    multiply<M, NV>(acc, q, w.a.head_dim, k, 16 * P, w.a.head_dim / P);
  }
  repeat<M>([&](auto i) INLINE {
    float* s = w.st.s + (row + i) * TILE + col;
    repeat<NV>([&](auto j) INLINE { store(s + j * VW, acc[i][j]); });
  });
}

// o[row .. row + M] += p V over the keys of the tile, N vectors from column c.
template <class T, int M, int N, class Next>
void values(const Work<T>& w, const Tile<T>& tile, const Next& next, int row, int c) {
  constexpr int P = Elem<T>::P;
  vf acc[M][N];
  float* o = w.st.o + int64_t(row) * w.ldo() + c;
  int64_t ldo = w.ldo();
  repeat<M>([&](auto i) INLINE {
    repeat<N>([&](auto j) INLINE { acc[i][j] = load(o + i * ldo + j * VW); });
  });
  for (int at = 0; at < tile.count; at += 16) {
    int n = tile.count - at < 16 ? tile.count - at : 16;
    const T* v[N];
    repeat<N>([&](auto j) INLINE { v[j] = tile.v[at / 16] + int64_t(c + j * VW) * P; });
    const T* p = w.st.p + row * TILE + at;
    int steps = (n + P - 1) / P;
    if constexpr (constexpr int L = LINES<M, Next>; L > 0) {
      Ahead<L, 3> ahead;  // 16 / P steps of 64 bytes a stream
      const char* piece = ahead_of(tile, next, PIECES + at / 16) + c * 16 * sizeof(T);
      for (int i = 0; i < L; ++i) ahead.at[i] = piece + i * 1024 / P;
      multiply<M, N>(acc, p, TILE, v, int64_t(w.a.head_dim) * P, steps, ahead);
    } else {
      multiply<M, N>(acc, p, TILE, v, int64_t(w.a.head_dim) * P, steps);
    }
  }
  repeat<M>([&](auto i) INLINE {
    repeat<N>([&](auto j) INLINE { store(o + i * ldo + j * VW, acc[i][j]); });
  });
}

template <class T, int M, class Next>
void values_of_rows(const Work<T>& w, const Tile<T>& tile, const Next& next, int row) {
  int c = 0;
  for (; c + NV * VW <= w.ldo(); c += NV * VW) values<T, M, NV>(w, tile, next, row, c);
  for (; c < w.ldo(); c += VW) values<T, M, 1>(w, tile, next, row, c);
}

// Brings border tiles and capped scores into plain form: masked keys become -infinity.
void mask(const AttentionArgs& a, float* s, int key, int first, int last) {
  vi lane;
  for (int i = 0; i < VW; ++i) lane[i] = i;
  for (int j = 0; j < TILE; j += VW) {
    vf v = load(s + j);
    if (a.softcap > 0.f) v = splat(a.softcap) * vtanh(v * splat(a.scale / a.softcap));
    vi at = lane + (key + j);
    vi visible = (at <= last) & (at >= first);
    store(s + j, visible ? v : splat(-INFINITY));
  }
}

// Scores -> probabilities 2^(s * factor - m), and the online-softmax update of m, l and O.
// m is kept in units of log2, so the scale and log2(e) cost one fused multiply-add.
template <class T, bool SCALED>
void soften(const Work<T>& w, int row, int key) {
  const AttentionArgs& a = w.a;
  int last = w.position(row), first = a.window > 0 ? last - a.window + 1 : 0;
  float* s = w.st.s + row * TILE;
  if constexpr (SCALED)
    for (int j = 0; j < TILE; j += VW) store(s + j, load(s + j) * load(w.st.k_scales + j));
  bool inside = key >= first && key + TILE - 1 <= last;
  if (!inside || a.softcap > 0.f) mask(a, s, key, first, last);
  float factor = a.softcap > 0.f ? LOG2E : a.scale * LOG2E;
  vf best = load(s);
  for (int j = VW; j < TILE; j += VW) best = vmax(best, load(s + j));
  float m = max_of(best) * factor, old = w.st.m[row];
  m = m > old ? m : old;
  T* p = w.st.p + row * TILE;
  if (m == -INFINITY) {
    std::memset(p, 0, TILE * sizeof(T));
    return;
  }
  vf total = {};
  for (int j = 0; j < TILE; j += VW) {
    vf e = vexp2<Elem<T>::P == 2>(load(s + j) * splat(factor) - splat(m));
    total += e;
    if constexpr (SCALED) e *= load(w.st.v_scales + j);
    store(p + j, e);
  }
  float alpha = m == old ? 1.f : sexp2(old - m);
  w.st.l[row] = w.st.l[row] * alpha + sum(total);
  w.st.m[row] = m;
  if (alpha == 1.f) return;
  float* o = w.st.o + int64_t(row) * w.ldo();
  for (int c = 0; c < w.ldo(); c += VW) store(o + c, load(o + c) * splat(alpha));
}

template <class T, int M, class Next>
void rows_of(const Work<T>& w, const Tile<T>& tile, const Next& next, int m, int row,
             bool first_pass) {
  if (m == M) {
    if (!first_pass) return values_of_rows<T, M>(w, tile, next, row);
    for (int col = 0; col < tile.count; col += NV * VW) scores<T, M>(w, tile, next, row, col);
    return;
  }
  if constexpr (M > 1) rows_of<T, M - 1>(w, tile, next, m, row, first_pass);
}

template <class T, class Next>
void all_rows(const Work<T>& w, const Tile<T>& tile, const Next& next, bool first_pass) {
  int rows = w.it.rows();
  for (int r = 0; r < rows; r += MR)
    rows_of<T, MR>(w, tile, next, rows - r < MR ? rows - r : MR, r, first_pass);
}

template <class T, CacheFormat F, class E>
void one_tile(const Work<T>& w, const Tile<E>& tile, const Tile<E>& next) {
  if constexpr (F == CACHE_PLAIN) {
    all_rows(w, tile, next, true);
    for (int r = 0; r < w.it.rows(); ++r) soften<T, false>(w, r, tile.first);
    all_rows(w, tile, next, false);
  } else {
    Tile<T> plain(w, tile);
    gather_scales(w, tile, next);
    decode_tile<T, F>(w, tile.k, next.k, tile.count);
    all_rows(w, plain, Nothing{}, true);
    for (int r = 0; r < w.it.rows(); ++r) soften<T, true>(w, r, tile.first);
    decode_tile<T, F>(w, tile.v, next.v, tile.count);
    all_rows(w, plain, Nothing{}, false);
  }
}

template <class T>
void write_out(const Work<T>& w) {
  int C = w.a.head_dim;
  for (int r = 0; r < w.it.rows(); ++r) {
    int64_t token = w.it.first_token + r / w.it.num_heads;
    int head = w.it.first_head + r % w.it.num_heads;
    T* out = static_cast<T*>(w.a.out) + (token * w.a.num_heads + head) * C;
    const float* o = w.st.o + int64_t(r) * w.ldo();
    float l = w.st.l[r];
    int c = 0;
    for (; c + VW <= C; c += VW) store(out + c, load(o + c) / splat(l));
    for (; c < C; ++c) store_one(out + c, o[c] / l);
  }
}

template <class T>
Work<T> work_of(const AttentionArgs& a, const Item& it, const Worker& worker) {
  int starts = a.query_starts[it.seq], new_tokens = a.query_starts[it.seq + 1] - starts;
  int cached = a.context_lens[it.seq] - new_tokens;
  return {a, it, carve<T>(worker.scratch, a.head_dim), cached + it.first_token - starts};
}

// `next` is the item that this thread most likely takes after this one; it may be the same.
template <class T, CacheFormat F>
void run_item(const AttentionArgs& a, const Item& it, const Item& next, const Worker& worker) {
  using E = std::conditional_t<F == CACHE_PLAIN, T, uint8_t>;
  Work<T> w = work_of<T>(a, it, worker);
  gather_queries(w);
  int end = w.end();
  Tile<E> tile(w, w.begin(), end), after = tile;
  for (int key = w.begin(); key < end; key += TILE, tile = after) {
    if (key + TILE < end) {
      after = Tile<E>(w, key + TILE, end);
    } else {
      Work<T> other = work_of<T>(a, next, worker);
      after = Tile<E>(other, other.begin(), other.end());
    }
    one_tile<T, F>(w, tile, after);
  }
  write_out(w);
}

template <class T>
void run_format(const AttentionArgs& a, const Item& it, const Item& next, const Worker& worker) {
  if (a.cache_format == CACHE_INT8) return run_item<T, CACHE_INT8>(a, it, next, worker);
  if (a.cache_format == CACHE_E4M3) return run_item<T, CACHE_E4M3>(a, it, next, worker);
  run_item<T, CACHE_PLAIN>(a, it, next, worker);
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
    int rows = a.query_starts[s + 1] - a.query_starts[s];
    return rows <= tokens_a_tile ? rows > 0 : (rows + tokens_a_tile - 1) / tokens_a_tile;
  }
  // Decodes only: a token a sequence, and a row a token.
  bool is_uniform(const Step& step) const {
    return step.num_rows[0] == step.num_seqs && step.num_rows[a.rows_kind] == step.num_seqs;
  }
  int units(const Step& step) const {
    if (is_uniform(step)) return step.num_seqs * per_tile;
    int total = 0;
    for (int s = 0; s < step.num_seqs; ++s) total += tiles(s);
    return total * per_tile;
  }
  Item item(const Step& step, int unit) const {
    int local = unit / per_tile, seq = 0;
    if (is_uniform(step)) {
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
            Cut cut(a);
            Item it = cut.item(step, unit);
            Item next = unit + 1 < cut.units(step) ? cut.item(step, unit + 1) : it;
            a.dtype ? run_format<bf16>(a, it, next, w) : run_format<float>(a, it, next, w);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
