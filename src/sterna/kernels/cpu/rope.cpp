// Head norms, rotary embedding and the write of new keys and values into the paged cache.
#include "kernels.h"
#include "kvcodes.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int MAX_HEAD_DIM = 1024;
constexpr int UNIT_TOKENS = 8;

template <class T>
void load_head(const T* x, int n, float* out) {
  for (int c = 0; c < n; ++c) out[c] = to_float(x[c]);
}

template <class T>
void head_norm(const RopeArgs& a, const T* weight, float* x) {
  float sq = 0.f;
  for (int c = 0; c < a.head_dim; ++c) sq += x[c] * x[c];
  float inv = 1.f / std::sqrt(sq / a.head_dim + a.eps);
  float offset = a.unit_offset ? 1.f : 0.f;
  for (int c = 0; c < a.head_dim; ++c) x[c] = x[c] * inv * (to_float(weight[c]) + offset);
}

// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
void rotate(const float* row, int rotary_dim, float* x) {
  int half = rotary_dim / 2;
  const float *cosines = row, *sines = row + half;
  for (int c = 0; c < half; ++c) {
    float x1 = x[c], x2 = x[c + half];
    x[c] = x1 * cosines[c] - x2 * sines[c];
    x[c + half] = x2 * cosines[c] + x1 * sines[c];
  }
}

template <class T>
void prepare_head(const RopeArgs& a, const T* src, const void* norm, int position, float* x) {
  load_head(src, a.head_dim, x);
  if (norm) head_norm(a, static_cast<const T*>(norm), x);
  if (a.table) rotate(a.table + int64_t(position) * a.rotary_dim, a.rotary_dim, x);
}

template <class T>
void put(const float* x, int n, T* out, int64_t step = 1) {
  for (int c = 0; c < n; ++c) store_one(out + c * step, x[c]);
}

// Where block `slot / block_size` keeps head `head` of its keys; values follow all the keys.
template <class T>
T* head_base(const RopeArgs& a, int64_t slot, int head, bool values) {
  char* base = static_cast<char*>(a.cache);
  return reinterpret_cast<T*>(base + kv_head_offset(a, slot / a.block_size, head, values));
}

template <class T>
void store_key(const RopeArgs& a, int64_t slot, int head, const float* x) {
  constexpr int P = Elem<T>::P;
  int offset = slot % a.block_size;
  T* at = head_base<T>(a, slot, head, false) + int64_t(offset / 16) * 16 * a.head_dim;
  at += offset % 16 * P;
  for (int c = 0; c < a.head_dim; ++c) store_one(at + c / P * 16 * P + c % P, x[c]);
}

// A value that opens a pair clears its partner unless this batch fills it: a masked key has
// weight 0, and 0 * (NaN left by an earlier owner of the block) would not be 0.
template <class T>
void store_value(const RopeArgs& a, int64_t slot, int head, const T* v, bool partner_follows) {
  constexpr int P = Elem<T>::P;
  int offset = slot % a.block_size;
  T* at = head_base<T>(a, slot, head, true) + int64_t(offset / P) * P * a.head_dim + offset % P;
  bool clear = P == 2 && offset % 2 == 0 && !partner_follows;
  for (int c = 0; c < a.head_dim; ++c) {
    at[c * P] = v[c];
    if (clear) at[c * P + 1] = T(0);
  }
}

// The codes and the scale of one head, in the panels of T (see args.h).
template <class T, CacheFormat F>
void store_codes(const RopeArgs& a, int64_t slot, int head, const float* x, bool values) {
  constexpr int P = Elem<T>::P;
  uint8_t codes[MAX_HEAD_DIM];
  int offset = slot % a.block_size;
  uint8_t* base = head_base<uint8_t>(a, slot, head, values);
  float scale = quantise<F>(x, a.head_dim, codes);
  int64_t elems = int64_t(a.block_size) * a.head_dim;
  std::memcpy(base + elems + offset * sizeof(float), &scale, sizeof(float));
  if (values) {
    uint8_t* at = base + int64_t(offset / P) * P * a.head_dim + offset % P;
    for (int c = 0; c < a.head_dim; ++c) at[c * P] = codes[c];
  } else {
    uint8_t* at = base + int64_t(offset / 16) * 16 * a.head_dim + offset % 16 * P;
    for (int c = 0; c < a.head_dim; ++c) at[c / P * 16 * P + c % P] = codes[c];
  }
}

