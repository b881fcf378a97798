// Maximum, minimum, sum and sum of squares over groups of rows, and their gradient. Contract: reid3d/ops/edge_pool.py.
#pragma once

#include "group_max.h"

namespace reid3d::REID3D_ISA {

template <typename T, typename S>
REID3D_INLINE PooledEdges<T, S> at(const PooledEdges<T, S>& p, int64_t i) {
  return {p.max + i, p.min + i, p.sum + i, p.sumsq + i, p.max_slot + i, p.min_slot + i};
}

// One channel by the definition.
template <typename T, typename S>
void pool_edges_of_channel(const T* feats, int64_t stride, const int64_t* idx, int64_t k,
                           const PooledEdges<T, S>& out) {
  Wide<T> most = widened(feats[idx[0] * stride]), least = most, sum = 0, sumsq = 0;
  int64_t max_slot = 0, min_slot = 0;
  for (int64_t s = 0; s < k; ++s) {
    const Wide<T> v = widened(feats[idx[s] * stride]);
    if (!(v <= most) && most == most) most = v, max_slot = s;
    if (!(v >= least) && least == least) least = v, min_slot = s;
    sum += v;
    sumsq = reid3d::add_square(sumsq, v);
  }
  narrow(most, out.max);
  narrow(least, out.min);
  *out.sum = sum;
  *out.sumsq = sumsq;
  *out.max_slot = static_cast<S>(max_slot);
  *out.min_slot = static_cast<S>(min_slot);
}

// One group, V * 16 channels of feats. Where a sum is NaN there may have been one among its terms: all is done again.
template <int V, typename T, typename S>
REID3D_INLINE void pool_edges(const T* feats, int64_t stride, const int64_t* idx, const int64_t* ahead, int64_t k,
                              const PooledEdges<T, S>& out) {
  using W = Wide<T>;
  using Lane = typename SlotLane<W>::type;
  Vec<W> most[V], least[V], sum[V], sumsq[V];
  Vec<Lane> max_slot[V], min_slot[V];
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) {
    most[i] = least[i] = load_row(feats + idx[0] * stride + i * kLanes);
    sum[i] = sumsq[i] = Vec<W>::all(0);
    max_slot[i] = min_slot[i] = Vec<Lane>::all(0);
  }
  for (int64_t s = 0; s < k; ++s) {
    const T* row = feats + idx[s] * stride;
    const Vec<Lane> slot = Vec<Lane>::all(static_cast<Lane>(s));
    REID3D_UNROLL
    for (int i = 0; i < V; ++i) {
      prefetch(feats, stride, ahead[s], i * kLanes);
      const Vec<W> v = load_row(row + i * kLanes);
      max_slot[i] = where(most[i] < v, slot, max_slot[i]);
      min_slot[i] = where(v < least[i], slot, min_slot[i]);
      most[i] = max(v, most[i]);
      least[i] = min(v, least[i]);
      sum[i] = sum[i] + v;
      sumsq[i] = add_square(sumsq[i], v);
    }
  }
  Mask<W> nan = unordered(sum[0], sum[0]);
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) {
    const PooledEdges<T, S> o = at(out, i * kLanes);
    store_row(most[i], o.max);
    store_row(least[i], o.min);
    sum[i].store(o.sum);
    sumsq[i].store(o.sumsq);
    store_slots(max_slot[i], o.max_slot);
    store_slots(min_slot[i], o.min_slot);
    nan = nan | unordered(sum[i], sum[i]);
  }
  if (bits(nan))
    for (int c = 0; c < V * kLanes; ++c) pool_edges_of_channel(feats + c, stride, idx, k, at(out, c));
}

