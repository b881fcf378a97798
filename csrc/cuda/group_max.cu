// Grouped max pooling without the grouped tensor, and its gradient. Contract: reid3d/ops/group_max.py.
#include <torch/headeronly/core/Dispatch_v2.h>

#include <tuple>
#include <type_traits>

#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kThreads = 256;

// Half types are compared and summed in float.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A thread per output, channels of a group side by side.
template <typename T>
__global__ void group_max_kernel(const T* feats, const int64_t* idx, int64_t outputs, int64_t M, int64_t N, int64_t C,
                                 int64_t K, T* out, int16_t* slot_out) {
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (output >= outputs) return;
  const int64_t row = output / C, c = output % C;
  const T* column = feats + row / M * N * C + c;
  Wide<T> best = 0;
  int16_t slot = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t i = idx[row * K + k];
    if (i < 0 || i >= N) __trap();
    const Wide<T> v = static_cast<Wide<T>>(column[i * C]);
    if (k == 0 || (!(v <= best) && best == best)) best = v, slot = static_cast<int16_t>(k);  // the first NaN wins for good
  }
  out[output] = static_cast<T>(best);
  slot_out[output] = slot;
}

// A thread per channel of a cloud walks the groups in order: no atomics, one order of summation.
template <typename T>
__global__ void group_max_backward_kernel(const T* grad, const int64_t* idx, const int16_t* slot, int64_t columns,
                                          int64_t M, int64_t N, int64_t C, int64_t K, Wide<T>* sum) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  const int64_t b = column / C, c = column % C;
  for (int64_t m = b * M; m < (b + 1) * M; ++m)
    sum[(b * N + idx[m * K + slot[m * C + c]]) * C + c] += static_cast<Wide<T>>(grad[m * C + c]);
}

std::tuple<Tensor, Tensor> group_max(const Tensor& feats_, const Tensor& idx_) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const DeviceGuard guard(feats.get_device_index());
  const int64_t B = feats.size(0), N = feats.size(1), C = feats.size(2), M = idx.size(1), K = idx.size(2);
  Tensor out = torch::stable::new_empty(feats, {B, M, C});
  Tensor slot = torch::stable::new_empty(feats, {B, M, C}, ScalarType::Short);
  if (out.numel() == 0) return {out, slot};
  THO_DISPATCH_V2(feats.scalar_type(), "reid3d::group_max", AT_WRAP(([&] {
    group_max_kernel<scalar_t><<<blocks_for(out.numel(), kThreads), kThreads, 0, current_stream(feats)>>>(
        feats.const_data_ptr<scalar_t>(), idx.const_data_ptr<int64_t>(), out.numel(), M, N, C, K,
        out.mutable_data_ptr<scalar_t>(), slot.mutable_data_ptr<int16_t>());
  })), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  check_launch("group_max");
  return {out, slot};
}

Tensor group_max_backward(const Tensor& grad_, const Tensor& idx_, const Tensor& slot_, int64_t n) {
  const Tensor grad = torch::stable::contiguous(grad_), idx = torch::stable::contiguous(idx_),
               slot = torch::stable::contiguous(slot_);
  const DeviceGuard guard(grad.get_device_index());
  const int64_t B = grad.size(0), M = grad.size(1), C = grad.size(2), K = idx.size(2);
  const bool wide = grad.scalar_type() == ScalarType::Double;
  const Tensor sum = torch::stable::new_zeros(grad, {B, n, C}, wide ? ScalarType::Double : ScalarType::Float);
  if (grad.numel() > 0) {
    THO_DISPATCH_V2(grad.scalar_type(), "reid3d::group_max_backward", AT_WRAP(([&] {
      group_max_backward_kernel<scalar_t><<<blocks_for(B * C, kThreads), kThreads, 0, current_stream(grad)>>>(
          grad.const_data_ptr<scalar_t>(), idx.const_data_ptr<int64_t>(), slot.const_data_ptr<int16_t>(), B * C, M, n, C,
          K, sum.mutable_data_ptr<Wide<scalar_t>>());
    })), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
    check_launch("group_max_backward");
  }
  return torch::stable::to(sum, grad.scalar_type());
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) {
  m.impl("group_max", TORCH_BOX(&reid3d::group_max));
  m.impl("group_max_backward", TORCH_BOX(&reid3d::group_max_backward));
}
