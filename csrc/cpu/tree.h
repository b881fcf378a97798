// A cloud along the Z-curve, in leaves of 16 points with their boxes, in nodes of 16 leaves, and so on up. Search and
// sampling skip what a box shows to be too far. A box never lies: rounding is monotone, so that the distance to the
// box, rounded as distances are, is at most the rounded distance to any point inside.
#pragma once

#include <cstdint>

namespace reid3d {

constexpr int kLeaf = 16;
constexpr int kMaxLevels = 7;  // 16^8 points at most

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the parts of a tree are in one piece of memory. Arrays are padded to whole vectors: points with NaN, which is
// near nothing.
template <typename T>
struct Tree {
  int64_t n;           // points
  int levels;          // level 0: the boxes of leaves; the last has at most 16 boxes
  T *x, *y, *z;        // coordinates along the curve
  int32_t* index;      // of the point in the cloud
  struct Level {
    int64_t count;     // boxes
    T *lo[3], *hi[3];
  } level[kMaxLevels];

  // Numbers of T for coordinates and boxes of n points.
  static int64_t size(int64_t n) {
    int64_t total = 3 * round_up(n, kLeaf);
    for (int64_t levels = levels_of(n); levels > 0; --levels) {
      n = (n + kLeaf - 1) / kLeaf;
      total += 6 * round_up(n, kLeaf);
    }
    return total;
  }

  // Lays the tree of n points out in size(n) numbers and round_up(n, kLeaf) indices.
  Tree(int64_t points, T* numbers, int32_t* indices) : n(points), levels(levels_of(points)), index(indices) {
    const auto take = [&numbers](int64_t count) {
      T* part = numbers;
      numbers += round_up(count, kLeaf);
      return part;
    };
    x = take(n), y = take(n), z = take(n);
    int64_t count = n;
    for (int l = 0; l < levels; ++l) {
      level[l].count = count = (count + kLeaf - 1) / kLeaf;
      for (int axis = 0; axis < 3; ++axis) level[l].lo[axis] = take(count), level[l].hi[axis] = take(count);
    }
  }

  // 1, 2, 3 (65536 points), or else all: sampling is compiled for each number of levels (fps.h).
  static int levels_of(int64_t n) {
    int levels = 1;
    for (n = (n + kLeaf - 1) / kLeaf; n > kLeaf; n = (n + kLeaf - 1) / kLeaf) ++levels;
    return levels > 3 ? kMaxLevels : levels;
  }
};

}  // namespace reid3d
