// An exact z-buffer of triangles. Contract: reid3d/ops/rasterize.py.
#pragma once

#include "../raster.h"
#include "simd.h"

namespace reid3d::REID3D_ISA {

// Whether some pixel centre k + 0.5 lies between the least and the most of three numbers.
REID3D_INLINE uint32_t holds_centre(Vec<float> a, Vec<float> b, Vec<float> c) {
  const Vec<float> half = Vec<float>::all(0.5f), low = min(min(a, b), c) - half, high = max(max(a, b), c) - half;
  return bits(low <= floor(high));
}

// Sixteen pixel centres: four columns of four rows.
struct Tile {
  Vec<float> x, y;
};
inline Tile tile_at(int32_t column, int32_t row) {
  alignas(64) static constexpr float across[kLanes] = {0.5f, 1.5f, 2.5f, 3.5f, 0.5f, 1.5f, 2.5f, 3.5f,
                                                       0.5f, 1.5f, 2.5f, 3.5f, 0.5f, 1.5f, 2.5f, 3.5f};
  alignas(64) static constexpr float down[kLanes] = {0.5f, 0.5f, 0.5f, 0.5f, 1.5f, 1.5f, 1.5f, 1.5f,
                                                     2.5f, 2.5f, 2.5f, 2.5f, 3.5f, 3.5f, 3.5f, 3.5f};
  return {Vec<float>::load(across) + Vec<float>::all(static_cast<float>(column)),
          Vec<float>::load(down) + Vec<float>::all(static_cast<float>(row))};
}
// The lanes of a tile in its first `columns` columns and `rows` rows.
REID3D_INLINE uint32_t lanes_within(int32_t columns, int32_t rows) {
  constexpr uint32_t first[5] = {0, 0x1111, 0x3333, 0x7777, 0xffff};
  return first[columns < 4 ? columns : 4] & ((1u << 4 * (rows < 4 ? rows : 4)) - 1);
}

// ../raster.h's for_covered, a tile at a time.
template <typename F>
REID3D_INLINE void for_covered_tiles(Corner a, Corner b, Corner c, int32_t height, int32_t width, F&& visit) {
  const Box box(a, b, c, height, width);
  const float area = signed_area(a, b, c);
  if (box.empty() || !is_front(a, b, c, area)) return;
  const auto all = [](float x) { return Vec<float>::all(x); };
  const float inverse = 1 / area;
  for (int32_t row = box.y0; row <= box.y1; row += 4) {
    for (int32_t column = box.x0; column <= box.x1; column += 4) {
      const Tile pixel = tile_at(column, row);
      const Vec<float> ax = all(a.x) - pixel.x, bx = all(b.x) - pixel.x, cx = all(c.x) - pixel.x;
      const Vec<float> ay = all(a.y) - pixel.y, by = all(b.y) - pixel.y, cy = all(c.y) - pixel.y;
      const Vec<float> u = bx * cy - cx * by, v = cx * ay - ax * cy, w = ax * by - bx * ay, zero = all(0);
      uint32_t covered = lanes_within(box.x1 - column + 1, box.y1 - row + 1) & bits(u <= zero) & bits(v <= zero) &
                         bits(w <= zero);
      if (!covered) continue;
      alignas(64) float z[kLanes];
      (u * all(inverse) * all(a.z) + v * all(inverse) * all(b.z) + w * all(inverse) * all(c.z)).store(z);
      for (; covered; covered &= covered - 1) {
        const int lane = __builtin_ctz(covered);
        visit(static_cast<int64_t>(row + lane / 4) * width + column + lane % 4, z[lane]);
      }
    }
  }
}

// `corners` holds the three corners of every face, times 3, as three rows of `faces` rounded up to 16; what follows the
// last face is 0, a face without area.
inline void rasterize(const float* points, const int32_t* corners, int64_t faces, int64_t height, int64_t width,
                      float* depth, int64_t* face) {
  const int64_t stride = (faces + kLanes - 1) / kLanes * kLanes;
  const auto corner = [points](int32_t at) { return Corner{points[at], points[at + 1], points[at + 2]}; };
  for (int64_t first = 0; first < faces; first += kLanes) {
    const int32_t *a = corners + first, *b = a + stride, *c = b + stride;
    const Vec<float> ax = gather(points, a), bx = gather(points, b), cx = gather(points, c);
    const Vec<float> ay = gather(points + 1, a), by = gather(points + 1, b), cy = gather(points + 1, c);
    // Most faces of a body are turned away or lie between the centres; only the others are looked at one by one.
    const Vec<float> area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay);
    uint32_t drawn = bits(area < Vec<float>::all(0)) & holds_centre(ax, bx, cx) & holds_centre(ay, by, cy);
    for (; drawn; drawn &= drawn - 1) {
      const int lane = __builtin_ctz(drawn);
      for_covered_tiles(corner(a[lane]), corner(b[lane]), corner(c[lane]), static_cast<int32_t>(height),
                        static_cast<int32_t>(width), [&](int64_t pixel, float z) {
                          if (z < depth[pixel]) {
                            depth[pixel] = z;
                            face[pixel] = first + lane;
                          }
                        });
    }
  }
}

}  // namespace reid3d::REID3D_ISA
