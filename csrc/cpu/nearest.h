// The k nearest of the candidates pushed so far, by distance and then by index.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace reid3d::REID3D_ISA {

#if defined(__AVX2__)
// ---- sorting networks on vectors of keys (Batcher, 1968)

// The lanes of a vector of 8 into order, when they are a bitonic sequence.
REID3D_INLINE Keys merge_lanes(Keys a) {
  Keys other = a.exchanged<4>();
  a = Keys::blend<0xf0>(min(a, other), max(a, other));
  other = a.exchanged<2>();
  a = Keys::blend<0xcc>(min(a, other), max(a, other));
  other = a.exchanged<1>();
  return Keys::blend<0xaa>(min(a, other), max(a, other));
}

// A bitonic sequence of R vectors into order.
template <int R>
REID3D_INLINE void merge_bitonic(Keys* k) {
  if constexpr (R == 1) {
    k[0] = merge_lanes(k[0]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R / 2; ++i) {
      const Keys a = k[i], b = k[i + R / 2];
      k[i] = min(a, b), k[i + R / 2] = max(a, b);
    }
    merge_bitonic<R / 2>(k);
    merge_bitonic<R / 2>(k + R / 2);
  }
}

// The R smallest vectors of two sorted sequences of R, into the first.
template <int R>
REID3D_INLINE void keep_smaller(Keys* k, const Keys* other) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) k[i] = min(k[i], other[R - 1 - i].exchanged<7>());
  merge_bitonic<R>(k);
}

template <int R>
REID3D_INLINE void sort(Keys* k) {
  if constexpr (R == 1) {
    Keys other = k[0].exchanged<1>();  // runs of 2, of 4, of 8; a run's second half is met in reverse
    k[0] = Keys::blend<0xaa>(min(k[0], other), max(k[0], other));
    other = k[0].exchanged<3>();
    k[0] = Keys::blend<0xcc>(min(k[0], other), max(k[0], other));
    other = k[0].exchanged<1>();
    k[0] = Keys::blend<0xaa>(min(k[0], other), max(k[0], other));
    other = k[0].exchanged<7>();
    k[0] = Keys::blend<0xf0>(min(k[0], other), max(k[0], other));
    other = k[0].exchanged<2>();
    k[0] = Keys::blend<0xcc>(min(k[0], other), max(k[0], other));
    other = k[0].exchanged<1>();
    k[0] = Keys::blend<0xaa>(min(k[0], other), max(k[0], other));
  } else {
    sort<R / 2>(k);
    sort<R / 2>(k + R / 2);
#pragma GCC unroll 16
    for (int i = 0; i < R / 2; ++i) {
      const Keys a = k[i], b = k[R - 1 - i].exchanged<7>();
      k[i] = min(a, b), k[R - 1 - i] = max(a, b);  // of the second half in reverse, which a bitonic merge allows
    }
    merge_bitonic<R / 2>(k);
    merge_bitonic<R / 2>(k + R / 2);
  }
}

// ---- candidates

// Distance and index in one number that orders as the pair does: the bits of a float that is not negative order as it
// does.
REID3D_INLINE uint64_t key_of(float dist2, int32_t index) {
  return static_cast<uint64_t>(bits_of(dist2)) << 32 | static_cast<uint32_t>(index);
}
REID3D_INLINE float distance_of(uint64_t key) { return float_of(static_cast<uint32_t>(key >> 32)); }

constexpr uint64_t kNoKey = ~uint64_t{0} >> 1;  // larger than any pair

// For k <= 8 R: the list is R sorted vectors of keys; candidates wait until there are enough to be worth a sort.
template <int R>
class SortedList {
  static constexpr int kWaiting = 64;
  Keys best_[R];
  alignas(64) float dist2_[kWaiting + kLanes];
  alignas(64) int32_t index_[kWaiting + kLanes];
  int64_t k_, waiting_ = 0;
  bool empty_ = true;
  float limit_;

