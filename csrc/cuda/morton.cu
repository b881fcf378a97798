// The points of every cloud along the Z-curve. Contract: reid3d/ops/morton.py; the key of a point: ../morton.h. Radix
// sorts are stable, so that points of one key stay in index order.
#include "morton.cuh"

#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "../morton.h"
#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kKeyBits = 30;
constexpr int kThreads = 512;
constexpr int kChunk = 8 * kThreads;  // points of a block in the kernels for large clouds

template <typename T>
struct Corners {
  T lo[3], hi[3];

  __device__ static Corners none() {
    const T inf = infinity<T>();
    return {{inf, inf, inf}, {-inf, -inf, -inf}};
  }

  __device__ void include(const Corners& other) {
    for (int a = 0; a < 3; ++a) lo[a] = fmin(lo[a], other.lo[a]), hi[a] = fmax(hi[a], other.hi[a]);  // passes over NaN
  }
};

template <typename T>
__device__ T coordinate(const T* points, int64_t i, int dims, int axis) {
  return axis < dims ? points[i * dims + axis] : T(0);
}

template <typename T>
__device__ Corners<T> corners_of_point(const T* points, int64_t i, int dims) {
  Corners<T> c;
  for (int a = 0; a < 3; ++a) c.lo[a] = c.hi[a] = coordinate(points, i, dims, a);
  return c;
}

