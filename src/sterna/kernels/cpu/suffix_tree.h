// A compressed tree of all suffixes of many token sequences, up to a depth, with counts.
//
// What it holds: for every sequence and every start, the text from there to the end or to
// `max_depth` tokens. The count of a path is the number of (sequence, start) whose text begins
// with it. `engine/drafters/suffix_reference.py` says the same with a node a token; it is the oracle.
//
// Layout. A node is an edge: a label of tokens top .. depth of the path from its root, and the
// place at its end. Labels are not copied, they are read from a suffix that passes through (`ref`).
// Inner nodes have two children or more; where sequences end makes no nodes, so the tree depends
// on its content alone. `count` is that of the edge's first token.
//
// Growth costs nothing where nothing is known: a leaf's label ends where its ref's text ends (or at
// max_depth), so when a sequence grows, the leaves that it is the ref of grow with it. Only its
// suffixes from `frontier` on, the ones that occur elsewhere too, are looked at. Advancing one
// within an edge compares a token and writes nothing.
//
// Children form a ring in falling order of count; equal counts are a group that knows its ends, so
// a count changes in O(1). Who changes goes in front of its new equals: ties go to the recent.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace sterna {

constexpr uint32_t NONE = UINT32_MAX;

// Objects by number, in chunks that never move; numbers of freed ones are used again.
template <class T>
class Slots {
 public:
  T& operator[](uint32_t i) { return chunks_[i / CHUNK][i % CHUNK]; }
  const T& operator[](uint32_t i) const { return chunks_[i / CHUNK][i % CHUNK]; }
  uint32_t make() {
    if (!free_.empty()) {
      uint32_t i = free_.back();
      free_.pop_back();
      (*this)[i] = T();
      return i;
    }
    if (size_ % CHUNK == 0) chunks_.emplace_back(new T[CHUNK]);
    return size_++;
  }
  void drop(uint32_t i) { free_.push_back(i); }
  size_t live() const { return size_ - free_.size(); }
  uint32_t end() const { return size_; }

 private:
  static constexpr uint32_t CHUNK = 512;
  std::vector<std::unique_ptr<T[]>> chunks_;
  std::vector<uint32_t> free_;
  uint32_t size_ = 0;
};

// (parent, token) -> child, open addressing with linear probes; erasing leaves no tombstones.
class ChildMap {
 public:
  ChildMap();
  uint32_t find(uint32_t parent, int32_t token) const;  // NONE where there is no such child
  void set(uint32_t parent, int32_t token, uint32_t child);
  void erase(uint32_t parent, int32_t token);
  size_t size() const { return size_; }
  size_t bytes() const { return entries_.size() * sizeof(Entry); }

 private:
  struct Entry { uint32_t parent, child; int32_t token; };
  size_t home(uint32_t parent, int32_t token) const;
  size_t slot(uint32_t parent, int32_t token) const;  // its entry, or the free one it would take
  void resize(size_t num_entries);  // a power of two
  static constexpr size_t MIN_ENTRIES = 64;
  std::vector<Entry> entries_;
  size_t size_ = 0;
  uint64_t seed_;
};

struct Draft {
  std::vector<int32_t> tokens;
  std::vector<int32_t> parents;  // of tree drafts: the token before each, -1 = the context
  std::vector<double> probs;     // P(token | the ones before it)
  double score = 0;              // expected accepted tokens: the sum of the paths' probabilities
  int match_len = 0;
};

struct DraftArgs {
  int max_tokens;
  double min_prob;  // of a path
  bool is_tree;
};

class SuffixTree {
 public:
  SuffixTree(int max_depth, double escape);
  SuffixTree(const SuffixTree&) = delete;

  uint32_t add_root();
  void drop_root(uint32_t root);   // it must be empty
  uint32_t add(uint32_t root);     // an empty sequence
  void extend(uint32_t seq, const int32_t* tokens, size_t count);
  void remove(uint32_t seq);
  const std::vector<int32_t>& tokens(uint32_t seq) const { return at(seq).tokens; }

  // The best continuation of the context's last tokens; without tokens when none is likely enough.
  Draft draft(uint32_t root, const std::vector<int32_t>& context, const DraftArgs& args) const;

