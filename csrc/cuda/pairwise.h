// Squared distances between the points of two clouds, tile by tile: what a thread of the block of a tile does. Plain
// C++, so that the tests run it on the host (tests/ops/warp_pairwise.cpp).
#pragma once

#include "pack.h"

namespace reid3d {

// Tile t of those on and above the diagonal, row by row, of a square of `side` tiles by `side`.
REID3D_HOST_DEVICE inline void upper_tile(int32_t t, int32_t side, int32_t& row, int32_t& column) {
  for (row = 0; t >= side - row; ++row) t -= side - row;
  column = row + t;
}

// P * P distances for each of 16 * 16 threads: four neighbouring rows and columns of every 64, so that a thread reads
// them at once and the threads of a warp read from different banks.
template <typename T, int P>
struct PairTile {
  static constexpr int kThreads = 256;
  static constexpr int kSide = 16 * P;
  static constexpr int kPitch = kSide + 4;
  static constexpr int kDepth = 16;  // coordinates in shared memory at a time, the points of one side by side
  using Points = T[kDepth][kPitch];

  T dist2[P][P];

  REID3D_HOST_DEVICE PairTile() {
    for (int i = 0; i < P; ++i)
      for (int j = 0; j < P; ++j) dist2[i][j] = 0;
  }

  // Entry i of a thread's rows (thread / 16) or columns (thread % 16).
  REID3D_HOST_DEVICE static int place(int part, int i) { return i / 4 * 64 + part * 4 + i % 4; }

  // Brings coordinates [first, first + kDepth) of the rows [low, low + kSide) to shared memory, with zeros where there
  // are none: copy(destination, source, whether there is a source to be read).
  template <typename Copy>
  REID3D_HOST_DEVICE static void fetch(int thread, Points& points, const T* x, int32_t low, int32_t rows, int32_t D,
                                       int32_t first, const Copy& copy) {
    const int d = thread % kDepth, r = thread / kDepth;
    const T* from = x + static_cast<int64_t>(low + r) * D + first + d;
    for (int step = 0; step < kSide; step += kThreads / kDepth, from += kThreads / kDepth * static_cast<int64_t>(D))
      copy(&points[d][r + step], from, low + r + step < rows && first + d < D);
  }

  REID3D_HOST_DEVICE static void read(const T* points, int part, T (&x)[P]) {
    for (int i = 0; i < P; i += 4) {
      const Pack<T, 4> pack = load<4>(points + place(part, i));
      for (int u = 0; u < 4; ++u) x[i + u] = pack.v[u];
    }
  }

  // Adds coordinate after coordinate, as csrc/rounding.h says.
  REID3D_HOST_DEVICE void add(int thread, const Points& rows, const Points& columns, int depth) {
#ifdef __CUDA_ARCH__
#pragma unroll 2
#endif
    for (int d = 0; d < depth; ++d) {
      T a[P], b[P];
      read(rows[d], thread / 16, a);
      read(columns[d], thread % 16, b);
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < P; ++j) dist2[i][j] = add_square(dist2[i][j], a[i] - b[j]);
    }
  }

  // Writes to a matrix with `stride` columns, a multiple of four: +inf in those that stand for no point, and for NaN.
  REID3D_HOST_DEVICE void write(int thread, T* matrix, int32_t stride, int32_t low, int32_t rows, int32_t left,
                                int32_t columns, bool transposed) const {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const int mine = transposed ? thread % 16 : thread / 16, other = transposed ? thread / 16 : thread % 16;
    for (int i = 0; i < P; ++i) {
      const int32_t row = low + place(mine, i);
      for (int j = 0; j < P; j += 4) {
        const int32_t column = left + place(other, j);
        T x[4];
        for (int u = 0; u < 4; ++u) {
          const T d = transposed ? dist2[j + u][i] : dist2[i][j + u];
          x[u] = column + u < columns && d < inf ? d : inf;
        }
        if (row < rows && column < stride) store(matrix + static_cast<int64_t>(row) * stride + column, x);
      }
    }
  }
};

}  // namespace reid3d
