// First k points in index order within a radius. Contract: reid3d/ops/ball_query.py.
#include "columns.h"

namespace reid3d {
namespace {

template <typename T>
REID3D_INLINE void first_within(const T* center, const T* columns, int64_t n, int64_t stride, T radius2, int64_t k,
                                int64_t* idx) {
  T dist2[kTile];
  int64_t count = 0;
  for (int64_t tile = 0; tile < n && count < k; tile += kTile) {
    tile_distances(center, columns + tile, stride, 3, dist2);
    int hit = 0;
    for (int64_t j = 0; j < kTile; ++j) hit |= dist2[j] < radius2;  // the NaN of the tail is no hit
    if (!hit) continue;
    for (int64_t j = 0; j < kTile && count < k; ++j)
      if (dist2[j] < radius2) idx[count++] = tile + j;
  }
  for (const int64_t first = count ? idx[0] : 0; count < k; ++count) idx[count] = first;
}

REID3D_HOT void first_within_of(const float* center, const float* columns, int64_t n, int64_t stride, float radius2,
                                int64_t k, int64_t* idx) {
  first_within(center, columns, n, stride, radius2, k, idx);
}

REID3D_HOT void first_within_of(const double* center, const double* columns, int64_t n, int64_t stride, double radius2,
                                int64_t k, int64_t* idx) {
  first_within(center, columns, n, stride, radius2, k, idx);
}

Tensor ball_query(const Tensor& centers_, const Tensor& points_, double radius, int64_t k) {
  const Tensor centers = torch::stable::contiguous(centers_), points = torch::stable::contiguous(points_);
  const int64_t B = centers.size(0), M = centers.size(1);
  Tensor idx = torch::stable::new_empty(centers, {B, M, k}, ScalarType::Long);
  dispatch_float_double(centers, [&](auto zero) {
    using T = decltype(zero);
    const Columns<T> columns(points);
    const T* c = centers.const_data_ptr<T>();
    int64_t* out = idx.mutable_data_ptr<int64_t>();
    const T r = static_cast<T>(radius);
    torch::stable::parallel_for(0, B * M, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        first_within_of(c + row * 3, columns.cloud(row / M), columns.n, columns.stride, r * r, k, out + row * k);
    });
  });
  return idx;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("ball_query", TORCH_BOX(&reid3d::ball_query)); }
