// k nearest neighbours in space, k <= 128, as a warp finds them. The points of a cloud lie along the Z-curve, in leaves
// of 32 with a box around each, and 32 leaves are a branch with a box of its own. A warp walks through queries that are
// near each other: what the last one needed bounds what the next one can need, and few boxes lie that near.
#pragma once

#include "box.h"
#include "sorted_list.h"

namespace reid3d {

struct alignas(16) OrderedPoint {
  float x, y, z;
  int32_t index;  // in the cloud as it was given; -1 behind the last point
};

// The points of a cloud and their boxes in memory.
struct OrderedCloud {
  OrderedPoint* points;  // 32 * leaves
  Box* leaf_boxes;       // leaves
  Box* branch_boxes;     // branches
  int32_t N, leaves, branches;
};

REID3D_HOST_DEVICE inline int32_t count_leaves(int64_t N) { return static_cast<int32_t>((N + kWarp - 1) / kWarp); }
REID3D_HOST_DEVICE inline int32_t count_branches(int64_t N) { return count_leaves(count_leaves(N)); }

// Copies the points of a leaf, xyz (N,dims) in the given order, and finds its box. Missing coordinates are zero.
REID3D_WARP Box fill_leaf(const float* xyz, int dims, const int32_t* order, int32_t leaf, const OrderedCloud& cloud) {
  const int32_t N = cloud.N;
  OrderedPoint* const points = cloud.points + static_cast<int64_t>(leaf) * kWarp;
  const Lane<OrderedPoint> point = map(
      [=](int lane) {
        const int64_t place = static_cast<int64_t>(leaf) * kWarp + lane;
        const float nan = std::numeric_limits<float>::quiet_NaN();
        if (place >= N) return OrderedPoint{nan, nan, nan, -1};
        const int32_t i = order[place];
        const float* p = xyz + static_cast<int64_t>(i) * dims;
        return OrderedPoint{dims > 0 ? p[0] : 0, dims > 1 ? p[1] : 0, dims > 2 ? p[2] : 0, i};
      },
      lane_id());
  each([=](int lane, const OrderedPoint& p) { points[lane] = p; }, lane_id(), point);
  return box_around(map([](const OrderedPoint& p) { return box_of_point(p.x, p.y, p.z); }, point));
}

// The k neighbours of one query after the other.
template <int R>
struct KnnWarp {
  // A limit includes every index at its distance; this one leaves out NaN and infinite distances.
  static constexpr uint64_t kFinite = 0x7f7fffffffffffffu;

  OrderedCloud cloud;
  Nearest<R> nearest;
  float x = 0, y = 0, z = 0;  // the query
  float farthest = -1;        // the k-th distance of the last query, < 0 where that is of no use

  REID3D_WARP KnnWarp(const OrderedCloud& cloud_, int k, uint64_t* waiting) : cloud(cloud_), nearest(k, waiting) {}

  // Afterwards the list holds the neighbours.
  REID3D_WARP void query(float qx, float qy, float qz) {
    const float moved2 = squared_distance3(qx, qy, qz, x, y, z);
    x = qx, y = qy, z = qz;
    uint64_t limit = kFinite;
    if (farthest >= 0) {
      // The triangle inequality, with room for rounding. Were it too low, time would be lost and no neighbour: fewer
      // than k points within a limit are never taken for the answer.
      const float reach = sqrtf(farthest) + sqrtf(moved2);
      limit = at_most(reach * reach * 1.00001f + 1e-30f);
    }
    if (limit == kFinite) limit = near_leaves();
    nearest.restart(limit);
    all_leaves_within();
    uint64_t last = nearest.list.at(nearest.k - 1);
    farthest = last == kNoKey ? -1.0f : key_distance(last);
    if (last == kNoKey) every_point();
  }

 private:
  REID3D_WARP static uint64_t at_most(float dist2) {
    return dist2 <= std::numeric_limits<float>::max() ? neighbour_key(dist2, -1) : kFinite;
  }

