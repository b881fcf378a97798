// What the bindings of the point kernels share: tensors, and trees over the clouds of a batch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "../dispatch.h"
#include "kernels.h"

namespace reid3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxPoints = std::numeric_limits<int32_t>::max();

// Memory that need not be cleared.
template <typename T>
class Scratch {
  T* data_;

 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
};

inline void check_size(int64_t n) {
  STD_TORCH_CHECK(n <= kMaxPoints, "reid3d: a cloud has at most ", kMaxPoints, " points, got ", n);
}

// The order (B,N), where it is given: contiguous, and a permutation for every cloud.
inline std::optional<Tensor> checked(const std::optional<Tensor>& order_) {
  if (!order_) return std::nullopt;
  const Tensor order = torch::stable::contiguous(*order_);
  const int64_t n = order.size(1);
  const int32_t* place = order.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < order.size(0); ++b, place += n) {
    std::vector<bool> seen(static_cast<size_t>(n), false);
    for (int64_t i = 0; i < n; ++i) {
      const int32_t at = place[i];
      STD_TORCH_CHECK(0 <= at && at < n, "order must hold indices between 0 and ", n - 1, ", got ", at);
      STD_TORCH_CHECK(!seen[static_cast<size_t>(at)], "order must hold every index once, got ", at, " twice");
      seen[static_cast<size_t>(at)] = true;
    }
  }
  return order;
}

// A tree over every cloud of (B,N,D), D <= 3, in the order that is given and checked, or in that of the Z-curve.
template <typename T>
class Forest {
  Scratch<T> numbers_;
  Scratch<int32_t> indices_;

 public:
  std::vector<Tree<T>> trees;

  Forest(const Tensor& x, const std::optional<Tensor>& order)
      : numbers_(x.size(0) * Tree<T>::size(x.size(1))), indices_(x.size(0) * round_up(x.size(1), kLeaf)) {
    const int64_t B = x.size(0), n = x.size(1), dims = x.size(2);
    check_size(n);
    const T* rows = x.const_data_ptr<T>();
    for (int64_t b = 0; b < B; ++b)
      trees.emplace_back(n, numbers_.get() + b * Tree<T>::size(n), indices_.get() + b * round_up(n, kLeaf));
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const Scratch<uint64_t> keys(order ? 0 : 2 * n);
      const Scratch<int32_t> curve(order ? 0 : n);
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* places = order ? order->const_data_ptr<int32_t>() + b * n : curve.get();
        if (!order) kernels().of(T()).morton_order(rows + b * n * dims, n, dims, keys.get(), curve.get());
        kernels().of(T()).build(rows + b * n * dims, dims, places, trees[static_cast<size_t>(b)]);
      }
    });
  }
};

}  // namespace reid3d
