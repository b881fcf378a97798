// Farthest point sampling. Contract: reid3d/ops/fps.py.
#pragma once

#include "curve.h"

namespace reid3d::REID3D_ISA {

// A picked point changes the distances of the points around it only: of the boxes that are nearer to it than the
// farthest of their points is to what was picked before. dist2 is the squared distance of every point to the nearest
// picked one, +inf before the first, -1 for a point with a NaN, -inf once picked; most[l] the largest of every box.
template <typename T>
class Sampler {
  const Tree<T>& tree_;
  int64_t at_ = 0;  // the place of the point to be picked next
  T* dist2_;
  T* most_[kMaxLevels];

  // The two functions below are inlined in each other on the levels of up to 4096 points, and called on those above.
  static constexpr int kInlined = 1;

  // Picks the point at place `at`, within the boxes [first, first + 16) of a level; returns the largest that is left.
  template <int l>
  REID3D_INLINE T pick(int64_t first, int64_t at, const Point<T>& p) {
    Vec<T> most = Vec<T>::load(most_[l] + first);
    const int64_t own = (at >> 4 * (l + 1)) - first;  // the box it is in
    uint32_t near = bits(box_distances(p, tree_.level[l], first) < most);
    if (0 <= own && own < kLanes) near |= 1u << own;
    for (; near; near &= near - 1) {
      const int lane = __builtin_ctz(near);
      const int64_t box = first + lane;
      T left;
      if constexpr (l == 0) left = relax(box * kLeaf, at, p);
      else if constexpr (l <= kInlined) left = pick<l - 1>(box * kLanes, at, p);
      else left = pick_apart<l - 1>(box * kLanes, at, p);
      most = with_lane(most, lane, left);
    }
    most.store(most_[l] + first);
    return reduce_max(most);
  }

  template <int l>
  __attribute__((noinline)) T pick_apart(int64_t first, int64_t at, const Point<T>& p) {
    return pick<l>(first, at, p);
  }

  REID3D_INLINE T relax(int64_t leaf, int64_t at, const Point<T>& p) {
    const Vec<T> d = distances(p, tree_.x + leaf, tree_.y + leaf, tree_.z + leaf);
    Vec<T> nearest = min(d, Vec<T>::load(dist2_ + leaf));  // a NaN leaves what was there
    if (at - leaf < kLeaf && at >= leaf) nearest = with_lane(nearest, static_cast<int>(at - leaf), -kInf<T>);
    nearest.store(dist2_ + leaf);
    return reduce_max(nearest);
  }

  template <int l>
  __attribute__((noinline)) uint64_t lowest_apart(int64_t first, T distance) const {
    return lowest<l>(first, distance);
  }

  // Of the points at this distance the one with the lowest index: its place, below its index.
  template <int l>
  REID3D_INLINE uint64_t lowest(int64_t first, T distance) const {
    const Vec<T> wanted = Vec<T>::all(distance);
    uint64_t found = ~uint64_t{0};
    const T* values = dist2_;
    if constexpr (l >= 0) values = most_[l];
    for (uint32_t equal = bits(Vec<T>::load(values + first) == wanted); equal; equal &= equal - 1) {
      const int64_t at = first + __builtin_ctz(equal);
      uint64_t candidate;
      if constexpr (l < 0) candidate = static_cast<uint64_t>(tree_.index[at]) << 32 | static_cast<uint64_t>(at);
      else if constexpr (l <= kInlined) candidate = lowest<l - 1>(at * kLanes, distance);
      else candidate = lowest_apart<l - 1>(at * kLanes, distance);
      found = candidate < found ? candidate : found;
    }
    return found;
  }

 public:
  Sampler(const Tree<T>& tree, int64_t start, T* scratch) : tree_(tree), dist2_(scratch) {
    while (tree.index[at_] != start) ++at_;
    const int64_t full = round_up(tree.n, kLeaf);
    for (int64_t i = 0; i < full; ++i) {
      const bool number = (tree.x[i] == tree.x[i]) & (tree.y[i] == tree.y[i]) & (tree.z[i] == tree.z[i]);
      dist2_[i] = i >= tree.n ? -kInf<T> : number ? kInf<T> : T(-1);
    }
    const T* below = dist2_;
    T* next = scratch + full;
    for (int l = 0; l < tree.levels; ++l) {
      most_[l] = next;
      for (int64_t i = 0; i < round_up(tree.level[l].count, kLanes); ++i)
        next[i] = i < tree.level[l].count ? reduce_max(Vec<T>::load(below + i * kLanes)) : -kInf<T>;
      below = next;
      next += round_up(tree.level[l].count, kLanes);
    }
  }

  // The point at hand.
  REID3D_INLINE int64_t index() const { return tree_.index[at_]; }

  // Picks it, and finds the next: the farthest of what is left. Something must be left: what is not there is at -inf,
  // as what was picked, and lies beyond the arrays.
  template <int levels>
  REID3D_INLINE void advance() {
    const T farthest = pick<levels - 1>(0, at_, Point<T>(tree_.x[at_], tree_.y[at_], tree_.z[at_]));
    at_ = static_cast<uint32_t>(lowest<levels - 1>(0, farthest));
  }
};

// Every pick waits for the one before it; of two clouds in turn, the one computes while the other waits.
template <int levels, typename T>
void sample(const Tree<T>* trees, int64_t count, int64_t m, int64_t start, T* scratch, int64_t* picked) {
  Sampler<T> one(trees[0], start, scratch);
  picked[0] = start;
  if (count == 1) {
    for (int64_t i = 1; i < m; ++i) {
      one.template advance<levels>();
      picked[i] = one.index();
    }
  } else {
    Sampler<T> other(trees[1], start, scratch + Tree<T>::size(trees[0].n));
    picked[m] = start;
    for (int64_t i = 1; i < m; ++i) {
      one.template advance<levels>();
      other.template advance<levels>();
      picked[i] = one.index();
      picked[m + i] = other.index();
    }
  }
}

// One cloud or two of the same size.
template <typename T>
void fps(const Tree<T>* trees, int64_t count, int64_t m, int64_t start, T* scratch, int64_t* picked) {
  switch (trees->levels) {
    case 1: return sample<1>(trees, count, m, start, scratch, picked);
    case 2: return sample<2>(trees, count, m, start, scratch, picked);
    case 3: return sample<3>(trees, count, m, start, scratch, picked);
    default: return sample<kMaxLevels>(trees, count, m, start, scratch, picked);
  }
}

}  // namespace reid3d::REID3D_ISA
