// The best match of every position of a map in another one, and its gradient. Contract: reid3d/ops/match_maps.py. The
// similarities are computed in tiles that are looked at while they are in registers. As matrix.h, this rounds as the
// processor likes best; which map is whose makes no difference to a bit.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace reid3d::REID3D_ISA {

// A tile: as many rows of vectors of 16 columns as the registers hold.
#if defined(__AVX512F__)
template <typename T>
constexpr int kTileVectors = sizeof(T) == 8 ? 1 : 2;
template <typename T>
constexpr int kTileRows = sizeof(T) == 8 ? 8 : 12;
#else
template <typename T>
constexpr int kTileVectors = 1;
template <typename T>
constexpr int kTileRows = kRowsAtOnce<T>;
#endif

// A map (c,l) as panels (c,P) of P positions, of which the last one fills up the last panel: what is there twice changes
// no maximum. Writes match_panels(c, l) numbers, or less.
template <int P, typename T>
REID3D_INLINE void pack_positions(const T* map, int64_t c, int64_t l, Wide<T>* panels) {
  constexpr int vectors = (P + kLanes - 1) / kLanes;
  for (int64_t first = 0; first < l; first += P)
    for (int64_t h = 0; h < c; ++h, panels += P) {
      const T* from = map + h * l;
      if (first + vectors * kLanes <= l) {  // the next panel, or nobody, has what is written beyond this one
        for (int v = 0; v < vectors; ++v) load_row(from + first + v * kLanes).store(panels + v * kLanes);
      } else {
        for (int i = 0; i < P; ++i) panels[i] = widened(from[first + i < l ? first + i : l - 1]);
      }
    }
}

template <typename T>
void pack_rows(const T* map, int64_t c, int64_t l, Wide<T>* panels) {
  pack_positions<kTileRows<Wide<T>>>(map, c, l, panels);
}

template <typename T>
void pack_columns(const T* map, int64_t c, int64_t l, Wide<T>* panels) {
  pack_positions<kLanes * kTileVectors<Wide<T>>>(map, c, l, panels);
}

// Keeps the larger one and where it was found; the first of equal ones, and the first NaN for good.
template <typename T, typename I>
REID3D_INLINE void keep(const Vec<T>& x, int64_t place, Vec<T>& best, Vec<I>& at) {
  const Mask<T> wins = above(x, best);
  best = where(wins, x, best);
  at = where(wins, Vec<I>::all(static_cast<I>(place)), at);
}

// Both maxima (2,l) of a pair of packed maps, and where `exact` the winners, which may go nowhere. What is not exact
// knows no NaN: it gives up, and is false, where it sees one.
template <bool exact, int R, int V, typename T>
REID3D_INLINE bool match_tiles(const T* rows, const T* columns, int64_t c, int64_t l, void* scratch, T* best,
                               int16_t* winner) {
  using I = typename SlotLane<T>::type;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const int64_t blocks = (l + R - 1) / R;
  // of each row the best in columns of one remainder by 16, and which vector of columns that was in
  T* row_best = static_cast<T*>(scratch);
  I* row_at = reinterpret_cast<I*>(row_best + blocks * R * kLanes);
  for (int64_t i = 0; i < blocks * R; ++i) {
    Vec<T>::all(-inf).store(row_best + i * kLanes);
    if (exact) Vec<I>::all(0).store(row_at + i * kLanes);
  }
  for (int64_t left = 0; left < l; left += V * kLanes, columns += V * kLanes * c) {
    Vec<T> top[V];
    Vec<I> top_at[V];
    REID3D_UNROLL
    for (int v = 0; v < V; ++v) top[v] = Vec<T>::all(-inf), top_at[v] = Vec<I>::all(0);
    for (int64_t block = 0; block < blocks; ++block) {
      Vec<T> sum[R][V];
      REID3D_UNROLL
      for (int i = 0; i < R; ++i)
        REID3D_UNROLL
        for (int v = 0; v < V; ++v) sum[i][v] = Vec<T>::all(0);
      const T* x = rows + block * R * c;
      const T* y = columns;
      for (int64_t h = 0; h < c; ++h, x += R, y += V * kLanes) {
        Vec<T> b[V];
        REID3D_UNROLL
        for (int v = 0; v < V; ++v) b[v] = Vec<T>::load(y + v * kLanes);
        REID3D_UNROLL
        for (int i = 0; i < R; ++i) {
          const Vec<T> a = Vec<T>::all(x[i]);
          REID3D_UNROLL
          for (int v = 0; v < V; ++v) sum[i][v] = madd(a, b[v], sum[i][v]);
        }
      }
      T* tile_best = row_best + block * R * kLanes;
      if constexpr (exact) {
        I* tile_at = row_at + block * R * kLanes;
        REID3D_UNROLL
        for (int i = 0; i < R; ++i) {
          Vec<T> most = Vec<T>::load(tile_best + i * kLanes);
          Vec<I> at = Vec<I>::load(tile_at + i * kLanes);
          REID3D_UNROLL
          for (int v = 0; v < V; ++v) {
            keep(sum[i][v], left / kLanes + v, most, at);
            keep(sum[i][v], block * R + i, top[v], top_at[v]);
          }
          most.store(tile_best + i * kLanes);
          at.store(tile_at + i * kLanes);
        }
      } else {
        Mask<T> nan = unordered(sum[0][0], sum[R - 1][V - 1]);
        REID3D_UNROLL
        for (int i = 0; i < R; ++i) {
          Vec<T> most = Vec<T>::load(tile_best + i * kLanes);
          REID3D_UNROLL
          for (int v = 0; v < V; ++v) {
            most = max(sum[i][v], most);
            top[v] = max(sum[i][v], top[v]);
            if (i % 2) nan = nan | unordered(sum[i - 1][v], sum[i][v]);
          }
          most.store(tile_best + i * kLanes);
        }
        if (bits(nan)) return false;
      }
    }
    T value[V * kLanes];
    I at[V * kLanes];
    REID3D_UNROLL
    for (int v = 0; v < V; ++v) {
      top[v].store(value + v * kLanes);
      top_at[v].store(at + v * kLanes);
    }
    for (int64_t j = left; j < l && j < left + V * kLanes; ++j) {
      best[l + j] = value[j - left];
      if (exact && winner) winner[l + j] = static_cast<int16_t>(at[j - left]);
    }
  }
  for (int64_t i = 0; i < l; ++i) {
    const T* value = row_best + i * kLanes;
    if constexpr (exact) {
      const I* at = row_at + i * kLanes;
      T most = value[0];
      int64_t place = at[0] * kLanes;
      for (int k = 1; k < kLanes; ++k) {
        const int64_t j = at[k] * kLanes + k;
        const bool nan = value[k] != value[k], was = most != most;
        if (nan == was ? (nan || value[k] == most ? j < place : value[k] > most) : nan) most = value[k], place = j;
      }
      best[i] = most;
      if (winner) winner[i] = static_cast<int16_t>(place);
    } else {
      best[i] = reduce_max(Vec<T>::load(value));
    }
  }
  return true;
}

