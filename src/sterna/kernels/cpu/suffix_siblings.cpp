// Children of a suffix tree's node: found by token, ordered by count.
#include "suffix_tree.h"

#include <random>
#include <utility>

namespace sterna {

// The seed keeps clients from choosing tokens that collide.
ChildMap::ChildMap() : entries_(MIN_ENTRIES, Entry{NONE, NONE, 0}) {
  std::random_device random;
  seed_ = (uint64_t(random()) << 32) | random();
}

size_t ChildMap::home(uint32_t parent, int32_t token) const {
  uint64_t x = ((uint64_t(parent) << 32) | uint32_t(token)) ^ seed_;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) & (entries_.size() - 1);
}

size_t ChildMap::slot(uint32_t parent, int32_t token) const {
  size_t i = home(parent, token), mask = entries_.size() - 1;
  while (entries_[i].child != NONE &&
         (entries_[i].parent != parent || entries_[i].token != token))
    i = (i + 1) & mask;
  return i;
}

uint32_t ChildMap::find(uint32_t parent, int32_t token) const {
  return entries_[slot(parent, token)].child;
}

void ChildMap::set(uint32_t parent, int32_t token, uint32_t child) {
  Entry& entry = entries_[slot(parent, token)];
  bool is_new = entry.child == NONE;
  entry = Entry{parent, child, token};
  if (is_new && ++size_ * 3 > entries_.size() * 2) resize(entries_.size() * 2);
}

void ChildMap::erase(uint32_t parent, int32_t token) {
  size_t hole = slot(parent, token), mask = entries_.size() - 1;
  if (entries_[hole].child == NONE) return;
  size_--;
  for (size_t i = (hole + 1) & mask; entries_[i].child != NONE; i = (i + 1) & mask) {
    size_t from_home = (i - home(entries_[i].parent, entries_[i].token)) & mask;
    if (from_home < ((i - hole) & mask)) continue;  // it would move before its home
    entries_[hole] = entries_[i];
    hole = i;
  }
  entries_[hole].child = NONE;
  if (entries_.size() > MIN_ENTRIES && size_ * 8 < entries_.size()) resize(entries_.size() / 2);
}

void ChildMap::resize(size_t num_entries) {
  std::vector<Entry> old(num_entries, Entry{NONE, NONE, 0});
  old.swap(entries_);
  for (const Entry& entry : old)
    if (entry.child != NONE) entries_[slot(entry.parent, entry.token)] = entry;
}

uint32_t SuffixTree::next_of(uint32_t c) const {
  uint32_t next = nodes_[c].next;
  return next == nodes_[nodes_[c].parent].first ? NONE : next;
}

uint32_t SuffixTree::prev_of(uint32_t c) const {
  return c == nodes_[nodes_[c].parent].first ? NONE : nodes_[c].prev;
}

void SuffixTree::link_before(uint32_t c, uint32_t parent, uint32_t target) {
  Node &v = nodes_[c], &p = nodes_[parent];
  if (p.first == NONE) {
    p.first = v.next = v.prev = c;
    return;
  }
  uint32_t next = target == NONE ? p.first : target;  // in a ring the last is before the first
  v.next = next;
  v.prev = nodes_[next].prev;
  nodes_[v.prev].next = c;
  nodes_[next].prev = c;
  if (target == p.first) p.first = c;
}

void SuffixTree::unlink(uint32_t c) {
  const Node& v = nodes_[c];
  Node& p = nodes_[v.parent];
  if (v.next == c) {
    p.first = NONE;
    return;
  }
  nodes_[v.prev].next = v.next;
  nodes_[v.next].prev = v.prev;
  if (p.first == c) p.first = v.next;
}

void SuffixTree::leave_group(uint32_t c) {
  const Node& v = nodes_[c];
  Group& group = groups_[v.group];
  if (group.head == group.tail)
    groups_.drop(v.group);
  else if (group.head == c)
    group.head = v.next;
  else if (group.tail == c)
    group.tail = v.prev;
}

void SuffixTree::lead_group(uint32_t c, uint32_t group) {
  if (group == NONE) {
    group = groups_.make();
    groups_[group].tail = c;
  }
  groups_[group].head = c;
  nodes_[c].group = group;
}

// c takes the place, the group and the neighbours of `old`.
void SuffixTree::replace(uint32_t old, uint32_t c) {
  const Node& v = nodes_[old];
  Node& n = nodes_[c];
  bool is_only = v.next == old;
  n.next = is_only ? c : v.next;
  n.prev = is_only ? c : v.prev;
  n.group = v.group;
  if (!is_only) {
    nodes_[n.prev].next = c;
    nodes_[n.next].prev = c;
  }
  Node& p = nodes_[v.parent];
  if (p.first == old) p.first = c;
  Group& group = groups_[v.group];
  if (group.head == old) group.head = c;
  if (group.tail == old) group.tail = c;
}

// One more: to the front of the group with the next count, which ends where c's own begins.
void SuffixTree::count_up(uint32_t c) {
  Node& v = nodes_[c];
  uint32_t head = groups_[v.group].head, above = prev_of(head);
  uint32_t joined = NONE, target = head;
  if (above != NONE && nodes_[above].count == v.count + 1) {
    joined = nodes_[above].group;
    target = groups_[joined].head;
  }
  leave_group(c);
  if (target != c) {
    unlink(c);
    link_before(c, v.parent, target);
  }
  v.count++;
  lead_group(c, joined);
}

// One less: behind the last of its group, which is the front of the group below.
void SuffixTree::count_down(uint32_t c) {
  Node& v = nodes_[c];
  uint32_t tail = groups_[v.group].tail, below = next_of(tail);
  bool is_joined = below != NONE && nodes_[below].count + 1 == v.count;
  leave_group(c);
  if (tail != c) {
    unlink(c);
    link_before(c, v.parent, below);
  }
  v.count--;
  lead_group(c, is_joined ? nodes_[below].group : NONE);
}

// A child seen once: in front of the others that were.
void SuffixTree::insert_new(uint32_t c, uint32_t parent) {
  uint32_t first = nodes_[parent].first, last = first == NONE ? NONE : nodes_[first].prev;
  bool is_joined = last != NONE && nodes_[last].count == 1;
  uint32_t group = is_joined ? nodes_[last].group : NONE;
  link_before(c, parent, is_joined ? groups_[group].head : NONE);
  lead_group(c, group);
}

}  // namespace sterna
