// Clouds along the Z-curve: the order, and the tree of boxes over it (tree.h).
#pragma once

#include <limits>

#include "../morton.h"
#include "simd.h"
#include "tree.h"

namespace reid3d::REID3D_ISA {

template <typename T>
constexpr T kInf = static_cast<T>(std::numeric_limits<float>::infinity());

template <typename T>
REID3D_INLINE T coordinate(const T* row, int64_t dims, int64_t axis) { return axis < dims ? row[axis] : T(0); }

// The lower corner of the box of a cloud, and its longest side; a NaN is in no box.
template <typename T>
MortonGrid<T> grid_of(const T* rows, int64_t n, int64_t dims) {
  constexpr int kPeriod = 3 * kLanes;  // of the axes in the rows, one after the other, for 1, 2 and 3 of them
  Vec<T> least[3], most[3];
  for (int v = 0; v < 3; ++v) least[v] = Vec<T>::all(kInf<T>), most[v] = Vec<T>::all(-kInf<T>);
  int64_t at = 0;
  for (; at + kPeriod <= n * dims; at += kPeriod)
    for (int v = 0; v < 3; ++v) {
      const Vec<T> c = Vec<T>::load(rows + at + v * kLanes);
      least[v] = min(c, least[v]), most[v] = max(c, most[v]);
    }
  T lo[3] = {kInf<T>, kInf<T>, kInf<T>}, hi[3] = {-kInf<T>, -kInf<T>, -kInf<T>};
  const auto widen = [&](int64_t axis, T low, T high) {
    lo[axis] = low < lo[axis] ? low : lo[axis];
    hi[axis] = high > hi[axis] ? high : hi[axis];
  };
  T lows[kPeriod], highs[kPeriod];
  for (int v = 0; v < 3; ++v) least[v].store(lows + v * kLanes), most[v].store(highs + v * kLanes);
  for (int i = 0; i < kPeriod; ++i) widen(i % dims, lows[i], highs[i]);
  for (; at < n * dims; ++at) widen(at % dims, rows[at], rows[at]);
  T longest = 0;
  for (int axis = 0; axis < dims; ++axis) longest = hi[axis] - lo[axis] > longest ? hi[axis] - lo[axis] : longest;
  for (int64_t axis = dims; axis < 3; ++axis) lo[axis] = 0;
  return {lo[0], lo[1], lo[2], longest};
}

// A stable radix sort of the keys, with the index below each.
template <typename T>
void morton_order(const T* rows, int64_t n, int64_t dims, uint64_t* keys, int32_t* order) {
  const MortonGrid<T> grid = grid_of(rows, n, dims);
  uint32_t* key = reinterpret_cast<uint32_t*>(order);
  if (dims == 3) {
    for (int64_t i = 0; i < n; ++i) key[i] = grid.key(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]);
  } else {
    for (int64_t i = 0; i < n; ++i) key[i] = grid.key(rows[i * dims], coordinate(rows + i * dims, dims, 1), T(0));
  }
  constexpr int kDigits = 3, kBits = 10;
  uint32_t count[kDigits][1 << kBits] = {};
  uint64_t *from = keys, *to = keys + n;
  for (int64_t i = 0; i < n; ++i) {
    for (int digit = 0; digit < kDigits; ++digit) ++count[digit][key[i] >> digit * kBits & 1023];
    from[i] = static_cast<uint64_t>(key[i]) << 32 | static_cast<uint32_t>(i);
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    uint32_t next = 0;
    for (uint32_t& c : count[digit]) {
      const uint32_t here = c;
      c = next;
      next += here;
    }
    for (int64_t i = 0; i < n; ++i) to[count[digit][from[i] >> (32 + digit * kBits) & 1023]++] = from[i];
    uint64_t* swapped = from;
    from = to, to = swapped;
  }
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(static_cast<uint32_t>(from[i]));
}

// The boxes of `count` vectors that start at lo and hi; lanes from n on are not there, and NaN is in no box.
template <typename T>
void boxes_of(const T* lo, const T* hi, int64_t n, int64_t count, T* lo_out, T* hi_out) {
  for (int64_t i = 0; i < count; ++i) {
    T least[kLanes], most[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t at = i * kLanes + lane;
      least[lane] = at < n && lo[at] < kInf<T> ? lo[at] : kInf<T>;
      most[lane] = at < n && hi[at] > -kInf<T> ? hi[at] : -kInf<T>;
    }
    lo_out[i] = reduce_min(Vec<T>::load(least));
    hi_out[i] = reduce_max(Vec<T>::load(most));
  }
}

template <typename T>
void build(const T* rows, int64_t dims, const int32_t* order, Tree<T>& tree) {
  T* columns[3] = {tree.x, tree.y, tree.z};
  for (int64_t i = 0; i < tree.n; ++i) {
    const T* row = rows + order[i] * dims;
    for (int axis = 0; axis < 3; ++axis) columns[axis][i] = coordinate(row, dims, axis);
    tree.index[i] = order[i];
  }
  for (int64_t i = tree.n; i < round_up(tree.n, kLeaf); ++i) {
    for (T* column : columns) column[i] = std::numeric_limits<T>::quiet_NaN();
    tree.index[i] = 0;
  }
  for (int axis = 0; axis < 3; ++axis) {
    const T *lo = columns[axis], *hi = lo;
    int64_t n = tree.n;
    for (int l = 0; l < tree.levels; ++l) {
      auto& level = tree.level[l];
      boxes_of(lo, hi, n, level.count, level.lo[axis], level.hi[axis]);
      for (int64_t i = level.count; i < round_up(level.count, kLeaf); ++i) level.lo[axis][i] = level.hi[axis][i] = 0;
      lo = level.lo[axis], hi = level.hi[axis], n = level.count;
    }
  }
}

template <typename T>
struct Point {
  Vec<T> x, y, z;
  REID3D_INLINE Point(T x_, T y_, T z_) : x(Vec<T>::all(x_)), y(Vec<T>::all(y_)), z(Vec<T>::all(z_)) {}
};

// Squared distances to 16 points, each coordinate's difference in turn (../rounding.h).
template <typename T>
REID3D_INLINE Vec<T> distances(const Point<T>& q, const T* x, const T* y, const T* z) {
  using V = Vec<T>;
  const V dx = q.x - V::load(x), dy = q.y - V::load(y), dz = q.z - V::load(z);
  return add_square(add_square(add_square(V::all(0), dx), dy), dz);
}

// Squared distances to 16 boxes; 0, so that they are entered, where a NaN leaves them unknown.
template <typename T>
REID3D_INLINE Vec<T> box_distances(const Point<T>& q, const typename Tree<T>::Level& level, int64_t first) {
  using V = Vec<T>;
  const V zero = V::all(0);
  const auto beyond = [&](const V& p, int axis) {
    return max(max(V::load(level.lo[axis] + first) - p, p - V::load(level.hi[axis] + first)), zero);
  };
  const V dx = beyond(q.x, 0), dy = beyond(q.y, 1), dz = beyond(q.z, 2);
  return add_square(add_square(add_square(zero, dx), dy), dz);
}

// The lanes of a vector of boxes that are boxes.
template <typename T>
REID3D_INLINE uint32_t present(const typename Tree<T>::Level& level, int64_t first) {
  const int64_t left = level.count - first;
  return left >= kLanes ? 0xffffu : (1u << left) - 1;
}

}  // namespace reid3d::REID3D_ISA
