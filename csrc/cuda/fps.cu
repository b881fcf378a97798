// Farthest point sampling, a block per cloud. Contract: reid3d/ops/fps.py; what a warp does: fps.h.
#include "fps.h"

#include <optional>

#include "launch.cuh"
#include "morton.cuh"

namespace reid3d {
namespace {

constexpr int kMemoryThreads = 1024;

// One barrier a step is enough: what is named in a step is overwritten two steps later, and before that every warp has
// been at the barrier between.
template <int Threads, int P>
__global__ void __launch_bounds__(Threads, 1)
    fps_registers_kernel(const float* xyz_all, int32_t N, int64_t m, int32_t start, int64_t* picked_all) {
  __shared__ FpsName names[2][Threads / kWarp];
  const float* xyz = xyz_all + static_cast<int64_t>(blockIdx.x) * N * 3;
  int64_t* picked = picked_all + blockIdx.x * m;
  const int warp = threadIdx.x / kWarp;
  FpsRegisters<Threads, P> cloud(xyz, N, warp);
  int32_t current = start;
  for (int64_t step = 0; step < m; ++step) {
    if (threadIdx.x == 0) picked[step] = current;
    if (step + 1 == m) break;
    const float* p = xyz + 3 * current;
    const FpsName name = cloud.pick(current, p[0], p[1], p[2]);
    if (threadIdx.x % kWarp == 0) names[step % 2][warp] = name;
    __syncthreads();
    current = fps_choose(names[step % 2], Threads / kWarp).index;
  }
}

template <int Threads, int P>
__global__ void __launch_bounds__(Threads, 1)
    fps_slab_kernel(const float* xyz_all, const int32_t* order_all, int32_t N, int64_t m, int32_t start,
                    int64_t* picked_all) {
  __shared__ FpsName names[2][Threads / kWarp];
  const float* xyz = xyz_all + static_cast<int64_t>(blockIdx.x) * N * 3;
  const int32_t* order = order_all + static_cast<int64_t>(blockIdx.x) * N;
  int64_t* picked = picked_all + blockIdx.x * m;
  const int warp = threadIdx.x / kWarp;
  for (int32_t place = threadIdx.x; place < N; place += Threads)
    check_index("farthest_point_sample", "order", order[place], N);
  __syncthreads();
  FpsSlab<Threads, P> slab(xyz, order, N, warp);
  FpsChoice current{start, warp};  // which slab it is in is not known: each takes it for its own
  for (int64_t step = 0; step < m; ++step) {
    if (threadIdx.x == 0) picked[step] = current.index;
    if (step + 1 == m) break;
    const float* p = xyz + 3 * current.index;
    const FpsName name = slab.pick(current.index, current.warp == warp, p[0], p[1], p[2]);
    if (threadIdx.x % kWarp == 0) names[step % 2][warp] = name;
    __syncthreads();
    current = fps_choose(names[step % 2], Threads / kWarp);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMemoryThreads)
    fps_memory_kernel(const T* xyz_all, int32_t N, int64_t m, int32_t start, T* dist2_all, int64_t* picked_all) {
  __shared__ Farthest<T> names[2][kMemoryThreads / kWarp];
  const int64_t cloud_start = static_cast<int64_t>(blockIdx.x) * N;
  int64_t* picked = picked_all + blockIdx.x * m;
  const int warp = threadIdx.x / kWarp;
  const FpsMemory<T> cloud{xyz_all + cloud_start * 3, dist2_all + cloud_start, N, kMemoryThreads, warp};
  cloud.start();
  int32_t current = start;
  for (int64_t step = 0; step < m; ++step) {
    if (threadIdx.x == 0) picked[step] = current;
    if (step + 1 == m) break;
    const T* p = cloud.xyz + static_cast<int64_t>(3) * current;
    const Farthest<T> name = cloud.pick(current, p[0], p[1], p[2]);
    if (threadIdx.x % kWarp == 0) names[step % 2][warp] = name;
    __syncthreads();
    current = FpsMemory<T>::choose(names[step % 2], kMemoryThreads / kWarp);
  }
}

bool fits(const Tensor& xyz, int64_t points) { return xyz.scalar_type() == ScalarType::Float && xyz.size(1) <= points; }

template <int Threads, int P>
bool sample_in_registers(const Tensor& xyz, int64_t m, int32_t start, int64_t* picked) {
  if (!fits(xyz, Threads * P)) return false;
  fps_registers_kernel<Threads, P><<<blocks_for(xyz.size(0), 1), Threads, 0, current_stream(xyz)>>>(
      xyz.const_data_ptr<float>(), static_cast<int32_t>(xyz.size(1)), m, start, picked);
  return true;
}

template <int Threads, int P>
bool sample_in_slabs(const Tensor& xyz, const std::optional<Tensor>& order, int64_t m, int32_t start, int64_t* picked) {
  if (!fits(xyz, Threads * P)) return false;
  const Tensor places = order ? torch::stable::contiguous(*order) : morton_order(xyz);
  fps_slab_kernel<Threads, P><<<blocks_for(xyz.size(0), 1), Threads, 0, current_stream(xyz)>>>(
      xyz.const_data_ptr<float>(), places.const_data_ptr<int32_t>(), static_cast<int32_t>(xyz.size(1)), m, start,
      picked);
  return true;
}

template <typename T>
void sample_in_memory(const Tensor& xyz, int64_t m, int32_t start, int64_t* picked) {
  const Tensor dist2 = torch::stable::new_empty(xyz, {xyz.size(0), xyz.size(1)});
  fps_memory_kernel<T><<<blocks_for(xyz.size(0), 1), kMemoryThreads, 0, current_stream(xyz)>>>(
      xyz.const_data_ptr<T>(), static_cast<int32_t>(xyz.size(1)), m, start, dist2.mutable_data_ptr<T>(), picked);
}

Tensor farthest_point_sample(const Tensor& xyz_, const std::optional<Tensor>& order, int64_t m, int64_t start_) {
  const Tensor xyz = torch::stable::contiguous(xyz_);
  const DeviceGuard guard(xyz.get_device_index());
  const int64_t B = xyz.size(0), N = xyz.size(1);
  STD_TORCH_CHECK(N <= std::numeric_limits<int32_t>::max(),
                  "reid3d::farthest_point_sample: more than 2^31 - 1 points in a cloud");
  STD_TORCH_CHECK(!order || order->numel() == B * N,
                  "reid3d::farthest_point_sample: order must have an entry for every point");
  Tensor result = torch::stable::new_empty(xyz, {B, m}, ScalarType::Long);
  if (result.numel() == 0) return result;
  int64_t* const picked = result.mutable_data_ptr<int64_t>();
  const auto start = static_cast<int32_t>(start_);
  if (!sample_in_registers<64, 4>(xyz, m, start, picked) && !sample_in_registers<128, 8>(xyz, m, start, picked) &&
      !sample_in_slabs<512, 4>(xyz, order, m, start, picked) &&
      !sample_in_slabs<512, 8>(xyz, order, m, start, picked) && !sample_in_registers<512, 16>(xyz, m, start, picked))
    dispatch_float_double(xyz, [&](auto zero) { sample_in_memory<decltype(zero)>(xyz, m, start, picked); });
  check_launch("farthest_point_sample");
  return result;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&reid3d::farthest_point_sample));
}
