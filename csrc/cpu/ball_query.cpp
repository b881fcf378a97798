// First k points in index order within a radius: the binding of ball_query.h.
#include <tuple>

#include "cloud.h"

namespace reid3d {
namespace {

std::tuple<Tensor, Tensor> ball_query(const Tensor& centers_, const Tensor& points_, double radius, int64_t k) {
  const Tensor centers = torch::stable::contiguous(centers_), points = torch::stable::contiguous(points_);
  const int64_t B = centers.size(0), M = centers.size(1), n = points.size(1), size = 3 * round_up(n, kLeaf);
  check_size(n);
  Tensor idx = torch::stable::new_empty(centers, {B, M, k}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(centers, {B, M}, ScalarType::Int);
  int64_t* out = idx.mutable_data_ptr<int64_t>();
  int32_t* hits = count.mutable_data_ptr<int32_t>();
  dispatch_float_double(centers, [&](auto zero) {
    using T = decltype(zero);
    const T *c = centers.const_data_ptr<T>(), *p = points.const_data_ptr<T>(), r = static_cast<T>(radius);
    const Scratch<T> panels(B * size);
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) kernels().of(T()).pack(p + b * n * 3, n, 3, panels.get() + b * size);
    });
    torch::stable::parallel_for(0, B * M, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        hits[row] = static_cast<int32_t>(
            kernels().of(T()).ball_query(c + row * 3, panels.get() + row / M * size, n, r * r, k, out + row * k));
    });
  });
  return {idx, count};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("ball_query", TORCH_BOX(&reid3d::ball_query)); }
