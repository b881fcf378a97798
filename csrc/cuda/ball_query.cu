// First k points in index order within a radius, a warp per center. Contract: reid3d/ops/ball_query.py.
#include "ball_query.h"

#include <tuple>

#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    ball_query_kernel(const T* centers, const T* points, int64_t rows, int64_t M, int64_t N, T radius2, int64_t k,
                      int64_t* idx, int32_t* count) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const T* c = centers + 3 * row;
  const int64_t found = ball_query_warp(points + row / M * N * 3, N, c[0], c[1], c[2], radius2, k, idx + row * k);
  if (threadIdx.x % kWarp == 0) count[row] = static_cast<int32_t>(found);
}

std::tuple<Tensor, Tensor> ball_query(const Tensor& centers_, const Tensor& points_, double radius, int64_t k) {
  const Tensor centers = torch::stable::contiguous(centers_), points = torch::stable::contiguous(points_);
  const DeviceGuard guard(centers.get_device_index());
  const int64_t B = centers.size(0), M = centers.size(1);
  STD_TORCH_CHECK(points.size(1) <= std::numeric_limits<int32_t>::max(),
                  "reid3d::ball_query: more than 2^31 - 1 points in a cloud");
  Tensor idx = torch::stable::new_empty(centers, {B, M, k}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(centers, {B, M}, ScalarType::Int);
  if (count.numel() == 0) return {idx, count};
  dispatch_float_double(centers, [&](auto zero) {
    using T = decltype(zero);
    const T r = static_cast<T>(radius);
    ball_query_kernel<T><<<blocks_for(B * M, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, current_stream(centers)>>>(
        centers.const_data_ptr<T>(), points.const_data_ptr<T>(), B * M, M, points.size(1), r * r, k,
        idx.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int32_t>());
    check_launch("ball_query");
  });
  return {idx, count};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("ball_query", TORCH_BOX(&reid3d::ball_query)); }
