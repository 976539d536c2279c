// Growth and removal of the suffix tree; see suffix_tree.h for what it holds.
#include "suffix_tree.h"

#include <algorithm>
#include <stdexcept>

namespace sterna {

SuffixTree::SuffixTree(int max_depth, double escape)
    : max_depth_(uint32_t(max_depth)), escape_(escape) {
  if (max_depth < 2 || max_depth > 1024)
    throw std::invalid_argument("max_depth is " + std::to_string(max_depth) +
                                "; allowed is 2 to 1024");
}

uint32_t SuffixTree::add_root() {
  uint32_t root = nodes_.make();
  nodes_[root].is_live = nodes_[root].is_root = true;
  return root;
}

void SuffixTree::drop_root(uint32_t root) {
  if (root_at(root).first != NONE) throw std::invalid_argument("a root with sequences stays");
  nodes_[root].is_live = false;
  nodes_.drop(root);
}

const SuffixTree::Node& SuffixTree::root_at(uint32_t root) const {
  if (root >= nodes_.end() || !nodes_[root].is_live || !nodes_[root].is_root)
    throw std::invalid_argument("there is no root " + std::to_string(root));
  return nodes_[root];
}

const SuffixTree::Seq& SuffixTree::at(uint32_t seq) const {
  if (seq >= seqs_.end() || !seqs_[seq].is_live)
    throw std::invalid_argument("there is no sequence " + std::to_string(seq));
  return seqs_[seq];
}

uint32_t SuffixTree::add(uint32_t root) {
  root_at(root);
  uint32_t seq = seqs_.make();
  seqs_[seq].root = root;
  seqs_[seq].is_live = true;
  return seq;
}

void SuffixTree::extend(uint32_t seq, const int32_t* tokens, size_t count) {
  Seq& s = at(seq);
  size_t before = s.tokens.capacity() * 4 + s.ends.capacity() * sizeof(End);
  if (count > 64) {
    s.tokens.reserve(s.tokens.size() + count);
    s.ends.reserve(s.ends.size() + count);
  }
  for (size_t i = 0; i < count; i++) push(seq, tokens[i]);
  num_tokens_ += count;
  seq_bytes_ += s.tokens.capacity() * 4 + s.ends.capacity() * sizeof(End) - before;
}

uint32_t SuffixTree::suffix_len(uint32_t seq, uint32_t start) const {
  return std::min(max_depth_, uint32_t(seqs_[seq].tokens.size()) - start);
}

// Appends one token. Suffixes are taken by rising start, so by falling length: while `start` moves,
// those after it still have their old length and those before it their new one.
void SuffixTree::push(uint32_t seq, int32_t token) {
  Seq& s = seqs_[seq];
  const uint32_t old_len = uint32_t(s.tokens.size());
  s.tokens.push_back(token);
  s.ends.emplace_back();
  uint32_t oldest = old_len + 1 > max_depth_ ? old_len + 1 - max_depth_ : 0;  // below max_depth
  uint32_t start = std::max(s.frontier, oldest);
  s.frontier = start;
  for (; start <= old_len; start++) advance(seq, start, token, old_len - start);
  while (s.frontier <= old_len) {
    const Node& v = nodes_[s.ends[s.frontier].node];
    if (!is_leaf(v) || !is_ref(v, seq, s.frontier)) break;
    s.frontier++;
  }
}

// Moves the end of a suffix, now of `len` tokens, on by `token`.
void SuffixTree::advance(uint32_t seq, uint32_t start, int32_t token, uint32_t len) {
  Seq& s = seqs_[seq];
  uint32_t at = len == 0 ? s.root : s.ends[start].node;
  Node& v = nodes_[at];
  if (is_leaf(v) && is_ref(v, seq, start)) return;  // the leaf has grown with it
  uint32_t end = bottom(v);
  if (len < end) {
    if (label(v, len) == token) return;
    unlink_end(seq, start);
    uint32_t top = split(at, len);
    nodes_[at].count--;  // it was counted as passing
    nodes_[top].sum = nodes_[at].count;
    link_end(add_leaf(top, seq, start, token, len), seq, start);
    return;
  }
  if (is_leaf(v)) return take_over(v, seq, start);
  uint32_t child = children_.find(at, token);
  if (len > 0) unlink_end(seq, start);
  if (child == NONE) {
    child = add_leaf(at, seq, start, token, len);
  } else {
    count_up(child);
    v.sum++;
  }
  link_end(child, seq, start);
}

// The suffix grows beyond a leaf's end: its text is the label from now on.
void SuffixTree::take_over(Node& leaf, uint32_t seq, uint32_t start) {
  Seq& former = seqs_[leaf.ref_seq];
  former.frontier = std::min(former.frontier, leaf.ref_start);
  leaf.ref_seq = seq;
  leaf.ref_start = start;
}

// Cuts the edge of v after `len` tokens of the path; returns the new upper node, whose only child
// is v. The caller adds another.
uint32_t SuffixTree::split(uint32_t lower, uint32_t len) {
  uint32_t upper = nodes_.make();
  Node &v = nodes_[lower], &w = nodes_[upper];
  w = Node(v);
  w.depth = uint16_t(len);
  w.first = NONE;
  w.end_seq = NONE;
  replace(lower, upper);
  children_.set(w.parent, w.token, upper);
  v.parent = upper;
  v.top = uint16_t(len);
  v.token = label(v, len);
  children_.set(upper, v.token, lower);
  uint32_t seq = v.end_seq, start = v.end_start;
  while (seq != NONE) {
    const End end = seqs_[seq].ends[start];
    if (suffix_len(seq, start) <= len) {
      unlink_end(seq, start);
      link_end(upper, seq, start);
      v.count--;
    }
    seq = end.next_seq;
    start = end.next;
  }
  link_before(lower, upper, NONE);
  lead_group(lower, NONE);
  return upper;
}

uint32_t SuffixTree::add_leaf(uint32_t parent, uint32_t seq, uint32_t start, int32_t token,
                              uint32_t top) {
  uint32_t leaf = nodes_.make();
  Node& v = nodes_[leaf];
  v.is_live = true;
  v.parent = parent;
  v.token = token;
  v.top = uint16_t(top);
  v.count = 1;
  v.ref_seq = seq;
  v.ref_start = start;
  nodes_[parent].sum++;
  children_.set(parent, token, leaf);
  insert_new(leaf, parent);
  return leaf;
}

void SuffixTree::remove(uint32_t seq) {
  Seq& s = at(seq);
  for (uint32_t start = 0; start < s.tokens.size(); start++) forget(seq, start);
  num_tokens_ -= s.tokens.size();
  seq_bytes_ -= s.tokens.capacity() * 4 + s.ends.capacity() * sizeof(End);
  s = Seq();
  seqs_.drop(seq);
}

// Takes one suffix out: from where it ends up to the root.
void SuffixTree::forget(uint32_t seq, uint32_t start) {
  uint32_t at = seqs_[seq].ends[start].node;
  unlink_end(seq, start);
  while (!nodes_[at].is_root) {
    Node& v = nodes_[at];
    uint32_t parent = v.parent;
    nodes_[parent].sum--;
    if (v.count == 1) {
      children_.erase(parent, v.token);
      leave_group(at);
      unlink(at);
      v.is_live = false;
      nodes_.drop(at);
    } else {
      count_down(at);
      if (is_ref(v, seq, start)) renew_ref(v);
      if (v.first != NONE && next_of(v.first) == NONE) merge(at);
    }
    at = parent;
  }
}

// Any other suffix through v; of a leaf the longest one, for it holds the label.
void SuffixTree::renew_ref(Node& v) {
  if (v.first != NONE) {
    v.ref_seq = nodes_[v.first].ref_seq;
    v.ref_start = nodes_[v.first].ref_start;
    return;
  }
  uint32_t longest = 0;
  for (uint32_t seq = v.end_seq, start = v.end_start; seq != NONE && longest < max_depth_;) {
    uint32_t len = suffix_len(seq, start);
    if (len > longest) {
      longest = len;
      v.ref_seq = seq;
      v.ref_start = start;
    }
    const End& end = seqs_[seq].ends[start];
    seq = end.next_seq;
    start = end.next;
  }
}

// Joins v with its only child, which stays: a leaf keeps its number, and who is its ref.
void SuffixTree::merge(uint32_t at) {
  Node& v = nodes_[at];
  uint32_t child = v.first;
  Node& c = nodes_[child];
  children_.erase(at, c.token);
  leave_group(child);
  c.parent = v.parent;
  c.token = v.token;
  c.top = v.top;
  c.count = v.count;
  replace(at, child);
  children_.set(c.parent, c.token, child);
  while (v.end_seq != NONE) {
    uint32_t seq = v.end_seq, start = v.end_start;
    unlink_end(seq, start);
    link_end(child, seq, start);
  }
  v.is_live = false;
  nodes_.drop(at);
}

void SuffixTree::link_end(uint32_t node, uint32_t seq, uint32_t start) {
  Node& v = nodes_[node];
  End& end = seqs_[seq].ends[start];
  end = End{node, v.end_seq, v.end_start, NONE, 0};
  if (v.end_seq != NONE) {
    End& next = seqs_[v.end_seq].ends[v.end_start];
    next.prev_seq = seq;
    next.prev = start;
  }
  v.end_seq = seq;
  v.end_start = start;
}

void SuffixTree::unlink_end(uint32_t seq, uint32_t start) {
  const End end = seqs_[seq].ends[start];
  if (end.prev_seq != NONE) {
    End& prev = seqs_[end.prev_seq].ends[end.prev];
    prev.next_seq = end.next_seq;
    prev.next = end.next;
  } else {
    nodes_[end.node].end_seq = end.next_seq;
    nodes_[end.node].end_start = end.next;
  }
  if (end.next_seq != NONE) {
    End& next = seqs_[end.next_seq].ends[end.next];
    next.prev_seq = end.prev_seq;
    next.prev = end.prev;
  }
}

size_t SuffixTree::bytes() const {
  return nodes_.live() * sizeof(Node) + groups_.live() * sizeof(Group) +
         seqs_.live() * sizeof(Seq) + children_.bytes() + seq_bytes_;
}

}  // namespace sterna