  // Of up to 32 boxes; +inf where there is none.
  REID3D_WARP Lane<float> bounds(const Box* boxes, int32_t first, int32_t end) const {
    const float qx = x, qy = y, qz = z;
    return map(
        [=](int lane) {
          return first + lane < end ? distance_to_box(boxes[first + lane], qx, qy, qz) : infinity<float>();
        },
        lane_id());
  }

  // The lanes whose box is no farther than the limit, which is finite.
  REID3D_WARP uint32_t within_limit(const Lane<float>& bound) const {
    const float most = key_distance(nearest.limit);
    return ballot(map([most](float b) { return b <= most; }, bound));
  }

  // True where the limit may have come down. `All` takes distances that are NaN or infinite too, as +inf.
  template <bool All>
  REID3D_WARP bool visit(int32_t leaf) {
    const OrderedPoint* const points = cloud.points + static_cast<int64_t>(leaf) * kWarp;
    const float qx = x, qy = y, qz = z;
    return nearest.push(map(
        [=](int lane) {
          const OrderedPoint p = points[lane];
          const float d = squared_distance3(qx, qy, qz, p.x, p.y, p.z);
          if (!All) return neighbour_key(d, p.index);
          return p.index < 0 ? kNoKey : neighbour_key(d < infinity<float>() ? d : infinity<float>(), p.index);
        },
        lane_id()));
  }

  REID3D_WARP void all_leaves_within() {
    for (int32_t base = 0; base < cloud.branches; base += kWarp) {
      const Lane<float> branch_bound = bounds(cloud.branch_boxes, base, cloud.branches);
      uint32_t branches = within_limit(branch_bound);
      while (branches) {
        const int32_t first = (base + lowest_bit(branches)) * kWarp;
        branches &= branches - 1;
        const Lane<float> leaf_bound = bounds(cloud.leaf_boxes, first, cloud.leaves);
        uint32_t leaves = within_limit(leaf_bound);
        while (leaves) {
          const int32_t leaf = first + lowest_bit(leaves);
          leaves &= leaves - 1;
          if (visit<false>(leaf)) leaves &= within_limit(leaf_bound);
        }
        branches &= within_limit(branch_bound);
      }
    }
    if (nearest.count > 0) nearest.merge_waiting();
  }

  // Without a query before: a limit from the leaves around the nearest box.
  REID3D_WARP uint64_t near_leaves() {
    const int32_t wanted = (nearest.k + kWarp - 1) / kWarp + 1;
    if (cloud.leaves <= wanted) return kFinite;
    const int32_t branch = nearest_box(cloud.branch_boxes, 0, cloud.branches);
    const int32_t begin = branch * kWarp, end = begin + kWarp < cloud.leaves ? begin + kWarp : cloud.leaves;
    const int32_t home = nearest_box(cloud.leaf_boxes, begin, end);
    const int32_t first = home < cloud.leaves - wanted ? home : cloud.leaves - wanted;
    nearest.restart(kFinite);
    for (int32_t leaf = first; leaf < first + wanted; ++leaf) visit<false>(leaf);
    nearest.merge_waiting();
    const uint64_t last = nearest.list.at(nearest.k - 1);
    return last == kNoKey ? kFinite : at_most(key_distance(last));
  }

  // Of the boxes from `first` up to `end`, of which there is at least one.
  REID3D_WARP int32_t nearest_box(const Box* boxes, int32_t first, int32_t end) const {
    Lane<uint64_t> best(kNoKey);
    REID3D_NO_UNROLL
    for (int32_t base = first; base < end; base += kWarp)
      best = map(
          [=](int lane, uint64_t b, float bound) {
            const uint64_t key = neighbour_key(bound, base + lane);
            return key < b ? key : b;
          },
          lane_id(), best, bounds(boxes, base, end));
    REID3D_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2)
      best = map([](uint64_t a, uint64_t b) { return b < a ? b : a; }, best, shfl_xor(best, step));
    return key_index(first_lane(best));
  }

  // Fewer than k distances are finite: the others follow by index.
  REID3D_WARP void every_point() {
    nearest.restart(kNoKey - 1);
    for (int32_t leaf = 0; leaf < cloud.leaves; ++leaf) visit<true>(leaf);
    nearest.merge_waiting();
  }
};

}  // namespace reid3d
