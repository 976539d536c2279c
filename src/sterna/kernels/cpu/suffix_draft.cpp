// Drafts from the suffix tree.
//
// Each suffix of the context that occurs in the tree, with something after it, is a place to draft
// from. There a token seen c times of N gets the probability c / (N + escape / m), where m is how
// much of the context it was seen after: a long match needs few witnesses. As a draft grows, so
// does m. The suffix whose draft is expected to have the most tokens accepted wins; ties go to
// the longer one. Of suffixes with equal N only the longest is tried: it saw the same.
#include "suffix_tree.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace sterna {

// One token on, if the tree knows it.
bool SuffixTree::step(Place& place, int32_t token) const {
  const Node& v = nodes_[place.node];
  if (place.len < bottom(v)) {
    if (label(v, place.len) != token) return false;
  } else {
    uint32_t child = is_leaf(v) ? NONE : children_.find(place.node, token);
    if (child == NONE) return false;
    place.node = child;
  }
  place.len++;
  return true;
}

bool SuffixTree::locate(uint32_t root, const int32_t* tokens, uint32_t count, Place& place) const {
  place = Place{root, 0};
  for (uint32_t i = 0; i < count; i++)
    if (!step(place, tokens[i])) return false;
  return true;
}

// Occurrences that go on from here; on an edge those of its first token.
uint32_t SuffixTree::support(const Place& place) const {
  const Node& v = nodes_[place.node];
  return place.len < bottom(v) ? v.count : v.sum;
}

// Candidate tokens after a place, the likeliest first.
struct SuffixTree::Walker {
  const SuffixTree* tree;
  Place place;  // after the token
  int32_t token = 0;
  double prob = 0;

  bool enter(uint32_t node, uint32_t len, double count, double total) {
    place = Place{node, len + 1};
    token = tree->label(tree->nodes_[node], len);
    prob = count / (total + tree->escape_ / len);
    return true;
  }
  bool first() {
    const Node& v = tree->nodes_[place.node];
    if (place.len < tree->bottom(v)) return enter(place.node, place.len, v.count, v.count);
    if (v.first == NONE) return false;
    return enter(v.first, place.len, tree->nodes_[v.first].count, v.sum);
  }
  bool sibling() {
    const Node& v = tree->nodes_[place.node];
    if (place.len != v.top + 1u) return false;
    uint32_t next = tree->next_of(place.node);
    return next != NONE && enter(next, v.top, tree->nodes_[next].count, tree->nodes_[v.parent].sum);
  }
};

Draft SuffixTree::walk(const Place& place, const DraftArgs& args) const {
  Draft draft;
  draft.match_len = int(place.len);
  Walker at{this, place};
  double path = 1;
  while (int(draft.tokens.size()) < args.max_tokens && at.first()) {
    path *= at.prob;
    if (path < args.min_prob) break;
    draft.tokens.push_back(at.token);
    draft.probs.push_back(at.prob);
    draft.score += path;
  }
  return draft;
}

// The likeliest paths first; equal ones in the order in which they were found.
Draft SuffixTree::branch(const Place& place, const DraftArgs& args) const {
  struct Candidate {
    double path, above;
    int order, parent;
    Walker at;
    bool operator<(const Candidate& other) const {
      return std::tuple(path, -order) < std::tuple(other.path, -other.order);
    }
  };
  Draft draft;
  draft.match_len = int(place.len);
  std::priority_queue<Candidate> queue;
  int order = 0;
  auto offer = [&](bool exists, const Walker& at, double above, int parent) {
    if (exists && above * at.prob >= args.min_prob)
      queue.push(Candidate{above * at.prob, above, order++, parent, at});
  };
  Walker start{this, place};
  bool exists = start.first();
  offer(exists, start, 1, -1);
  while (int(draft.tokens.size()) < args.max_tokens && !queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    draft.tokens.push_back(best.at.token);
    draft.parents.push_back(best.parent);
    draft.probs.push_back(best.at.prob);
    draft.score += best.path;
    Walker below = best.at, beside = best.at;
    exists = below.first();
    offer(exists, below, best.path, int(draft.tokens.size()) - 1);
    exists = beside.sibling();
    offer(exists, beside, best.above, best.parent);
  }
  return draft;
}

Draft SuffixTree::draft(uint32_t root, const std::vector<int32_t>& context,
                        const DraftArgs& args) const {
  root_at(root);
  Draft best;
  auto try_from = [&](const Place& place) {
    Draft draft = args.is_tree ? branch(place, args) : walk(place, args);
    if (!draft.tokens.empty() && draft.score >= best.score) best = std::move(draft);
  };
  uint32_t longest = uint32_t(std::min(context.size(), size_t(max_depth_ - 1)));
  Place place, last;
  uint32_t last_support = 0;
  for (uint32_t m = 1; m <= longest; m++) {
    if (!locate(root, context.data() + context.size() - m, m, place)) break;
    uint32_t now = support(place);
    if (now == 0) break;
    if (m > 1 && now != last_support) try_from(last);
    last = place;
    last_support = now;
  }
  if (last_support) try_from(last);
  return best;
}

}  // namespace sterna
