// What the bindings of the ops on groups share: rows of every dtype, slots of both, and errors.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "cloud.h"

namespace reid3d {

// Calls f with a value of the type that the kernels know x's rows by.
template <typename F>
void dispatch_rows(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: STD_TORCH_CHECK(false, "reid3d: features must be float16, bfloat16, float32 or float64");
  }
}

// Calls f with a value of the type of a slot of a group of k.
template <typename F>
void dispatch_slots(int64_t k, F&& f) {
  if (k <= 256) f(uint8_t());
  else f(int16_t());
}

inline ScalarType slot_type(int64_t k) { return k <= 256 ? ScalarType::Byte : ScalarType::Short; }
inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* values(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <typename T>
T* values(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

inline GroupShape group_shape(int64_t n, const Tensor& idx, int64_t c) { return {n, idx.size(1), idx.size(2), c}; }

// Calls f(begin, end) for pieces of `rows` rows that read `reads` values each, enough of them to be worth a thread.
template <typename F>
void parallel_rows(int64_t rows, int64_t reads, F&& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, reads)), f);
}

[[noreturn]] inline void index_out_of_range(const Tensor& idx, int64_t n) {
  const int64_t* i = values<int64_t>(idx);
  while (0 <= *i && *i < n) ++i;
  STD_TORCH_CHECK(false, "idx must be between 0 and ", n - 1, ", the last row, got ", *i);
}

// Calls f(begin, end) for pieces of all groups, which is false where an index is out of range.
template <typename F>
void for_groups(const Tensor& idx, GroupShape size, F&& f) {
  std::atomic<bool> good{true};
  parallel_rows(idx.size(0) * size.m, size.k * size.c, [&](int64_t begin, int64_t end) {
    if (!f(begin, end)) good = false;
  });
  if (!good) index_out_of_range(idx, size.n);
}

// Calls f(b, c, count) for up to 16 channels [c, c + count) of each cloud. One thread owns them: sums have one order.
template <typename F>
void for_channels(int64_t B, int64_t C, F&& f) {
  const int64_t chunks = (C + kLeaf - 1) / kLeaf;
  torch::stable::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task % chunks * kLeaf;
      f(task / chunks, c, std::min<int64_t>(kLeaf, C - c));
    }
  });
}

}  // namespace reid3d
