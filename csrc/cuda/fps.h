// Farthest point sampling by a block, as its warps see it. A cloud that fits into the registers of a block stays there
// (FpsRegisters, FpsSlab); any other has its distances in memory (FpsMemory). Every warp takes a picked point into
// account and names its own farthest point; after one barrier every warp finds the farthest of all from these names.
//
// dist2 of a point is its squared distance to the nearest picked point: +inf before the first, -1 for NaN points, -inf
// once picked.
#pragma once

#include "box.h"

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

// The other way round; below 0 where no distance is left.
REID3D_WARP float ranked_distance(uint32_t rank) { return rank >= 2 ? bits_float(rank - 2) : -1.0f; }

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

struct FpsChoice {
  int32_t index;
  int warp;  // that named it
};

// The farthest of all from the names of up to 32 warps.
REID3D_WARP FpsChoice fps_choose(const FpsName* names, int warps) {
  const Lane<uint32_t> rank = map([=](int lane) { return names[lane % warps].rank; }, lane_id());
  const Lane<uint32_t> index = map([=](int lane) { return names[lane % warps].index; }, lane_id());
  const uint32_t chosen = fps_name(rank, index).index;
  const uint32_t from = ballot(map([chosen](uint32_t i) { return i == chosen; }, index));
  return {static_cast<int32_t>(chosen), lowest_bit(from) % warps};
}

// Takes a picked point into account. Gives a lane's largest distance alone, which costs one instruction a point; where
// it is, is asked afterwards.
template <int P>
REID3D_WARP Lane<float> shorten(const Lane<float> (&x)[P], const Lane<float> (&y)[P], const Lane<float> (&z)[P],
                                float px, float py, float pz, Lane<float> (&dist2)[P]) {
  const auto nearest = [=](float d, float qx, float qy, float qz) {
    return fminf(d, squared_distance3(qx, qy, qz, px, py, pz));  // a NaN leaves what was there
  };
  Lane<float> most(-infinity<float>());
  REID3D_UNROLL
  for (int j = 0; j < P; ++j) {
    dist2[j] = map(nearest, dist2[j], x[j], y[j], z[j]);
    most = map([](float a, float b) { return fmaxf(a, b); }, most, dist2[j]);
  }
  return most;
}

// A warp of `Threads` threads that hold up to Threads * P points: point j * Threads + thread is in place j of a thread.
// For small clouds, which are sampled sooner than they are ordered, and for those that fill the registers.
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
    const Lane<float> most = shorten(x, y, z, px, py, pz, dist2);
    const Lane<uint32_t> rank = map([](float d) { return distance_rank(d); }, most);
    Lane<uint32_t> place(0u);
    REID3D_UNROLL
    for (int j = P - 1; j >= 0; --j)
      place = map([j](uint32_t at, float d, float m) { return d == m ? uint32_t(j) : at; }, place, dist2[j], most);
    const uint32_t first = warp * kWarp;
    return fps_name(rank, map([first](uint32_t p, int lane) { return p * Threads + first + lane; }, place, lane_id()));
  }
};

// The same for points in the order of the Z-curve, of which a warp has a slab with a box around it. Most picked points
// are too far from a slab to change it: then its warp names what it named before. Any order gives the same result.
template <int Threads, int P>
struct FpsSlab {
  Lane<float> x[P], y[P], z[P], dist2[P];
  Lane<uint32_t> index[P];
  Box box;
  float most;  // the largest distance
  FpsName name;

  REID3D_WARP FpsSlab(const float* xyz, const int32_t* order, int32_t N, int warp) : most(infinity<float>()), name{} {
    const int rows = (N + Threads - 1) / Threads;  // as many for each warp; there are up to P
    const float nan = std::numeric_limits<float>::quiet_NaN();
    Lane<Box> around(box_of_point(nan, nan, nan));
    REID3D_UNROLL
    for (int j = 0; j < P; ++j) {
      index[j] = map(
          [=](int lane) {
            const int32_t place = (warp * rows + j) * kWarp + lane;
            return j < rows && place < N ? static_cast<uint32_t>(order[place]) : ~0u;
          },
          lane_id());
      x[j] = map([=](uint32_t i) { return i != ~0u ? xyz[3 * i] : nan; }, index[j]);
      y[j] = map([=](uint32_t i) { return i != ~0u ? xyz[3 * i + 1] : nan; }, index[j]);
      z[j] = map([=](uint32_t i) { return i != ~0u ? xyz[3 * i + 2] : nan; }, index[j]);
      dist2[j] = map(
          [=](uint32_t i, float px, float py, float pz) {
            return i != ~0u ? initial_distance(px, py, pz) : -infinity<float>();
          },
          index[j], x[j], y[j], z[j]);
      around = map([](const Box& b, float px, float py, float pz) { return box_of_both(b, box_of_point(px, py, pz)); },
                   around, x[j], y[j], z[j]);
    }
    box = box_around(around);
  }

  // `mine` where the picked point is in this slab; before the first name it may be true for all.
  REID3D_WARP FpsName pick(int32_t picked, bool mine, float px, float py, float pz) {
    if (!mine && distance_to_box(box, px, py, pz) >= most) return name;
    if (mine) {
      REID3D_UNROLL
      for (int j = 0; j < P; ++j)
        dist2[j] = map([=](uint32_t i, float d) { return i == static_cast<uint32_t>(picked) ? -infinity<float>() : d; },
                       index[j], dist2[j]);
    }
    const Lane<float> farthest = shorten(x, y, z, px, py, pz, dist2);
    Lane<uint32_t> lowest(~0u);
    REID3D_UNROLL
    for (int j = 0; j < P; ++j)
      lowest = map([](uint32_t best, uint32_t i, float d, float f) { return d == f && i < best ? i : best; }, lowest,
                   index[j], dist2[j], farthest);
    name = fps_name(map([](float d) { return distance_rank(d); }, farthest), lowest);
    most = ranked_distance(name.rank);
    return name;
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
