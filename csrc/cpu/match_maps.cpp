// The best matches of the positions of maps: the binding of match_maps.h.
#include <type_traits>

#include "pool.h"

namespace reid3d {
namespace {

constexpr int64_t kPacked = 3 << 17;  // bytes of packed query maps that stay in the second cache
constexpr int64_t kQueries = 32;      // query maps that a thread has sums for, 16 channels of them

// A thread takes pairs of some query maps and a gallery map, the same query maps for as long as it can.
template <typename T, typename U>
void match_all(const Tensor& query, const Tensor& gallery, Tensor& best, int16_t* winner) {
  using W = Wide<T>;
  const int64_t Q = query.size(0), G = gallery.size(0), c = query.size(1), l = query.size(2);
  const int64_t panels = match_panels(c, l), size = static_cast<int64_t>(sizeof(W)) * panels;
  const int64_t most = std::clamp<int64_t>(kPacked / size, 1, std::max<int64_t>(Q, 1)), blocks = (Q + most - 1) / most;
  torch::stable::parallel_for(0, blocks * G, 1, [&](int64_t begin, int64_t end) {
    const Scratch<W> rows(most * panels), columns(panels);
    const Scratch<char> scratch(match_pair_scratch(l));
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / G, g = task % G, first = block * most, last = std::min(first + most, Q);
      if (block != packed)
        for (int64_t q = first; q < last; ++q)
          kernels().maps(T()).pack_rows(values<T>(query) + q * c * l, c, l, rows.get() + (q - first) * panels);
      packed = block;
      kernels().maps(U()).pack_columns(values<U>(gallery) + g * c * l, c, l, columns.get());
      for (int64_t q = first; q < last; ++q) {
        const int64_t pair = (q * G + g) * 2 * l;
        kernels().maps(T()).match_pair(rows.get() + (q - first) * panels, columns.get(), c, l, scratch.get(),
                                       values<W>(best) + pair, winner ? winner + pair : nullptr);
      }
    }
  });
}

std::tuple<Tensor, Tensor> match_maps(const Tensor& query_, const Tensor& gallery_, bool winners) {
  const Tensor query = torch::stable::contiguous(query_), gallery = torch::stable::contiguous(gallery_);
  const int64_t Q = query.size(0), G = gallery.size(0), l = query.size(2);
  Tensor best = torch::stable::new_empty(query, {Q, G, 2, l}, wide_type(query));
  Tensor winner = torch::stable::new_empty(query, {winners ? Q : 0, G, 2, l}, ScalarType::Short);
  dispatch_rows(query, [&](auto t) {
    dispatch_rows(gallery, [&](auto u) {
      using T = decltype(t);
      using U = decltype(u);
      if constexpr (std::is_same_v<Wide<T>, Wide<U>>)
        match_all<T, U>(query, gallery, best, winners ? values<int16_t>(winner) : nullptr);
    });
  });
  return {best, winner};
}

// Threads take 16 channels of some query maps: every sum is one thread's, in the order of the gallery.
Tensor match_maps_backward(const Tensor& grad_, const Tensor& winner_, const Tensor& gallery_) {
  const Tensor grad = torch::stable::contiguous(grad_), winner = torch::stable::contiguous(winner_),
               gallery = torch::stable::contiguous(gallery_);
  const int64_t Q = grad.size(0), G = grad.size(1), c = gallery.size(1), l = gallery.size(2);
  STD_TORCH_CHECK(winner.numel() == grad.numel(), "match_maps: there is no gradient without winners");
  const int16_t* at = values<int16_t>(winner);
  bool good = true;
  for (int64_t i = 0; i < winner.numel(); ++i) good &= 0 <= at[i] && at[i] < l;
  STD_TORCH_CHECK(good, "winner must be between 0 and ", l - 1);
  Tensor out = torch::stable::new_empty(grad, {Q, c, l});
  dispatch_rows(gallery, [&](auto t) {
    using T = decltype(t);
    using W = Wide<T>;
    const int64_t chunks = (c + kLeaf - 1) / kLeaf, most = std::clamp<int64_t>(Q, 1, kQueries);
    torch::stable::parallel_for(0, (Q + most - 1) / most * chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<W> scratch((most + 1) * l * kLeaf);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t q = task / chunks * most, pairs = q * G * 2 * l;
        kernels().maps(t).add_matches(values<W>(grad) + pairs, at + pairs, values<T>(gallery), std::min(most, Q - q), G,
                                      c, l, task % chunks * kLeaf, scratch.get(), values<W>(out) + q * c * l);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) {
  m.impl("match_maps", TORCH_BOX(&reid3d::match_maps));
  m.impl("match_maps_backward", TORCH_BOX(&reid3d::match_maps_backward));
}
