// What the wrappers of the CPU and the CUDA kernels share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace reid3d {

// Calls f<float>() or f<double>(): the wrappers in Python widen the half types.
template <typename F>
void dispatch_float_double(const torch::stable::Tensor& x, F&& f) {
  using torch::headeronly::ScalarType;
  if (x.scalar_type() == ScalarType::Float) {
    f(float());
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "reid3d: coordinates must be float32 or float64");
    f(double());
  }
}

// Whether two tensors of one dtype are one: a cloud's own graph needs no second copy of the cloud.
inline bool same_memory(const torch::stable::Tensor& x, const torch::stable::Tensor& y) {
  bool same = x.data_ptr() == y.data_ptr() && x.dim() == y.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == y.size(d) && x.stride(d) == y.stride(d);
  return same;
}

}  // namespace reid3d
