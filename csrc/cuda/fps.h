// Farthest point sampling by a block, as its warps see it. A cloud that fits into the registers of a block stays there
// (FpsRegisters); any other has its distances in memory (FpsMemory). Every warp takes a picked point into account and
// names its own farthest point; after one barrier every warp finds the farthest of all from what the others named.
//
// dist2 of a point is its squared distance to the nearest picked point: +inf before the first, -1 for NaN points, -inf
// once picked.
#pragma once

#include "lane.h"

namespace reid3d {

template <typename T>
struct Farthest {
  T dist2;
  int32_t index;
};

// The larger distance; the lower index where they are equal.
template <typename T>
REID3D_WARP Farthest<T> farther(Farthest<T> a, Farthest<T> b) {
  return b.dist2 > a.dist2 || (b.dist2 == a.dist2 && b.index < a.index) ? b : a;
}

// Distances as they order, as unsigned numbers: one instruction of a warp finds the largest.
REID3D_WARP uint32_t distance_rank(float dist2) { return dist2 >= 0 ? float_bits(dist2) + 2 : dist2 == -1 ? 1 : 0; }

template <typename T>
REID3D_WARP T initial_distance(T x, T y, T z) {
  return x == x && y == y && z == z ? infinity<T>() : T(-1);
}

// What a warp names: the rank of its largest distance and the lowest index that has it.
struct FpsName {
  uint32_t rank, index;
};

REID3D_WARP FpsName fps_name(const Lane<uint32_t>& rank, const Lane<uint32_t>& index) {
  const uint32_t most = reduce_max(rank);
  return {most,
          reduce_min(map([most](uint32_t r, uint32_t i) { return r == most ? i : ~uint32_t(0); }, rank, index))};
}

// The farthest of all from the names of a power of two of warps.
REID3D_WARP int32_t fps_choose(const FpsName* names, int warps) {
  const Lane<uint32_t> rank = map([=](int lane) { return names[lane % warps].rank; }, lane_id());
  const Lane<uint32_t> index = map([=](int lane) { return names[lane % warps].index; }, lane_id());
  return static_cast<int32_t>(fps_name(rank, index).index);
}

// A warp of `Threads` threads that hold up to Threads * P points: point j * Threads + thread is in place j of a thread.
// The order along the Z-curve is of no use here: no point is passed over, and neighbours would share a thread.
template <int Threads, int P>
struct FpsRegisters {
  Lane<float> x[P], y[P], z[P], dist2[P];
  int warp;

  REID3D_WARP FpsRegisters(const float* xyz, int32_t N, int warp_) : warp(warp_) {
    REID3D_UNROLL
    for (int j = 0; j < P; ++j) {
      const Lane<int32_t> i = map([=](int lane) { return j * Threads + warp_ * kWarp + lane; }, lane_id());
      x[j] = map([=](int32_t i) { return i < N ? xyz[3 * i] : 0.0f; }, i);
      y[j] = map([=](int32_t i) { return i < N ? xyz[3 * i + 1] : 0.0f; }, i);
      z[j] = map([=](int32_t i) { return i < N ? xyz[3 * i + 2] : 0.0f; }, i);
      dist2[j] = map(
          [=](int32_t i, float px, float py, float pz) {
            return i < N ? initial_distance(px, py, pz) : -infinity<float>();
          },
          i, x[j], y[j], z[j]);
    }
  }

  REID3D_WARP FpsName pick(int32_t picked, float px, float py, float pz) {
    if (picked % Threads / kWarp == warp) {
      const int lane_of = picked % kWarp, place = picked / Threads;
      REID3D_UNROLL
      for (int j = 0; j < P; ++j)
        dist2[j] = map([=](int lane, float d) { return lane == lane_of && j == place ? -infinity<float>() : d; },
                       lane_id(), dist2[j]);
    }
    // The largest distance alone, which costs one instruction a point; where it is, is asked afterwards.
    Lane<float> most(-infinity<float>());
    REID3D_UNROLL
    for (int j = 0; j < P; ++j) {
      dist2[j] = map(  // fminf: a NaN leaves what was there
          [=](float d, float x, float y, float z) { return fminf(d, squared_distance3(x, y, z, px, py, pz)); }, dist2[j],
          x[j], y[j], z[j]);
      most = map([](float a, float b) { return fmaxf(a, b); }, most, dist2[j]);
    }
    const Lane<uint32_t> rank = map([](float d) { return distance_rank(d); }, most);
    Lane<uint32_t> place(0u);
    REID3D_UNROLL
    for (int j = P - 1; j >= 0; --j)
      place = map([j](uint32_t at, float d, float m) { return d == m ? uint32_t(j) : at; }, place, dist2[j], most);
    const uint32_t first = warp * kWarp;
    return fps_name(rank, map([first](uint32_t p, int lane) { return p * Threads + first + lane; }, place, lane_id()));
  }
};

// Any number of points: a lane reads and writes only its own entries of dist2, so that no barrier is needed for them.
template <typename T>
struct FpsMemory {
  const T* xyz;
  T* dist2;
  int32_t N, threads;
  int warp;

  REID3D_WARP void start() const {
    const FpsMemory m = *this;
    for (int64_t base = warp * kWarp; base < N; base += threads)
      each(
          [=](int lane) {
            const int64_t i = base + lane;
            if (i < m.N) m.dist2[i] = initial_distance(m.xyz[3 * i], m.xyz[3 * i + 1], m.xyz[3 * i + 2]);
          },
          lane_id());
  }

  REID3D_WARP Farthest<T> pick(int32_t picked, T px, T py, T pz) const {
    const FpsMemory m = *this;
    Lane<Farthest<T>> most(Farthest<T>{-infinity<T>(), m.N});
    for (int64_t base = warp * kWarp; base < N; base += threads)
      most = map(
          [=](int lane, Farthest<T> best) {
            const int64_t i = base + lane;
            if (i >= m.N) return best;
            const T d = squared_distance3(m.xyz[3 * i], m.xyz[3 * i + 1], m.xyz[3 * i + 2], px, py, pz);
            T nearest = d < m.dist2[i] ? d : m.dist2[i];  // a NaN leaves what was there
            if (i == picked) nearest = -infinity<T>();
            m.dist2[i] = nearest;
            return farther(best, Farthest<T>{nearest, static_cast<int32_t>(i)});
          },
          lane_id(), most);
    return reduce(most);
  }

  REID3D_WARP static Farthest<T> reduce(Lane<Farthest<T>> most) {
    REID3D_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Lane<T> d = shfl_xor(map([](Farthest<T> f) { return f.dist2; }, most), step);
      const Lane<int32_t> i = shfl_xor(map([](Farthest<T> f) { return f.index; }, most), step);
      most = map([](Farthest<T> f, T d, int32_t i) { return farther(f, Farthest<T>{d, i}); }, most, d, i);
    }
    return first_lane(most);
  }

  REID3D_WARP static int32_t choose(const Farthest<T>* names, int warps) {
    return reduce(map([=](int lane) { return names[lane % warps]; }, lane_id())).index;
  }
};

}  // namespace reid3d
