// The best matches of the positions of maps. Contract: reid3d/ops/match_maps.py. A block takes some positions of a map
// and holds them against all of another one; what these find is a launch of its own, with the maps exchanged.
#include "match_maps.h"

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace reid3d {
namespace {

// What maps a (A,c,l) find in maps b (B,c,l). Pair (i,j) is written at i * a_stride + j * b_stride.
template <typename T>
__global__ void __launch_bounds__(MatchTile<T>::kThreads)
    match_maps_kernel(const T* a, const T* b, int64_t B, int64_t c, int32_t l, int32_t tiles, int64_t a_stride,
                      int64_t b_stride, T* best, int16_t* winner) {
  using Tile = MatchTile<T>;
  __shared__ typename Tile::Positions rows, columns;
  __shared__ alignas(16) char memory[sizeof(BestMatch<T>[Tile::kSide][16])];  // constructors must not run here
  auto& all = *reinterpret_cast<BestMatch<T>(*)[Tile::kSide][16]>(memory);
  const int64_t pair = blockIdx.x / tiles, i = pair / B, j = pair % B;
  const int32_t low = static_cast<int32_t>(blockIdx.x % tiles) * Tile::kSide;
  a += i * c * l;
  b += j * c * l;
  Tile tile;
  for (int32_t left = 0; left < l; left += Tile::kSide) {
    tile.clear();
    for (int64_t channel = 0; channel < c; channel += Tile::kDepth) {
      __syncthreads();  // all have done with the last channels
      Tile::fetch(threadIdx.x, rows, a, low, l, channel, c);
      Tile::fetch(threadIdx.x, columns, b, left, l, channel, c);
      __syncthreads();
      tile.add(threadIdx.x, rows, columns);
    }
    tile.take(threadIdx.x, left, l);
  }
  tile.share(threadIdx.x, all);
  __syncthreads();
  const int32_t row = low + static_cast<int32_t>(threadIdx.x);
  if (threadIdx.x >= Tile::kSide || row >= l) return;
  const BestMatch<T> most = Tile::of_row(all[threadIdx.x]);
  const int64_t at = i * a_stride + j * b_stride + row;
  best[at] = most.value;
  if (winner) winner[at] = static_cast<int16_t>(most.at);
}

template <typename T>
void match(const T* a, const T* b, int64_t A, int64_t B, int64_t c, int64_t l, int64_t a_stride, int64_t b_stride,
           T* best, int16_t* winner, cudaStream_t stream) {
  using Tile = MatchTile<T>;
  const int64_t tiles = (l + Tile::kSide - 1) / Tile::kSide;
  match_maps_kernel<T><<<blocks_for(A * B * tiles, 1), Tile::kThreads, 0, stream>>>(
      a, b, B, c, static_cast<int32_t>(l), static_cast<int32_t>(tiles), a_stride, b_stride, best, winner);
}

std::tuple<Tensor, Tensor> match_maps(const Tensor& query_, const Tensor& gallery_, bool winners) {
  const DeviceGuard guard(query_.get_device_index());
  const ScalarType wide = query_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor query = torch::stable::contiguous(torch::stable::to(query_, wide)),
               gallery = torch::stable::contiguous(torch::stable::to(gallery_, wide));
  const int64_t Q = query.size(0), G = gallery.size(0), c = query.size(1), l = query.size(2);
  Tensor best = torch::stable::new_empty(query, {Q, G, 2, l});
  Tensor winner = torch::stable::new_empty(query, {winners ? Q : 0, G, 2, l}, ScalarType::Short);
  if (best.numel() == 0) return {best, winner};
  const cudaStream_t stream = current_stream(query);
  dispatch_float_double(query, [&](auto zero) {
    using T = decltype(zero);
    const T *q = query.const_data_ptr<T>(), *g = gallery.const_data_ptr<T>();
    T* out = best.mutable_data_ptr<T>();
    int16_t* at = winners ? winner.mutable_data_ptr<int16_t>() : nullptr;
    match(q, g, Q, G, c, l, G * 2 * l, 2 * l, out, at, stream);
    check_launch("match_maps");
    match(g, q, G, Q, c, l, 2 * l, G * 2 * l, out + l, at ? at + l : nullptr, stream);
    check_launch("match_maps");
  });
  return {best, winner};
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CUDA, m) { m.impl("match_maps", TORCH_BOX(&reid3d::match_maps)); }
