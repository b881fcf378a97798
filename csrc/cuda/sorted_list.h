// The smallest of many 64-bit keys, kept sorted in the registers of a warp. A key is a distance above an index, so that
// equal distances go by index and no two keys are equal. Batcher, "Sorting networks and their applications", 1968.
#pragma once

#include "lane.h"

namespace reid3d {

constexpr uint64_t kNoKey = ~uint64_t(0);  // larger than any

// The bits of numbers >= 0 order as the numbers do; those of a NaN are above those of +inf.
REID3D_WARP uint64_t neighbour_key(float dist2, int32_t index) {
  return static_cast<uint64_t>(float_bits(dist2)) << 32 | static_cast<uint32_t>(index);
}
REID3D_WARP float key_distance(uint64_t key) { return bits_float(static_cast<uint32_t>(key >> 32)); }
REID3D_WARP int32_t key_index(uint64_t key) { return static_cast<int32_t>(static_cast<uint32_t>(key)); }

// Lanes whose numbers differ by `mask` compare: the smaller key goes to the one of them that has `bit` clear.
REID3D_WARP Lane<uint64_t> compare_exchange(const Lane<uint64_t>& key, int mask, int bit) {
  return map(
      [bit](int lane, uint64_t mine, uint64_t other) {
        return (other < mine) == ((lane & bit) == 0) ? other : mine;
      },
      lane_id(), key, shfl_xor(key, mask));
}

// Sorts 32 keys that first rise and then fall, or the other way round.
REID3D_WARP Lane<uint64_t> sort_bitonic32(Lane<uint64_t> key) {
  REID3D_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) key = compare_exchange(key, step, step);
  return key;
}

REID3D_WARP Lane<uint64_t> sort32(Lane<uint64_t> key) {
  REID3D_UNROLL
  for (int size = 2; size <= kWarp; size *= 2) {
    key = compare_exchange(key, size - 1, size / 2);  // two sorted halves, the second backwards
    REID3D_UNROLL
    for (int step = size / 4; step > 0; step /= 2) key = compare_exchange(key, step, step);
  }
  return key;
}

// The 32 * R smallest keys; place r * 32 + lane of the list is key[r] of a lane.
template <int R>
struct SortedList {
  Lane<uint64_t> key[R];

  REID3D_WARP void clear() {
    REID3D_UNROLL
    for (int r = 0; r < R; ++r) key[r] = Lane<uint64_t>(kNoKey);
  }

  // The batch backwards behind the list makes one bitonic sequence, of which the smaller half stays.
  REID3D_WARP void merge(const Lane<uint64_t>& batch) {
    const auto smaller = [](uint64_t a, uint64_t b) { return b < a ? b : a; };
    const auto larger = [](uint64_t a, uint64_t b) { return b < a ? a : b; };
    key[R - 1] = map(smaller, key[R - 1], shfl_xor(sort32(batch), kWarp - 1));
    REID3D_UNROLL
    for (int step = R / 2; step > 0; step /= 2) {
      REID3D_UNROLL
      for (int r = 0; r < R; ++r) {
        if (r & step) continue;
        const Lane<uint64_t> low = map(smaller, key[r], key[r + step]);
        key[r + step] = map(larger, key[r], key[r + step]);
        key[r] = low;
      }
    }
    REID3D_UNROLL
    for (int r = 0; r < R; ++r) key[r] = sort_bitonic32(key[r]);
  }

  REID3D_WARP uint64_t at(int place) const {
    uint64_t found = shfl(key[0], place % kWarp);
    REID3D_UNROLL
    for (int r = 1; r < R; ++r) {
      const uint64_t other = shfl(key[r], place % kWarp);
      if (r == place / kWarp) found = other;
    }
    return found;
  }
};

// The k <= 32 * R smallest of the keys that are pushed. They wait in memory of the warp until 32 of them can be merged.
template <int R>
struct Nearest {
  SortedList<R> list;
  uint64_t limit;     // no larger key can be among the k
  uint64_t* waiting;  // 64 of them, a ring
  int k, first, count;

  REID3D_WARP Nearest(int k_, uint64_t* waiting_) : waiting(waiting_), k(k_) { restart(kNoKey); }

  REID3D_WARP void restart(uint64_t limit_) {
    list.clear();
    limit = limit_;
    first = count = 0;
  }

  // Takes the keys up to the limit. True where the limit may have come down.
  REID3D_WARP bool push(const Lane<uint64_t>& key) {
    const uint64_t most = limit;
    const uint32_t taken = ballot(map([most](uint64_t x) { return x <= most; }, key));
    if (taken == 0) return false;
    const int end = first + count;
    uint64_t* const ring = waiting;
    each(
        [=](int lane, uint64_t x) {
          if (taken >> lane & 1) ring[(end + popcount(taken & ((1u << lane) - 1))) % (2 * kWarp)] = x;
        },
        lane_id(), key);
    count += popcount(taken);
    if (count < kWarp) return false;
    merge_waiting();
    return true;
  }

  // Call it after the last push: then the list holds the k smallest.
  REID3D_WARP void merge_waiting() {
    const uint64_t* const ring = waiting;
    const int begin = first, valid = count;
    sync_warp();
    const Lane<uint64_t> batch = map(
        [=](int lane) { return lane < valid ? ring[(begin + lane) % (2 * kWarp)] : kNoKey; }, lane_id());
    sync_warp();
    first = (first + kWarp) % (2 * kWarp);
    count = count > kWarp ? count - kWarp : 0;
    list.merge(batch);
    const uint64_t last = list.at(k - 1);
    limit = last < limit ? last : limit;
  }
};

}  // namespace reid3d
