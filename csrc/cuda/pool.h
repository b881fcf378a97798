// What one thread of a pooling kernel does: V neighbouring channels of one row, V * sizeof(T) bytes in one access.
// Plain C++, so that the tests run it on the host (tests/ops/warp_pool.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "pack.h"

namespace reid3d {

constexpr int kInFlight = 4;  // rows that a thread has asked for before it looks at the first

// Half types are compared and summed in float.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Division of 0 <= n < 2^31 by a constant that is known only at run time (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t value, magic;
  int shift = 31;

  explicit Divisor(uint32_t d) : value(d) {
    while ((uint64_t{1} << (shift - 31)) < d) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << shift) / d + 1);
  }

  REID3D_HOST_DEVICE int32_t quotient(int32_t n) const {
    return static_cast<int32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> shift);
  }
};

// The largest value of every channel and the first slot that has it; the first NaN wins for good.
template <typename T, int V>
struct MaxPool {
  Wide<T> best[V];
  int32_t slot[V];

  REID3D_HOST_DEVICE MaxPool() {
    for (int c = 0; c < V; ++c) best[c] = -std::numeric_limits<Wide<T>>::infinity(), slot[c] = 0;
  }

  REID3D_HOST_DEVICE void add(const Pack<T, V>& x, int32_t k) {
    for (int c = 0; c < V; ++c) {
      const Wide<T> v = static_cast<Wide<T>>(x.v[c]);
      const bool wins = !(v <= best[c]) && best[c] == best[c];
      best[c] = wins ? v : best[c];
      slot[c] = wins ? k : slot[c];
    }
  }
};

// Largest, smallest, sum and sum of squares of every channel.
template <typename T, int V>
struct EdgePool {
  MaxPool<T, V> max;
  Wide<T> min[V], sum[V], sumsq[V];
  int32_t min_slot[V];

  REID3D_HOST_DEVICE EdgePool() {
    for (int c = 0; c < V; ++c) {
      min[c] = std::numeric_limits<Wide<T>>::infinity();
      min_slot[c] = 0;
      sum[c] = sumsq[c] = 0;
    }
  }

  REID3D_HOST_DEVICE void add(const Pack<T, V>& x, int32_t k) {
    max.add(x, k);
    for (int c = 0; c < V; ++c) {
      const Wide<T> v = static_cast<Wide<T>>(x.v[c]);
      const bool wins = !(v >= min[c]) && min[c] == min[c];
      min[c] = wins ? v : min[c];
      min_slot[c] = wins ? k : min_slot[c];
      sum[c] += v;
      sumsq[c] = add_square(sumsq[c], v);
    }
  }
};

// Adds `count` rows to a pool, slots first, first + 1, ...; column is the thread's channels of row 0, C apart.
template <int V, typename T, typename Pool>
REID3D_HOST_DEVICE inline void pool_rows(const T* column, int64_t C, const int32_t* rows, int32_t count, int32_t first,
                                         Pool& pool) {
  int32_t k = 0;
  for (; k + kInFlight <= count; k += kInFlight) {
    Pack<T, V> x[kInFlight];
    for (int u = 0; u < kInFlight; ++u) x[u] = load<V>(column + rows[k + u] * C);
    for (int u = 0; u < kInFlight; ++u) pool.add(x[u], first + k + u);
  }
  for (; k < count; ++k) pool.add(load<V>(column + rows[k] * C), first + k);
}

template <typename Slot, int V>
REID3D_HOST_DEVICE inline bool any_equal(const Pack<Slot, V>& slots, int32_t slot) {
  bool any = false;
  for (int c = 0; c < V; ++c) any |= slots.v[c] == slot;
  return any;
}

// The gradient of a maximum: what the edges into a point, in ascending order, hand to those channels they have won.
// Edge e is slot e % K of group e / K; grad and slot are the thread's channels of group 0. Check refuses other e.
template <int V, typename T, typename Slot, typename Check>
REID3D_HOST_DEVICE inline void max_gradient(const int32_t* edges, int32_t count, const Divisor& K, const T* grad,
                                            const Slot* slot, int64_t C, const Check& check, Wide<T> (&sum)[V]) {
  for (int c = 0; c < V; ++c) sum[c] = 0;
  for (int32_t i = 0; i < count; i += kInFlight) {
    int64_t group[kInFlight];
    int32_t mine[kInFlight];
    Pack<Slot, V> won[kInFlight];
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t e = edges[u < count - i ? i + u : i];
      check(e);
      const int32_t m = K.quotient(e);
      mine[u] = u < count - i ? e - m * static_cast<int32_t>(K.value) : -1;  // no slot is -1
      group[u] = m * C;
      won[u] = load<V>(slot + group[u]);
    }
    Pack<T, V> g[kInFlight];
    for (int u = 0; u < kInFlight; ++u)
      if (any_equal(won[u], mine[u])) g[u] = load<V>(grad + group[u]);
    for (int u = 0; u < kInFlight; ++u)
      for (int c = 0; c < V; ++c)
        if (won[u].v[c] == mine[u]) sum[c] += static_cast<Wide<T>>(g[u].v[c]);
  }
}

// The same for the four results of an edge pool, each summed by itself. The sum and the sum of squares hand something
// to every edge. The pointers are the thread's channels of group 0; x is the point's.
template <int V, typename T, typename Slot>
struct EdgeGradient {
  const T *max, *min;
  const Wide<T>*sum, *sumsq;
  const Slot *max_slot, *min_slot;

  template <typename Check>
  REID3D_HOST_DEVICE void operator()(const int32_t* edges, int32_t count, const Divisor& K, int64_t C, const T* x,
                                     const Check& check, Wide<T> (&grad)[V]) const {
    Wide<T> high[V], low[V], linear[V], square[V];
    for (int c = 0; c < V; ++c) high[c] = low[c] = linear[c] = square[c] = 0;
    for (int32_t i = 0; i < count; ++i) {
      check(edges[i]);
      const int32_t m = K.quotient(edges[i]), mine = edges[i] - m * static_cast<int32_t>(K.value);
      const int64_t group = m * C;
      const Pack<Slot, V> won = load<V>(max_slot + group), lost = load<V>(min_slot + group);
      const Pack<Wide<T>, V> g = load<V>(sum + group), q = load<V>(sumsq + group);
      Pack<T, V> g_max, g_min;
      if (any_equal(won, mine)) g_max = load<V>(max + group);
      if (any_equal(lost, mine)) g_min = load<V>(min + group);
      for (int c = 0; c < V; ++c) {
        if (won.v[c] == mine) high[c] += static_cast<Wide<T>>(g_max.v[c]);
        if (lost.v[c] == mine) low[c] += static_cast<Wide<T>>(g_min.v[c]);
        linear[c] += g.v[c];
        square[c] += q.v[c];
      }
    }
    const Pack<T, V> point = load<V>(x);
    for (int c = 0; c < V; ++c) {
      const Wide<T> v = static_cast<Wide<T>>(point.v[c]);
      grad[c] = ((high[c] + low[c]) + linear[c]) + (v + v) * square[c];
    }
  }
};

}  // namespace reid3d
