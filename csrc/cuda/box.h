// Boxes around points that are near each other, and what they say about distances.
#pragma once

#include "lane.h"

namespace reid3d {

struct alignas(16) Box {
  float lo[4], hi[4];  // the fourth is for the alignment
};

REID3D_WARP Box box_of_point(float x, float y, float z) { return {{x, y, z, 0}, {x, y, z, 0}}; }

// fminf and fmaxf pass over NaN.
REID3D_WARP Box box_of_both(Box a, const Box& b) {
  REID3D_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    a.lo[axis] = fminf(a.lo[axis], b.lo[axis]);
    a.hi[axis] = fmaxf(a.hi[axis], b.hi[axis]);
  }
  return a;
}

// The box around the boxes of all lanes.
REID3D_WARP Box box_around(Lane<Box> box) {
  REID3D_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Lane<Box> other = box;
    REID3D_UNROLL
    for (int axis = 0; axis < 3; ++axis)
      other = map(
          [axis](Box b, float lo, float hi) {
            b.lo[axis] = lo, b.hi[axis] = hi;
            return b;
          },
          other, shfl_xor(map([axis](const Box& b) { return b.lo[axis]; }, box), step),
          shfl_xor(map([axis](const Box& b) { return b.hi[axis]; }, box), step));
    box = map([](const Box& a, const Box& b) { return box_of_both(a, b); }, box, other);
  }
  return first_lane(box);
}

// The box around up to 32 boxes.
REID3D_WARP Box box_around(const Box* boxes, int count) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Box none = box_of_point(nan, nan, nan);
  return box_around(map([=](int lane) { return lane < count ? boxes[lane] : none; }, lane_id()));
}

// No point in the box has a smaller computed distance: it is rounded in the same steps, and rounding keeps order. A NaN
// bounds nothing.
REID3D_WARP float distance_to_box(const Box& box, float x, float y, float z) {
  const float dx = fmaxf(fmaxf(box.lo[0] - x, x - box.hi[0]), 0.0f);
  const float dy = fmaxf(fmaxf(box.lo[1] - y, y - box.hi[1]), 0.0f);
  const float dz = fmaxf(fmaxf(box.lo[2] - z, z - box.hi[2]), 0.0f);
  return squared_distance3(dx, dy, dz, 0.0f, 0.0f, 0.0f);
}

}  // namespace reid3d
