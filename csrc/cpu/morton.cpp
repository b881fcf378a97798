// The order of points along the Z-curve. Contract: reid3d/ops/morton.py.
#include "cloud.h"

namespace reid3d {
namespace {

Tensor morton_order(const Tensor& xyz_) {
  const Tensor xyz = torch::stable::contiguous(xyz_);
  const int64_t B = xyz.size(0), n = xyz.size(1);
  check_size(n);
  Tensor order = torch::stable::new_empty(xyz, {B, n}, ScalarType::Int);
  int32_t* out = order.mutable_data_ptr<int32_t>();
  dispatch_float_double(xyz, [&](auto zero) {
    using T = decltype(zero);
    const T* rows = xyz.const_data_ptr<T>();
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const Scratch<uint64_t> keys(2 * n);
      for (int64_t b = begin; b < end; ++b)
        kernels().of(T()).morton_order(rows + b * n * 3, n, 3, keys.get(), out + b * n);
    });
  });
  return order;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("morton_order", TORCH_BOX(&reid3d::morton_order)); }
