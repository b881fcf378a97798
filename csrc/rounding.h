// How a squared distance is rounded: the same on every device, so that equal input gives equal indices. Coordinates are
// added in order; float is fused (rounded once), double is not. Of all choices these are the ones that the plain-torch
// reference can follow: double exactly, float but for a rare last bit (reid3d/ops/knn.py). Compile without contraction.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define REID3D_HOST_DEVICE __host__ __device__
#else
// always inlined: the CPU kernels are compiled for several instruction sets, which must not share a function
#define REID3D_HOST_DEVICE __attribute__((always_inline))
#endif

namespace reid3d {

REID3D_HOST_DEVICE inline float add_square(float sum, float difference) {
  return fmaf(difference, difference, sum);
}

REID3D_HOST_DEVICE inline double add_square(double sum, double difference) {
  return sum + difference * difference;
}

template <typename T>
REID3D_HOST_DEVICE inline T squared_distance3(T x0, T y0, T z0, T x1, T y1, T z1) {
  return add_square(add_square(add_square(T(0), x0 - x1), y0 - y1), z0 - z1);
}

}  // namespace reid3d
