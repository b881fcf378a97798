// k nearest neighbours in any dimension, for knn.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace reid3d {

// Both inputs (B,·,D) contiguous, float32 or float64, D >= 0, any k up to the number of points.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> knn_pairwise(const torch::stable::Tensor& query,
                                                                      const torch::stable::Tensor& points, int64_t k);

}  // namespace reid3d
