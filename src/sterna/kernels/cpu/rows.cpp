// Ops that work on one row at a time: embedding, norms, activations, row selection.
#include "activations.h"
#include "kernels.h"
#include "microkernel.h"
#include "norm.h"

namespace sterna {
namespace STERNA_ISA {
namespace {

// Elements of a unit: small enough to share out, large enough to hide taking one (about 20 ns).
constexpr int64_t UNIT_ELEMS = 8192;

int rows_a_unit(int width) { return int(UNIT_ELEMS / width > 1 ? UNIT_ELEMS / width : 1); }
int num_units(int rows, int width) { return (rows + rows_a_unit(width) - 1) / rows_a_unit(width); }

struct Range {
  int begin, end;
};
Range rows_of(int unit, int rows, int width) {
  int begin = unit * rows_a_unit(width), end = begin + rows_a_unit(width);
  return {begin, end < rows ? end : rows};
}

template <class T>
void embed_row(const EmbedArgs& a, int token, T* out) {
  constexpr int P = Elem<T>::P;
  const T* table = static_cast<const T*>(a.table);
  const T* src = table + int64_t(token) * a.hidden;
  int64_t k_stride = P;
  if (a.packed) {
    int64_t panel_elems = int64_t((a.hidden + P - 1) / P) * PANEL * P;
    src = table + token / PANEL * panel_elems + token % PANEL * P;
    k_stride = PANEL * P;
  }
  for (int k = 0; k < a.hidden; ++k) {
    T v = src[k / P * k_stride + k % P];
    if (a.scale == 1.f)
      out[k] = v;
    else
      store_one(out + k, to_float(v) * a.scale);
  }
}

template <class T>
void embed_t(const EmbedArgs& a, Range r) {
  for (int i = r.begin; i < r.end; ++i)
    embed_row<T>(a, a.tokens[i], static_cast<T*>(a.out) + int64_t(i) * a.hidden);
}

template <class T>
void rms_row(const NormArgs& a, const T* x, T* out) {
  const T* weight = static_cast<const T*>(a.weight);
  float mean_sq = row_sum(x, a.hidden, [](vf v) { return v * v; }) / a.hidden;
  float inv = 1.f / std::sqrt(mean_sq + a.eps);
  float offset = a.unit_offset ? 1.f : 0.f;
  int k = 0;
  for (; k + VW <= a.hidden; k += VW)
    store(out + k, load(x + k) * splat(inv) * (load(weight + k) + splat(offset)));
  for (; k < a.hidden; ++k)
    store_one(out + k, to_float(x[k]) * inv * (to_float(weight[k]) + offset));
}

template <class T>
void norm_t(const NormArgs& a, Range r) {
  for (int i = r.begin; i < r.end; ++i) {
    const T* x = static_cast<const T*>(a.x) + int64_t(i) * a.hidden;
    T* out = static_cast<T*>(a.out) + int64_t(i) * a.hidden;
    a.is_layer_norm ? layer_norm_row(x, static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
                                     a.hidden, a.eps, out)
                    : rms_row(a, x, out);
  }
}

template <class T>
void activate_row(const ActivateArgs& a, const T* x, const T* y, T* out) {
  int k = 0;
  for (; k + VW <= a.hidden; k += VW)
    store(out + k, y ? load(x + k) + load(y + k) : activated<sizeof(T) == 2>(a.kind, load(x + k)));
  for (; k < a.hidden; ++k) {
    float lanes[VW];
    store(lanes, activated<sizeof(T) == 2>(a.kind, splat(to_float(x[k]))));
    store_one(out + k, y ? to_float(x[k]) + to_float(y[k]) : lanes[0]);
  }
}

template <class T>
void activate_t(const ActivateArgs& a, Range r) {
  for (int i = r.begin; i < r.end; ++i) {
    int64_t at = int64_t(i) * a.hidden;
    const T* y = a.y ? static_cast<const T*>(a.y) + at : nullptr;
    activate_row(a, static_cast<const T*>(a.x) + at, y, static_cast<T*>(a.out) + at);
  }
}

// act(x) and its slope.
struct Slope {
  vf value, slope;
};

Slope slope_of(int kind, vf x) {
  const vf one = splat(1.f), half = splat(0.5f);
  if (kind == ACT_SILU) {
    vf s = vsigmoid(x);
    return {x * s, s * (one + x * (one - s))};
  }
  const vf root = splat(0.7978845608028654f), cube = splat(0.044715f);
  vf t = vtanh(root * (x + cube * x * x * x));
  vf inner = root * (one + splat(3.f) * cube * x * x);
  return {half * x * (one + t), half * (one + t) + half * x * (one - t * t) * inner};
}

template <class T>
void gated_grad_row(const GatedGradArgs& a, const T* grad, const T* pre, T* out) {
  int k = 0;
  for (; k + VW <= a.width; k += VW) {
    vf g = load(grad + k), up = load(pre + a.width + k);
    Slope s = slope_of(a.gate, load(pre + k));
    store(out + k, g * up * s.slope);
    store(out + a.width + k, g * s.value);
  }
  for (; k < a.width; ++k) {
    float value[VW], slope[VW], g = to_float(grad[k]);
    Slope s = slope_of(a.gate, splat(to_float(pre[k])));
    store(value, s.value);
    store(slope, s.slope);
    store_one(out + k, g * to_float(pre[a.width + k]) * slope[0]);
    store_one(out + a.width + k, g * value[0]);
  }
}

template <class T>
void gated_grad_t(const GatedGradArgs& a, Range r) {
  for (int64_t i = r.begin; i < r.end; ++i)
    gated_grad_row(a, static_cast<const T*>(a.grad) + i * a.width,
                   static_cast<const T*>(a.pre) + 2 * i * a.width,
                   static_cast<T*>(a.d_pre) + 2 * i * a.width);
}

void select_rows(const SelectArgs& a, Range r) {
  int64_t bytes = int64_t(a.hidden) * (a.dtype ? 2 : 4);
  for (int i = r.begin; i < r.end; ++i)
    std::memcpy(static_cast<char*>(a.out) + i * bytes,
                static_cast<const char*>(a.x) + a.rows[i] * bytes, bytes);
}

}  // namespace

Kernel<EmbedArgs> embed_kernel() {
  return {[](const EmbedArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.hidden);
          },
          [](const EmbedArgs& a, const Step& step, const Worker&, int unit) {
            Range r = rows_of(unit, step.num_rows[a.rows_kind], a.hidden);
            a.dtype ? embed_t<bf16>(a, r) : embed_t<float>(a, r);
          }};
}

Kernel<NormArgs> norm_kernel() {
  return {[](const NormArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.hidden);
          },
          [](const NormArgs& a, const Step& step, const Worker&, int unit) {
            Range r = rows_of(unit, step.num_rows[a.rows_kind], a.hidden);
            a.dtype ? norm_t<bf16>(a, r) : norm_t<float>(a, r);
          }};
}