// What the threads of a block have between them.
template <int Threads, typename T>
__device__ Corners<T> corners_of_block(Corners<T> mine) {
  __shared__ Corners<T> of_warp[Threads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Corners<T> other;
    for (int a = 0; a < 3; ++a) {
      other.lo[a] = __shfl_xor_sync(kAllLanes, mine.lo[a], step);
      other.hi[a] = __shfl_xor_sync(kAllLanes, mine.hi[a], step);
    }
    mine.include(other);
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  for (const Corners<T>& c : of_warp) mine.include(c);
  return mine;
}

template <typename T>
__device__ MortonGrid<T> grid_of(const Corners<T>& c) {
  T longest = 0;
  for (int a = 0; a < 3; ++a)
    if (c.hi[a] - c.lo[a] > longest) longest = c.hi[a] - c.lo[a];
  return MortonGrid<T>(c.lo[0], c.lo[1], c.lo[2], longest);
}

template <typename T>
__device__ uint32_t key_of_point(const MortonGrid<T>& grid, const T* points, int64_t i, int dims) {
  return grid.key(coordinate(points, i, dims, 0), coordinate(points, i, dims, 1), coordinate(points, i, dims, 2));
}

// A cloud of up to Threads * P points in one block.
template <int Threads, int P>
__global__ void __launch_bounds__(Threads)
    morton_block_kernel(const float* points_all, int32_t N, int dims, int32_t* order_all) {
  using Sort = cub::BlockRadixSort<uint32_t, Threads, P, int32_t>;
  __shared__ typename Sort::TempStorage storage;
  const float* points = points_all + static_cast<int64_t>(blockIdx.x) * N * dims;
  int32_t* order = order_all + static_cast<int64_t>(blockIdx.x) * N;
  Corners<float> corners = Corners<float>::none();
  for (int32_t i = threadIdx.x; i < N; i += Threads) corners.include(corners_of_point(points, i, dims));
  const MortonGrid<float> grid = grid_of(corners_of_block<Threads>(corners));
  uint32_t key[P];
  int32_t index[P];
#pragma unroll
  for (int j = 0; j < P; ++j) {
    index[j] = threadIdx.x * P + j;
    key[j] = index[j] < N ? key_of_point(grid, points, index[j], dims) : ~0u;  // behind all points, by its place too
  }
  Sort(storage).SortBlockedToStriped(key, index, 0, kKeyBits);
#pragma unroll
  for (int j = 0; j < P; ++j) {
    const int32_t place = j * Threads + threadIdx.x;
    if (place < N) order[place] = index[j];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    morton_corners_kernel(const T* points_all, int32_t N, int dims, int32_t chunks, Corners<T>* corners_all) {
  const T* points = points_all + static_cast<int64_t>(blockIdx.x / chunks) * N * dims;
  const int64_t first = static_cast<int64_t>(blockIdx.x % chunks) * kChunk;
  Corners<T> corners = Corners<T>::none();
  for (int64_t i = first + threadIdx.x; i < N && i < first + kChunk; i += kThreads)
    corners.include(corners_of_point(points, i, dims));
  corners = corners_of_block<kThreads>(corners);
  if (threadIdx.x == 0) corners_all[blockIdx.x] = corners;
}

// The cloud stands above the key of a point, so that one sort does for all clouds.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    morton_keys_kernel(const T* points_all, int32_t N, int dims, int32_t chunks, const Corners<T>* corners_all,
                       uint64_t* keys, int32_t* index) {
  const int64_t cloud = blockIdx.x / chunks, first = static_cast<int64_t>(blockIdx.x % chunks) * kChunk;
  const T* points = points_all + cloud * N * dims;
  Corners<T> corners = Corners<T>::none();
  for (int32_t c = threadIdx.x; c < chunks; c += kThreads) corners.include(corners_all[cloud * chunks + c]);
  const MortonGrid<T> grid = grid_of(corners_of_block<kThreads>(corners));
  for (int64_t i = first + threadIdx.x; i < N && i < first + kChunk; i += kThreads) {
    keys[cloud * N + i] = static_cast<uint64_t>(cloud) << kKeyBits | key_of_point(grid, points, i, dims);
    index[cloud * N + i] = static_cast<int32_t>(i);
  }
}

template <int Threads, int P>
bool sort_in_blocks(const Tensor& points, Tensor& order) {
  const int64_t N = points.size(1);
  if (points.scalar_type() != ScalarType::Float || N > Threads * P) return false;
  morton_block_kernel<Threads, P><<<blocks_for(points.size(0), 1), Threads, 0, current_stream(points)>>>(
      points.const_data_ptr<float>(), static_cast<int32_t>(N), static_cast<int>(points.size(2)),
      order.mutable_data_ptr<int32_t>());
  return true;
}

template <typename T>
void sort_in_memory(const Tensor& points, Tensor& order) {
  const cudaStream_t stream = current_stream(points);
  const int64_t B = points.size(0), N = points.size(1), chunks = (N + kChunk - 1) / kChunk;
  const auto scratch = [&](int64_t bytes) { return torch::stable::new_empty(points, {bytes}, ScalarType::Byte); };
  const Tensor corners = scratch(B * chunks * sizeof(Corners<T>)), keys = scratch(B * N * 8),
               sorted = scratch(B * N * 8), index = scratch(B * N * 4);
  auto* const corners_data = static_cast<Corners<T>*>(corners.data_ptr());
  auto* const keys_data = static_cast<uint64_t*>(keys.data_ptr());
  auto* const sorted_data = static_cast<uint64_t*>(sorted.data_ptr());
  auto* const index_data = static_cast<int32_t*>(index.data_ptr());
  const int dims = static_cast<int>(points.size(2));
  const unsigned blocks = blocks_for(B * chunks, 1);
  morton_corners_kernel<T><<<blocks, kThreads, 0, stream>>>(points.const_data_ptr<T>(), static_cast<int32_t>(N), dims,
                                                            static_cast<int32_t>(chunks), corners_data);
  check_launch("morton_order");
  morton_keys_kernel<T><<<blocks, kThreads, 0, stream>>>(points.const_data_ptr<T>(), static_cast<int32_t>(N), dims,
                                                         static_cast<int32_t>(chunks), corners_data, keys_data,
                                                         index_data);
  check_launch("morton_order");
  int bits = kKeyBits;
  while (B > int64_t(1) << (bits - kKeyBits)) ++bits;
  size_t bytes = 0;
  const auto sort = [&](void* temporary) {
    const cudaError_t error =
        cub::DeviceRadixSort::SortPairs(temporary, bytes, keys_data, sorted_data, index_data,
                                        order.mutable_data_ptr<int32_t>(), B * N, 0, bits, stream);
    STD_TORCH_CHECK(error == cudaSuccess, "reid3d::morton_order: ", cudaGetErrorString(error));
  };
  sort(nullptr);  // only says how many bytes it needs
  const Tensor temporary = scratch(static_cast<int64_t>(bytes));
  sort(temporary.data_ptr());
}

}  // namespace

Tensor morton_order(const Tensor& points_) {
  const Tensor points = torch::stable::contiguous(points_);
  const DeviceGuard guard(points.get_device_index());
  STD_TORCH_CHECK(points.size(1) <= std::numeric_limits<int32_t>::max(),
                  "reid3d::morton_order: more than 2^31 - 1 points in a cloud");
  Tensor order = torch::stable::new_empty(points, {points.size(0), points.size(1)}, ScalarType::Int);
  if (order.numel() == 0) return order;
  if (!sort_in_blocks<128, 8>(points, order) && !sort_in_blocks<512, 8>(points, order))
    dispatch_float_double(points, [&](auto zero) { sort_in_memory<decltype(zero)>(points, order); });
  check_launch("morton_order");
  return order;
}

}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("morton_order", TORCH_BOX(&reid3d::morton_order)); }
