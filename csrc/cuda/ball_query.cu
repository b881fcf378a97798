// First k points in index order within a radius, a warp per center. Contract: reid3d/ops/ball_query.py.
#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename T>
__global__ void ball_query_kernel(const T* centers, const T* points, int64_t rows, int64_t M, int64_t N, T radius2,
                                  int64_t k, int64_t* idx_all) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const T x = centers[3 * row], y = centers[3 * row + 1], z = centers[3 * row + 2];
  const T* cloud = points + row / M * N * 3;
  int64_t* idx = idx_all + row * k;
  int64_t count = 0, first = 0;
  for (int64_t base = 0; base < N && count < k; base += kWarp) {
    const int64_t i = base + lane;
    const bool hit = i < N && squared_distance3(x, y, z, cloud[3 * i], cloud[3 * i + 1], cloud[3 * i + 2]) < radius2;
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (hits && count == 0) first = base + __ffs(static_cast<int>(hits)) - 1;
    const int64_t place = count + __popc(hits & ((1u << lane) - 1));  // the hits of the lanes before this one come first
    if (hit && place < k) idx[place] = i;
    count += __popc(hits);
  }
  for (int64_t place = count + lane; place < k; place += kWarp) idx[place] = first;
}

Tensor ball_query(const Tensor& centers_, const Tensor& points_, double radius, int64_t k) {
  const Tensor centers = torch::stable::contiguous(centers_), points = torch::stable::contiguous(points_);
  const DeviceGuard guard(centers.get_device_index());
  const int64_t M = centers.size(1), rows = centers.size(0) * M;
  Tensor idx = torch::stable::new_empty(centers, {centers.size(0), M, k}, ScalarType::Long);
  if (idx.numel() == 0) return idx;
  dispatch_float_double(centers, [&](auto zero) {
    using T = decltype(zero);
    const T r = static_cast<T>(radius);
    ball_query_kernel<T><<<blocks_for(rows, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, current_stream(centers)>>>(
        centers.const_data_ptr<T>(), points.const_data_ptr<T>(), rows, M, points.size(1), r * r, k,
        idx.mutable_data_ptr<int64_t>());
    check_launch("ball_query");
  });
  return idx;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("ball_query", TORCH_BOX(&reid3d::ball_query)); }
