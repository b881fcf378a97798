// The order of points along the Z-curve, for other kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace reid3d {

// (B,N,D), D <= 3, to (B,N) int32. Coordinates that are missing count as zero.
torch::stable::Tensor morton_order(const torch::stable::Tensor& points);

}  // namespace reid3d
