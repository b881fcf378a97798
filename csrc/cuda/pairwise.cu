// k nearest neighbours by all distances. Contract: reid3d/ops/knn.py. Distances are direct differences: by a matrix
// product, |q|^2 - 2qp + |p|^2 would lose the neighbours of a cloud far from the origin. Of a cloud with itself half of
// them are enough. They go to a matrix in memory, of which a warp takes a row.
#include "pairwise.cuh"

#include <cuda_pipeline.h>

#include <algorithm>

#include "pairwise.h"
#include "select.h"

namespace reid3d {
namespace {

constexpr int64_t kScratch = int64_t{1} << 28;  // bytes of the matrix; more distances take several passes
constexpr int kSelectWarps = 8;

// matrix (clouds,rows,stride). A block per tile; of a cloud with itself only the tiles that `symmetric` leaves.
template <typename T, int P>
__global__ void __launch_bounds__(PairTile<T, P>::kThreads, 2)
    distances_kernel(const T* query, const T* points, int32_t rows, int32_t columns, int32_t D, int32_t stride,
                     int32_t tiles, bool symmetric, T* matrix) {
  using Tile = PairTile<T, P>;
  __shared__ alignas(32) typename Tile::Points a[2], b[2];
  const int32_t tile_index = blockIdx.x % tiles, across = (columns + Tile::kSide - 1) / Tile::kSide;
  int32_t tile_row = tile_index / across, tile_column = tile_index % across;
  if (symmetric) upper_tile(tile_index, across, tile_row, tile_column);
  const int32_t low = tile_row * Tile::kSide, left = tile_column * Tile::kSide;
  const int64_t cloud = blockIdx.x / tiles;
  query += cloud * rows * D;
  points += cloud * columns * D;
  matrix += cloud * rows * stride;

  const auto fetch = [&](int32_t first, int stage) {
    const auto copy = [](T* to, const T* from, bool there) {
      __pipeline_memcpy_async(to, from, sizeof(T), there ? 0 : sizeof(T));
    };
    Tile::fetch(threadIdx.x, a[stage], query, low, rows, D, first, copy);
    Tile::fetch(threadIdx.x, b[stage], points, left, columns, D, first, copy);
    __pipeline_commit();
  };
  Tile tile;
  if (D > 0) fetch(0, 0);
  int stage = 0;
  for (int32_t first = 0; first < D; first += Tile::kDepth, stage ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this stage is here, and all have done with the other one
    if (first + Tile::kDepth < D) fetch(first + Tile::kDepth, stage ^ 1);
    tile.add(threadIdx.x, a[stage], b[stage], min(D - first, int32_t{Tile::kDepth}));
  }
  tile.write(threadIdx.x, matrix, stride, low, rows, left, columns, false);
  if (symmetric && tile_row != tile_column) tile.write(threadIdx.x, matrix, stride, left, columns, low, rows, true);
}

template <int R>
__global__ void __launch_bounds__(kSelectWarps * kWarp, 4)
    select_kernel(const float* matrix, int64_t rows, int64_t stride, int64_t k, float* dist2, int64_t* idx) {
  __shared__ uint64_t waiting[kSelectWarps][kWaiting];
  const int warp = threadIdx.x / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectWarps + warp;
  if (row >= rows) return;
  k_smallest<R>(matrix + row * stride, stride, k, waiting[warp], dist2 + row * k, idx + row * k);
}

__global__ void __launch_bounds__(kSelectWarps * kWarp, 4)
    select_kernel(const double* matrix, int64_t rows, int64_t stride, int64_t k, double* dist2, int64_t* idx) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  k_smallest(matrix + row * stride, stride, k, dist2 + row * k, idx + row * k);
}

void select(const float* matrix, int64_t rows, int64_t stride, int64_t k, float* dist2, int64_t* idx,
            cudaStream_t stream) {
  const unsigned blocks = blocks_for(rows, kSelectWarps);
  const auto kernel = k <= kWarp ? &select_kernel<1> : &select_kernel<4>;
  kernel<<<blocks, kSelectWarps * kWarp, 0, stream>>>(matrix, rows, stride, k, dist2, idx);
}

void select(const double* matrix, int64_t rows, int64_t stride, int64_t k, double* dist2, int64_t* idx,
            cudaStream_t stream) {
  const unsigned blocks = blocks_for(rows, kSelectWarps);
  select_kernel<<<blocks, kSelectWarps * kWarp, 0, stream>>>(matrix, rows, stride, k, dist2, idx);
}

int64_t tiles_of(int64_t rows, int64_t columns, int64_t side, bool symmetric) {
  const int64_t down = (rows + side - 1) / side, across = (columns + side - 1) / side;
  return symmetric ? down * (down + 1) / 2 : down * across;
}

template <typename T, int P>
void fill(const T* query, const T* points, int64_t clouds, int64_t rows, int64_t columns, int64_t D, int64_t stride,
          bool symmetric, T* matrix, cudaStream_t stream) {
  using Tile = PairTile<T, P>;
  const int64_t tiles = tiles_of(rows, columns, Tile::kSide, symmetric);
  const unsigned blocks = blocks_for(clouds * tiles, 1);
  distances_kernel<T, P><<<blocks, Tile::kThreads, 0, stream>>>(
      query, points, static_cast<int32_t>(rows), static_cast<int32_t>(columns), static_cast<int32_t>(D),
      static_cast<int32_t>(stride), static_cast<int32_t>(tiles), symmetric, matrix);
}

}  // namespace

