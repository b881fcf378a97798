// The edges of a graph, sorted by the point they end in. Contract: reid3d/ops/transpose.py. A block can count a few
// hundred points: a larger cloud is first brought into groups of points, then each group is sorted by itself. All steps
// keep the order of the edges.
#include "transpose.cuh"
#include "transpose.h"

namespace reid3d {
namespace {

constexpr int kThreads = kSortWarps * kWarp;

struct CheckPoint {
  int64_t n;
  REID3D_HOST_DEVICE void operator()([[maybe_unused]] int64_t i) const {
#ifdef __CUDA_ARCH__
    check_index("transpose_graph", "idx", i, n);
#endif
  }
};

struct ByRow {
  REID3D_HOST_DEVICE int32_t operator()(int32_t row) const { return row; }
};

struct ByGroup {
  int32_t shift;
  REID3D_HOST_DEVICE int32_t operator()(int32_t row) const { return row >> shift; }
};

struct EntryList {
  const Entry* entries;
  REID3D_HOST_DEVICE Entry operator[](int64_t place) const { return entries[place]; }
};

// counts (B,chunks,groups): the edges of a chunk that end in a group.
__global__ void __launch_bounds__(kThreads) count_groups(const int64_t* idx_all, int64_t E, int64_t n, Groups groups,
                                                         int32_t* counts) {
  __shared__ int32_t counter[kMaxGroups];
  const int64_t cloud = blockIdx.x / groups.chunks, chunk = blockIdx.x % groups.chunks;
  const int64_t first = chunk * groups.chunk, last = min(first + groups.chunk, E);
  const GraphList<CheckPoint> list{idx_all + cloud * E, {n}};
  for (int g = threadIdx.x; g < groups.count; g += kThreads) counter[g] = 0;
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) atomicAdd(counter + (list[i].row >> groups.shift), 1);
  __syncthreads();
  for (int g = threadIdx.x; g < groups.count; g += kThreads)
    counts[static_cast<int64_t>(blockIdx.x) * groups.count + g] = counter[g];
}

// starts (B,groups+1) and the edges of a cloud, group after group: a block per chunk.
__global__ void __launch_bounds__(kThreads) gather_groups(const int64_t* idx_all, int64_t E, int64_t n, Groups groups,
                                                          const int32_t* counts, int32_t* starts, Entry* entries_all) {
  __shared__ SortShared shared;
  __shared__ GroupStarts start;
  const int64_t cloud = blockIdx.x / groups.chunks, chunk = blockIdx.x % groups.chunks;
  const int warp = threadIdx.x / kWarp;
  start.add_up(warp, counts + cloud * groups.chunks * groups.count, groups.chunks, groups.count, chunk);
  const GraphList<CheckPoint> list{idx_all + cloud * E, {n}};
  const ByGroup key{groups.shift};
  const int64_t first = chunk * groups.chunk;
  const StableSort<GraphList<CheckPoint>, ByGroup> sort{list, key, first, min(first + groups.chunk, E), 0, groups.count,
                                                        shared};
  sort.count(warp);
  __syncthreads();
  sort.add_up(warp);
  __syncthreads();
  int32_t* const group_starts = starts + cloud * (groups.count + 1);
  if (threadIdx.x == 0 && chunk == 0) group_starts[groups.count] = static_cast<int32_t>(E);
  const GroupStarts& shared_start = start;
  sort.open(warp, [=, &shared_start](int32_t group, int32_t) {
    const int32_t begin = shared_start.begin(group);
    if (chunk == 0) group_starts[group] = begin;
    return begin + shared_start.earlier[group];
  });
  __syncthreads();
  Entry* const entries = entries_all + cloud * E;
  sort.place(warp, [=](int32_t place, Entry entry) { entries[place] = entry; });
}

// Sorts the rows [low, low + rows) of list[first, last), whose first edge has place `first` in the cloud.
template <typename List>
__device__ void sort_rows(const List& list, int64_t first, int64_t last, int32_t low, int32_t rows, SortShared& shared,
                          int32_t* offsets, int32_t* edges) {
  const int warp = threadIdx.x / kWarp;
  const ByRow key;
  const StableSort<List, ByRow> sort{list, key, first, last, low, rows, shared};
  sort.count(warp);
  __syncthreads();
  sort.add_up(warp);
  __syncthreads();
  sort.open(warp, [=](int32_t row, int32_t place) {
    const int32_t start = static_cast<int32_t>(first) + place;
    offsets[low + row] = start;
    return start;
  });
  __syncthreads();
  sort.place(warp, [=](int32_t place, Entry entry) { edges[place] = entry.edge; });
}

// A block per sweep of a group of a cloud. starts and entries are null where there is one group, the cloud.
__global__ void __launch_bounds__(kThreads) sort_group(const int64_t* idx_all, int64_t E, int32_t n, Groups groups,
                                                       const int32_t* starts, const Entry* entries_all,
                                                       int32_t* offsets_all, int32_t* edges_all) {
  __shared__ SortShared shared;
  const int64_t block = blockIdx.x / groups.sweeps, cloud = block / groups.count;
  const int32_t group = static_cast<int32_t>(block % groups.count), sweep = blockIdx.x % groups.sweeps;
  const int64_t low = (static_cast<int64_t>(group) << groups.shift) + static_cast<int64_t>(sweep) * kSortRows;
  const int64_t high = min(min(low + kSortRows, (static_cast<int64_t>(group) + 1) << groups.shift), int64_t{n});
  if (low >= high) return;
  int32_t* offsets = offsets_all + cloud * (int64_t{n} + 1);
  int32_t* edges = edges_all + cloud * E;
  if (high == n && threadIdx.x == 0) offsets[n] = static_cast<int32_t>(E);
  if (starts == nullptr) {
    const GraphList<CheckPoint> list{idx_all + cloud * E, {n}};
    sort_rows(list, 0, E, static_cast<int32_t>(low), static_cast<int32_t>(high - low), shared, offsets, edges);
  } else {
    const int32_t* start = starts + cloud * (groups.count + 1) + group;
    const EntryList list{entries_all + cloud * E};
    sort_rows(list, start[0], start[1], static_cast<int32_t>(low), static_cast<int32_t>(high - low), shared, offsets,
              edges);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> transpose_graph(const Tensor& idx_, int64_t n) {
  const Tensor idx = torch::stable::contiguous(idx_);
  const DeviceGuard guard(idx.get_device_index());
  const int64_t B = idx.size(0), E = idx.size(1) * idx.size(2);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(n < most && E <= most, "reid3d::transpose_graph: more than 2^31 - 1 points or edges in a cloud");
  Tensor edges = torch::stable::new_empty(idx, {B, E}, ScalarType::Int);
  if (B * E == 0) return {torch::stable::new_zeros(idx, {B, n + 1}, ScalarType::Int), edges};
  STD_TORCH_CHECK(n >= 1, "reid3d::transpose_graph: n must be at least 1, got ", n);
  Tensor offsets = torch::stable::new_empty(idx, {B, n + 1}, ScalarType::Int);
  const Groups groups(n, E);
  const int64_t* i = idx.const_data_ptr<int64_t>();
  const cudaStream_t stream = current_stream(idx);
  const int32_t* starts = nullptr;
  const Entry* entries = nullptr;
  Tensor counts, group_starts, by_group;
  if (groups.count > 1) {
    counts = torch::stable::new_empty(idx, {B, groups.chunks, groups.count}, ScalarType::Int);
    group_starts = torch::stable::new_empty(idx, {B, groups.count + 1}, ScalarType::Int);
    by_group = torch::stable::new_empty(idx, {B, E, 2}, ScalarType::Int);
    const unsigned blocks = blocks_for(B * groups.chunks, 1);
    count_groups<<<blocks, kThreads, 0, stream>>>(i, E, n, groups, counts.mutable_data_ptr<int32_t>());
    check_launch("transpose_graph");
    starts = group_starts.const_data_ptr<int32_t>();
    entries = reinterpret_cast<const Entry*>(by_group.const_data_ptr<int32_t>());
    gather_groups<<<blocks, kThreads, 0, stream>>>(i, E, n, groups, counts.const_data_ptr<int32_t>(),
                                                   group_starts.mutable_data_ptr<int32_t>(),
                                                   reinterpret_cast<Entry*>(by_group.mutable_data_ptr<int32_t>()));
    check_launch("transpose_graph");
  }
  sort_group<<<blocks_for(B * groups.count * groups.sweeps, 1), kThreads, 0, stream>>>(
      i, E, static_cast<int32_t>(n), groups, starts, entries, offsets.mutable_data_ptr<int32_t>(),
      edges.mutable_data_ptr<int32_t>());
  check_launch("transpose_graph");
  return {offsets, edges};
}

}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("transpose_graph", TORCH_BOX(&reid3d::transpose_graph)); }
