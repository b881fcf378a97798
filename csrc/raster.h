// Which pixel centres a triangle covers and how deep it lies there: the same on every device. Pixel (row i, column j) has
// its centre at x = j + 0.5, y = i + 0.5. Every sum is rounded as it is written: compile without contraction.
#pragma once

#include <cstdint>

#include "rounding.h"

namespace reid3d {

struct Corner {
  float x, y, z;
};

// Twice the area of o, a, b: negative where they turn counter-clockwise as one looks at the image, whose y points down.
REID3D_HOST_DEVICE inline float signed_area(Corner o, Corner a, Corner b) {
  return (a.x - o.x) * (b.y - o.y) - (b.x - o.x) * (a.y - o.y);
}

REID3D_HOST_DEVICE inline bool is_finite(float v) { return v - v == 0; }

// The first and the last pixel of a row of `size` whose centres lie in [low, high]; last < first where there is none.
REID3D_HOST_DEVICE inline int32_t first_centre(float low, int32_t size) {
  const float edge = low - 0.5f;
  if (!(edge > 0)) return 0;
  if (edge >= static_cast<float>(size)) return size;
  const int32_t whole = static_cast<int32_t>(edge);
  return whole + (static_cast<float>(whole) < edge);
}
REID3D_HOST_DEVICE inline int32_t last_centre(float high, int32_t size) {
  const float edge = high - 0.5f;
  if (!(edge >= 0)) return -1;
  return edge >= static_cast<float>(size) ? size - 1 : static_cast<int32_t>(edge);
}

REID3D_HOST_DEVICE inline float least(float a, float b, float c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }
REID3D_HOST_DEVICE inline float most(float a, float b, float c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }

// The pixels whose centres lie in the bounding box of a triangle.
struct Box {
  int32_t x0, x1, y0, y1;
  REID3D_HOST_DEVICE Box(Corner a, Corner b, Corner c, int32_t height, int32_t width)
      : x0(first_centre(least(a.x, b.x, c.x), width)),
        x1(last_centre(most(a.x, b.x, c.x), width)),
        y0(first_centre(least(a.y, b.y, c.y), height)),
        y1(last_centre(most(a.y, b.y, c.y), height)) {}
  REID3D_HOST_DEVICE bool empty() const { return x0 > x1 || y0 > y1; }
};

// Whether a triangle of that signed area is turned to the camera and has finite corners.
REID3D_HOST_DEVICE inline bool is_front(Corner a, Corner b, Corner c, float area) {
  return area < 0 && is_finite(area) && is_finite(a.z) && is_finite(b.z) && is_finite(c.z);
}

// Calls visit(pixel, depth) for every pixel of an image whose centre a front triangle covers, its edges included.
template <typename F>
REID3D_HOST_DEVICE inline void for_covered(Corner a, Corner b, Corner c, int32_t height, int32_t width, F&& visit) {
  const Box box(a, b, c, height, width);
  const float area = signed_area(a, b, c);
  if (box.empty() || !is_front(a, b, c, area)) return;
  const float inverse = 1 / area;
  for (int32_t y = box.y0; y <= box.y1; ++y) {
    for (int32_t x = box.x0; x <= box.x1; ++x) {
      const Corner pixel{static_cast<float>(x) + 0.5f, static_cast<float>(y) + 0.5f, 0};
      // each from its own edge, not the third as the rest: triangles that share an edge leave no crack along it
      const float u = signed_area(pixel, b, c), v = signed_area(pixel, c, a), w = signed_area(pixel, a, b);
      if (u <= 0 && v <= 0 && w <= 0)
        visit(static_cast<int64_t>(y) * width + x, u * inverse * a.z + v * inverse * b.z + w * inverse * c.z);
    }
  }
}

}  // namespace reid3d
