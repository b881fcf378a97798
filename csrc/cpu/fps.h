// Farthest point sampling. Contract: reid3d/ops/fps.py.
#pragma once

#include "curve.h"

namespace reid3d::REID3D_ISA {

// A picked point changes the distances of the points around it only: of the boxes that are nearer to it than the farthest
// of their points is to what was picked before. dist2 is the squared distance of every point to the nearest picked one,
// +inf before the first, -1 for a point with a NaN, -inf once picked; most[l] the largest of every box.
template <typename T>
class Sampler {
  const Tree<T>& tree_;
  T* dist2_;
  T* most_[kMaxLevels];

  // Picks the point at place `at`, within the boxes [first, first + 16) of a level; returns the largest that is left.
  T pick(int l, int64_t first, int64_t at, const Point<T>& p) {
    const auto& level = tree_.level[l];
    T* most = most_[l];
    const int64_t own = (at >> 4 * (l + 1)) - first;  // the box it is in
    uint32_t near = bits(box_distances(p, level, first) < Vec<T>::load(most + first));
    if (0 <= own && own < kLanes) near |= 1u << own;
    for (; near; near &= near - 1) {
      const int64_t box = first + __builtin_ctz(near);
      most[box] = l == 0 ? relax(box * kLeaf, p) : pick(l - 1, box * kLanes, at, p);
    }
    return reduce_max(Vec<T>::load(most + first));
  }

  REID3D_INLINE T relax(int64_t at, const Point<T>& p) {
    const Vec<T> d = distances(p, tree_.x + at, tree_.y + at, tree_.z + at);
    const Vec<T> nearest = min(d, Vec<T>::load(dist2_ + at));  // a NaN leaves what was there
    nearest.store(dist2_ + at);
    return reduce_max(nearest);
  }

  // Of the points at this distance the one with the lowest index: its place, below its index.
  uint64_t lowest(int l, int64_t first, T distance) const {
    const Vec<T> wanted = Vec<T>::all(distance);
    uint64_t found = ~uint64_t{0};
    const T* values = l < 0 ? dist2_ : most_[l];
    for (uint32_t equal = bits(Vec<T>::load(values + first) == wanted); equal; equal &= equal - 1) {
      const int64_t at = first + __builtin_ctz(equal);
      const uint64_t candidate = l < 0 ? static_cast<uint64_t>(tree_.index[at]) << 32 | static_cast<uint64_t>(at)
                                       : lowest(l - 1, at * kLanes, distance);
      found = candidate < found ? candidate : found;
    }
    return found;
  }

 public:
  Sampler(const Tree<T>& tree, T* scratch) : tree_(tree), dist2_(scratch) {
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

  void sample(int64_t m, int64_t start, int64_t* picked) {
    int64_t at = 0;
    while (tree_.index[at] != start) ++at;
    const int top = tree_.levels - 1;
    for (int64_t i = 0; i < m; ++i) {
      picked[i] = tree_.index[at];
      if (i + 1 == m) break;
      dist2_[at] = -kInf<T>;
      const T farthest = pick(top, 0, at, Point<T>(tree_.x[at], tree_.y[at], tree_.z[at]));
      at = static_cast<uint32_t>(lowest(top, 0, farthest));
    }
  }
};

template <typename T>
void fps(const Tree<T>& tree, int64_t m, int64_t start, T* scratch, int64_t* picked) {
  Sampler<T>(tree, scratch).sample(m, start, picked);
}

}  // namespace reid3d::REID3D_ISA