  REID3D_INLINE void flush() {
    constexpr int V = kWaiting / 8;
    if (waiting_ == 0 && !empty_) return;
    alignas(64) uint64_t keys[kWaiting];
    const int64_t full = round_up(waiting_, kLanes);
    for (int64_t i = 0; i < full; ++i) keys[i] = key_of(dist2_[i], index_[i]);
    for (int64_t i = waiting_; i < kWaiting; ++i) keys[i] = kNoKey;
    Keys v[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) v[i] = Keys::load(keys + 8 * i);
    sort<V>(v);
    if (empty_) {
      for (int i = 0; i < R; ++i) best_[i] = v[i];
    } else {
      keep_smaller<R>(best_, v);
    }
    empty_ = false;
    waiting_ = 0;
    const float kth = this->kth();
    if (kth < limit_) limit_ = kth;
  }

  REID3D_INLINE float kth() const {
    alignas(64) uint64_t keys[8];
    best_[(k_ - 1) / 8].store(keys);
    return distance_of(keys[(k_ - 1) % 8]);
  }

 public:
  SortedList(int64_t k, void*) : k_(k) {}

  // A new query: nothing beyond `limit` can be among its k nearest.
  REID3D_INLINE void start(float limit) { limit_ = limit, empty_ = true, waiting_ = 0; }
  REID3D_INLINE float limit() const { return limit_; }

  REID3D_INLINE void push(const Vec<float>& dist2, const Vec<int32_t>& index) {
    const auto near = dist2 <= Vec<float>::all(limit_);
    const uint32_t lanes = bits(near);
    compress(near, dist2, dist2_ + waiting_);
    compress(near, index, index_ + waiting_);
    waiting_ += __builtin_popcount(lanes);
    if (waiting_ > kWaiting - kLanes) flush();
  }

  // The k-th distance; NaN where fewer than k were pushed.
  REID3D_INLINE float finish() {
    flush();
    return kth();
  }

  REID3D_INLINE void write(float* dist2, int64_t* idx) const {
    alignas(64) uint64_t keys[8 * R];
    for (int i = 0; i < R; ++i) best_[i].store(keys + 8 * i);
    for (int64_t i = 0; i < k_; ++i) {
      dist2[i] = distance_of(keys[i]);
      idx[i] = static_cast<uint32_t>(keys[i]);
    }
  }
};

#endif  // AVX2

// For any k and type, in scratch of 2 k + 64 + 16 pairs.
template <typename T>
struct Pair {
  T dist2;
  int64_t index;
  bool operator<(const Pair& o) const { return dist2 < o.dist2 || (dist2 == o.dist2 && index < o.index); }
};

template <typename T>
class PairList {
  Pair<T>* pairs_;
  int64_t k_, room_, count_ = 0;
  T limit_;

  void select() {
    if (count_ <= k_) return;
    std::nth_element(pairs_, pairs_ + (k_ - 1), pairs_ + count_);
    count_ = k_;
    if (pairs_[k_ - 1].dist2 < limit_) limit_ = pairs_[k_ - 1].dist2;
  }

 public:
  PairList(int64_t k, void* scratch) : pairs_(static_cast<Pair<T>*>(scratch)), k_(k), room_(k + (k > 64 ? k : 64)) {}

  void start(T limit) { limit_ = limit, count_ = 0; }
  T limit() const { return limit_; }

  REID3D_INLINE void push(const Vec<T>& dist2, const Vec<int32_t>& index) {
    uint32_t near = bits(dist2 <= Vec<T>::all(limit_));
    if (!near) return;
    T d[kLanes];
    int32_t at[kLanes];
    dist2.store(d), index.store(at);
    for (; near; near &= near - 1) {
      const int lane = __builtin_ctz(near);
      pairs_[count_++] = {d[lane], at[lane]};
    }
    if (count_ >= room_) select();
  }

  T finish() {
    select();
    std::sort(pairs_, pairs_ + count_);
    return count_ < k_ ? std::numeric_limits<T>::quiet_NaN() : pairs_[k_ - 1].dist2;
  }

  void write(T* dist2, int64_t* idx) const {
    for (int64_t i = 0; i < k_; ++i) dist2[i] = pairs_[i].dist2, idx[i] = pairs_[i].index;
  }
};

// Calls f(list) with the kind of list that suits T and k.
template <typename T, typename F>
void with_list(int64_t k, void* scratch, F&& f) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (k <= 16) return f(SortedList<2>(k, scratch));
    if (k <= 32) return f(SortedList<4>(k, scratch));
    if (k <= 64) return f(SortedList<8>(k, scratch));
  }
#endif
  f(PairList<T>(k, scratch));
}

}  // namespace reid3d::REID3D_ISA
