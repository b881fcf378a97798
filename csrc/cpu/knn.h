// k nearest neighbours. Contract: reid3d/ops/knn.py.
#pragma once

#include <cmath>

#include "curve.h"
#include "nearest.h"

namespace reid3d::REID3D_ISA {

// All points of a cloud by (distance, index), where NaN and overflow count as +inf: what the contract says, word for
// word.
template <typename T, typename Distance>
void nearest_of_all(int64_t n, int64_t k, Distance distance, void* scratch, T* dist2, int64_t* idx) {
  Pair<T>* pairs = static_cast<Pair<T>*>(scratch);
  for (int64_t i = 0; i < n; ++i) {
    const auto [d, index] = distance(i);
    pairs[i] = {d < kInf<T> ? d : kInf<T>, index};
  }
  std::partial_sort(pairs, pairs + k, pairs + n);
  for (int64_t i = 0; i < k; ++i) dist2[i] = pairs[i].dist2, idx[i] = pairs[i].index;
}

// ---- D <= 3: the tree

template <typename T, typename List>
REID3D_INLINE void scan_leaf(const Tree<T>& tree, int64_t leaf, const Point<T>& q, List& list) {
  const int64_t at = leaf * kLeaf;
  list.push(distances(q, tree.x + at, tree.y + at, tree.z + at), Vec<int32_t>::load(tree.index + at));
}

template <typename T, typename List>
void visit(const Tree<T>& tree, int l, int64_t first, const Point<T>& q, List& list) {
  const auto& level = tree.level[l];
  uint32_t near = bits(box_distances(q, level, first) <= Vec<T>::all(list.limit())) & present<T>(level, first);
  for (; near; near &= near - 1) {
    const int64_t box = first + __builtin_ctz(near);
    if (l == 0) scan_leaf(tree, box, q, list);
    else visit(tree, l - 1, box * kLanes, q, list);
  }
}

// The largest distance to k points next to place `at` along the curve: at least the k-th smallest of all.
template <typename T>
REID3D_INLINE T window_limit(const Tree<T>& tree, int64_t at, int64_t k, const Point<T>& q) {
  const int64_t size = round_up(k, kLanes);
  int64_t first = at - size / 2;
  first = first < 0 ? 0 : first;
  first = first + size > tree.n ? tree.n - size : first;
  if (first < 0) return kInf<T>;
  Vec<T> most = Vec<T>::all(0);
  for (int64_t i = first; i < first + size; i += kLanes) {
    const Vec<T> d = distances(q, tree.x + i, tree.y + i, tree.z + i);
    if (bits(unordered(d, d))) return kInf<T>;
    most = max(d, most);
  }
  return reduce_max(most);
}

template <typename T, typename List>
void knn_with(const Tree<T>& queries, int64_t begin, int64_t end, const Tree<T>& points, int64_t k, List& list,
              void* scratch, T* dist2, int64_t* idx) {
  const bool self = queries.x == points.x;
  T kth = std::numeric_limits<T>::quiet_NaN();  // of the query before, at (x, y, z)
  T x = 0, y = 0, z = 0;
  for (int64_t i = begin; i < end; ++i) {
    const T qx = queries.x[i], qy = queries.y[i], qz = queries.z[i];
    const Point<T> q(qx, qy, qz);
    // Two bounds of the k-th distance: by the triangle inequality from the query before, and from points next to this
    // one. What is added covers the rounding.
    const T radius = std::sqrt(kth) + std::sqrt(squared_distance3(qx, qy, qz, x, y, z));
    T limit = radius * radius * T(1.00001) + T(1e-30);
    if (!(limit < kInf<T>)) limit = kInf<T>;
    if (self) {
      const T near = window_limit(points, i, k, q);
      limit = near < limit ? near : limit;
    }
    list.start(limit);
    visit(points, points.levels - 1, 0, q, list);
    kth = list.finish();
    x = qx, y = qy, z = qz;
    const int64_t row = queries.index[i];
    if (kth < kInf<T>) {
      list.write(dist2 + row * k, idx + row * k);
    } else {
      const auto distance = [&](int64_t j) {
        return Pair<T>{squared_distance3(qx, qy, qz, points.x[j], points.y[j], points.z[j]), points.index[j]};
      };
      nearest_of_all(points.n, k, distance, scratch, dist2 + row * k, idx + row * k);
    }
  }
}

template <typename T>
void knn(const Tree<T>& queries, int64_t begin, int64_t end, const Tree<T>& points, int64_t k, void* scratch, T* dist2,
         int64_t* idx) {
  with_list<T>(k, scratch, [&](auto&& list) { knn_with(queries, begin, end, points, k, list, scratch, dist2, idx); });
}

// ---- any D: blocks of distances by direct differences, which need as many instructions as a matrix product that would
// lose the last bits, then a selection

// Panel p holds points 16 p .. 16 p + 15, coordinate by coordinate; missing points are NaN.
template <typename T>
void pack(const T* rows, int64_t n, int64_t dims, T* panels) {
  for (int64_t first = 0; first < n; first += kLanes, panels += dims * kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = first + lane;
      for (int64_t d = 0; d < dims; ++d)
        panels[d * kLanes + lane] = i < n ? rows[i * dims + d] : std::numeric_limits<T>::quiet_NaN();
    }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Q queries against P panels, the sums in registers.
template <typename T, int Q, int P>
REID3D_INLINE void distance_block(const T* queries, const T* panels, int64_t dims, T* out, int64_t stride) {
  Vec<T> sum[Q][P];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[q][p] = Vec<T>::all(0);
  for (int64_t d = 0; d < dims; ++d) {
    Vec<T> point[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) point[p] = Vec<T>::load(panels + (p * dims + d) * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const Vec<T> value = Vec<T>::all(queries[q * dims + d]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[q][p] = add_square(sum[q][p], value - point[p]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[q][p].store(out + q * stride + p * kLanes);
}

#if defined(__AVX512F__)
constexpr int kBlockQueries = 8, kBlockPanels = 2;  // 16 sums, the points and a query fit 32 registers
#else
constexpr int kBlockQueries = 4, kBlockPanels = 1;
#endif

template <typename T, typename List>
void select_rows(int64_t m, const T* distances, int64_t stride, int64_t n, int64_t k, List& list, void* scratch,
                 T* dist2, int64_t* idx) {
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto lanes = Vec<int32_t>::load(lane);
  for (int64_t row = 0; row < m; ++row, distances += stride) {
    list.start(kInf<T>);
    for (int64_t first = 0; first < n; first += kLanes)
      list.push(Vec<T>::load(distances + first), lanes + Vec<int32_t>::all(static_cast<int32_t>(first)));
    if (list.finish() < kInf<T>) {
      list.write(dist2 + row * k, idx + row * k);
    } else {
      const auto distance = [&](int64_t i) { return Pair<T>{distances[i], i}; };
      nearest_of_all(n, k, distance, scratch, dist2 + row * k, idx + row * k);
    }
  }
}

template <typename T>
void knn_rows(const T* queries, int64_t m, const T* panels, int64_t n, int64_t dims, int64_t k, T* distances,
              void* scratch, T* dist2, int64_t* idx) {
  constexpr int Q = kBlockQueries, P = kBlockPanels;
  const int64_t stride = round_up(n, kLanes), count = stride / kLanes;
  const auto block = [&](auto queries_in_block, auto panels_in_block, int64_t q, int64_t p) {
    distance_block<T, queries_in_block.value, panels_in_block.value>(
        queries + q * dims, panels + p * kLanes * dims, dims, distances + q * stride + p * kLanes, stride);
  };
  for (int64_t p = 0; p < count; p += P)  // the panels of a block stay in the cache for all the queries
    for (int64_t q = 0; q < m; q += Q) {
      if (q + Q <= m && p + P <= count) {
        block(Constant<Q>(), Constant<P>(), q, p);
      } else {
        for (int64_t i = q; i < m && i < q + Q; ++i)
          for (int64_t j = p; j < count && j < p + P; ++j) block(Constant<1>(), Constant<1>(), i, j);
      }
    }
  with_list<T>(k, scratch, [&](auto&& list) { select_rows(m, distances, stride, n, k, list, scratch, dist2, idx); });
}

}  // namespace reid3d::REID3D_ISA
