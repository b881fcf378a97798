// The place of a point along the Z-curve (Morton, 1966): points that are near in the order are near in space. The order
// only decides what lies together in memory, never a result; it is the same on every device all the same.
#pragma once

#include <cstdint>

#include "rounding.h"

namespace reid3d {

// Every third bit of the result is a bit of v < 1024.
REID3D_HOST_DEVICE inline uint32_t spread_bits(uint32_t v) {
  v = (v | v << 16) & 0x030000ffu;
  v = (v | v << 8) & 0x0300f00fu;
  v = (v | v << 4) & 0x030c30c3u;
  return (v | v << 2) & 0x09249249u;
}

// 1024 cells along the longest side of the cloud's box, whose lower corner is lo.
template <typename T>
struct MortonGrid {
  T lo[3], scale;

  REID3D_HOST_DEVICE MortonGrid(T x, T y, T z, T longest)
      : lo{x, y, z}, scale(longest > 0 ? T(1023) / longest : T(0)) {}

  REID3D_HOST_DEVICE uint32_t cell(T value, int axis) const {
    const T c = (value - lo[axis]) * scale;
    const T inside = c > 0 ? c : T(0);  // a NaN is in cell 0
    return static_cast<uint32_t>(static_cast<int32_t>(inside < 1023 ? inside : T(1023)));
  }

  REID3D_HOST_DEVICE uint32_t key(T x, T y, T z) const {
    return spread_bits(cell(x, 0)) | spread_bits(cell(y, 1)) << 1 | spread_bits(cell(z, 2)) << 2;
  }
};

}  // namespace reid3d
