// The places of a query's matches in its ranked list, without the list. Contract: reid3d/ops/match_places.py.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace reid3d::REID3D_ISA {

constexpr int64_t kRowChunk = 4096;  // similarities that stay in the first cache while all matches are compared
constexpr int64_t kCounted = 256;    // matches of a query, up to which comparing all is faster than a search

// A match in the order of the list: by falling similarity, then by position.
struct Match {
  uint64_t key;
};

// In the order of falling similarities; 0.0 and -0.0 are one.
REID3D_INLINE uint64_t match_key(float sim, int64_t position) {
  const uint32_t bits = bits_of(sim + 0.0f);
  return uint64_t{bits >> 31 ? bits : ~bits & 0x7fffffff} << 32 | static_cast<uint64_t>(position);
}

REID3D_INLINE int64_t position_of(Match match) { return static_cast<int64_t>(match.key & 0xffffffff); }

// Takes items out of a row: a NaN is neither above nor below anything. False where a position is out of range.
REID3D_INLINE bool take_out(const int64_t* positions, int64_t count, int64_t n, float* row) {
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i] == -1) continue;
    if (static_cast<uint64_t>(positions[i]) >= static_cast<uint64_t>(n)) return false;
    row[positions[i]] = std::numeric_limits<float>::quiet_NaN();
  }
  return true;
}

// ahead[k] is how many of the row are ahead of match k: those above it, and of its equals those before `split` of it.
REID3D_INLINE void count_ahead(const float* row, int64_t n, const float* sims, const int64_t* splits, int64_t count,
                               int64_t* ahead) {
  for (int64_t k = 0; k < count; ++k) ahead[k] = 0;
  for (int64_t begin = 0; begin < n; begin += kRowChunk) {
    const int64_t end = n - begin < kRowChunk ? n : begin + kRowChunk;
    for (int64_t k = 0; k < count; ++k) {
      const float sim = sims[k];
      const int64_t split = splits[k] < begin ? begin : splits[k] < end ? splits[k] : end;
      int32_t above = 0;
      for (int64_t i = begin; i < split; ++i) above += row[i] >= sim;
      for (int64_t i = split; i < end; ++i) above += row[i] > sim;
      ahead[k] += above;
    }
  }
}

// The same for many matches, in their order: every item is found between two of them by a search without branches.
REID3D_INLINE void search_ahead(const float* row, int64_t n, const float* sims, const int64_t* splits, int64_t count,
                                uint64_t* keys, int64_t* ahead) {
  for (int64_t k = 0; k < count; ++k) {
    keys[k] = match_key(sims[k], splits[k]);
    ahead[k] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = row[i] == row[i] ? match_key(row[i], i) : ~uint64_t{0};
    const uint64_t* first = keys;  // of those that the item may be ahead of
    for (int64_t left = count; left > 1;) {
      const int64_t half = left / 2;
      first += first[half - 1] <= key ? half : 0;
      left -= half;
    }
    const int64_t gap = first - keys + (*first <= key);
    if (gap < count) ++ahead[gap];
  }
  for (int64_t k = 1; k < count; ++k) ahead[k] += ahead[k - 1];
}

inline MatchError match_places(const float* sim, int64_t n, const int64_t* matches, int64_t matches_count,
                               const int64_t* removed, int64_t removed_count, const int64_t* junk, int64_t junk_count,
                               bool pessimistic, void* scratch, int64_t* places) {
  Match* found = static_cast<Match*>(scratch);
  uint64_t* keys = reinterpret_cast<uint64_t*>(found + matches_count);
  int64_t* splits = reinterpret_cast<int64_t*>(keys + matches_count);
  float* sims = reinterpret_cast<float*>(splits + matches_count);
  float* row = sims + matches_count;
  int32_t unordered = 0;
  for (int64_t i = 0; i < n; ++i) {
    row[i] = sim[i];
    unordered |= sim[i] != sim[i];
  }
  if (unordered) return MatchError::nan;
  if (!take_out(matches, matches_count, n, row) || !take_out(removed, removed_count, n, row) ||
      !take_out(junk, junk_count, n, row))
    return MatchError::position;
  int64_t count = 0;
  for (int64_t k = 0; k < matches_count; ++k)
    if (matches[k] != -1) found[count++] = {match_key(sim[matches[k]], matches[k])};
  std::sort(found, found + count, [](Match a, Match b) { return a.key < b.key; });
  for (int64_t k = 0; k < count; ++k) {
    sims[k] = sim[position_of(found[k])];
    splits[k] = pessimistic ? n : position_of(found[k]);
  }
  if (count > kCounted) search_ahead(row, n, sims, splits, count, keys, places);
  else count_ahead(row, n, sims, splits, count, places);
  for (int64_t k = 0; k < count; ++k) places[k] += k + 1;
  for (int64_t k = count; k < matches_count; ++k) places[k] = 0;
  return MatchError::none;
}

}  // namespace reid3d::REID3D_ISA
