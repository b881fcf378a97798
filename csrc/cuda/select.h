// The k smallest of a row of distances, by a warp. Contract of the row: no NaN, and +inf behind the last distance up to
// a multiple of four.
#pragma once

#include "pack.h"
#include "sorted_list.h"

namespace reid3d {

constexpr int kWaiting = 2 * kWarp;  // keys in the memory that a warp needs


// The four distances of every lane, from `base` on; a lane beyond the row has +inf.
REID3D_WARP Lane<Pack<float, 4>> load_row(const float* row, int64_t base, int64_t size) {
  return map(
      [=](int lane) {
        constexpr float inf = std::numeric_limits<float>::infinity();
        return base + 4 * lane < size ? load<4>(row + base + 4 * lane) : Pack<float, 4>{{inf, inf, inf, inf}};
      },
      lane_id());
}

// A key that at least k <= 32 of the distances do not exceed: the k-th smallest of the minima of the lanes. With it few
// keys but those wanted reach the list.
REID3D_WARP uint64_t upper_limit(const float* row, int64_t size, int k) {
  Lane<float> least = Lane<float>(std::numeric_limits<float>::infinity());
  for (int64_t base = 0; base < size; base += 4 * kWarp)
    least = map(
        [](float so_far, Pack<float, 4> x) {
          return fminf(so_far, fminf(fminf(x.v[0], x.v[1]), fminf(x.v[2], x.v[3])));
        },
        least, load_row(row, base, size));
  const Lane<uint64_t> sorted = sort32(map([](float d) { return neighbour_key(d, 0x7fffffff); }, least));
  return shfl(sorted, k - 1);
}

// 32 * R at a time, each time those after the last.
template <int R>
REID3D_WARP void k_smallest(const float* row, int64_t size, int64_t k, uint64_t* waiting, float* dist2, int64_t* idx) {
  uint64_t from = 0;
  for (int64_t done = 0; done < k; done += R * kWarp) {
    const int wanted = static_cast<int>(k - done < R * kWarp ? k - done : R * kWarp);
    Nearest<R> nearest(wanted, waiting);
    if (R == 1 && done == 0) nearest.restart(upper_limit(row, size, wanted));
    for (int64_t base = 0; base < size; base += 4 * kWarp) {
      const Lane<Pack<float, 4>> x = load_row(row, base, size);
      REID3D_UNROLL
      for (int c = 0; c < 4; ++c)
        nearest.push(map(
            [=](int lane, Pack<float, 4> d) {
              const uint64_t key = neighbour_key(d.v[c], static_cast<int32_t>(base) + 4 * lane + c);
              return base + 4 * lane < size && key >= from ? key : kNoKey;
            },
            lane_id(), x));
    }
    nearest.merge_waiting();
    REID3D_UNROLL
    for (int r = 0; r < R; ++r)
      each(
          [=](int lane, uint64_t key) {
            if (r * kWarp + lane >= wanted) return;
            dist2[done + r * kWarp + lane] = key_distance(key);
            idx[done + r * kWarp + lane] = key_index(key);
          },
          lane_id(), nearest.list.key[r]);
    from = nearest.list.at(wanted - 1) + 1;
  }
}

// A distance in double precision leaves no room for the index in 64 bits: one neighbour at a time, the smallest after
// the last.
struct Neighbour {
  double dist2;
  int32_t index;

  REID3D_HOST_DEVICE bool before(const Neighbour& other) const {
    return dist2 < other.dist2 || (dist2 == other.dist2 && index < other.index);
  }
};

REID3D_WARP void k_smallest(const double* row, int64_t size, int64_t k, double* dist2, int64_t* idx) {
  constexpr Neighbour none{std::numeric_limits<double>::infinity(), 0x7fffffff};
  Neighbour last{-1, -1};
  for (int64_t place = 0; place < k; ++place) {
    Lane<Neighbour> best = map(
        [=](int lane) {
          Neighbour mine = none;
          for (int64_t i = lane; i < size; i += kWarp) {
            const Neighbour next{row[i], static_cast<int32_t>(i)};
            if (last.before(next) && next.before(mine)) mine = next;
          }
          return mine;
        },
        lane_id());
    REID3D_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2)
      best = map(
          [](Neighbour mine, double d, int32_t i) {
            const Neighbour other{d, i};
            return other.before(mine) ? other : mine;
          },
          best, shfl_xor(map([](Neighbour x) { return x.dist2; }, best), step),
          shfl_xor(map([](Neighbour x) { return x.index; }, best), step));
    last.dist2 = shfl(map([](Neighbour x) { return x.dist2; }, best), 0);
    last.index = shfl(map([](Neighbour x) { return x.index; }, best), 0);
    each([=](int lane) { if (lane == 0) dist2[place] = last.dist2, idx[place] = last.index; }, lane_id());
  }
}

}  // namespace reid3d
