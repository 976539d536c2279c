// Python bindings. Tensors come as addresses: the extension does not link PyTorch, so it builds
// with any compiler and works with any PyTorch; `kernels/cpu_backend.py` checks the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <charconv>
#include <stdexcept>

#include "dispatch.h"
#include "int8_table.h"
#include "tape.h"
#include "weights.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sterna;

void bind_suffix_tree(nb::module_& m);  // suffix_bind.cpp

namespace {

template <class T>
T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A thread pool with one instruction set: what runs calls and tapes.
class Kernels {
 public:
  Kernels(int threads, const std::string& isa) : pool_(threads) {
    for (const KernelTable* table : runnable_tables())
      if (isa.empty() || isa == table->name) {
        table_ = table;
        return;
      }
    throw std::invalid_argument("this processor cannot run " + isa);
  }
  std::string isa() const { return table_->name; }
  int threads() const { return pool_.size(); }

  // Records the call when a tape is given, runs it otherwise.
  void submit(Tape* tape, const Args& args, int tokens, int rows, int seqs) {
    if (tape) return tape->add(args);
    nb::gil_scoped_release release;
    Tape one;
    one.add(args);
    one.run(pool_, *table_, Step{{tokens, rows}, seqs});
  }
  void replay(Tape& tape, int tokens, int rows, int seqs) {
    nb::gil_scoped_release release;
    tape.run(pool_, *table_, Step{{tokens, rows}, seqs});
  }
  std::vector<double> profile(Tape& tape, int tokens, int rows, int seqs) {
    nb::gil_scoped_release release;
    std::vector<double> seconds;
    tape.run(pool_, *table_, Step{{tokens, rows}, seqs}, &seconds);
    return seconds;
  }
  // Runs do(unit) for every unit, on all threads, without Python's lock.
  template <class F>
  void each(int num_units, F run_unit) {
    nb::gil_scoped_release release;
    Job job;
    job.num_stages = 1;
    job.units = [&](int) { return num_units; };
    job.run = [&](int, int unit, const Worker&) { run_unit(unit); };
    pool_.run(job);
  }

