// What the launches of the pooling kernels share: a block takes some rows, with a thread for every V channels of a row.
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>

#include "pool.h"
#include "transpose.cuh"

namespace reid3d {

constexpr int kPoolThreads = 256;
constexpr int kStage = 32;  // indices of a group in shared memory at a time

// Threads in a block of `rows` rows by `width` packs of channels; as many blocks across as the channels need.
struct PoolShape {
  int width, rows;
  unsigned threads;
  dim3 blocks;

  PoolShape(int64_t total_rows, int64_t packs) {
    const int64_t across = (packs + kPoolThreads - 1) / kPoolThreads;
    STD_TORCH_CHECK(across <= 65535, "reid3d: too many channels in one call");
    width = static_cast<int>((packs + across - 1) / across);
    rows = kPoolThreads / width;
    threads = static_cast<unsigned>((rows * width + kWarp - 1) / kWarp * kWarp);
    blocks = dim3(blocks_for(total_rows, rows), static_cast<unsigned>(across));
  }
};

// The row and the first channel of a thread; it has none where `active` is false.
struct PoolThread {
  int row_in_block;
  int64_t row, channel;
  bool active;

  __device__ PoolThread(int width, int rows, int64_t total_rows, int64_t C, int V) {
    row_in_block = threadIdx.x / width;
    row = static_cast<int64_t>(blockIdx.x) * rows + row_in_block;
    channel = (static_cast<int64_t>(blockIdx.y) * width + threadIdx.x % width) * V;
    active = row_in_block < rows && row < total_rows && channel < C;
  }
};

// Pools the groups of a block: their indices come to shared memory, each looked at once, kStage slots at a time.
template <int V, typename T, typename Pool>
__device__ void pool_groups(const char* op, const PoolThread& thread, int rows, const T* feats, const int64_t* idx,
                            int64_t total_rows, int64_t M, int64_t N, int64_t C, int32_t K, Pool& pool) {
  extern __shared__ int32_t staged[];  // rows by kStage + 1, so that the rows of a warp are in different banks
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows;
  const T* column = feats + thread.row / M * N * C + thread.channel;
  for (int32_t first = 0; first < K; first += kStage) {
    if (first > 0) __syncthreads();
    for (int t = threadIdx.x; t < rows * kStage; t += blockDim.x) {
      const int r = t / kStage, k = t % kStage;
      if (first_row + r >= total_rows || first + k >= K) continue;
      const int64_t i = idx[(first_row + r) * K + first + k];
      check_index(op, "idx", i, N);
      staged[r * (kStage + 1) + k] = static_cast<int32_t>(i);
    }
    __syncthreads();
    if (thread.active)
      pool_rows<V>(column, C, staged + thread.row_in_block * (kStage + 1), min(K - first, kStage), first, pool);
  }
}

// The edges into a row of a gradient.
struct Incoming {
  const int32_t* edges;
  int32_t count;

  __device__ Incoming(const char* op, const int32_t* offsets, const int32_t* edges_all, int64_t row, int64_t n,
                      int64_t E) {
    const int64_t cloud = row / n;
    const int32_t* bounds = offsets + row + cloud;  // n + 1 of them for every cloud
    const int32_t begin = bounds[0], end = bounds[1];
    check_index(op, "offsets", begin, E + 1);
    check_index(op, "offsets", end, E + 1);
    edges = edges_all + cloud * E + begin;
    count = end - begin;
  }
};

// Refuses what is no edge of the graph.
struct CheckEdge {
  const char* op;
  int64_t E;
  REID3D_HOST_DEVICE void operator()([[maybe_unused]] int32_t e) const {
#ifdef __CUDA_ARCH__
    check_index(op, "edges", e, E);
#endif
  }
};

// The graph from its points, as given or else made here.
inline std::pair<Tensor, Tensor> transposed_graph(const Tensor& idx, const std::optional<Tensor>& offsets,
                                                  const std::optional<Tensor>& edges, int64_t n) {
  if (offsets.has_value() && edges.has_value())
    return {torch::stable::contiguous(*offsets), torch::stable::contiguous(*edges)};
  const auto [made_offsets, made_edges] = transpose_graph(idx, n);
  return {made_offsets, made_edges};
}

inline ScalarType slot_type(int64_t K) { return K <= 256 ? ScalarType::Byte : ScalarType::Short; }

// Whether rows of C values of each tensor are made of packs of V.
inline bool packs(int64_t C, int64_t V, std::initializer_list<const Tensor*> tensors) {
  return C % V == 0 && std::all_of(tensors.begin(), tensors.end(), [V](const Tensor* x) {
    return reinterpret_cast<uintptr_t>(x->data_ptr()) % (V * x->element_size()) == 0;
  });
}

// Calls f(T(), Slot(), V): V is 16 bytes of T, or 1 where the rows are not made of such packs.
template <typename F>
void dispatch_pool(const Tensor& x, int64_t K, int64_t C, std::initializer_list<const Tensor*> tensors,
                   F&& f) {
  THO_DISPATCH_V2(x.scalar_type(), "reid3d", AT_WRAP(([&] {
    constexpr int most = 16 / sizeof(scalar_t);
    const bool packed = packs(C, most, tensors), byte = K <= 256;
    using Packed = std::integral_constant<int, most>;
    using Single = std::integral_constant<int, 1>;
    if (packed && byte) {
      f(scalar_t(), uint8_t(), Packed());
    } else if (packed) {
      f(scalar_t(), int16_t(), Packed());
    } else if (byte) {
      f(scalar_t(), uint8_t(), Single());
    } else {
      f(scalar_t(), int16_t(), Single());
    }
  })), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
}

inline void check_graph(const char* op, int64_t N, int64_t M, int64_t K) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(N <= most && K <= 32767 && M * K <= most, "reid3d::", op,
                  ": more than 2^31 - 1 points or edges in a cloud, or 32767 slots in a group");
}

}  // namespace reid3d
