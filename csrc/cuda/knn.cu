// k nearest neighbours. In float32 and up to 3 dimensions a warp walks through queries along the Z-curve (knn.h); all
// else is compared pair by pair (pairwise.cu). Contract: reid3d/ops/knn.py.
#include "knn.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "launch.cuh"
#include "morton.cuh"
#include "pairwise.cuh"

namespace reid3d {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int64_t kMostPoints = int64_t(1) << 30;  // places of points are int32

// The ordered clouds of a batch, one behind the other.
struct OrderedClouds {
  OrderedCloud first;

  REID3D_HOST_DEVICE OrderedCloud operator[](int64_t b) const {
    return {first.points + b * first.leaves * kWarp, first.leaf_boxes + b * first.leaves,
            first.branch_boxes + b * first.branches, first.N, first.leaves, first.branches};
  }
};

// A block per branch, a warp per leaf.
__global__ void __launch_bounds__(kWarp* kWarp)
    order_kernel(const float* xyz_all, int dims, const int32_t* order_all, OrderedClouds clouds) {
  __shared__ Box boxes[kWarp];
  const int64_t b = blockIdx.x / clouds.first.branches;
  const int32_t branch = blockIdx.x % clouds.first.branches, warp = threadIdx.x / kWarp, leaf = branch * kWarp + warp;
  const OrderedCloud cloud = clouds[b];
  const int32_t* order = order_all + b * cloud.N;
  if (leaf < cloud.leaves) {
    const int32_t place = branch * kWarp * kWarp + threadIdx.x;
    if (place < cloud.N) check_index("knn", "order", order[place], cloud.N);
    const Box box = fill_leaf(xyz_all + b * cloud.N * dims, dims, order, leaf, cloud);
    if (threadIdx.x % kWarp == 0) boxes[warp] = cloud.leaf_boxes[leaf] = box;
  }
  __syncthreads();
  if (warp != 0) return;
  const Box box = box_around(boxes, cloud.leaves - branch * kWarp);
  if (threadIdx.x == 0) cloud.branch_boxes[branch] = box;
}

// `walks` warps for a cloud, each for `steps` queries along the curve.
template <int R>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp, 6)
    knn_kernel(OrderedClouds points, OrderedClouds queries, int64_t B, int32_t walks, int32_t steps, int k,
               float* dist2, int64_t* idx) {
  __shared__ uint64_t waiting[kWarpsPerBlock][2 * kWarp];
  const int64_t walk = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp, b = walk / walks;
  if (b >= B) return;
  const OrderedCloud asked = queries[b];
  const int64_t first = walk % walks * steps, end = first + steps < asked.N ? first + steps : asked.N;
  KnnWarp<R> warp(points[b], k, waiting[threadIdx.x / kWarp]);
  for (int64_t i = first; i < end; ++i) {
    const OrderedPoint q = asked.points[i];
    warp.query(q.x, q.y, q.z);
    const int64_t row = (b * asked.N + q.index) * k;
#pragma unroll
    for (int r = 0; r < R; ++r)
      each(
          [=](int lane, uint64_t key) {
            const int place = r * kWarp + lane;
            if (place < k) dist2[row + place] = key_distance(key), idx[row + place] = key_index(key);
          },
          lane_id(), warp.nearest.list.key[r]);
  }
}

// Clouds in the given order, and the memory they lie in.
struct OrderedBatch {
  Tensor memory;
  OrderedClouds clouds;

  OrderedBatch(const Tensor& xyz, const Tensor& order) {
    const int64_t B = xyz.size(0), leaves = count_leaves(xyz.size(1)), branches = count_branches(xyz.size(1));
    const int64_t point_bytes = B * leaves * kWarp * sizeof(OrderedPoint), box_bytes = B * sizeof(Box);
    memory = torch::stable::new_empty(xyz, {point_bytes + box_bytes * (leaves + branches)}, ScalarType::Byte);
    auto* const points = static_cast<OrderedPoint*>(memory.data_ptr());
    auto* const boxes = reinterpret_cast<Box*>(points + B * leaves * kWarp);
    clouds.first = {points, boxes, boxes + B * leaves, static_cast<int32_t>(xyz.size(1)),
                    static_cast<int32_t>(leaves), static_cast<int32_t>(branches)};
    order_kernel<<<blocks_for(B * branches, 1), kWarp * kWarp, 0, current_stream(xyz)>>>(
        xyz.const_data_ptr<float>(), static_cast<int>(xyz.size(2)), order.const_data_ptr<int32_t>(), clouds);
    check_launch("knn");
  }
};

template <int R>
void launch(const OrderedClouds& points, const OrderedClouds& queries, int64_t k, Tensor& dist2, Tensor& idx) {
  const int64_t B = dist2.size(0), M = dist2.size(1);
  // The first query of a walk costs more; but a device holds thousands of walks, and short ones end together.
  const int64_t steps = std::clamp<int64_t>(B * M / (1 << 13), 1, 8), walks = (M + steps - 1) / steps;
  knn_kernel<R><<<blocks_for(B * walks, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, current_stream(dist2)>>>(
      points, queries, B, static_cast<int32_t>(walks), static_cast<int32_t>(steps), static_cast<int>(k),
      dist2.mutable_data_ptr<float>(), idx.mutable_data_ptr<int64_t>());
  check_launch("knn");
}

std::tuple<Tensor, Tensor> knn(const Tensor& query_, const Tensor& points_, const std::optional<Tensor>& order,
                               int64_t k) {
  const bool self = same_memory(query_, points_);
  const Tensor points = torch::stable::contiguous(points_), query = self ? points : torch::stable::contiguous(query_);
  if (points.scalar_type() != ScalarType::Float || points.size(2) > 3 || k > 4 * kWarp)
    return knn_pairwise(query, points, k);
  const DeviceGuard guard(points.get_device_index());
  const int64_t B = query.size(0), M = query.size(1);
  STD_TORCH_CHECK(std::max(M, points.size(1)) <= kMostPoints, "reid3d::knn: more than 2^30 points in a cloud");
  Tensor dist2 = torch::stable::new_empty(query, {B, M, k});
  Tensor idx = torch::stable::new_empty(query, {B, M, k}, ScalarType::Long);
  if (idx.numel() == 0) return {dist2, idx};
  STD_TORCH_CHECK(!order || order->numel() == B * points.size(1),
                  "reid3d::knn: order must have an entry for every point");
  const OrderedBatch ordered(points, order ? torch::stable::contiguous(*order) : morton_order(points));
  std::optional<OrderedBatch> asked;
  if (!self) asked.emplace(query, morton_order(query));
  const OrderedClouds &to = ordered.clouds, &from = self ? to : asked->clouds;
  if (k <= kWarp) {
    launch<1>(to, from, k, dist2, idx);
  } else if (k <= 2 * kWarp) {
    launch<2>(to, from, k, dist2, idx);
  } else {
    launch<4>(to, from, k, dist2, idx);
  }
  return {dist2, idx};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("knn", TORCH_BOX(&reid3d::knn)); }
