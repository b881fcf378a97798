// A stable counting sort of the edges of a graph by the point they end in, as the code of a block: phases between which
// the block waits, each of them the work of one warp. Every warp counts and places a stretch of the list of its own, in
// order, so that the result depends on no order of atomics. Merrill and Grimshaw, "High performance and scalable radix
// sorting", 2011. The tests run the phases on the host (tests/ops/warp_transpose.cpp).
#pragma once

#include "lane.h"

namespace reid3d {

constexpr int kSortWarps = 8;
constexpr int kSortRows = 512;    // counted at a time by a block
constexpr int kMaxGroups = 256;   // of points, where there are too many for one block
constexpr int kMaxChunks = 64;    // of the edges of a cloud, while they are being brought into groups
constexpr int kMinChunk = 4096;
static_assert(kSortWarps * kWarp >= kMaxGroups && kSortRows >= kMaxGroups);

#ifdef __CUDA_ARCH__

// The lanes with the same x.
__device__ __forceinline__ uint32_t match_any(int32_t x) { return __match_any_sync(kAllLanes, x); }

__device__ __forceinline__ int32_t inclusive_sum(int32_t x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, x, step);
    if (lane_id() >= step) x += below;
  }
  return x;
}

__device__ __forceinline__ void increment(int32_t* counter) { atomicAdd(counter, 1); }

#else

inline Lane<uint32_t> match_any(const Lane<int32_t>& x) {
  Lane<uint32_t> r(0);
  for (int i = 0; i < kWarp; ++i)
    for (int j = 0; j < kWarp; ++j) r.v[i] |= static_cast<uint32_t>(x.v[i] == x.v[j]) << j;
  return r;
}

inline Lane<int32_t> inclusive_sum(Lane<int32_t> x) {
  for (int i = 1; i < kWarp; ++i) x.v[i] += x.v[i - 1];
  return x;
}

inline void increment(int32_t* counter) { ++*counter; }

#endif

// An edge and the point it ends in; Entry(row, edge) of a place in a list.
struct Entry {
  int32_t row, edge;
};

// The list of a cloud: the graph itself, whose indices Check looks at.
template <typename Check>
struct GraphList {
  const int64_t* idx;
  Check check;

  REID3D_HOST_DEVICE Entry operator[](int64_t place) const {
    check(idx[place]);
    return {static_cast<int32_t>(idx[place]), static_cast<int32_t>(place)};
  }
};

// Where the edges of a lane go: its row's counter, after the lower lanes of the same row. Row -1 is no row.
REID3D_WARP Lane<int32_t> claim(const Lane<int32_t>& row, int32_t* counter) {
  const Lane<uint32_t> same = match_any(row);
  const Lane<int32_t> place = map(
      [=](int lane, int32_t r, uint32_t peers) {
        return r < 0 ? -1 : counter[r] + popcount(peers & ((1u << lane) - 1));
      },
      lane_id(), row, same);
  sync_warp();
  each(
      [=](int lane, int32_t r, uint32_t peers, int32_t first) {
        if (r >= 0 && lowest_bit(peers) == lane) counter[r] = first + popcount(peers);
      },
      lane_id(), row, same, place);
  sync_warp();
  return place;
}

// What the warps of a block share.
struct SortShared {
  int32_t counter[kSortWarps][kSortRows];
  int32_t start[kSortRows];     // of a row among the rows of its warp
  int32_t total[kSortWarps];    // edges in the rows of a warp
  int32_t below[kSortWarps];    // edges of a warp's stretch in rows before the first
};

// Sorts list[first, last) by key(row) - low, where it is in [0, rows): rows <= kSortRows.
template <typename List, typename Key>
struct StableSort {
  const List& list;
  const Key& key;
  int64_t first, last;
  int32_t low, rows;
  SortShared& shared;

  REID3D_WARP int64_t stretch() const {
    return ((last - first + kSortWarps - 1) / kSortWarps + kWarp - 1) / kWarp * kWarp;
  }
  REID3D_WARP int64_t begin(int warp) const { return first + warp * stretch(); }
  REID3D_WARP int64_t end(int warp) const { return begin(warp) + stretch() < last ? begin(warp) + stretch() : last; }

  // Phase 1.
  REID3D_WARP void count(int warp) const {
    int32_t* const counter = shared.counter[warp];
    const auto& self = *this;
    each([=](int lane) { for (int r = lane; r < self.rows; r += kWarp) counter[r] = 0; }, lane_id());
    sync_warp();
    const int64_t stop = end(warp);
    int32_t below = 0;
    for (int64_t base = begin(warp); base < stop; base += kWarp) {
      below += popcount(ballot(map(
          [=](int lane) {
            if (base + lane >= stop) return false;
            const int32_t row = self.key(self.list[base + lane].row) - self.low;
            if (row >= 0 && row < self.rows) increment(counter + row);
            return row < 0;
          },
          lane_id())));
    }
    each([=](int lane) { if (lane == 0) self.shared.below[warp] = below; }, lane_id());
  }

  // Phase 2: a warp adds up some of the rows.
  REID3D_WARP static int32_t rows_per_warp(int32_t rows) {
    return (rows + kSortWarps * kWarp - 1) / (kSortWarps * kWarp) * kWarp;
  }

