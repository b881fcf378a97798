// k nearest neighbours: the binding of knn.h. In space (D <= 3) by a tree, else by blocks of all distances.
#include <algorithm>
#include <tuple>

#include "cloud.h"

namespace reid3d {
namespace {

constexpr int64_t kChunk = 256;             // queries along the curve that a thread takes at a time
constexpr int64_t kBlockBytes = 192 << 10;  // of distances, which should stay in the cache

// f(b, begin, end, scratch) for pieces of at most `chunk` of the M rows of B clouds. The scratch is taken once a
// thread: giving memory of this size back to the system stops all threads.
template <typename F>
void for_rows(int64_t B, int64_t M, int64_t chunk, int64_t scratch_bytes, F&& f) {
  const int64_t chunks = (M + chunk - 1) / chunk;
  torch::stable::parallel_for(0, B * chunks, 1, [&](int64_t first, int64_t last) {
    const Scratch<char> scratch(scratch_bytes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % chunks * chunk;
      f(i / chunks, begin, std::min(begin + chunk, M), scratch.get());
    }
  });
}

template <typename T>
void in_space(const Tensor& query, const Tensor& points, const std::optional<Tensor>& order, int64_t k, T* dist2,
              int64_t* idx) {
  const int64_t B = query.size(0), M = query.size(1), n = points.size(1);
  const Forest<T> forest(points, order);
  const bool self = query.const_data_ptr<T>() == points.const_data_ptr<T>() && M == n;
  std::optional<Forest<T>> other;
  if (!self) other.emplace(query, std::nullopt);
  for_rows(B, M, kChunk, knn_scratch(n, k), [&](int64_t b, int64_t begin, int64_t end, char* scratch) {
    const size_t at = static_cast<size_t>(b);
    const Tree<T>& queries = self ? forest.trees[at] : other->trees[at];
    kernels().of(T()).knn(queries, begin, end, forest.trees[at], k, scratch, dist2 + b * M * k, idx + b * M * k);
  });
}

template <typename T>
void by_blocks(const Tensor& query, const Tensor& points, int64_t k, T* dist2, int64_t* idx) {
  const int64_t B = query.size(0), M = query.size(1), n = points.size(1), dims = query.size(2);
  const int64_t stride = round_up(n, kLeaf);
  const int64_t chunk = std::max<int64_t>(8, kBlockBytes / static_cast<int64_t>(sizeof(T)) / stride / 8 * 8);
  const T *q = query.const_data_ptr<T>(), *p = points.const_data_ptr<T>();
  const Scratch<T> panels(B * stride * dims);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels().of(T()).pack(p + b * n * dims, n, dims, panels.get() + b * stride * dims);
  });
  const int64_t block = chunk * stride * static_cast<int64_t>(sizeof(T));
  for_rows(B, M, chunk, block + knn_scratch(n, k), [&](int64_t b, int64_t begin, int64_t end, char* scratch) {
    const int64_t row = b * M + begin;
    kernels().of(T()).knn_rows(q + row * dims, end - begin, panels.get() + b * stride * dims, n, dims, k,
                               reinterpret_cast<T*>(scratch), scratch + block, dist2 + row * k, idx + row * k);
  });
}

std::tuple<Tensor, Tensor> knn(const Tensor& query_, const Tensor& points_, std::optional<Tensor> order_, int64_t k) {
  const Tensor query = torch::stable::contiguous(query_);
  const std::optional<Tensor> order = checked(order_);
  const Tensor points = same_memory(query_, points_) ? query : torch::stable::contiguous(points_);
  const int64_t B = query.size(0), M = query.size(1);
  check_size(points.size(1));
  Tensor dist2 = torch::stable::new_empty(query, {B, M, k});
  Tensor idx = torch::stable::new_empty(query, {B, M, k}, ScalarType::Long);
  if (idx.numel() == 0) return {dist2, idx};
  dispatch_float_double(query, [&](auto zero) {
    using T = decltype(zero);
    T* nearest = dist2.mutable_data_ptr<T>();
    int64_t* indices = idx.mutable_data_ptr<int64_t>();
    if (1 <= query.size(2) && query.size(2) <= 3) in_space<T>(query, points, order, k, nearest, indices);
    else by_blocks<T>(query, points, k, nearest, indices);
  });
  return {dist2, idx};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("knn", TORCH_BOX(&reid3d::knn)); }