// `rows` and `columns` are packed; `winner` may be null. `scratch`: see match_pair_scratch.
template <typename T>
void match_pair(const T* rows, const T* columns, int64_t c, int64_t l, void* scratch, T* best, int16_t* winner) {
  constexpr int R = kTileRows<T>, V = kTileVectors<T>;
  if (winner || !match_tiles<false, R, V>(rows, columns, c, l, scratch, best, nullptr))
    match_tiles<true, R, V>(rows, columns, c, l, scratch, best, winner);
}

// The gradient (count,c,l) of `count` query maps in the channels [channel, channel + 16), or up to the last one, from
// that of their matches in all `maps` gallery maps, grad (count,maps,2,l). `scratch` is (count + 1) * l * 16.
template <typename T>
void add_matches(const Wide<T>* grad, const int16_t* winner, const T* gallery, int64_t count, int64_t maps, int64_t c,
                 int64_t l, int64_t channel, Wide<T>* scratch, Wide<T>* out) {
  using W = Wide<T>;
  const int width = c - channel < kLanes ? static_cast<int>(c - channel) : kLanes;
  W* rows = scratch;  // (l,16) of the gallery map, zeros beyond its channels
  W* sums = rows + l * kLanes;
  for (int64_t i = 0; i < (count + 1) * l * kLanes; ++i) scratch[i] = 0;
  for (int64_t g = 0; g < maps; ++g) {
    for (int h = 0; h < width; ++h)
      for (int64_t i = 0; i < l; ++i) rows[i * kLanes + h] = widened(gallery[(g * c + channel + h) * l + i]);
    for (int64_t q = 0; q < count; ++q) {
      const W* weight = grad + (q * maps + g) * 2 * l;
      const int16_t* at = winner + (q * maps + g) * 2 * l;
      W* sum = sums + q * l * kLanes;
      const auto add = [&](int64_t i, int64_t j, W w) {
        madd(Vec<W>::all(w), Vec<W>::load(rows + j * kLanes), Vec<W>::load(sum + i * kLanes)).store(sum + i * kLanes);
      };
      for (int64_t i = 0; i < l; ++i) add(i, at[i], weight[i]);
      for (int64_t j = 0; j < l; ++j) add(at[l + j], j, weight[l + j]);
    }
  }
  for (int64_t q = 0; q < count; ++q)
    for (int h = 0; h < width; ++h)
      for (int64_t i = 0; i < l; ++i) out[(q * c + channel + h) * l + i] = sums[(q * l + i) * kLanes + h];
}

}  // namespace reid3d::REID3D_ISA
