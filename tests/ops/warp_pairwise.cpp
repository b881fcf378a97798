// The tiles of csrc/cuda/pairwise.h and the selection of csrc/cuda/select.h, against loops and std::stable_sort.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cuda/pairwise.h"
#include "../../csrc/cuda/select.h"

using namespace reid3d;

namespace {

std::mt19937 rng(1);

int32_t below(int32_t limit) { return static_cast<int32_t>(rng() % static_cast<uint32_t>(limit)); }

template <typename T>
T value(int round) {
  if (round % 3 == 0) return static_cast<T>(below(3));  // ties
  if (round % 7 == 0 && below(20) == 0) return std::numeric_limits<T>::quiet_NaN();
  if (round % 5 == 0 && below(20) == 0) return std::numeric_limits<T>::max();
  return static_cast<T>(rng()) / static_cast<T>(1 << 30);
}

// A buffer whose first value is aligned as that of a tensor is.
template <typename T>
struct Aligned {
  std::vector<T> memory;
  T* data;
  Aligned(int64_t size, T fill) : memory(size + 64 / sizeof(T), fill) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (64 - address % 64) % 64 / sizeof(T);
  }
};

template <typename T, int P>
void run_tile(const T* query, int32_t rows, const T* points, int32_t columns, int32_t D, int32_t stride,
              int32_t tile_row, int32_t tile_column, bool mirror, T* matrix) {
  using Tile = PairTile<T, P>;
  struct alignas(64) Stage {
    typename Tile::Points a, b;
  };
  static Stage stage;
  static std::vector<Tile> tiles;
  tiles.assign(Tile::kThreads, Tile());
  const auto copy = [](T* to, const T* from, bool there) { *to = there ? *from : 0; };
  const int32_t low = tile_row * Tile::kSide, left = tile_column * Tile::kSide;
  for (int32_t first = 0; first < D; first += Tile::kDepth) {
    for (int t = 0; t < Tile::kThreads; ++t) {
      Tile::fetch(t, stage.a, query, low, rows, D, first, copy);
      Tile::fetch(t, stage.b, points, left, columns, D, first, copy);
    }
    for (int t = 0; t < Tile::kThreads; ++t)
      tiles[t].add(t, stage.a, stage.b, std::min<int32_t>(D - first, Tile::kDepth));
  }
  for (int t = 0; t < Tile::kThreads; ++t) {
    tiles[t].write(t, matrix, stride, low, rows, left, columns, false);
    if (mirror) tiles[t].write(t, matrix, stride, left, columns, low, rows, true);
  }
}

template <typename T>
void select_row(const T* row, int64_t stride, int64_t k, T* dist2, int64_t* idx) {
  if constexpr (std::is_same_v<T, float>) {
    uint64_t waiting[kWaiting];
    (k <= kWarp ? &k_smallest<1> : &k_smallest<4>)(row, stride, k, waiting, dist2, idx);
  } else {
    k_smallest(row, stride, k, dist2, idx);
  }
}

template <typename T>
bool same_bits(const T* a, const T* b, int64_t size) {
  return std::memcmp(a, b, size * sizeof(T)) == 0;
}

// Rows of a matrix against std::sort.
template <typename T>
bool selection_is_right(const T* matrix, int64_t rows, int64_t N, int64_t stride, int64_t k) {
  std::vector<T> dist2(k);
  std::vector<int64_t> idx(k);
  for (int64_t m = 0; m < rows; ++m) {
    const T* row = matrix + m * stride;
    select_row(row, stride, k, dist2.data(), idx.data());
    std::vector<int64_t> order(N);
    for (int64_t i = 0; i < N; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] < row[b]; });
    for (int64_t place = 0; place < k; ++place)
      if (idx[place] != order[place] || !same_bits(&dist2[place], row + order[place], 1)) return false;
  }
  return true;
}

template <typename T, int P>
bool check_clouds(int round) {
  constexpr int32_t side = PairTile<T, P>::kSide;
  const bool symmetric = round % 2 == 0;
  const int32_t N = 1 + below(round % 4 == 0 ? 2 * side + 9 : 90), M = symmetric ? N : 1 + below(150), D = below(40);
  std::vector<T> points(N * D), other(M * D);
  for (T& x : points) x = value<T>(round);
  for (T& x : other) x = value<T>(round);
  const T *p = points.data(), *q = symmetric ? p : other.data();
  const int32_t stride = (N + 3) / 4 * 4;
  Aligned<T> matrix(M * stride, -1);
  const int32_t down = (M + side - 1) / side, across = (N + side - 1) / side;
  for (int32_t t = 0; t < (symmetric ? down * (down + 1) / 2 : down * across); ++t) {
    int32_t tile_row = t / across, tile_column = t % across;
    if (symmetric) upper_tile(t, across, tile_row, tile_column);
    run_tile<T, P>(q, M, p, N, D, stride, tile_row, tile_column, symmetric && tile_row != tile_column, matrix.data);
  }
  constexpr T inf = std::numeric_limits<T>::infinity();
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t i = 0; i < stride; ++i) {
      T expected = i < N ? T(0) : inf;
      for (int64_t d = 0; d < D && i < N; ++d) expected = add_square(expected, q[m * D + d] - p[i * D + d]);
      if (!(expected < inf)) expected = inf;
      if (!same_bits(matrix.data + m * stride + i, &expected, 1)) return false;
    }
  }
  return selection_is_right(matrix.data, std::min<int64_t>(M, 20), N, stride, 1 + below(N));
}

// Distances that no cloud has, to the end: ties, infinities, every k.
template <typename T>
bool check_rows(int round) {
  const int64_t N = 1 + below(round % 9 == 0 ? 3000 : 300), stride = (N + 3) / 4 * 4;
  Aligned<T> row(stride, std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < N; ++i) {
    if (round % 4 == 0) row.data[i] = static_cast<T>(below(4));
    if (round % 4 == 1) row.data[i] = static_cast<T>(rng());
    if (round % 4 == 2 && below(2)) row.data[i] = static_cast<T>(below(1000));
    if (round % 4 == 3) row.data[i] = static_cast<T>(round % 8 == 3 ? i : N - i);
  }
  const int64_t most = round % 3 == 0 ? N : std::min<int64_t>(N, 33);
  return selection_is_right(row.data, 1, N, stride, 1 + below(most));
}

}  // namespace

int main() {
  for (int round = 0; round < 60; ++round) {
    if (!check_clouds<float, 8>(round) || !check_clouds<float, 4>(round) || !check_clouds<double, 4>(round)) {
      std::printf("clouds, round %d: wrong\n", round);
      return 1;
    }
  }
  for (int round = 0; round < 3000; ++round) {
    if (!check_rows<float>(round) || (round % 10 == 0 && !check_rows<double>(round))) {
      std::printf("rows, round %d: wrong\n", round);
      return 1;
    }
  }
  return 0;
}
