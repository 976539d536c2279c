// The two ends of an encoder: embeddings summed and normed, hidden states pooled.
#include "kernels.h"
#include "norm.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

constexpr int EMBED_ROWS = 32;  // tokens of a unit
constexpr int POOL_SEQS = 4;    // sequences of a unit

template <class T>
void embed_row(const EmbedNormArgs& a, int row, float* sum) {
  const T* word = static_cast<const T*>(a.table) + int64_t(a.tokens[row]) * a.hidden;
  const float* place = a.position_table;
  if (a.num_positions > 1) place += int64_t(a.positions[row]) * a.hidden;
  int k = 0;
  for (; k + VW <= a.hidden; k += VW) store(sum + k, place ? load(word + k) + load(place + k) : load(word + k));
  for (; k < a.hidden; ++k) sum[k] = to_float(word[k]) + (place ? place[k] : 0.f);
}

template <class T>
void embed_unit(const EmbedNormArgs& a, int begin, int end, float* sum) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  for (int row = begin; row < end; ++row) {
    embed_row<T>(a, row, sum);
    layer_norm_row(sum, weight, bias, a.hidden, a.eps, static_cast<T*>(a.out) + int64_t(row) * a.hidden);
  }
}

// Rows are added one after the other, so the mean depends on nothing but its own sequence.
template <class T>
void pool_seq(const PoolArgs& a, int seq) {
  int begin = a.query_starts[seq], end = a.query_starts[seq + 1];
  if (a.kind == POOL_FIRST) end = begin + 1;
  if (a.kind == POOL_LAST) begin = end - 1;
  const T* x = static_cast<const T*>(a.x);
  float* out = a.out + int64_t(seq) * a.hidden;
  float factor = 1.f / (end - begin);
  int k = 0;
  for (; k + VW <= a.hidden; k += VW) {
    vf total = {};
    for (int row = begin; row < end; ++row) total += load(x + int64_t(row) * a.hidden + k);
    store(out + k, total * splat(factor));
  }
  for (; k < a.hidden; ++k) {
    float total = 0.f;
    for (int row = begin; row < end; ++row) total += to_float(x[int64_t(row) * a.hidden + k]);
    out[k] = total * factor;
  }
  if (!a.normalize) return;
  float length = std::sqrt(row_sum(out, a.hidden, [](vf v) { return v * v; }));
  float inverse = 1.f / (length > 1e-12f ? length : 1e-12f);
  for (k = 0; k < a.hidden; ++k) out[k] *= inverse;
}

}  // namespace

Kernel<EmbedNormArgs> embed_norm_kernel() {
  return {[](const EmbedNormArgs&, const Step& step) {
            return (step.num_rows[0] + EMBED_ROWS - 1) / EMBED_ROWS;
          },
          [](const EmbedNormArgs& a, const Step& step, const Worker& w, int unit) {
            int begin = unit * EMBED_ROWS, end = begin + EMBED_ROWS;
            if (end > step.num_rows[0]) end = step.num_rows[0];
            float* sum = reinterpret_cast<float*>(w.scratch);
            a.dtype ? embed_unit<bf16>(a, begin, end, sum) : embed_unit<float>(a, begin, end, sum);
          }};
}

Kernel<PoolArgs> pool_kernel() {
  return {[](const PoolArgs&, const Step& step) {
            return (step.num_seqs + POOL_SEQS - 1) / POOL_SEQS;
          },
          [](const PoolArgs& a, const Step& step, const Worker&, int unit) {
            int end = unit * POOL_SEQS + POOL_SEQS;
            for (int s = unit * POOL_SEQS; s < end && s < step.num_seqs; ++s)
              a.dtype ? pool_seq<bf16>(a, s) : pool_seq<float>(a, s);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
