// An exact z-buffer of triangles: the binding of rasterize.h.
#include <algorithm>
#include <tuple>

#include "corners.h"

namespace reid3d {
namespace {

std::tuple<Tensor, Tensor> rasterize(const Tensor& points_, const Tensor& faces_, int64_t height, int64_t width) {
  const Tensor points = torch::stable::contiguous(points_), faces = torch::stable::contiguous(faces_);
  const int64_t B = points.size(0), V = points.size(1), F = faces.size(0), pixels = height * width;
  check_size(3 * V);
  Tensor depth = torch::stable::new_empty(points, {B, height, width});
  Tensor face = torch::stable::new_empty(points, {B, height, width}, ScalarType::Long);
  check_indices(faces, 0, V, "faces");
  const Scratch<int32_t> corners(3 * round_up(F, kLeaf));
  fill_corners(faces, corners.get());
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
