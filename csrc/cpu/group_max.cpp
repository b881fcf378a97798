// Grouped max pooling without the grouped tensor, and its gradient: the binding of group_max.h.
#include "pool.h"

namespace reid3d {
namespace {

std::tuple<Tensor, Tensor> group_max(const Tensor& feats_, const Tensor& idx_, std::optional<Tensor>,
                                     std::optional<Tensor>) {
  const Tensor feats = torch::stable::contiguous(feats_), idx = torch::stable::contiguous(idx_);
  const GroupShape size = group_shape(feats.size(1), idx, feats.size(2));
  const int64_t B = feats.size(0);
  Tensor out = torch::stable::new_empty(feats, {B, size.m, size.c});
  Tensor slot = torch::stable::new_empty(feats, {B, size.m, size.c}, slot_type(size.k));
  dispatch_rows(feats, [&](auto t) {
    dispatch_slots(size.k, [&](auto s) {
      using T = decltype(t);
      using S = decltype(s);
      for_groups(idx, size, [&](int64_t begin, int64_t end) {
        return kernels().pool(t).of(s).group_max(values<T>(feats), values<int64_t>(idx), size, begin, end,
                                                 values<T>(out), values<S>(slot));
      });
    });
  });
  return {out, slot};
}

// A thread owns some channels of a cloud and walks the groups in order. A transposed graph would not help: it leads to
// all edges of a row, and few of them won.
Tensor group_max_backward(const Tensor& grad_, const Tensor& idx_, const Tensor& slot_, std::optional<Tensor>,
                          std::optional<Tensor>, int64_t n) {
  const Tensor grad = torch::stable::contiguous(grad_), idx = torch::stable::contiguous(idx_),
               slot = torch::stable::contiguous(slot_);
  const int64_t B = grad.size(0);
  const GroupShape size = group_shape(n, idx, grad.size(2));
  Tensor out = torch::stable::new_empty(grad, {B, n, size.c}, wide_type(grad));
  dispatch_rows(grad, [&](auto t) {
    dispatch_slots(size.k, [&](auto s) {
      using T = decltype(t);
      using S = decltype(s);
      for_channels(B, size.c, [&](int64_t b, int64_t c, int64_t count) {
        const Scratch<Wide<T>> sum(n * kLeaf);
        const int64_t from = b * size.m * size.c + c;
        kernels().pool(t).of(s).add_at_winners(values<T>(grad) + from, values<int64_t>(idx) + b * size.m * size.k,
                                               values<S>(slot) + from, size, count, false, sum.get(),
                                               values<Wide<T>>(out) + b * n * size.c + c);
      });
    });
  });
  return grad.scalar_type() == out.scalar_type() ? out : torch::stable::to(out, grad.scalar_type());
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("group_max", TORCH_BOX(&reid3d::group_max));
  m.impl("group_max_backward", TORCH_BOX(&reid3d::group_max_backward));
}