// Groups [begin, end) of all clouds. False where an index is out of range.
template <typename T, typename S>
bool edge_pool(const T* feats, const int64_t* idx, GroupShape size, int64_t begin, int64_t end,
               const PooledEdges<T, S>& out) {
  const int64_t C = size.c, K = size.k;
  const auto one = [=](const T* x, const int64_t* group, const int64_t* ahead, int64_t row) {
    const PooledEdges<T, S> o = at(out, row * C);
    constexpr int V = kPooled<Wide<T>> > 1 ? kPooled<Wide<T>> / 2 : 1;
    int64_t c = 0;
    for (; c + V * kLanes <= C; c += V * kLanes) pool_edges<V>(x + c, C, group, ahead, K, at(o, c));
    for (; c + kLanes <= C; c += kLanes) pool_edges<1>(x + c, C, group, ahead, K, at(o, c));
    if (c < C && C > kLanes) {
      c = C - kLanes;  // some channels a second time
      pool_edges<1>(x + c, C, group, ahead, K, at(o, c));
    } else {
      for (; c < C; ++c) pool_edges_of_channel(x + c, C, group, K, at(o, c));
    }
  };
  return for_groups(feats, idx, size, begin, end, one);
}

// V * 16 channels of one row x: the sums over its edges [first, last) to x's gradient, in the order of the edges. The
// group of an edge is edge / k: the product in double is off by less than what separates it from a whole number.
template <int V, typename T>
REID3D_INLINE void add_edges_of(const Wide<T>* grad_sum, const Wide<T>* grad_sumsq, const T* x, const int32_t* edges,
                                int64_t first, int64_t last, int64_t total, double per_k, int64_t stride,
                                Wide<T>* out) {
  using W = Wide<T>;
  const auto row_of = [=](int64_t e) { return static_cast<int64_t>((edges[e] + 0.5) * per_k) * stride; };
  Vec<W> sum[V], sumsq[V];
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) sum[i] = sumsq[i] = Vec<W>::all(0);
  for (int64_t e = first; e < last; ++e) {
    const int64_t row = row_of(e), next = row_of(e + kAhead < total ? e + kAhead : e);
    REID3D_UNROLL
    for (int i = 0; i < V; ++i) {
      __builtin_prefetch(grad_sum + next + i * kLanes);
      __builtin_prefetch(grad_sumsq + next + i * kLanes);
      sum[i] = sum[i] + Vec<W>::load(grad_sum + row + i * kLanes);
      sumsq[i] = sumsq[i] + Vec<W>::load(grad_sumsq + row + i * kLanes);
    }
  }
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) {
    const Vec<W> v = load_row(x + i * kLanes);
    (Vec<W>::load(out + i * kLanes) + sum[i] + (v + v) * sumsq[i]).store(out + i * kLanes);
  }
}

template <typename T>
void add_edges(const Wide<T>* grad_sum, const Wide<T>* grad_sumsq, const T* feats, const int32_t* offsets,
               const int32_t* edges, GroupShape size, int64_t begin, int64_t end, Wide<T>* out) {
  using W = Wide<T>;
  const int64_t C = size.c, total = size.m * size.k;
  const double per_k = 1.0 / static_cast<double>(size.k);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t first = offsets[j], last = offsets[j + 1];
    const T* x = feats + j * C;
    W* o = out + j * C;
    constexpr int V = kPooled<W>;
    int64_t c = 0;
    for (; c + V * kLanes <= C; c += V * kLanes)
      add_edges_of<V>(grad_sum + c, grad_sumsq + c, x + c, edges, first, last, total, per_k, C, o + c);
    for (; c + kLanes <= C; c += kLanes)
      add_edges_of<1>(grad_sum + c, grad_sumsq + c, x + c, edges, first, last, total, per_k, C, o + c);
    for (; c < C; ++c) {
      W sum = 0, sumsq = 0;
      for (int64_t e = first; e < last; ++e) {
        const int64_t at = edges[e] / static_cast<int32_t>(size.k) * C + c;
        sum += grad_sum[at];
        sumsq += grad_sumsq[at];
      }
      const W v = widened(x[c]);
      o[c] = o[c] + sum + (v + v) * sumsq;
    }
  }
}

}  // namespace reid3d::REID3D_ISA
