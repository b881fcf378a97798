// k nearest neighbours by brute force: tiles of distances, of which those below the k-th smallest so far are kept.
// Contract: reid3d/ops/knn.py.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "columns.h"

namespace reid3d {
namespace {

// A candidate (distance, index) that orders by distance, then by index. The bits of a non-negative float order as the
// float does, so that in single precision both fit one integer.
template <typename T>
struct Candidate {
  T distance;
  int64_t index;
  Candidate() = default;
  Candidate(T d, int64_t i) : distance(d), index(i) {}
  T dist2() const { return distance; }
  int64_t idx() const { return index; }
  bool operator<(const Candidate& o) const {
    return distance < o.distance || (distance == o.distance && index < o.index);
  }
};

template <>
struct Candidate<float> {
  uint64_t key;
  Candidate() = default;
  Candidate(float d, int64_t i) {
    uint32_t bits;
    std::memcpy(&bits, &d, sizeof bits);
    key = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(i);
  }
  float dist2() const {
    const uint32_t bits = static_cast<uint32_t>(key >> 32);
    float d;
    std::memcpy(&d, &bits, sizeof d);
    return d;
  }
  int64_t idx() const { return static_cast<uint32_t>(key); }
  bool operator<(const Candidate& o) const { return key < o.key; }
};

constexpr int64_t kGroup = 16;  // candidates are looked for in groups of this many
constexpr int64_t kSlack = 32;  // candidates held beyond k before the k smallest are selected again

template <typename T>
REID3D_INLINE void nearest(const T* q, const T* columns, int64_t n, int64_t stride, int64_t dims, int64_t k,
                           Candidate<T>* kept, T* dist2_out, int64_t* idx_out) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  T limit = inf;     // the k-th smallest distance at the last selection
  bool open = true;  // fewer than k were seen: everything is kept, even at infinity
  int64_t count = 0;
  T dist2[kTile];
  for (int64_t first = 0; first < n; first += kTile) {
    tile_distances(q, columns + first, stride, dims, dist2);
    for (int64_t j = 0; j < kTile; ++j) dist2[j] = dist2[j] < inf ? dist2[j] : inf;  // NaN counts as +inf
    const int64_t size = std::min(kTile, n - first);
    for (int64_t g = 0; g < size; g += kGroup) {
      int below = open;
      for (int64_t j = g; j < g + kGroup; ++j) below |= dist2[j] < limit;
      if (!below) continue;
      for (int64_t j = g; j < std::min(g + kGroup, size); ++j) {
        kept[count] = Candidate<T>(dist2[j], first + j);
        count += open | (dist2[j] < limit);  // a tie with the limit has the higher index: it loses
      }
    }
    if (open ? count >= k : count > k + kSlack) {
      std::nth_element(kept, kept + (k - 1), kept + count);
      limit = kept[k - 1].dist2();
      count = k;
      open = false;
    }
  }
  std::partial_sort(kept, kept + k, kept + count);
  for (int64_t i = 0; i < k; ++i) {
    dist2_out[i] = kept[i].dist2();
    idx_out[i] = kept[i].idx();
  }
}

REID3D_HOT void nearest_of(const float* q, const float* columns, int64_t n, int64_t stride, int64_t dims, int64_t k,
                           Candidate<float>* kept, float* dist2, int64_t* idx) {
  nearest(q, columns, n, stride, dims, k, kept, dist2, idx);
}

REID3D_HOT void nearest_of(const double* q, const double* columns, int64_t n, int64_t stride, int64_t dims, int64_t k,
                           Candidate<double>* kept, double* dist2, int64_t* idx) {
  nearest(q, columns, n, stride, dims, k, kept, dist2, idx);
}

std::tuple<Tensor, Tensor> knn(const Tensor& query_, const Tensor& points_, int64_t k) {
  const Tensor query = torch::stable::contiguous(query_), points = torch::stable::contiguous(points_);
  const int64_t B = query.size(0), M = query.size(1), N = points.size(1), D = points.size(2);
  STD_TORCH_CHECK(N <= std::numeric_limits<int32_t>::max(), "reid3d::knn: more than 2^31 - 1 points in a cloud");
  Tensor dist2 = torch::stable::new_empty(query, {B, M, k});
  Tensor idx = torch::stable::new_empty(query, {B, M, k}, ScalarType::Long);
  dispatch_float_double(query, [&](auto zero) {
    using T = decltype(zero);
    const Columns<T> columns(points);
    const T* q = query.const_data_ptr<T>();
    T* d = dist2.mutable_data_ptr<T>();
    int64_t* i = idx.mutable_data_ptr<int64_t>();
    torch::stable::parallel_for(0, B * M, 16, [&](int64_t begin, int64_t end) {
      std::vector<Candidate<T>> kept(static_cast<size_t>(k + kSlack + 2 * kTile));
      for (int64_t row = begin; row < end; ++row)
        nearest_of(q + row * D, columns.cloud(row / M), N, columns.stride, D, k, kept.data(), d + row * k, i + row * k);
    });
  });
  return {dist2, idx};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("knn", TORCH_BOX(&reid3d::knn)); }