  REID3D_WARP void add_up(int warp) const {
    const auto& self = *this;
    const int32_t size = rows_per_warp(rows);
    int32_t sum = 0;
    for (int32_t base = warp * size; base < (warp + 1) * size; base += kWarp) {
      const Lane<int32_t> mine = map(
          [=](int lane) {
            int32_t edges = 0;
            for (int w = 0; w < kSortWarps && base + lane < self.rows; ++w)
              edges += self.shared.counter[w][base + lane];
            return edges;
          },
          lane_id());
      const Lane<int32_t> upto = inclusive_sum(mine);
      each(
          [=](int lane, int32_t with, int32_t edges) {
            if (base + lane < self.rows) self.shared.start[base + lane] = sum + with - edges;
          },
          lane_id(), upto, mine);
      sum += shfl(upto, kWarp - 1);
    }
    each([=](int lane) { if (lane == 0) self.shared.total[warp] = sum; }, lane_id());
  }

  // Phase 3: counters become the places where each warp goes on. start_of(row, place among the rows) is where a row
  // begins; the rows before `low` are counted in.
  template <typename Start>
  REID3D_WARP void open(int warp, const Start& start_of) const {
    const auto& self = *this;
    const int32_t size = rows_per_warp(rows);
    int32_t before = 0;
    for (int w = 0; w < kSortWarps; ++w) before += shared.below[w] + (w < warp ? shared.total[w] : 0);
    for (int32_t base = warp * size; base < (warp + 1) * size; base += kWarp) {
      each(
          [=](int lane) {
            const int32_t r = base + lane;
            if (r >= self.rows) return;
            int32_t place = start_of(r, before + self.shared.start[r]);
            for (int w = 0; w < kSortWarps; ++w) {
              const int32_t edges = self.shared.counter[w][r];
              self.shared.counter[w][r] = place;
              place += edges;
            }
          },
          lane_id());
    }
  }

  // Phase 4: out(place, entry).
  template <typename Out>
  REID3D_WARP void place(int warp, const Out& out) const {
    const auto& self = *this;
    int32_t* const counter = shared.counter[warp];
    const int64_t stop = end(warp);
    for (int64_t base = begin(warp); base < stop; base += kWarp) {
      const Lane<Entry> entry = map(
          [=](int lane) { return base + lane < stop ? self.list[base + lane] : Entry{-1, -1}; }, lane_id());
      const Lane<int32_t> row = map(
          [=](Entry e) {
            const int32_t r = e.row < 0 ? -1 : self.key(e.row) - self.low;
            return r >= 0 && r < self.rows ? r : -1;
          },
          entry);
      each([=](int32_t p, Entry e) { if (p >= 0) out(p, e); }, claim(row, counter), entry);
    }
  }
};

// Where the groups of a cloud begin, and a chunk's edges in them, from counts (chunks,groups); a thread per group.
struct GroupStarts {
  int32_t before[kMaxGroups];   // edges in the groups before it, of those of the same warp
  int32_t earlier[kMaxGroups];  // edges of the group in earlier chunks
  int32_t total[kSortWarps];    // edges in the groups of a warp

  // A phase of the block, as above.
  REID3D_WARP void add_up(int warp, const int32_t* counts, int64_t chunks, int32_t groups, int64_t chunk) {
    auto& self = *this;
    const Lane<int32_t> mine = map(
        [=, &self](int lane) {
          const int group = warp * kWarp + lane;
          int32_t edges = 0;
          for (int64_t c = 0; c < chunks && group < groups; ++c) {
            if (c == chunk) self.earlier[group] = edges;
            edges += counts[c * groups + group];
          }
          return edges;
        },
        lane_id());
    const Lane<int32_t> upto = inclusive_sum(mine);
    each([=, &self](int lane, int32_t with, int32_t edges) { self.before[warp * kWarp + lane] = with - edges; },
         lane_id(), upto, mine);
    const int32_t all = shfl(upto, kWarp - 1);
    each([=, &self](int lane) { if (lane == 0) self.total[warp] = all; }, lane_id());
  }

  REID3D_HOST_DEVICE int32_t begin(int32_t group) const {
    int32_t place = before[group];
    for (int w = 0; w < group / kWarp; ++w) place += total[w];
    return place;
  }
};

// How the points of a cloud are taken apart: groups of 1 << shift points, each sorted by itself.
struct Groups {
  int32_t shift, count;
  int32_t sweeps;  // blocks per group: each counts kSortRows of its rows
  int64_t chunk, chunks;  // edges in the care of a block while they are brought into groups

  // n points, E edges per cloud. One group is sorted straight from the graph.
  Groups(int64_t n, int64_t E) {
    shift = 6;
    while (((n - 1) >> shift) >= kMaxGroups) ++shift;
    if (n <= 2 * kSortRows) shift = 10;
    count = static_cast<int32_t>((n - 1) >> shift) + 1;
    const int64_t rows = n < (int64_t{1} << shift) ? n : int64_t{1} << shift;
    sweeps = static_cast<int32_t>((rows + kSortRows - 1) / kSortRows);
    constexpr int64_t step = kSortWarps * kWarp;
    chunk = ((E + kMaxChunks - 1) / kMaxChunks + step - 1) / step * step;
    if (chunk < kMinChunk) chunk = kMinChunk;
    chunks = (E + chunk - 1) / chunk;
  }
};

}  // namespace reid3d
