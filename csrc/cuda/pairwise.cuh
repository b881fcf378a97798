// k nearest neighbours by all distances, in any number of dimensions (csrc/cuda/pairwise.cu).
#pragma once

#include <tuple>

#include "launch.cuh"

namespace reid3d {

// query (B,M,D), points (B,N,D) float or double, 1 <= k <= N -> squared distances and int64 indices, both (B,M,k).
std::tuple<Tensor, Tensor> knn_pairwise(const Tensor& query, const Tensor& points, int64_t k);

}  // namespace reid3d