 private:
  Pool pool_;
  const KernelTable* table_ = nullptr;
};

#define ROWS "tokens"_a, "rows"_a, "seqs"_a
using Addr = uintptr_t;

void bind_row_ops(nb::class_<Kernels>& k) {
  k.def("embed", [](Kernels& self, Tape* tape, int t, int r, int s, Addr tokens, Addr table,
                    Addr out, int kind, int dtype, int packed, int hidden, int vocab, float scale) {
    self.submit(tape, EmbedArgs{ptr<int32_t>(tokens), ptr<void>(table), ptr<void>(out), kind,
                                dtype, packed, hidden, vocab, scale}, t, r, s);
  }, "tape"_a.none(), ROWS, "token_ids"_a, "table"_a, "out"_a, "rows_kind"_a, "dtype"_a,
     "packed"_a, "hidden"_a, "vocab"_a, "scale"_a);
  k.def("norm", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr weight, Addr bias,
                   Addr out, int kind, int dtype, int hidden, int unit_offset, int layer,
                   float eps) {
    self.submit(tape, NormArgs{ptr<void>(x), ptr<void>(weight), ptr<void>(bias), ptr<void>(out),
                               kind, dtype, hidden, unit_offset, layer, eps}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "weight"_a, "bias"_a, "out"_a, "rows_kind"_a, "dtype"_a,
     "hidden"_a, "unit_offset"_a, "is_layer_norm"_a, "eps"_a);
  k.def("activate", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr y, Addr out,
                       int kind, int dtype, int hidden, int act) {
    self.submit(tape, ActivateArgs{ptr<void>(x), ptr<void>(y), ptr<void>(out), kind, dtype,
                                   hidden, act}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "y"_a, "out"_a, "rows_kind"_a, "dtype"_a, "hidden"_a, "act"_a);
  k.def("select", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr rows, Addr out,
                     int dtype, int hidden) {
    self.submit(tape, SelectArgs{ptr<void>(x), ptr<int32_t>(rows), ptr<void>(out), dtype, hidden},
                t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "row_ids"_a, "out"_a, "dtype"_a, "hidden"_a);
}

void bind_matrix_ops(nb::class_<Kernels>& k) {
  k.def("linear", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr weight,
                     Addr bias, Addr residual, Addr out, int kind, int dtype, int packed, int in,
                     int out_features, int gate, int act, int out_f32, float softcap,
                     float scale, Addr pre) {
    self.submit(tape, LinearArgs{ptr<void>(x), ptr<void>(weight), ptr<void>(bias),
                                 ptr<void>(residual), ptr<void>(out), kind, dtype, packed, in,
                                 out_features, gate, act, out_f32, softcap, scale,
                                 ptr<void>(pre)}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "weight"_a, "bias"_a, "residual"_a, "out"_a, "rows_kind"_a,
     "dtype"_a, "packed"_a, "in_features"_a, "out_features"_a, "gate"_a, "act"_a, "out_f32"_a,
     "softcap"_a, "scale"_a, "pre"_a);
  k.def("gated_grad", [](Kernels& self, Addr grad, Addr pre, Addr d_pre, int rows, int dtype,
                         int width, int gate) {
    GatedGradArgs args{ptr<void>(grad), ptr<void>(pre), ptr<void>(d_pre), dtype, width, gate};
    self.submit(nullptr, args, 0, rows, 0);
  }, "grad"_a, "pre"_a, "d_pre"_a, "rows"_a, "dtype"_a, "width"_a, "gate"_a);
  k.def("pack", [](Kernels& self, Addr weight, Addr out, int rows, int cols, int elem_bytes) {
    self.submit(nullptr, PackArgs{ptr<void>(weight), ptr<void>(out), rows, cols, elem_bytes}, 0, 0,
                0);
  }, "weight"_a, "out"_a, "rows"_a, "cols"_a, "elem_bytes"_a);
}

std::vector<LoraPart> lora_parts(const std::vector<Addr>& a, const std::vector<Addr>& b,
                                 const std::vector<Addr>& scales, const std::vector<Addr>& ranks,
                                 const std::vector<int64_t>& strides,
                                 const std::vector<int>& starts) {
  std::vector<LoraPart> parts;
  for (size_t i = 0; i < a.size(); ++i)
    parts.push_back({ptr<float>(a[i]), ptr<float>(b[i]), ptr<float>(scales[i]), ptr<int32_t>(ranks[i]),
                     strides[2 * i], strides[2 * i + 1], starts[i], starts[i + 1] - starts[i]});
  return parts;
}
#define PARTS "a"_a, "b"_a, "scales"_a, "ranks"_a, "strides"_a, "starts"_a

void bind_lora_ops(nb::class_<Kernels>& k) {
  using Addrs = std::vector<Addr>;
  k.def("lora_down", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr slots,
                        Addr inner, const Addrs& a, const Addrs& b, const Addrs& scales,
                        const Addrs& ranks, const std::vector<int64_t>& strides, const std::vector<int>& starts,
                        int kind, int dtype, int in, int max_rank) {
    self.submit(tape, LoraDownArgs{ptr<void>(x), ptr<int32_t>(slots), ptr<float>(inner),
                                   lora_parts(a, b, scales, ranks, strides, starts),
                                   kind, dtype, in, max_rank}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "slots"_a, "inner"_a, PARTS, "rows_kind"_a, "dtype"_a,
     "in_features"_a, "max_rank"_a);
  k.def("lora_up", [](Kernels& self, Tape* tape, int t, int r, int s, Addr inner, Addr slots,
                      Addr product, Addr y, const Addrs& a, const Addrs& b, const Addrs& scales,
                      const Addrs& ranks, const std::vector<int64_t>& strides,
                      const std::vector<int>& starts, int kind, int dtype, int out, int max_rank,
                      int gate, int half, int stride) {
    self.submit(tape, LoraUpArgs{ptr<float>(inner), ptr<int32_t>(slots), ptr<float>(product),
                                 ptr<void>(y), lora_parts(a, b, scales, ranks, strides, starts), kind, dtype, out,
                                 max_rank, gate, half, stride}, t, r, s);
  }, "tape"_a.none(), ROWS, "inner"_a, "slots"_a, "product"_a, "y"_a, PARTS,
     "rows_kind"_a, "dtype"_a, "out_features"_a, "max_rank"_a, "gate"_a, "half"_a, "stride"_a);
}

QuantWeight quant_weight(Addr tiles, Addr scales, Addr table, Addr row_formats, int bits, int group,
                         int scale_kind, int in) {
  return {ptr<uint8_t>(tiles), ptr<void>(scales), ptr<float>(table), ptr<uint8_t>(row_formats),
          bits, group, scale_kind, in};
}
#define WEIGHT "tiles"_a, "scales"_a, "table"_a, "row_formats"_a, "bits"_a, "group"_a, \
               "scale_kind"_a, "in_features"_a

void bind_quant_ops(nb::class_<Kernels>& k) {
  k.def("quant_linear", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr tiles,
                           Addr scales, Addr table, Addr row_formats, int bits, int group,
                           int scale_kind, int in, Addr bias, Addr residual, Addr out, int kind,
                           int dtype, int out_features, int gate, int act, int out_f32, float softcap,
                           float scale, float int8_unit) {
    self.submit(tape, QuantLinearArgs{ptr<void>(x), quant_weight(tiles, scales, table, row_formats,
                                      bits, group, scale_kind, in), ptr<void>(bias),
                                      ptr<void>(residual), ptr<void>(out), kind, dtype,
                                      out_features, gate, act, out_f32, softcap, scale, int8_unit},
                t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, WEIGHT, "bias"_a, "residual"_a, "out"_a, "rows_kind"_a,
     "dtype"_a, "out_features"_a, "gate"_a, "act"_a, "out_f32"_a, "softcap"_a, "scale"_a,
     "int8_unit"_a);
  k.def("quant_embed", [](Kernels& self, Tape* tape, int t, int r, int s, Addr tokens, Addr tiles,
                          Addr scales, Addr table, Addr row_formats, int bits, int group,
                          int scale_kind, int in, Addr out, int kind, int dtype, float scale) {
    self.submit(tape, QuantEmbedArgs{ptr<int32_t>(tokens), quant_weight(tiles, scales, table,
                                     row_formats, bits, group, scale_kind, in), ptr<void>(out),
                                     kind, dtype, scale}, t, r, s);
  }, "tape"_a.none(), ROWS, "token_ids"_a, WEIGHT, "out"_a, "rows_kind"_a, "dtype"_a, "scale"_a);
  k.def("quant_rows", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr out,
                         int kind, int dtype, int in) {
    self.submit(tape, QuantRowsArgs{ptr<void>(x), ptr<uint8_t>(out), kind, dtype, in}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "out"_a, "rows_kind"_a, "dtype"_a, "in_features"_a);
}

void bind_draft_ops(nb::class_<Kernels>& k) {
  k.def("draft_cell", [](Kernels& self, Tape* tape, int t, int r, int s, Addr z, Addr cell,
                         Addr norm, Addr norm_bias, Addr cell_norm, Addr cell_norm_bias, Addr state,
                         Addr cell_out, int kind, int dtype, int hidden, float eps) {
    self.submit(tape, DraftCellArgs{ptr<void>(z), ptr<void>(cell), ptr<void>(norm),
                                    ptr<void>(norm_bias), ptr<void>(cell_norm),
                                    ptr<void>(cell_norm_bias), ptr<void>(state),
                                    ptr<void>(cell_out), kind, dtype, hidden, eps}, t, r, s);
  }, "tape"_a.none(), ROWS, "z"_a, "cell"_a, "norm"_a, "norm_bias"_a, "cell_norm"_a,
     "cell_norm_bias"_a, "state"_a, "cell_out"_a, "rows_kind"_a, "dtype"_a, "hidden"_a, "eps"_a);
  k.def("pick", [](Kernels& self, Tape* tape, int t, int r, int s, Addr logits, Addr ids,
                   Addr tokens_out, Addr probs, int kind, int vocab) {
    self.submit(tape, PickArgs{ptr<float>(logits), ptr<int32_t>(ids), ptr<int32_t>(tokens_out),
                               ptr<float>(probs), kind, vocab}, t, r, s);
  }, "tape"_a.none(), ROWS, "logits"_a, "ids"_a, "tokens_out"_a, "probs"_a, "rows_kind"_a,
     "vocab"_a);
}

void bind_attention_ops(nb::class_<Kernels>& k) {
  k.def("rope", [](Kernels& self, Tape* tape, int t, int r, int s, Addr qkv, Addr positions,
                   Addr row_ids, Addr table, Addr q_norm, Addr k_norm, Addr out, Addr cache,
                   Addr slots, int kind, int dtype, int heads, int kv_heads, int head_dim,
                   int rotary_dim, int unit_offset, int block_size, int format, float eps) {
    int64_t stride = int64_t(heads + 2 * kv_heads) * head_dim;
    self.submit(tape, RopeArgs{ptr<void>(qkv), ptr<int32_t>(positions), ptr<int32_t>(row_ids),
                               ptr<float>(table), ptr<void>(q_norm), ptr<void>(k_norm),
                               ptr<void>(out), ptr<void>(cache), ptr<int64_t>(slots), kind, dtype,
                               heads, kv_heads, head_dim, rotary_dim, unit_offset, block_size,
                               format, stride, eps}, t, r, s);
  }, "tape"_a.none(), ROWS, "qkv"_a, "positions"_a, "row_ids"_a, "table"_a, "q_norm"_a, "k_norm"_a,
     "out"_a, "cache"_a, "slots"_a, "rows_kind"_a, "dtype"_a, "num_heads"_a, "num_kv_heads"_a,
     "head_dim"_a, "rotary_dim"_a, "unit_offset"_a, "block_size"_a, "cache_format"_a, "eps"_a);
  k.def("store", [](Kernels& self, Tape* tape, int t, int r, int s, Addr kv, Addr positions,
                    Addr slots, const std::vector<Addr>& tables, const std::vector<int>& rotary,
                    const std::vector<Addr>& k_norms, const std::vector<Addr>& caches, int kind,
                    int dtype, int kv_heads, int head_dim, int unit_offset, int block_size,
                    int format, float eps) {
    int64_t stride = int64_t(caches.size()) * 2 * kv_heads * head_dim;
    StoreArgs args{RopeArgs{ptr<void>(kv), ptr<int32_t>(positions), nullptr, nullptr, nullptr,
                            nullptr, nullptr, nullptr, ptr<int64_t>(slots), kind, dtype, 0,
                            kv_heads, head_dim, 0, unit_offset, block_size, format, stride, eps},
                   {}};
    for (size_t i = 0; i < caches.size(); ++i)
      args.layers.push_back({ptr<float>(tables.at(i)), ptr<void>(k_norms.at(i)),
                             ptr<void>(caches[i]), rotary.at(i)});
    self.submit(tape, args, t, r, s);
  }, "tape"_a.none(), ROWS, "kv"_a, "positions"_a, "slots"_a, "tables"_a, "rotary_dims"_a,
     "k_norms"_a, "caches"_a, "rows_kind"_a, "dtype"_a, "num_kv_heads"_a, "head_dim"_a,
     "unit_offset"_a, "block_size"_a, "cache_format"_a, "eps"_a);
  k.def("attention", [](Kernels& self, Tape* tape, int t, int r, int s, Addr q, Addr cache,
                        Addr tables, Addr starts, Addr lens, Addr out, int kind, int dtype, int heads,
                        int kv_heads, int head_dim, int block_size, int width, int q_stride,
                        int window, int format, float scale, float softcap) {
    self.submit(tape, AttentionArgs{ptr<void>(q), ptr<void>(cache), ptr<int32_t>(tables),
                                    ptr<int32_t>(starts), ptr<int32_t>(lens), ptr<void>(out),
                                    kind, dtype, heads, kv_heads, head_dim, block_size, width,
                                    q_stride, window, format, scale, softcap}, t, r, s);
  }, "tape"_a.none(), ROWS, "q"_a, "cache"_a, "block_tables"_a, "query_starts"_a,
     "context_lens"_a, "out"_a, "rows_kind"_a, "dtype"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
     "block_size"_a, "table_width"_a, "q_stride"_a, "window"_a, "cache_format"_a,
     "scale"_a, "softcap"_a);
  k.def("attention_grad", [](Kernels& self, Addr qkv, Addr grad, Addr starts, Addr d_qkv,
                             Addr partial, int dtype, int heads, int kv_heads, int head_dim,
                             int parts, int window, int64_t tokens, int seqs, float scale,
                             float softcap) {
    AttentionGradArgs args{ptr<void>(qkv), ptr<void>(grad), ptr<int32_t>(starts),
                           ptr<void>(d_qkv), ptr<float>(partial), dtype, heads, kv_heads,
                           head_dim, parts, window, tokens, scale, softcap};
    self.submit(nullptr, args, 0, 0, seqs);
  }, "qkv"_a, "grad"_a, "query_starts"_a, "d_qkv"_a, "partial"_a, "dtype"_a, "num_heads"_a,
     "num_kv_heads"_a, "head_dim"_a, "parts"_a, "window"_a, "num_tokens"_a, "seqs"_a, "scale"_a,
     "softcap"_a);
}

// Rows of floats as JSON lists, one a line: the shortest digits that read back as the same float.
nb::bytes json_rows(Addr values, int64_t rows, int64_t cols) {
  std::string text;
  {
    nb::gil_scoped_release release;
    const float* x = ptr<float>(values);
    text.reserve(size_t(rows) * size_t(cols) * 14);
    char digits[32];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c, ++x) {
        text += c ? ',' : '[';
        text.append(digits, std::to_chars(digits, digits + sizeof(digits), *x).ptr);
      }
      text += "]\n";
    }
  }
  return nb::bytes(text.data(), text.size());
}

void bind_encoder_ops(nb::class_<Kernels>& k) {
  k.def("embed_norm", [](Kernels& self, Tape* tape, int t, int r, int s, Addr tokens, Addr table,
                         Addr positions, Addr position_table, Addr weight, Addr bias, Addr out,
                         int dtype, int hidden, int num_positions, float eps) {
    self.submit(tape, EmbedNormArgs{ptr<int32_t>(tokens), ptr<void>(table), ptr<int32_t>(positions),
                                    ptr<float>(position_table), ptr<void>(weight), ptr<void>(bias),
                                    ptr<void>(out), dtype, hidden, num_positions, eps}, t, r, s);
  }, "tape"_a.none(), ROWS, "token_ids"_a, "table"_a, "positions"_a, "position_table"_a, "weight"_a,
     "bias"_a, "out"_a, "dtype"_a, "hidden"_a, "num_positions"_a, "eps"_a);
  k.def("bidirectional", [](Kernels& self, Tape* tape, int t, int r, int s, Addr qkv, Addr starts,
                            Addr out, int dtype, int heads, int kv_heads, int head_dim, int window,
                            float scale) {
    self.submit(tape, BidirectionalArgs{ptr<void>(qkv), ptr<int32_t>(starts), ptr<void>(out), dtype,
                                        heads, kv_heads, head_dim, window, scale}, t, r, s);
  }, "tape"_a.none(), ROWS, "qkv"_a, "query_starts"_a, "out"_a, "dtype"_a, "num_heads"_a,
     "num_kv_heads"_a, "head_dim"_a, "window"_a, "scale"_a);
  k.def("pool", [](Kernels& self, Tape* tape, int t, int r, int s, Addr x, Addr starts, Addr out,
                   int dtype, int hidden, int kind, int normalize) {
    self.submit(tape, PoolArgs{ptr<void>(x), ptr<int32_t>(starts), ptr<float>(out), dtype, hidden,
                               kind, normalize}, t, r, s);
  }, "tape"_a.none(), ROWS, "x"_a, "query_starts"_a, "out"_a, "dtype"_a, "hidden"_a, "kind"_a,
     "normalize"_a);
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // the thread pool lives until the process ends
  m.attr("PANEL") = PANEL;
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : runnable_tables()) names.push_back(table->name);
    return names;
  });
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("__len__", &Tape::size)
      .def("name", [](const Tape& tape, size_t i) { return std::string(tape.name(i)); });
  nb::class_<Kernels> k(m, "Kernels");
  k.def(nb::init<int, const std::string&>(), "threads"_a, "isa"_a = "");
  k.def_prop_ro("isa", &Kernels::isa);
  k.def_prop_ro("threads", &Kernels::threads);
  k.def("replay", &Kernels::replay, "tape"_a, ROWS);
  k.def("profile", &Kernels::profile, "tape"_a, ROWS);
  m.attr("MAX_DRAW_VOCAB") = MAX_DRAW_VOCAB;
  m.def("json_rows", &json_rows, "values"_a, "rows"_a, "cols"_a);
  m.def("attention_grad_width", &attention_grad_width, "head_dim"_a);
  m.def("int8_row_bytes", &int8_row_bytes, "in_features"_a);
  m.def("int8_unit", [](Addr table, int count) { return int8_unit(ptr<float>(table), count); },
        "table"_a, "count"_a);
  k.def("draw", [](Kernels& self, Addr logits, Addr row_ids, Addr temperature, Addr top_k,
                   Addr top_p, Addr min_p, Addr uniform, Addr ids, Addr logprobs, Addr ranks,
                   int count, int vocab) {
    DrawArgs args{ptr<float>(logits), ptr<int32_t>(row_ids), ptr<float>(temperature),
                  ptr<float>(top_p), ptr<float>(min_p), ptr<int32_t>(top_k),
                  ptr<double>(uniform), ptr<int32_t>(ids), ptr<double>(logprobs),
                  ptr<int32_t>(ranks), vocab};
    self.submit(nullptr, args, 0, count, 0);
  }, "logits"_a, "row_ids"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a,
     "ids"_a, "logprobs"_a, "ranks"_a, "count"_a, "vocab"_a);
  k.def("score", [](Kernels& self, Addr logits, Addr row_ids, Addr chosen, Addr temperature,
                    Addr top_k, Addr top_p, Addr min_p, Addr logprobs, Addr entropies, Addr log_sums,
                    Addr probs, int count, int vocab) {
    ScoreArgs args{ptr<float>(logits), ptr<int32_t>(row_ids), ptr<int32_t>(chosen),
                   ptr<float>(temperature), ptr<float>(top_p), ptr<float>(min_p),
                   ptr<int32_t>(top_k), ptr<double>(logprobs), ptr<double>(entropies),
                   ptr<double>(log_sums), ptr<float>(probs), vocab};
    self.submit(nullptr, args, 0, count, 0);
  }, "logits"_a, "row_ids"_a, "chosen"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
     "logprobs"_a, "entropies"_a, "log_sums"_a, "probs"_a, "count"_a, "vocab"_a);
  k.def("score_grad", [](Kernels& self, Addr logits, Addr chosen, Addr temperature, Addr top_k,
                         Addr top_p, Addr min_p, Addr d_logprobs, Addr d_entropies, Addr out,
                         int count, int vocab, int dtype) {
    ScoreGradArgs args{ptr<float>(logits), ptr<int32_t>(chosen), ptr<float>(temperature),
                       ptr<float>(top_p), ptr<float>(min_p), ptr<int32_t>(top_k),
                       ptr<float>(d_logprobs), ptr<float>(d_entropies), ptr<void>(out), vocab,
                       dtype};
    self.submit(nullptr, args, 0, count, 0);
  }, "logits"_a, "chosen"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "d_logprobs"_a,
     "d_entropies"_a, "out"_a, "count"_a, "vocab"_a, "dtype"_a);
  k.def("dequantize", [](Kernels& self, Addr blocks, Addr out, int64_t num_blocks, int type,
                         int is_bf16) {
    DequantArgs args{ptr<uint8_t>(blocks), ptr<void>(out), num_blocks, BlockType(type), is_bf16};
    self.each(int((num_blocks + DEQUANT_UNIT - 1) / DEQUANT_UNIT),
              [&](int unit) { dequantize_unit(args, unit); });
  }, "blocks"_a, "out"_a, "num_blocks"_a, "type"_a, "is_bf16"_a);
  bind_suffix_tree(m);
  bind_row_ops(k);
  bind_matrix_ops(k);
  bind_quant_ops(k);
  bind_attention_ops(k);
  bind_encoder_ops(k);
  bind_draft_ops(k);
  bind_lora_ops(k);
}
