// The suffix tree in Python; see engine/drafters/suffix_reference.py for the same in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "suffix_tree.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sterna;

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_suffix_tree(nb::module_& m) {
  nb::class_<SuffixTree>(m, "SuffixTree")
      .def(nb::init<int, double>(), "max_depth"_a, "escape"_a)
      .def("add_root", &SuffixTree::add_root)
      .def("drop_root", &SuffixTree::drop_root, "root"_a)
      .def("add", &SuffixTree::add, "root"_a)
      .def("extend", [](SuffixTree& self, uint32_t seq, const Tokens& tokens) {
        nb::gil_scoped_release release;
        self.extend(seq, tokens.data(), tokens.shape(0));
      }, "seq"_a, "tokens"_a)
      .def("extend", [](SuffixTree& self, uint32_t seq, const std::vector<int32_t>& tokens) {
        self.extend(seq, tokens.data(), tokens.size());
      }, "seq"_a, "tokens"_a)
      .def("remove", &SuffixTree::remove, "seq"_a)
      .def("tokens", &SuffixTree::tokens, "seq"_a)
      .def("draft", [](const SuffixTree& self, uint32_t root, const std::vector<int32_t>& context,
                       int max_tokens, double min_prob) {
        Draft d = self.draft(root, context, DraftArgs{max_tokens, min_prob, false});
        return nb::make_tuple(d.tokens, d.probs, d.score, d.match_len);
      }, "root"_a, "context"_a, "max_tokens"_a, "min_prob"_a)
      .def("draft_tree", [](const SuffixTree& self, uint32_t root,
                            const std::vector<int32_t>& context, int max_tokens, double min_prob) {
        Draft d = self.draft(root, context, DraftArgs{max_tokens, min_prob, true});
        return nb::make_tuple(d.tokens, d.parents, d.probs, d.score, d.match_len);
      }, "root"_a, "context"_a, "max_tokens"_a, "min_prob"_a)
      .def_prop_ro("num_nodes", &SuffixTree::num_nodes)
      .def_prop_ro("num_tokens", &SuffixTree::num_tokens)
      .def_prop_ro("num_bytes", &SuffixTree::bytes)
      .def("check", &SuffixTree::check);
}
