// Transposed graphs. Contract: reid3d/ops/transpose.py.
#include "transpose.h"

#include <cstring>

namespace reid3d {
namespace {

// A counting sort of one cloud's `count` edges: offsets (n + 1), edges (count). False where an index is out of range.
bool transpose(const int64_t* idx, int64_t count, int64_t n, int32_t* offsets, int32_t* edges) {
  std::memset(offsets, 0, static_cast<size_t>(n + 1) * sizeof *offsets);
  for (int64_t e = 0; e < count; ++e) {
    if (static_cast<uint64_t>(idx[e]) >= static_cast<uint64_t>(n)) return false;
    ++offsets[idx[e] + 1];
  }
  // While edges are placed offsets[j + 1] is where the next of j goes; in the end that is where those of j + 1 begin.
  int32_t begin = 0;
  for (int64_t j = 1; j <= n; ++j) {
    const int32_t degree = offsets[j];
    offsets[j] = begin;
    begin += degree;
  }
  for (int64_t e = 0; e < count; ++e) edges[offsets[idx[e] + 1]++] = static_cast<int32_t>(e);
  return true;
}

}  // namespace

std::tuple<Tensor, Tensor> transpose_graph(const Tensor& idx_, int64_t n) {
  const Tensor idx = torch::stable::contiguous(idx_);
  const int64_t B = idx.size(0), count = idx.size(1) * idx.size(2);
  Tensor offsets = torch::stable::new_empty(idx, {B, n + 1}, ScalarType::Int);
  Tensor edges = torch::stable::new_empty(idx, {B, count}, ScalarType::Int);
  const int64_t* i = values<int64_t>(idx);
  int32_t *o = values<int32_t>(offsets), *e = values<int32_t>(edges);
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (!transpose(i + b * count, count, n, o + b * (n + 1), e + b * count)) good = false;
  });
  if (!good) index_out_of_range(idx, n);
  return {offsets, edges};
}

}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("transpose_graph", TORCH_BOX(&reid3d::transpose_graph)); }
