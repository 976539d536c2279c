// Is the suffix tree what suffix_tree.h says? Everything is counted again from the sequences.
#include "suffix_tree.h"

namespace sterna {

std::string SuffixTree::check() const {
  std::vector<uint32_t> counts(nodes_.end(), 0);
  size_t num_seen = 0, num_ends = 0, num_listed = 0, num_tokens = 0;
  for (uint32_t seq = 0; seq < seqs_.end(); seq++) {
    if (!seqs_[seq].is_live) continue;
    num_tokens += seqs_[seq].tokens.size();
    if (auto fault = check_seq(seq, counts, num_ends); !fault.empty()) return fault;
  }
  if (num_tokens != num_tokens_) return "the number of tokens is wrong";
  size_t num_roots = 0;
  for (uint32_t v = 0; v < nodes_.end(); v++) {
    if (!nodes_[v].is_live) continue;
    num_roots += nodes_[v].is_root;
    uint32_t seq = nodes_[v].end_seq, start = nodes_[v].end_start;
    for (; seq != NONE; num_listed++) {
      const End& end = seqs_[seq].ends[start];
      if (end.node != v) return "node " + std::to_string(v) + " lists a foreign end";
      seq = end.next_seq;
      start = end.next;
    }
    if (auto fault = check_node(v, counts, num_seen); !fault.empty()) return fault;
  }
  if (num_seen + num_roots != nodes_.live()) return "nodes are lost";
  if (num_seen != children_.size()) return "the map has other children than the nodes";
  if (num_listed != num_ends) return "ends are lost";
  return "";
}

// Every suffix lies where its end says; counts the edges that it enters.
std::string SuffixTree::check_seq(uint32_t seq, std::vector<uint32_t>& counts,
                                  size_t& num_ends) const {
  const Seq& s = seqs_[seq];
  const std::string name = "sequence " + std::to_string(seq);
  uint32_t size = uint32_t(s.tokens.size());
  uint32_t oldest = size + 1 > max_depth_ ? size + 1 - max_depth_ : 0;
  for (uint32_t start = 0; start < size; start++, num_ends++) {
    Place place{s.root, 0};
    for (uint32_t i = 0, len = suffix_len(seq, start); i < len; i++) {
      uint32_t from = place.node;
      if (!step(place, s.tokens[start + i])) return name + " is not in the tree";
      if (place.node != from) counts[place.node]++;
    }
    const Node& v = nodes_[place.node];
    if (s.ends[start].node != place.node) return name + " has an end elsewhere";
    if (start >= oldest && start < s.frontier && !(is_leaf(v) && is_ref(v, seq, start)))
      return name + " passes over a suffix that does not grow by itself";
  }
  return "";
}

std::string SuffixTree::check_node(uint32_t at, std::vector<uint32_t>& counts,
                                   size_t& num_seen) const {
  const Node& v = nodes_[at];
  const std::string name = "node " + std::to_string(at);
  if (!v.is_root) {
    num_seen++;
    if (v.count != counts[at] || v.count == 0) return name + " has a wrong count";
    if (children_.find(v.parent, v.token) != at) return name + " is not found by its token";
    if (!nodes_[v.parent].is_live || nodes_[v.parent].depth != v.top) return name + " hangs wrong";
    if (v.ref_seq >= seqs_.end() || !seqs_[v.ref_seq].is_live) return name + " refers to nothing";
    if (bottom(v) <= v.top || suffix_len(v.ref_seq, v.ref_start) < bottom(v))
      return name + " has a wrong length";
    if (label(v, v.top) != v.token) return name + " has a wrong first token";
    if (v.first != NONE && next_of(v.first) == NONE) return name + " has a single child";
  }
  if (v.first == NONE) return v.sum == 0 ? "" : name + " counts children that it has not";
  return check_children(at);
}

std::string SuffixTree::check_children(uint32_t at) const {
  const Node& v = nodes_[at];
  const std::string name = "node " + std::to_string(at);
  uint32_t sum = 0;
  for (uint32_t c = v.first; c != NONE; c = next_of(c)) {
    const Node& child = nodes_[c];
    if (!child.is_live || child.parent != at) return name + " has a foreign child";
    if (nodes_[child.next].prev != c) return name + " has a broken ring";
    sum += child.count;
    uint32_t before = prev_of(c), after = next_of(c);
    bool leads = before == NONE || nodes_[before].count != child.count;
    bool trails = after == NONE || nodes_[after].count != child.count;
    if (before != NONE && nodes_[before].count < child.count) return name + " is out of order";
    if (!leads && nodes_[before].group != child.group) return name + " has a torn group";
    const Group& group = groups_[child.group];
    if (leads != (group.head == c) || trails != (group.tail == c))
      return name + " has a group with wrong ends";
  }
  return sum == v.sum ? "" : name + " has a wrong sum";
}

}  // namespace sterna
