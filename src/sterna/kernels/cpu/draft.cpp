// What a learned speculator does between its matrices: the cell of a draft, and its token.
//
// A row is worked on by one thread alone, in float32, and rounded once at its outputs.
#include "activations.h"
#include "kernels.h"
#include "microkernel.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

int padded(int n) { return (n + VW - 1) / VW * VW; }

// Widens a row and pads it with zeros, so that all that follows has whole vectors.
template <class T>
void widen(const T* x, int n, float* out) {
  int k = 0;
  for (; k + VW <= n; k += VW) store(out + k, load(x + k));
  for (; k < n; ++k) out[k] = to_float(x[k]);
  for (; k < padded(n); ++k) out[k] = 0.f;
}

template <class T>
void narrow(const float* x, int n, T* out) {
  int k = 0;
  for (; k + VW <= n; k += VW) store(out + k, load(x + k));
  for (; k < n; ++k) store_one(out + k, x[k]);
}

// x becomes gelu(x / rms(x) * weight + bias); the padding stays zero in weight and bias.
template <class T>
void norm_gelu(float* x, const void* weight, const void* bias, int n, float eps, float* spare) {
  float *w = spare, *b = spare + padded(n);
  widen(static_cast<const T*>(weight), n, w);
  widen(static_cast<const T*>(bias), n, b);
  vf squares = {};
  for (int k = 0; k < padded(n); k += VW) squares += load(x + k) * load(x + k);
  vf inv = splat(1.f / std::sqrt(sum(squares) / n + eps));
  for (int k = 0; k < padded(n); k += VW)
    store(x + k, vgelu_exact(load(x + k) * inv * load(w + k) + load(b + k)));
}

// The lstm's cell into `fresh`: cell * sigmoid(f) + gelu(norm(fresh)) * sigmoid(i).
template <class T>
void update_cell(const DraftCellArgs& a, const T* z, const T* cell, float* fresh, float* gate,
                 float* spare) {
  int d = a.hidden;
  widen(z + 3 * int64_t(d), d, fresh);
  norm_gelu<T>(fresh, a.cell_norm, a.cell_norm_bias, d, a.eps, spare);
  widen(z + d, d, gate);
  for (int k = 0; k < padded(d); k += VW) store(fresh + k, load(fresh + k) * vsigmoid(load(gate + k)));
  if (!cell) return;
  widen(z, d, gate);
  widen(cell, d, spare);
  for (int k = 0; k < padded(d); k += VW)
    store(fresh + k, load(spare + k) * vsigmoid(load(gate + k)) + load(fresh + k));
}

template <class T>
void cell_row(const DraftCellArgs& a, int64_t row, float* scratch) {
  int d = a.hidden, p = padded(d);
  float *x = scratch, *gate = scratch + p, *spare = scratch + 2 * p;
  bool is_lstm = a.cell_norm != nullptr;
  const T* z = static_cast<const T*>(a.z) + row * d * (is_lstm ? 4 : 1);
  if (is_lstm) {
    const T* cell = a.cell ? static_cast<const T*>(a.cell) + row * d : nullptr;
    update_cell<T>(a, z, cell, x, gate, spare);
    narrow(x, d, static_cast<T*>(a.cell_out) + row * d);
  } else {
    widen(z, d, x);
  }
  norm_gelu<T>(x, a.norm, a.norm_bias, d, a.eps, spare);
  if (is_lstm) {
    widen(z + 2 * int64_t(d), d, gate);
    for (int k = 0; k < p; k += VW) store(x + k, load(x + k) * vsigmoid(load(gate + k)));
  }
  narrow(x, d, static_cast<T*>(a.state) + row * d);
}

void pick_row(const PickArgs& a, int64_t row) {
  const float* x = a.logits + row * a.vocab;
  vf top = splat(-INFINITY);
  int k = 0;
  for (; k + VW <= a.vocab; k += VW) top = vmax(load(x + k), top);
  float best = max_of(top);
  for (int j = k; j < a.vocab; ++j) best = x[j] > best ? x[j] : best;
  int at = 0;
  while (at < a.vocab && x[at] != best) ++at;
  float total = 0.f;
  vf sums = {};
  for (k = 0; k + VW <= a.vocab; k += VW) sums += vexp(load(x + k) - splat(best));
  for (; k < a.vocab; ++k) {
    float lanes[VW];
    store(lanes, vexp(splat(x[k] - best)));
    total += lanes[0];
  }
  total += sum(sums);
  bool is_finite = at < a.vocab && total >= 1.f && total < INFINITY;
  at = is_finite ? at : 0;
  a.tokens[row] = a.ids ? a.ids[at] : at;
  a.probs[row] = is_finite ? 1.f / total : 0.f;
}

}  // namespace

Kernel<DraftCellArgs> draft_cell_kernel() {
  return {[](const DraftCellArgs& a, const Step& step) { return int(step.num_rows[a.rows_kind]); },
          [](const DraftCellArgs& a, const Step&, const Worker& worker, int unit) {
            float* scratch = reinterpret_cast<float*>(worker.scratch);
            a.dtype ? cell_row<bf16>(a, unit, scratch) : cell_row<float>(a, unit, scratch);
          }};
}

Kernel<PickArgs> pick_kernel() {
  return {[](const PickArgs& a, const Step& step) { return int(step.num_rows[a.rows_kind]); },
          [](const PickArgs& a, const Step&, const Worker&, int unit) { pick_row(a, unit); }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
