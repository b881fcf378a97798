// The maximum over groups of rows, and its gradient. Contract: reid3d/ops/group_max.py.
#pragma once

#include "rows.h"

namespace reid3d::REID3D_ISA {

// As many vectors of channels side by side as the registers hold.
#if defined(__AVX512F__)
template <typename T>
constexpr int kPooled = sizeof(T) == 8 ? 2 : 4;
#elif defined(__AVX2__)
template <typename T>
constexpr int kPooled = sizeof(T) == 8 ? 1 : 2;
#else
template <typename T>
constexpr int kPooled = 1;
#endif

// One channel by the definition: the first NaN wins for good, else the first of the largest.
template <typename T, typename S>
void pool_channel(const T* feats, int64_t stride, const int64_t* idx, int64_t k, T* out, S* slot) {
  Wide<T> best = widened(feats[idx[0] * stride]);
  int64_t winner = 0;
  for (int64_t s = 1; s < k && best == best; ++s) {
    const Wide<T> v = widened(feats[idx[s] * stride]);
    if (!(v <= best)) best = v, winner = s;
  }
  narrow(best, out);
  *slot = static_cast<S>(winner);
}

// One group, V * 16 channels of feats. Where there is a NaN all is done again, one channel after the other.
template <int V, typename T, typename S>
REID3D_INLINE void pool(const T* feats, int64_t stride, const int64_t* idx, const int64_t* ahead, int64_t k, T* out,
                        S* slot_out) {
  using W = Wide<T>;
  using Lane = typename SlotLane<W>::type;
  Vec<W> best[V];
  Vec<Lane> slot[V];
  Mask<W> nan = unordered(Vec<W>::all(0), Vec<W>::all(0));
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) {
    prefetch(feats, stride, ahead[0], i * kLanes);
    best[i] = load_row(feats + idx[0] * stride + i * kLanes);
    slot[i] = Vec<Lane>::all(0);
    nan = nan | unordered(best[i], best[i]);
  }
  int64_t s = 1;
  for (; s + 1 < k; s += 2) {
    const T* row1 = feats + idx[s] * stride;
    const T* row2 = feats + idx[s + 1] * stride;
    const Vec<Lane> slot1 = Vec<Lane>::all(static_cast<Lane>(s)), slot2 = Vec<Lane>::all(static_cast<Lane>(s + 1));
    REID3D_UNROLL
    for (int i = 0; i < V; ++i) {
      prefetch(feats, stride, ahead[s], i * kLanes);
      prefetch(feats, stride, ahead[s + 1], i * kLanes);
      const Vec<W> a = load_row(row1 + i * kLanes), b = load_row(row2 + i * kLanes);
      slot[i] = where(best[i] < a, slot1, slot[i]);
      best[i] = max(a, best[i]);
      slot[i] = where(best[i] < b, slot2, slot[i]);
      best[i] = max(b, best[i]);
      nan = nan | unordered(a, b);
    }
  }
  if (s < k) {
    const T* row = feats + idx[s] * stride;
    REID3D_UNROLL
    for (int i = 0; i < V; ++i) {
      prefetch(feats, stride, ahead[s], i * kLanes);
      const Vec<W> a = load_row(row + i * kLanes);
      slot[i] = where(best[i] < a, Vec<Lane>::all(static_cast<Lane>(s)), slot[i]);
      best[i] = max(a, best[i]);
      nan = nan | unordered(a, a);
    }
  }
  REID3D_UNROLL
  for (int i = 0; i < V; ++i) {
    store_row(best[i], out + i * kLanes);
    store_slots(slot[i], slot_out + i * kLanes);
  }
  if (bits(nan))
    for (int c = 0; c < V * kLanes; ++c) pool_channel(feats + c, stride, idx, k, out + c, slot_out + c);
}

// Groups [begin, end) of all clouds. False where an index is out of range.
template <typename T, typename S>
bool group_max(const T* feats, const int64_t* idx, GroupShape size, int64_t begin, int64_t end, T* out, S* slot) {
  const int64_t C = size.c, K = size.k;
  const auto one = [=](const T* x, const int64_t* group, const int64_t* ahead, int64_t row) {
    T* o = out + row * C;
    S* s = slot + row * C;
    constexpr int side = kPooled<Wide<T>> * kLanes;
    int64_t c = 0;
    for (; c + side <= C; c += side) pool<kPooled<Wide<T>>>(x + c, C, group, ahead, K, o + c, s + c);
    for (; c + kLanes <= C; c += kLanes) pool<1>(x + c, C, group, ahead, K, o + c, s + c);
    if (c < C && C > kLanes) {
      c = C - kLanes;  // some channels a second time
      pool<1>(x + c, C, group, ahead, K, o + c, s + c);
    } else {
      for (; c < C; ++c) pool_channel(x + c, C, group, K, o + c, s + c);
    }
  };
  return for_groups(feats, idx, size, begin, end, one);
}

// Adds up grad (m,c) of one cloud at the rows that won, group by group, for `count` channels: in scratch of 16
// channels, which stays in the cache, and from there to out (n,c), which is set or added to.
template <typename T, typename S>
void add_at_winners(const T* grad, const int64_t* idx, const S* slot, GroupShape size, int64_t count, bool add,
                    Wide<T>* sum, Wide<T>* out) {
  using W = Wide<T>;
  std::memset(sum, 0, static_cast<size_t>(size.n) * kLanes * sizeof(W));
  for (int64_t m = 0; m < size.m; ++m, grad += size.c, slot += size.c, idx += size.k) {
    if (count == kLanes) {
      W g[kLanes];
      load_row(grad).store(g);
      for (int c = 0; c < kLanes; ++c) sum[idx[slot[c]] * kLanes + c] += g[c];
    } else {
      for (int64_t c = 0; c < count; ++c) sum[idx[slot[c]] * kLanes + c] += widened(grad[c]);
    }
  }
  for (int64_t j = 0; j < size.n; ++j, sum += kLanes, out += size.c) {
    if (count == kLanes) {
      const Vec<W> row = Vec<W>::load(sum);
      (add ? Vec<W>::load(out) + row : row).store(out);
    } else {
      for (int64_t c = 0; c < count; ++c) out[c] = add ? out[c] + sum[c] : sum[c];
    }
  }
}

}  // namespace reid3d::REID3D_ISA