Kernel<ActivateArgs> activate_kernel() {
  return {[](const ActivateArgs& a, const Step& step) {
            return num_units(step.num_rows[a.rows_kind], a.hidden);
          },
          [](const ActivateArgs& a, const Step& step, const Worker&, int unit) {
            Range r = rows_of(unit, step.num_rows[a.rows_kind], a.hidden);
            a.dtype ? activate_t<bf16>(a, r) : activate_t<float>(a, r);
          }};
}

Kernel<GatedGradArgs> gated_grad_kernel() {
  return {[](const GatedGradArgs& a, const Step& step) {
            return num_units(step.num_rows[1], 2 * a.width);
          },
          [](const GatedGradArgs& a, const Step& step, const Worker&, int unit) {
            Range r = rows_of(unit, step.num_rows[1], 2 * a.width);
            a.dtype ? gated_grad_t<bf16>(a, r) : gated_grad_t<float>(a, r);
          }};
}

Kernel<SelectArgs> select_kernel() {
  return {[](const SelectArgs& a, const Step& step) {
            return num_units(step.num_rows[1], a.hidden);
          },
          [](const SelectArgs& a, const Step& step, const Worker&, int unit) {
            Range r = rows_of(unit, step.num_rows[1], a.hidden);
            select_rows(a, r);
          }};
}

}  // namespace STERNA_ISA
}  // namespace sterna
