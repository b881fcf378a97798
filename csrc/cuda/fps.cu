// Farthest point sampling, a block per cloud. Contract: reid3d/ops/fps.py.
#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kThreads = 512;

// The larger distance; the lower index where they are equal.
template <typename T>
__device__ void keep_farther(T& d, int64_t& i, T other_d, int64_t other_i) {
  if (other_d > d || (other_d == d && other_i < i)) d = other_d, i = other_i;
}

template <typename T>
__device__ void warp_farthest(T& d, int64_t& i) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other_d = __shfl_xor_sync(kAllLanes, d, offset);
    const int64_t other_i = __shfl_xor_sync(kAllLanes, i, offset);
    keep_farther(d, i, other_d, other_i);
  }
}

// dist2, (B,N), holds the squared distance to the nearest picked point: +inf before the first, -1 for NaN points,
// -inf once picked.
template <typename T>
__global__ void fps_kernel(const T* xyz_all, int64_t N, int64_t m, int64_t start, T* dist2_all, int64_t* picked_all) {
  __shared__ T warp_d[kThreads / kWarp];
  __shared__ int64_t warp_i[kThreads / kWarp];
  const T* xyz = xyz_all + blockIdx.x * N * 3;
  T* dist2 = dist2_all + blockIdx.x * N;
  int64_t* picked = picked_all + blockIdx.x * m;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // A thread reads and writes only its own entries of dist2, every kThreads-th: no barrier is needed for them.
  for (int64_t i = threadIdx.x; i < N; i += kThreads) {
    const bool number = xyz[3 * i] == xyz[3 * i] && xyz[3 * i + 1] == xyz[3 * i + 1] && xyz[3 * i + 2] == xyz[3 * i + 2];
    dist2[i] = number ? infinity<T>() : T(-1);
  }
  int64_t current = start;
  for (int64_t step = 0; step < m; ++step) {
    if (threadIdx.x == 0) picked[step] = current;
    const T x = xyz[3 * current], y = xyz[3 * current + 1], z = xyz[3 * current + 2];
    T best = -infinity<T>();
    int64_t best_i = N;
    for (int64_t i = threadIdx.x; i < N; i += kThreads) {
      const T d = squared_distance3(xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2], x, y, z);
      T nearest = d < dist2[i] ? d : dist2[i];  // a NaN leaves what was there
      if (i == current) nearest = -infinity<T>();
      dist2[i] = nearest;
      if (nearest > best) best = nearest, best_i = i;
    }
    warp_farthest(best, best_i);
    if (lane == 0) warp_d[warp] = best, warp_i[warp] = best_i;
    __syncthreads();
    best = warp_d[lane % (kThreads / kWarp)];
    best_i = warp_i[lane % (kThreads / kWarp)];
    warp_farthest(best, best_i);
    current = best_i < N ? best_i : start;  // after the last pick nothing is left, and nothing is read any more
    __syncthreads();
  }
}

Tensor farthest_point_sample(const Tensor& xyz_, int64_t m, int64_t start) {
  const Tensor xyz = torch::stable::contiguous(xyz_);
  const DeviceGuard guard(xyz.get_device_index());
  const int64_t B = xyz.size(0), N = xyz.size(1);
  Tensor picked = torch::stable::new_empty(xyz, {B, m}, ScalarType::Long);
  if (picked.numel() == 0) return picked;
  const Tensor dist2 = torch::stable::new_empty(xyz, {B, N});
  dispatch_float_double(xyz, [&](auto zero) {
    using T = decltype(zero);
    fps_kernel<T><<<blocks_for(B, 1), kThreads, 0, current_stream(xyz)>>>(
        xyz.const_data_ptr<T>(), N, m, start, dist2.mutable_data_ptr<T>(), picked.mutable_data_ptr<int64_t>());
    check_launch("farthest_point_sample");
  });
  return picked;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&reid3d::farthest_point_sample));
}
