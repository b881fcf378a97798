// First k points in index order within a radius. Contract: reid3d/ops/ball_query.py.
#pragma once

#include "curve.h"

namespace reid3d::REID3D_ISA {

// The points in panels of 16 x, 16 y, 16 z, in index order. Returns the number of hits, at most k.
template <typename T>
int64_t ball_query(const T* center, const T* panels, int64_t n, T radius2, int64_t k, int64_t* idx) {
  const Point<T> c(center[0], center[1], center[2]);
  const Vec<T> limit = Vec<T>::all(radius2);
  int64_t count = 0;
  for (int64_t first = 0; first < n && count < k; first += kLanes, panels += 3 * kLanes) {
    uint32_t inside = bits(distances(c, panels, panels + kLanes, panels + 2 * kLanes) < limit);
    for (; inside && count < k; inside &= inside - 1) idx[count++] = first + __builtin_ctz(inside);
  }
  for (int64_t i = count; i < k; ++i) idx[i] = count ? idx[0] : 0;
  return count;
}

}  // namespace reid3d::REID3D_ISA
