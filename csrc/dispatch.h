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

}  // namespace reid3d
