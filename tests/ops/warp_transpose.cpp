// The sort of csrc/cuda/transpose.h, its blocks one after the other, against std::stable_sort.
#include "../../csrc/cuda/transpose.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace reid3d;

namespace {

struct InRange {
  int64_t n;
  void operator()(int64_t i) const {
    if (i < 0 || i >= n) std::abort();
  }
};

struct Shift {
  int32_t by;
  int32_t operator()(int32_t row) const { return row >> by; }
};

struct Entries {
  const Entry* entries;
  Entry operator[](int64_t place) const { return entries[place]; }
};

template <typename List, typename Start, typename Out>
void run_block(const List& list, int32_t shift, int64_t first, int64_t last, int32_t low, int32_t rows, Start start,
               Out out) {
  static SortShared shared;
  for (auto& counter : shared.counter) std::fill(std::begin(counter), std::end(counter), -7);
  const Shift key{shift};
  const StableSort<List, Shift> sort{list, key, first, last, low, rows, shared};
  for (int w = 0; w < kSortWarps; ++w) sort.count(w);
  for (int w = 0; w < kSortWarps; ++w) sort.add_up(w);
  for (int w = 0; w < kSortWarps; ++w) sort.open(w, start);
  for (int w = kSortWarps - 1; w >= 0; --w) sort.place(w, out);  // in any order
}

bool check(const std::vector<int64_t>& idx, int64_t n) {
  const int64_t E = static_cast<int64_t>(idx.size());
  const Groups groups(n, E);
  std::vector<int32_t> offsets(n + 1, -1), edges(E, -1), starts(groups.count + 1, -1);
  std::vector<Entry> entries(E, Entry{-1, -1});
  const GraphList<InRange> graph{idx.data(), {n}};
  starts[groups.count] = static_cast<int32_t>(E);
  if (groups.count > 1) {
    std::vector<int32_t> counts(groups.chunks * groups.count, 0);
    for (int64_t i = 0; i < E; ++i) ++counts[i / groups.chunk * groups.count + (idx[i] >> groups.shift)];
    for (int64_t chunk = 0; chunk < groups.chunks; ++chunk) {
      static GroupStarts start;
      for (int w = 0; w < kSortWarps; ++w) start.add_up(w, counts.data(), groups.chunks, groups.count, chunk);
      const int64_t first = chunk * groups.chunk;
      run_block(graph, groups.shift, first, std::min(first + groups.chunk, E), 0, groups.count,
                [&](int32_t group, int32_t) {
                  starts[group] = start.begin(group);
                  return start.begin(group) + start.earlier[group];
                },
                [&](int32_t place, Entry entry) { entries.at(place) = entry; });
    }
  } else {
    starts[0] = 0;
  }
  offsets[n] = static_cast<int32_t>(E);
  for (int32_t group = 0; group < groups.count; ++group) {
    for (int32_t sweep = 0; sweep < groups.sweeps; ++sweep) {
      const int32_t low = (group << groups.shift) + sweep * kSortRows;
      const int32_t high = std::min({low + kSortRows, (group + 1) << groups.shift, static_cast<int32_t>(n)});
      if (low >= high) continue;
      const int64_t first = starts[group], last = starts[group + 1];
      const auto start = [&](int32_t row, int32_t place) {
        return offsets.at(low + row) = static_cast<int32_t>(first) + place;
      };
      const auto out = [&](int32_t place, Entry entry) { edges.at(place) = entry.edge; };
      if (groups.count == 1) {
        run_block(graph, 0, 0, E, low, high - low, start, out);
      } else {
        run_block(Entries{entries.data()}, 0, first, last, low, high - low, start, out);
      }
    }
  }
  std::vector<int32_t> expected(E), expected_offsets(n + 1, 0);
  for (int64_t i = 0; i < E; ++i) expected[i] = static_cast<int32_t>(i), ++expected_offsets[idx[i] + 1];
  for (int64_t j = 0; j < n; ++j) expected_offsets[j + 1] += expected_offsets[j];
  std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return idx[a] < idx[b]; });
  return edges == expected && offsets == expected_offsets;
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(limit)); };
  for (int round = 0; round < 600; ++round) {
    // one block, two sweeps, groups, groups of several sweeps
    const int64_t limits[] = {40, 700, 1025, 5000, 20000, 150000};
    const int64_t n = 1 + below(limits[round % 6]), E = 1 + below(round % 5 == 0 ? 20000 : 900);
    std::vector<int64_t> idx(E);
    const int64_t hub = below(n), spread = 1 + below(n);
    for (auto& i : idx) {
      if (round % 4 == 0) i = below(n);                                  // even
      if (round % 4 == 1) i = hub;                                       // one point receives all
      if (round % 4 == 2) i = below(3) ? below(std::min<int64_t>(n, 8)) : below(n);  // the first ones most
      if (round % 4 == 3) i = n - 1 - below(spread);
    }
    if (!check(idx, n)) {
      std::printf("round %d: wrong for n = %d, %d edges\n", round, static_cast<int>(n), static_cast<int>(E));
      return 1;
    }
  }
  return 0;
}
