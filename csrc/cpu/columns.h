// What the CPU kernels share: clouds stored by coordinate, and loops compiled for every vector width.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../dispatch.h"
#include "../rounding.h"

// REID3D_HOT compiles a function for AVX-512, for AVX2 and for any x86-64, and the loader picks one. All give the same
// bits. Elsewhere the function is compiled once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define REID3D_HOT __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define REID3D_HOT
#endif
#define REID3D_INLINE inline __attribute__((always_inline))

namespace reid3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Points are met in tiles of this many, a multiple of every vector width.
constexpr int64_t kTile = 64;

// (B,N,D) rows as B x D columns of `stride` values; the tail of a column is NaN, which is near nothing.
template <typename T>
struct Columns {
  int64_t n, dims, stride;
  std::vector<T> data;

  explicit Columns(const Tensor& x)
      : n(x.size(1)),
        dims(x.size(2)),
        stride((n + kTile - 1) / kTile * kTile),
        data(static_cast<size_t>(x.size(0) * dims * stride), std::numeric_limits<T>::quiet_NaN()) {
    const T* rows = x.const_data_ptr<T>();
    torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t d = 0; d < dims; ++d) data[(b * dims + d) * stride + i] = rows[(b * n + i) * dims + d];
    });
  }

  const T* cloud(int64_t b) const { return data.data() + b * dims * stride; }
};

// Squared distances from q to the kTile points that start at `columns`.
template <typename T>
REID3D_INLINE void tile_distances(const T* q, const T* columns, int64_t stride, int64_t dims, T* dist2) {
  T sum[kTile] = {};
  for (int64_t d = 0; d < dims; ++d, columns += stride)
    for (int64_t j = 0; j < kTile; ++j) sum[j] = add_square(sum[j], q[d] - columns[j]);
  for (int64_t j = 0; j < kTile; ++j) dist2[j] = sum[j];
}

}  // namespace reid3d