// Both of one head, quantised from what a plain cache would hold: the key rounded to T.
template <class T, CacheFormat F>
void store_quantised(const RopeArgs& a, int64_t slot, int head, float* key, const T* value) {
  for (int c = 0; c < a.head_dim; ++c) {
    T rounded;
    store_one(&rounded, key[c]);
    key[c] = to_float(rounded);
  }
  store_codes<T, F>(a, slot, head, key, false);
  load_head(value, a.head_dim, key);
  store_codes<T, F>(a, slot, head, key, true);
}

template <class T>
void rope_token(const RopeArgs& a, int t, int num_tokens) {
  float x[MAX_HEAD_DIM];
  const int C = a.head_dim, H = a.num_heads, G = a.num_kv_heads;
  const int position = a.positions[a.row_ids ? a.row_ids[t] : t];
  const T* row = static_cast<const T*>(a.qkv) + t * a.row_stride;
  T* out = static_cast<T*>(a.out) + int64_t(t) * (a.cache ? H : H + 2 * G) * C;
  for (int h = 0; h < H; ++h) {
    prepare_head(a, row + h * C, a.q_norm, position, x);
    put(x, C, out + h * C);
  }
  bool partner_follows = a.cache && t + 1 < num_tokens && a.slots[t + 1] == a.slots[t] + 1;
  for (int g = 0; g < G; ++g) {
    const T *key = row + (H + g) * C, *value = row + (H + G + g) * C;
    prepare_head(a, key, a.k_norm, position, x);
    if (a.cache && a.cache_format == CACHE_INT8) {
      store_quantised<T, CACHE_INT8>(a, a.slots[t], g, x, value);
    } else if (a.cache && a.cache_format == CACHE_E4M3) {
      store_quantised<T, CACHE_E4M3>(a, a.slots[t], g, x, value);
    } else if (a.cache) {
      store_key<T>(a, a.slots[t], g, x);
      store_value<T>(a, a.slots[t], g, value, partner_follows);
    } else {
      put(x, C, out + (H + g) * C);
      std::memcpy(out + (H + G + g) * C, value, C * sizeof(T));
    }
  }
}

template <class T>
void rope_t(const RopeArgs& a, int tokens, int unit) {
  int end = (unit + 1) * UNIT_TOKENS;
  for (int t = unit * UNIT_TOKENS; t < end && t < tokens; ++t) rope_token<T>(a, t, tokens);
}

int num_units(const RopeArgs& a, const Step& step) {
  return (step.num_rows[a.rows_kind] + UNIT_TOKENS - 1) / UNIT_TOKENS;
}

void rope_unit(const RopeArgs& a, const Step& step, int unit) {
  int rows = step.num_rows[a.rows_kind];
  a.dtype ? rope_t<bf16>(a, rows, unit) : rope_t<float>(a, rows, unit);
}

// The share of one layer in a bulk write: the same call that `rope_store` makes for its own.
RopeArgs layer_of(const StoreArgs& a, int i) {
  RopeArgs one = a.rows;
  const StoreLayer& layer = a.layers[i];
  int64_t first = int64_t(i) * 2 * one.num_kv_heads * one.head_dim * (one.dtype ? 2 : 4);
  one.qkv = static_cast<const char*>(one.qkv) + first;
  one.table = layer.table;
  one.k_norm = layer.k_norm;
  one.cache = layer.cache;
  one.rotary_dim = layer.rotary_dim;
  return one;
}

}  // namespace

Kernel<RopeArgs> rope_kernel() {
  return {[](const RopeArgs& a, const Step& step) { return num_units(a, step); },
          [](const RopeArgs& a, const Step& step, const Worker&, int unit) {
            rope_unit(a, step, unit);
          }};
}

Kernel<StoreArgs> store_kernel() {
  return {[](const StoreArgs& a, const Step& step) {
            return num_units(a.rows, step) * int(a.layers.size());
          },
          [](const StoreArgs& a, const Step& step, const Worker&, int unit) {
            int num_layers = int(a.layers.size()), i = unit % num_layers;
            rope_unit(layer_of(a, i), step, unit / num_layers);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
