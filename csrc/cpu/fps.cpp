// Farthest point sampling: the binding of fps.h. Threads take whole clouds, for every pick follows from the one before
// it.
#include <algorithm>

#include "cloud.h"

namespace reid3d {
namespace {

Tensor farthest_point_sample(const Tensor& xyz_, std::optional<Tensor> order_, int64_t m, int64_t start) {
  const Tensor xyz = torch::stable::contiguous(xyz_);
  const std::optional<Tensor> order = checked(order_);
  const int64_t B = xyz.size(0), n = xyz.size(1);
  Tensor picked = torch::stable::new_empty(xyz, {B, m}, ScalarType::Long);
  if (picked.numel() == 0) return picked;
  int64_t* out = picked.mutable_data_ptr<int64_t>();
  dispatch_float_double(xyz, [&](auto zero) {
    using T = decltype(zero);
    const Forest<T> forest(xyz, order);
    // Two clouds at a time, unless that leaves threads without work.
    const int64_t together = B >= 2 * static_cast<int64_t>(torch::stable::get_num_threads()) ? 2 : 1;
    torch::stable::parallel_for(0, (B + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(together * Tree<T>::size(n));
      for (int64_t b = together * begin; b < std::min(together * end, B); b += together)
        kernels().of(T()).fps(&forest.trees[static_cast<size_t>(b)], std::min(together, B - b), m, start, scratch.get(),
                              out + b * m);
    });
  });
  return picked;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&reid3d::farthest_point_sample));
}
