// A cloud along the Z-curve, in leaves of 16 points with their boxes, in nodes of 16 leaves, and so on up. Search and
// sampling skip what a box shows to be too far. A box never lies: rounding is monotone, so that the distance to the box,
// rounded as distances are, is at most the rounded distance to any point inside.
#pragma once

#include <cstdint>

namespace reid3d {

constexpr int kLeaf = 16;
constexpr int kMaxLevels = 8;  // of 16 to the power: more than 2^31 points

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the parts of a tree are in one piece of memory. Arrays are padded to whole vectors: points with NaN, which is near
// nothing, in index order after the others.
template <typename T>
struct Tree {
  int64_t n = 0;       // points
  int levels = 0;      // 0: the boxes of leaves; the last has at most 16 boxes
  T *x, *y, *z;        // coordinates along the curve
  int32_t* index;      // the point's place in the cloud
  struct Level {
    int64_t count;     // boxes
    T *lo[3], *hi[3];
  } level[kMaxLevels];

  // Numbers of T for coordinates and boxes of n points.
  static int64_t size(int64_t n) {
    int64_t total = 3 * round_up(n, kLeaf);
    for (int64_t count = n; count > 0;) {
      count = (count + kLeaf - 1) / kLeaf;
      total += 6 * round_up(count, kLeaf);
      if (count <= kLeaf) break;
    }
    return total;
  }

  // Lays the tree of n points out in size(n) numbers and round_up(n, kLeaf) indices.
  Tree(int64_t points, T* numbers, int32_t* indices) : n(points), index(indices) {
    const auto take = [&numbers](int64_t count) {
      T* part = numbers;
      numbers += round_up(count, kLeaf);
      return part;
    };
    x = take(n), y = take(n), z = take(n);
    for (int64_t count = n; count > 0;) {
      count = (count + kLeaf - 1) / kLeaf;
      Level& l = level[levels++];
      l.count = count;
      for (int axis = 0; axis < 3; ++axis) l.lo[axis] = take(count), l.hi[axis] = take(count);
      if (count <= kLeaf) break;
    }
  }
};

}  // namespace reid3d
