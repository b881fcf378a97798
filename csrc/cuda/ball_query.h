// The first k points in index order within a radius, as a warp finds them.
#pragma once

#include "lane.h"

namespace reid3d {

// Writes k indices. The result says how many are hits: the others repeat the first, or are 0 where there is none.
template <typename T>
REID3D_WARP int64_t ball_query_warp(const T* points, int64_t N, T x, T y, T z, T radius2, int64_t k, int64_t* idx) {
  int64_t count = 0, first = 0;
  for (int64_t base = 0; base < N && count < k; base += kWarp) {
    const uint32_t hits = ballot(map(
        [=](int lane) {
          const T* p = points + 3 * (base + lane);
          return base + lane < N && squared_distance3(x, y, z, p[0], p[1], p[2]) < radius2;
        },
        lane_id()));
    if (hits == 0) continue;
    if (count == 0) first = base + lowest_bit(hits);
    each(
        [=](int lane) {
          const int64_t place = count + popcount(hits & ((1u << lane) - 1));  // the hits of the lanes before come first
          if ((hits >> lane & 1) && place < k) idx[place] = base + lane;
        },
        lane_id());
    count += popcount(hits);
  }
  if (count > k) count = k;
  for (int64_t base = count; base < k; base += kWarp)
    each(
        [=](int lane) {
          if (base + lane < k) idx[base + lane] = first;
        },
        lane_id());
  return count;
}

}  // namespace reid3d
