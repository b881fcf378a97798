// Maximum, minimum, sum and sum of squares over neighbours, and their gradient: the binding of edge_pool.h.
#include "pool.h"
#include "transpose.h"

namespace reid3d {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_pool(const Tensor& feats_, const Tensor& idx_,
                                                                     std::optional<Tensor>, std::optional<Tensor>) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const GroupShape size = group_shape(feats.size(1), idx, feats.size(2));
  const auto empty = [&](ScalarType type) {
    return torch::stable::new_empty(feats, {feats.size(0), size.m, size.c}, type);
  };
  Tensor most = empty(feats.scalar_type()), least = empty(feats.scalar_type());
  Tensor sum = empty(wide_type(feats)), sumsq = empty(wide_type(feats));
  Tensor max_slot = empty(slot_type(size.k)), min_slot = empty(slot_type(size.k));
  dispatch_rows(feats, [&](auto t) {
    dispatch_slots(size.k, [&](auto s) {
      using T = decltype(t);
      using S = decltype(s);
      const PooledEdges<T, S> out = {values<T>(most),        values<T>(least),   values<Wide<T>>(sum),
                                     values<Wide<T>>(sumsq), values<S>(max_slot), values<S>(min_slot)};
      for_groups(idx, size, [&](int64_t begin, int64_t end) {
        return kernels().pool(t).of(s).edge_pool(values<T>(feats), values<int64_t>(idx), size, begin, end, out);
      });
    });
  });
  return {most, least, sum, sumsq, max_slot, min_slot};
}

// Whether no edge of a given graph leads out of memory; whether it is that of idx is not checked.
bool edges_in_range(const int32_t* offsets, const int32_t* edges, int64_t n, int64_t count) {
  bool good = offsets[0] == 0 && offsets[n] == count;
  for (int64_t j = 0; j < n; ++j) good &= offsets[j] <= offsets[j + 1];
  for (int64_t e = 0; e < count; ++e) good &= 0 <= edges[e] && edges[e] < count;
  return good;
}

// The sums over winners by channels, as in group_max.cpp; then those over all edges by points, through the transposed
// graph.
Tensor edge_pool_backward(const Tensor& grad_max_, const Tensor& grad_min_, const Tensor& grad_sum_,
                          const Tensor& grad_sumsq_, const Tensor& feats_, const Tensor& idx_, const Tensor& max_slot_,
                          const Tensor& min_slot_, std::optional<Tensor> offsets_, std::optional<Tensor> edges_) {
  const Tensor grad_max = torch::stable::contiguous(grad_max_), grad_min = torch::stable::contiguous(grad_min_),
               grad_sum = torch::stable::contiguous(grad_sum_), grad_sumsq = torch::stable::contiguous(grad_sumsq_),
               feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_),
               max_slot = torch::stable::contiguous(max_slot_), min_slot = torch::stable::contiguous(min_slot_);
  const GroupShape size = group_shape(feats.size(1), idx, feats.size(2));
  const int64_t B = feats.size(0), n = size.n, C = size.c, count = size.m * size.k;
  Tensor out = torch::stable::new_empty(feats, {B, n, C}, wide_type(feats));
  const bool given = offsets_ && edges_;
  const auto [offsets, edges] =
      given ? std::tuple(torch::stable::contiguous(*offsets_), torch::stable::contiguous(*edges_))
            : transpose_graph(idx, n);
  const int32_t *o = values<int32_t>(offsets), *e = values<int32_t>(edges);
  for (int64_t b = 0; given && b < B; ++b)
    STD_TORCH_CHECK(edges_in_range(o + b * (n + 1), e + b * count, n, count),
                    "transposed must be the transposed graph of idx, got edges out of range");
  dispatch_rows(feats, [&](auto t) {
    using T = decltype(t);
    using W = Wide<T>;
    dispatch_slots(size.k, [&](auto s) {
      using S = decltype(s);
      for_channels(B, C, [&](int64_t b, int64_t c, int64_t channels) {
        const Scratch<W> sum(n * kLeaf);
        const int64_t from = b * size.m * C + c;
        for (const bool min : {false, true})
          kernels().pool(t).of(s).add_at_winners(
              values<T>(min ? grad_min : grad_max) + from, values<int64_t>(idx) + b * count,
              values<S>(min ? min_slot : max_slot) + from, size, channels, min, sum.get(),
              values<W>(out) + b * n * C + c);
      });
    });
    parallel_rows(B * n, count * C / std::max<int64_t>(1, n), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin / n; b * n < end; ++b)
        kernels().pool(t).add_edges(values<W>(grad_sum) + b * size.m * C, values<W>(grad_sumsq) + b * size.m * C,
                                    values<T>(feats) + b * n * C, o + b * (n + 1), e + b * count, size,
                                    std::max(begin - b * n, int64_t{0}), std::min(end - b * n, n),
                                    values<W>(out) + b * n * C);
    });
  });
  return feats.scalar_type() == out.scalar_type() ? out : torch::stable::to(out, feats.scalar_type());
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("edge_pool", TORCH_BOX(&reid3d::edge_pool));
  m.impl("edge_pool_backward", TORCH_BOX(&reid3d::edge_pool_backward));
}
