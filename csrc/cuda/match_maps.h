// Similarities of the positions of two maps, tile by tile, and the best of every row: what a thread of the block of some
// rows does. Plain C++, so that the tests run it on the host (tests/ops/warp_match_maps.cpp).
#pragma once

#include <cstdint>
#include <limits>

#include "../rounding.h"

namespace reid3d {

REID3D_HOST_DEVICE inline float multiply_add(float a, float b, float sum) { return fmaf(a, b, sum); }
REID3D_HOST_DEVICE inline double multiply_add(double a, double b, double sum) { return fma(a, b, sum); }

// The first of the largest, or the first NaN, and where it was.
template <typename T>
struct BestMatch {
  T value = -std::numeric_limits<T>::infinity();
  int32_t at = 0;

  REID3D_HOST_DEVICE void take(T x, int32_t place) {
    const bool nan = x != x, was = value != value;
    if (nan != was ? nan : x > value || ((nan || x == value) && place < at)) value = x, at = place;
  }
};

// Four by four similarities for each of 16 * 16 threads.
template <typename T>
struct MatchTile {
  static constexpr int kThreads = 256;
  static constexpr int kEach = 4;
  static constexpr int kSide = 16 * kEach;
  static constexpr int kDepth = 16;  // channels in shared memory at a time
  using Positions = T[kDepth][kSide];

  T sim[kEach][kEach];
  BestMatch<T> best[kEach];  // of a thread's rows, in its columns

  // Neighbouring threads have neighbouring positions.
  REID3D_HOST_DEVICE static int place(int part, int i) { return i * 16 + part; }

  // Brings channels [channel, channel + kDepth) of the positions [first, first + kSide) of a map (c,l) to shared memory:
  // zeros beyond the last channel, and the last position for those beyond it, which changes no maximum.
  REID3D_HOST_DEVICE static void fetch(int thread, Positions& to, const T* map, int32_t first, int32_t l,
                                       int64_t channel, int64_t c) {
    for (int i = thread; i < kDepth * kSide; i += kThreads) {
      const int64_t h = channel + i / kSide;
      const int32_t position = i % kSide < l - first ? first + i % kSide : l - 1;
      to[i / kSide][i % kSide] = h < c ? map[h * l + position] : 0;
    }
  }

  REID3D_HOST_DEVICE void clear() {
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) sim[i][j] = 0;
  }

  // The channels in their order, so that which map is whose makes no difference.
  REID3D_HOST_DEVICE void add(int thread, const Positions& rows, const Positions& columns) {
    for (int d = 0; d < kDepth; ++d) {
      T a[kEach], b[kEach];
      for (int i = 0; i < kEach; ++i) {
        a[i] = rows[d][place(thread / 16, i)];
        b[i] = columns[d][place(thread % 16, i)];
      }
      for (int i = 0; i < kEach; ++i)
        for (int j = 0; j < kEach; ++j) sim[i][j] = multiply_add(a[i], b[j], sim[i][j]);
    }
  }

  REID3D_HOST_DEVICE void take(int thread, int32_t left, int32_t l) {
    for (int j = 0; j < kEach; ++j) {
      const int32_t column = left + place(thread % 16, j);
      for (int i = 0; i < kEach && column < l; ++i) best[i].take(sim[i][j], column);
    }
  }

  REID3D_HOST_DEVICE void share(int thread, BestMatch<T> (&all)[kSide][16]) const {
    for (int i = 0; i < kEach; ++i) all[place(thread / 16, i)][thread % 16] = best[i];
  }

  // The best of a row in all columns.
  REID3D_HOST_DEVICE static BestMatch<T> of_row(const BestMatch<T> (&row)[16]) {
    BestMatch<T> most = row[0];
    for (int part = 1; part < 16; ++part) most.take(row[part].value, row[part].at);
    return most;
  }
};

}  // namespace reid3d
