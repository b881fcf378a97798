// k nearest neighbours by brute force, a warp per query: the lanes take 32 points at a time, and whichever is nearer than
// the k-th so far goes into a sorted list that the warp holds together. Contract: reid3d/ops/knn.py.
#include "pairwise.cuh"

#include "launch.cuh"

namespace reid3d {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename T>
__device__ T squared_distance(const T* q, const T* p, int64_t dims) {
  T sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum = add_square(sum, q[d] - p[d]);
  return sum < infinity<T>() ? sum : infinity<T>();  // NaN counts as +inf
}

// The list of the k smallest, in registers: place r * 32 + lane of the list is entry r of a lane. An entry makes room for
// a new one where it is larger; equal ones stay before it, for they have the lower index.
template <typename T, int R>
struct RegisterList {
  T dist2[R];
  int32_t idx[R];

  __device__ explicit RegisterList(int64_t, T*, int64_t*) {
#pragma unroll
    for (int r = 0; r < R; ++r) dist2[r] = infinity<T>(), idx[r] = -1;
  }

  __device__ void insert(T d, int64_t i, int lane) {
#pragma unroll
    for (int r = R - 1; r >= 0; --r) {
      T before = __shfl_up_sync(kAllLanes, dist2[r], 1);
      int32_t before_idx = __shfl_up_sync(kAllLanes, idx[r], 1);
      if (r > 0) {
        const T carry = __shfl_sync(kAllLanes, dist2[r > 0 ? r - 1 : 0], kWarp - 1);
        const int32_t carry_idx = __shfl_sync(kAllLanes, idx[r > 0 ? r - 1 : 0], kWarp - 1);
        if (lane == 0) before = carry, before_idx = carry_idx;
      }
      // an empty place (idx -1) is larger than anything, infinity included
      const bool moves = idx[r] < 0 || dist2[r] > d;
      const bool before_moves = (r > 0 || lane > 0) && (before_idx < 0 || before > d);
      if (moves) {
        dist2[r] = before_moves ? before : d;
        idx[r] = before_moves ? before_idx : static_cast<int32_t>(i);
      }
    }
  }

  // The k-th entry: what a candidate has to beat.
  __device__ T last(int64_t k) const {
    T value = dist2[0];
#pragma unroll
    for (int r = 1; r < R; ++r)
      if (r == (k - 1) / kWarp) value = dist2[r];
    return __shfl_sync(kAllLanes, value, static_cast<int>((k - 1) % kWarp));
  }

  __device__ void store(int64_t k, T* dist2_out, int64_t* idx_out, int lane) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t place = r * kWarp + lane;
      if (place < k) dist2_out[place] = dist2[r], idx_out[place] = idx[r];
    }
  }
};

// The same list for any k, in the output itself.
template <typename T>
struct MemoryList {
  int64_t k;
  T* dist2;
  int64_t* idx;

  __device__ MemoryList(int64_t k_, T* dist2_, int64_t* idx_) : k(k_), dist2(dist2_), idx(idx_) {
    for (int64_t place = threadIdx.x % kWarp; place < k; place += kWarp) dist2[place] = infinity<T>(), idx[place] = -1;
    __syncwarp();
  }

  __device__ void insert(T d, int64_t i, int lane) {
    for (int64_t base = (k - 1) / kWarp * kWarp; base >= 0; base -= kWarp) {
      const int64_t place = base + lane;
      const bool mine = place < k && (idx[place] < 0 || dist2[place] > d);
      const bool before = mine && place > 0 && (idx[place - 1] < 0 || dist2[place - 1] > d);
      const T new_dist2 = before ? dist2[place - 1] : d;
      const int64_t new_idx = before ? idx[place - 1] : i;
      __syncwarp();
      if (mine) dist2[place] = new_dist2, idx[place] = new_idx;
      __syncwarp();
      if (!__any_sync(kAllLanes, mine)) break;
    }
  }

  __device__ T last(int64_t) const { return dist2[k - 1]; }
  __device__ void store(int64_t, T*, int64_t*, int) const {}
};

template <typename T, typename List>
__global__ void knn_kernel(const T* query, const T* points, int64_t rows, int64_t M, int64_t N, int64_t dims, int64_t k,
                           T* dist2, int64_t* idx) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* q = query + row * dims;
  const T* cloud = points + row / M * N * dims;
  List list(k, dist2 + row * k, idx + row * k);
  int64_t seen = 0;  // points offered to the list
  T limit = infinity<T>();
  for (int64_t base = 0; base < N; base += kWarp) {
    const int64_t i = base + lane;
    const T d = i < N ? squared_distance(q, cloud + i * dims, dims) : infinity<T>();
    // in index order, so that the first of equal distances is the one that stays
    unsigned candidates = __ballot_sync(kAllLanes, i < N && (base < k || d < limit));
    while (candidates) {
      const int source = __ffs(static_cast<int>(candidates)) - 1;
      candidates &= candidates - 1;
      const T candidate = __shfl_sync(kAllLanes, d, source);
      if (seen < k || candidate < limit) {
        list.insert(candidate, base + source, lane);
        ++seen;
        limit = seen < k ? infinity<T>() : list.last(k);
      }
    }
  }
  list.store(k, dist2 + row * k, idx + row * k, lane);
}

template <typename T, typename List>
void launch(const Tensor& query, const Tensor& points, int64_t k, const Tensor& dist2, const Tensor& idx) {
  const int64_t M = query.size(1), rows = query.size(0) * M;
  knn_kernel<T, List><<<blocks_for(rows, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, current_stream(query)>>>(
      query.const_data_ptr<T>(), points.const_data_ptr<T>(), rows, M, points.size(1), points.size(2), k,
      dist2.mutable_data_ptr<T>(), idx.mutable_data_ptr<int64_t>());
  check_launch("knn");
}

}  // namespace

std::tuple<Tensor, Tensor> knn_pairwise(const Tensor& query, const Tensor& points, int64_t k) {
  const DeviceGuard guard(query.get_device_index());
  STD_TORCH_CHECK(points.size(1) <= std::numeric_limits<int32_t>::max(), "reid3d::knn: more than 2^31 - 1 points in a cloud");
  Tensor dist2 = torch::stable::new_empty(query, {query.size(0), query.size(1), k});
  Tensor idx = torch::stable::new_empty(query, {query.size(0), query.size(1), k}, ScalarType::Long);
  if (idx.numel() == 0) return {dist2, idx};
  dispatch_float_double(query, [&](auto zero) {
    using T = decltype(zero);
    if (k <= kWarp) {
      launch<T, RegisterList<T, 1>>(query, points, k, dist2, idx);
    } else if (k <= 4 * kWarp) {
      launch<T, RegisterList<T, 4>>(query, points, k, dist2, idx);
    } else {
      launch<T, MemoryList<T>>(query, points, k, dist2, idx);
    }
  });
  return {dist2, idx};
}

}  // namespace reid3d
