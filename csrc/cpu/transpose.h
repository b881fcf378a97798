// The edges of a graph by the point in which they end. Contract: reid3d/ops/transpose.py.
#pragma once

#include <tuple>

#include "pool.h"

namespace reid3d {

std::tuple<Tensor, Tensor> transpose_graph(const Tensor& idx, int64_t n);

}  // namespace reid3d
