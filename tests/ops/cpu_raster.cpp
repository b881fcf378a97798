// The z-buffer of the CPU, a tile at a time, against its plain loop, and the packed fragments of CUDA.
#define REID3D_ISA native
// GCC 12 finds uninitialized variables in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../csrc/cpu/rasterize.h"
#include "../../csrc/cuda/rasterize.h"
#include "warp_clouds.h"

#include <algorithm>
#include <limits>

using namespace reid3d;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void check_image(int round, Random& random) {
  const int64_t V = 3 + pick(random, 40), F = pick(random, 70), stride = (F + 15) / 16 * 16;
  const int height = 1 + pick(random, 30), width = 1 + pick(random, 30);
  std::vector<float> points = cloud<float>(V, round % kClouds, random);
  for (int64_t i = 0; i < 3 * V; ++i) points[i] = points[i] * (i % 3 == 2 ? 1 : 40) - (i % 3 == 2 ? 0.5f : 5);
  if (round % 5 == 0) points[pick(random, 3 * V)] = round % 2 ? kInfinity : std::nanf("");
  std::vector<int32_t> corners(3 * stride, 0);
  for (int64_t f = 0; f < F; ++f)
    for (int k = 0; k < 3; ++k) corners[k * stride + f] = 3 * pick(random, V);
  std::vector<float> depth(height * width, kInfinity);
  std::vector<int64_t> face(height * width, -1);
  native::rasterize(points.data(), corners.data(), F, height, width, depth.data(), face.data());

  std::vector<uint64_t> packed(height * width, kNothing);
  const auto corner = [&](int32_t at) { return Corner{points[at], points[at + 1], points[at + 2]}; };
  for (int64_t f = F - 1; f >= 0; --f)  // in no order that matters
    for_covered(corner(corners[f]), corner(corners[stride + f]), corner(corners[2 * stride + f]), height, width,
                [&](int64_t pixel, float z) {
                  packed[pixel] = std::min(packed[pixel], pack_fragment(z, static_cast<uint32_t>(f)));
                });
  for (int64_t i = 0; i < height * width; ++i) {
    const bool seen = packed[i] != kNothing;
    CHECK((face[i] >= 0) == seen, "seen", round, i);
    if (!seen) continue;
    CHECK(face[i] == static_cast<int64_t>(packed[i] & 0xffffffffu), "face", round, i);
    CHECK(depth[i] == depth_of(packed[i]), "depth", round, i);
  }
}

}  // namespace

int main() {
  Random random(0);
  for (int round = 0; round < 3000; ++round) check_image(round, random);
  const float depths[] = {-kInfinity, -3e38f, -2, -1e-40f, 0, 1e-40f, 0.5f, 2, 3e38f, kInfinity};
  for (int i = 0; i + 1 < 10; ++i) {
    CHECK(pack_fragment(depths[i], 7) < pack_fragment(depths[i + 1], 0), i);
    CHECK(pack_fragment(depths[i], 0) < pack_fragment(depths[i], 1), i);
    CHECK(depth_of(pack_fragment(depths[i], 3)) == depths[i], i);
  }
  CHECK(pack_fragment(-0.0f, 3) == pack_fragment(0.0f, 3), 0);
  return 0;
}
