// Depth and face in one number that sorts by depth, then by face, so that one atomic minimum keeps the nearest.
#pragma once

#include <cstdint>
#include <cstring>

#include "../raster.h"

namespace reid3d {

constexpr uint64_t kNothing = ~uint64_t{0};

REID3D_HOST_DEVICE inline uint64_t pack_fragment(float depth, uint32_t face) {
  depth += 0.0f;  // -0 becomes 0, which has other bits
  uint32_t bits;
  memcpy(&bits, &depth, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;  // sorts like the number, negative ones too
  return static_cast<uint64_t>(bits) << 32 | face;
}

REID3D_HOST_DEVICE inline float depth_of(uint64_t fragment) {
  uint32_t bits = static_cast<uint32_t>(fragment >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float depth;
  memcpy(&depth, &bits, sizeof depth);
  return depth;
}

}  // namespace reid3d
