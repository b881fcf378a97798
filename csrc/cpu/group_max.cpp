// Grouped max pooling without the grouped tensor, and its gradient. Contract: reid3d/ops/group_max.py.
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <type_traits>

#include "columns.h"

namespace reid3d {
namespace {

// Half types are compared and summed in float.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kChannels = 64;  // channels of a group that are pooled together, in registers or close to them

// One group, channels [0, size) of feats, whose rows are `row` values apart.
template <typename T, typename S>
REID3D_INLINE void pool(const T* feats, int64_t row, const int64_t* idx, int64_t k, int64_t size, T* out,
                        S* slot_out) {
  Wide<T> best[kChannels] = {};
  int32_t slot[kChannels] = {};
  for (int64_t c = 0; c < size; ++c) best[c] = static_cast<Wide<T>>(feats[idx[0] * row + c]);
  for (int64_t s = 1; s < k; ++s) {
    const T* values = feats + idx[s] * row;
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) {
      const Wide<T> v = static_cast<Wide<T>>(values[c]), b = best[c];
      const bool wins = !(v <= b) & (b == b);  // the first NaN wins for good
      best[c] = wins ? v : b;
      slot[c] = wins ? static_cast<int32_t>(s) : slot[c];
    }
  }
  for (int64_t c = 0; c < size; ++c) {
    out[c] = static_cast<T>(best[c]);
    slot_out[c] = static_cast<S>(slot[c]);
  }
}

// The common case by its own name: only plain functions can be compiled for several instruction sets.
REID3D_HOT void pool_of(const float* feats, int64_t row, const int64_t* idx, int64_t k, int64_t size, float* out,
                        int16_t* slot) {
  pool(feats, row, idx, k, size, out, slot);
}

template <typename T, typename S>
void pool_of(const T* feats, int64_t row, const int64_t* idx, int64_t k, int64_t size, T* out, S* slot) {
  pool(feats, row, idx, k, size, out, slot);
}

template <typename S>
std::tuple<Tensor, Tensor> group_max_with(const Tensor& feats_, const Tensor& idx_, ScalarType slot_type) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const int64_t B = feats.size(0), N = feats.size(1), C = feats.size(2), M = idx.size(1), K = idx.size(2);
  Tensor out = torch::stable::new_empty(feats, {B, M, C});
  Tensor slot = torch::stable::new_empty(feats, {B, M, C}, slot_type);
  const int64_t* i = idx.const_data_ptr<int64_t>();
  S* s = slot.mutable_data_ptr<S>();
  std::atomic<bool> in_range{true};
  THO_DISPATCH_V2(feats.scalar_type(), "reid3d::group_max", AT_WRAP(([&] {
    const scalar_t* x = feats.const_data_ptr<scalar_t>();
    scalar_t* o = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, B * M, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t* group = i + row * K;
        if (!std::all_of(group, group + K, [N](int64_t j) { return 0 <= j && j < N; })) {
          in_range = false;
          return;
        }
        for (int64_t c = 0; c < C; c += kChannels)
          pool_of(x + row / M * N * C + c, C, group, K, std::min(kChannels, C - c), o + row * C + c, s + row * C + c);
      }
    });
  })), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  STD_TORCH_CHECK(in_range, "idx must be between 0 and ", N - 1, ", the last row of feats");
  return {out, slot};
}

std::tuple<Tensor, Tensor> group_max(const Tensor& feats, const Tensor& idx, std::optional<Tensor>,
                                     std::optional<Tensor>) {
  if (idx.size(2) <= 256) return group_max_with<uint8_t>(feats, idx, ScalarType::Byte);
  return group_max_with<int16_t>(feats, idx, ScalarType::Short);
}

// Every thread owns some channels of a cloud and walks the groups in order: no atomics, one order of summation.
Tensor group_max_backward(const Tensor& grad_, const Tensor& idx_, const Tensor& slot_, std::optional<Tensor>,
                          std::optional<Tensor>, int64_t n) {
  const Tensor grad = torch::stable::contiguous(grad_), idx = torch::stable::contiguous(idx_),
               slot = torch::stable::contiguous(slot_);
  const int64_t B = grad.size(0), M = grad.size(1), C = grad.size(2), K = idx.size(2);
  const bool wide = grad.scalar_type() == ScalarType::Double;
  const Tensor sum = torch::stable::new_zeros(grad, {B, n, C}, wide ? ScalarType::Double : ScalarType::Float);
  const int64_t* i = idx.const_data_ptr<int64_t>();
  const uint8_t* s8 = K <= 256 ? slot.const_data_ptr<uint8_t>() : nullptr;
  const int16_t* s16 = K <= 256 ? nullptr : slot.const_data_ptr<int16_t>();
  THO_DISPATCH_V2(grad.scalar_type(), "reid3d::group_max_backward", AT_WRAP(([&] {
    const scalar_t* g = grad.const_data_ptr<scalar_t>();
    Wide<scalar_t>* out = sum.mutable_data_ptr<Wide<scalar_t>>();
    constexpr int64_t chunk = 16;
    const int64_t chunks = (C + chunk - 1) / chunk;
    torch::stable::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunks, first = task % chunks * chunk, last = std::min(first + chunk, C);
        for (int64_t m = b * M; m < (b + 1) * M; ++m)
          for (int64_t c = first; c < last; ++c)
            out[(b * n + i[m * K + (s8 ? s8[m * C + c] : s16[m * C + c])]) * C + c] += static_cast<Wide<scalar_t>>(g[m * C + c]);
      }
    });
  })), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  return torch::stable::to(sum, grad.scalar_type());
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("group_max", TORCH_BOX(&reid3d::group_max));
  m.impl("group_max_backward", TORCH_BOX(&reid3d::group_max_backward));
}
