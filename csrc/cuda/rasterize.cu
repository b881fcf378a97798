// An exact z-buffer of triangles, a thread per face. Contract: reid3d/ops/rasterize.py.
#include "rasterize.h"

#include <tuple>

#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) clear_kernel(uint64_t* fragments, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) fragments[i] = kNothing;
}

__global__ void __launch_bounds__(kThreads)
    draw_kernel(const float* points, const int64_t* faces, int64_t B, int64_t V, int64_t F, int32_t height,
                int32_t width, uint64_t* fragments) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= B * F) return;
  const int64_t b = i / F, f = i % F;
  Corner corner[3];
  for (int k = 0; k < 3; ++k) {
    const int64_t vertex = faces[3 * f + k];
    check_index("rasterize", "faces", vertex, V);
    const float* p = points + 3 * (b * V + vertex);
    corner[k] = {p[0], p[1], p[2]};
  }
  uint64_t* image = fragments + b * height * width;
  for_covered(corner[0], corner[1], corner[2], height, width, [image, f](int64_t pixel, float z) {
    atomicMin(reinterpret_cast<unsigned long long*>(image + pixel), pack_fragment(z, static_cast<uint32_t>(f)));
  });
}

__global__ void __launch_bounds__(kThreads)
    resolve_kernel(const uint64_t* fragments, int64_t count, float infinity, float* depth, int64_t* face) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const bool seen = fragments[i] != kNothing;
  depth[i] = seen ? depth_of(fragments[i]) : infinity;
  face[i] = seen ? static_cast<int64_t>(fragments[i] & 0xffffffffu) : -1;
}

std::tuple<Tensor, Tensor> rasterize(const Tensor& points_, const Tensor& faces_, int64_t height, int64_t width) {
  const Tensor points = torch::stable::contiguous(points_), faces = torch::stable::contiguous(faces_);
  const DeviceGuard guard(points.get_device_index());
  const int64_t B = points.size(0), V = points.size(1), F = faces.size(0), count = B * height * width;
  STD_TORCH_CHECK(F <= std::numeric_limits<int32_t>::max(), "reid3d::rasterize: more than 2^31 - 1 faces");
  Tensor depth = torch::stable::new_empty(points, {B, height, width});
  Tensor face = torch::stable::new_empty(points, {B, height, width}, ScalarType::Long);
  const Tensor fragments = torch::stable::new_empty(points, {count}, ScalarType::Long);
  if (count == 0) return {depth, face};
  uint64_t* buffer = reinterpret_cast<uint64_t*>(fragments.mutable_data_ptr<int64_t>());
  const cudaStream_t stream = current_stream(points);
  clear_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(buffer, count);
  if (F > 0)
    draw_kernel<<<blocks_for(B * F, kThreads), kThreads, 0, stream>>>(
        points.const_data_ptr<float>(), faces.const_data_ptr<int64_t>(), B, V, F, static_cast<int32_t>(height),
        static_cast<int32_t>(width), buffer);
  resolve_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(
      buffer, count, std::numeric_limits<float>::infinity(), depth.mutable_data_ptr<float>(),
      face.mutable_data_ptr<int64_t>());
  check_launch("rasterize");
  return {depth, face};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("rasterize", TORCH_BOX(&reid3d::rasterize)); }
