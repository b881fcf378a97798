// An exact z-buffer of triangles: the binding of rasterize.h.
#include <algorithm>
#include <tuple>

#include "cloud.h"

namespace reid3d {
namespace {

std::tuple<Tensor, Tensor> rasterize(const Tensor& points_, const Tensor& faces_, int64_t height, int64_t width) {
  const Tensor points = torch::stable::contiguous(points_), faces = torch::stable::contiguous(faces_);
  const int64_t B = points.size(0), V = points.size(1), F = faces.size(0), pixels = height * width;
  check_size(3 * V);
  Tensor depth = torch::stable::new_empty(points, {B, height, width});
  Tensor face = torch::stable::new_empty(points, {B, height, width}, ScalarType::Long);
  const int64_t* corner = faces.const_data_ptr<int64_t>();
  const int64_t stride = round_up(F, kLeaf);
  const Scratch<int32_t> corners(3 * stride);
  std::fill_n(corners.get(), 3 * stride, 0);
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t vertex = corner[3 * f + k];
      STD_TORCH_CHECK(0 <= vertex && vertex < V, "faces must hold indices between 0 and ", V - 1, ", got ", vertex);
      corners.get()[k * stride + f] = static_cast<int32_t>(3 * vertex);
    }
  }
  const float* p = points.const_data_ptr<float>();
  float* z = depth.mutable_data_ptr<float>();
  int64_t* index = face.mutable_data_ptr<int64_t>();
  std::fill_n(z, B * pixels, std::numeric_limits<float>::infinity());
  std::fill_n(index, B * pixels, -1);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels().rasterize(p + b * V * 3, corners.get(), F, height, width, z + b * pixels, index + b * pixels);
  });
  return {depth, face};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("rasterize", TORCH_BOX(&reid3d::rasterize)); }