  size_t num_nodes() const { return nodes_.live(); }
  size_t num_tokens() const { return num_tokens_; }
  size_t bytes() const;
  std::string check() const;  // what is wrong, or nothing

 private:
  struct Node {
    uint32_t parent = NONE, first = NONE, next = NONE, prev = NONE, group = NONE;
    uint32_t count = 0, sum = 0;               // sum: of the children's counts
    uint32_t ref_seq = NONE, ref_start = 0;    // a suffix that passes through
    uint32_t end_seq = NONE, end_start = 0;    // head of the list of suffixes that end here
    int32_t token = 0;                         // first of the label
    uint16_t top = 0, depth = 0;               // depth of a leaf: see bottom()
    bool is_live = false, is_root = false;
  };
  struct Group { uint32_t head = NONE, tail = NONE; };
  struct End { uint32_t node = NONE, next_seq = NONE, next = 0, prev_seq = NONE, prev = 0; };
  struct Seq {
    std::vector<int32_t> tokens;
    std::vector<End> ends;  // by start
    uint32_t root = NONE, frontier = 0;
    bool is_live = false;
  };
  struct Place { uint32_t node, len; };  // `len` tokens below the root, on the edge of `node`
  struct Walker;

  const Seq& at(uint32_t seq) const;
  Seq& at(uint32_t seq) { return const_cast<Seq&>(std::as_const(*this).at(seq)); }
  const Node& root_at(uint32_t root) const;
  bool is_leaf(const Node& v) const { return v.first == NONE && !v.is_root; }
  uint32_t suffix_len(uint32_t seq, uint32_t start) const;
  uint32_t bottom(const Node& v) const {
    return is_leaf(v) ? suffix_len(v.ref_seq, v.ref_start) : v.depth;
  }
  int32_t label(const Node& v, uint32_t len) const {
    return seqs_[v.ref_seq].tokens[v.ref_start + len];
  }
  bool is_ref(const Node& v, uint32_t seq, uint32_t start) const {
    return v.ref_seq == seq && v.ref_start == start;
  }

  void push(uint32_t seq, int32_t token);
  void advance(uint32_t seq, uint32_t start, int32_t token, uint32_t len);
  void take_over(Node& leaf, uint32_t seq, uint32_t start);
  uint32_t split(uint32_t v, uint32_t len);
  uint32_t add_leaf(uint32_t parent, uint32_t seq, uint32_t start, int32_t token, uint32_t top);
  void forget(uint32_t seq, uint32_t start);
  void merge(uint32_t v);
  void renew_ref(Node& v);

  void link_end(uint32_t node, uint32_t seq, uint32_t start);
  void unlink_end(uint32_t seq, uint32_t start);

  uint32_t next_of(uint32_t c) const;  // the sibling after it, NONE after the last
  uint32_t prev_of(uint32_t c) const;
  void link_before(uint32_t c, uint32_t parent, uint32_t target);  // NONE = as the last
  void unlink(uint32_t c);
  void leave_group(uint32_t c);
  void lead_group(uint32_t c, uint32_t group);  // NONE = one of its own
  void replace(uint32_t old, uint32_t c);
  void count_up(uint32_t c);
  void count_down(uint32_t c);
  void insert_new(uint32_t c, uint32_t parent);

  bool step(Place& place, int32_t token) const;
  bool locate(uint32_t root, const int32_t* tokens, uint32_t count, Place& place) const;
  uint32_t support(const Place& place) const;
  Draft walk(const Place& place, const DraftArgs& args) const;
  Draft branch(const Place& place, const DraftArgs& args) const;

  std::string check_node(uint32_t v, std::vector<uint32_t>& counts, size_t& num_seen) const;
  std::string check_children(uint32_t v) const;
  std::string check_seq(uint32_t seq, std::vector<uint32_t>& counts, size_t& num_ends) const;

  const uint32_t max_depth_;
  const double escape_;
  Slots<Node> nodes_;
  Slots<Group> groups_;
  Slots<Seq> seqs_;
  ChildMap children_;
  size_t num_tokens_ = 0, seq_bytes_ = 0;
};

}  // namespace sterna
