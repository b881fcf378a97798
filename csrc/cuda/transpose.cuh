// The graph read from its points (csrc/cuda/transpose.cu), for the gradients of the pooling kernels.
#pragma once

#include <tuple>

#include "launch.cuh"

namespace reid3d {

// idx (B,M,K) int64 -> offsets (B,n+1) int32, edges (B,M*K) int32: the edges m * K + slot that end in point j are
// edges[b, offsets[b,j]:offsets[b,j+1]], ascending.
std::tuple<Tensor, Tensor> transpose_graph(const Tensor& idx, int64_t n);

}  // namespace reid3d
