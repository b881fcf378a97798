// Farthest point sampling, one cloud after the other in every thread. Contract: reid3d/ops/fps.py.
#include "columns.h"

namespace reid3d {
namespace {

// Distances to the nearest picked point after p was picked, and the largest of them.
template <typename T>
REID3D_INLINE T relax(const T* x, const T* y, const T* z, int64_t n, int64_t p, T* dist2) {
  T farthest = -std::numeric_limits<T>::infinity();
  const T px = x[p], py = y[p], pz = z[p];
#pragma omp simd reduction(max : farthest)
  for (int64_t i = 0; i < n; ++i) {
    const T d = squared_distance3(x[i], y[i], z[i], px, py, pz);
    const T nearest = d < dist2[i] ? d : dist2[i];  // a NaN leaves what was there
    dist2[i] = nearest;
    farthest = nearest > farthest ? nearest : farthest;
  }
  return farthest;
}

// The lowest i with dist2[i] == value. It exists; the tail of dist2 up to a full tile never equals it.
template <typename T>
REID3D_INLINE int64_t first_equal(const T* dist2, T value) {
  for (int64_t tile = 0;; tile += kTile) {
    int found = 0;
    for (int64_t j = tile; j < tile + kTile; ++j) found |= dist2[j] == value;
    if (!found) continue;
    while (dist2[tile] != value) ++tile;
    return tile;
  }
}

template <typename T>
REID3D_INLINE void sample(const T* columns, int64_t n, int64_t stride, int64_t m, int64_t start, T* dist2,
                          int64_t* picked) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  const T *x = columns, *y = x + stride, *z = y + stride;
  // NaN points, and with them the tail, wait at -1 until nothing else is left; a picked point leaves to -inf.
  for (int64_t i = 0; i < stride; ++i) dist2[i] = (x[i] == x[i]) & (y[i] == y[i]) & (z[i] == z[i]) ? inf : T(-1);
  for (int64_t i = n; i < stride; ++i) dist2[i] = -inf;
  int64_t current = start;
  for (int64_t i = 0; i < m; ++i) {
    picked[i] = current;
    if (i + 1 == m) break;
    dist2[current] = -inf;
    current = first_equal(dist2, relax(x, y, z, stride, current, dist2));
  }
}

REID3D_HOT void sample_of(const float* columns, int64_t n, int64_t stride, int64_t m, int64_t start, float* dist2,
                          int64_t* picked) {
  sample(columns, n, stride, m, start, dist2, picked);
}

REID3D_HOT void sample_of(const double* columns, int64_t n, int64_t stride, int64_t m, int64_t start, double* dist2,
                          int64_t* picked) {
  sample(columns, n, stride, m, start, dist2, picked);
}

Tensor farthest_point_sample(const Tensor& xyz_, int64_t m, int64_t start) {
  const Tensor xyz = torch::stable::contiguous(xyz_);
  const int64_t B = xyz.size(0);
  Tensor picked = torch::stable::new_empty(xyz, {B, m}, ScalarType::Long);
  dispatch_float_double(xyz, [&](auto zero) {
    using T = decltype(zero);
    const Columns<T> columns(xyz);
    int64_t* out = picked.mutable_data_ptr<int64_t>();
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> dist2(static_cast<size_t>(columns.stride));
      for (int64_t b = begin; b < end; ++b)
        sample_of(columns.cloud(b), columns.n, columns.stride, m, start, dist2.data(), out + b * m);
    });
  });
  return picked;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&reid3d::farthest_point_sample));
}