std::tuple<Tensor, Tensor> knn_pairwise(const Tensor& query_, const Tensor& points_, int64_t k) {
  const Tensor query = torch::stable::contiguous(query_), points = torch::stable::contiguous(points_);
  const DeviceGuard guard(query.get_device_index());
  const int64_t B = query.size(0), M = query.size(1), N = points.size(1), D = points.size(2);
  constexpr int64_t most = (int64_t{1} << 31) - 256;  // a tile beyond the last point has a number too
  STD_TORCH_CHECK(N <= most && D <= most, "reid3d::knn: more than ", most, " points in a cloud, or dimensions");
  Tensor dist2 = torch::stable::new_empty(query, {B, M, k});
  Tensor idx = torch::stable::new_empty(query, {B, M, k}, ScalarType::Long);
  if (idx.numel() == 0) return {dist2, idx};
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, query.get_device_index());
  const cudaStream_t stream = current_stream(query);
  dispatch_float_double(query, [&](auto zero) {
    using T = decltype(zero);
    const T *q = query.const_data_ptr<T>(), *p = points.const_data_ptr<T>();
    T* d = dist2.mutable_data_ptr<T>();
    int64_t* i = idx.mutable_data_ptr<int64_t>();
    const int64_t stride = (N + 3) / 4 * 4, fit = std::max<int64_t>(kScratch / sizeof(T) / stride, 128);  // rows
    const int64_t rows = std::min(M, fit / 128 * 128), clouds = rows < M ? 1 : std::min(B, fit / M);
    const bool symmetric = rows == N && M == N && q == p;
    const Tensor scratch = torch::stable::new_empty(query, {clouds * rows * stride});
    T* matrix = scratch.mutable_data_ptr<T>();
    for (int64_t b = 0; b < B; b += clouds) {
      const int64_t count = std::min(clouds, B - b);
      for (int64_t m = 0; m < M; m += rows) {
        const int64_t size = std::min(rows, M - m), first = b * M + m;
        if constexpr (std::is_same_v<T, float>) {
          const bool large = count * tiles_of(size, N, 128, symmetric) >= 2 * multiprocessors;
          const auto fill_with = large ? &fill<T, 8> : &fill<T, 4>;
          fill_with(q + first * D, p + b * N * D, count, size, N, D, stride, symmetric, matrix, stream);
        } else {
          fill<T, 4>(q + first * D, p + b * N * D, count, size, N, D, stride, symmetric, matrix, stream);
        }
        check_launch("knn");
        select(matrix, count * size, stride, k, d + first * k, i + first * k, stream);
        check_launch("knn");
      }
    }
  });
  return {dist2, idx};
}

}  // namespace reid3d
