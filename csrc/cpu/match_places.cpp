// The places of matches in ranked lists: the binding of match_places.h. Threads take whole queries.
#include <atomic>

#include "cloud.h"

namespace reid3d {
namespace {

Tensor match_places(const Tensor& sim_, const Tensor& matches_, const Tensor& removed_, const Tensor& junk_,
                    bool pessimistic) {
  const Tensor sim = torch::stable::contiguous(sim_), matches = torch::stable::contiguous(matches_),
               removed = torch::stable::contiguous(removed_), junk = torch::stable::contiguous(junk_);
  const int64_t B = sim.size(0), n = sim.size(1), P = matches.size(1), R = removed.size(1);
  STD_TORCH_CHECK(n <= kMaxPoints, "sim must have at most ", kMaxPoints, " columns, got ", n);
  Tensor places = torch::stable::new_empty(matches, {B, P});
  const float* s = sim.const_data_ptr<float>();
  const int64_t *m = matches.const_data_ptr<int64_t>(), *r = removed.const_data_ptr<int64_t>();
  const int64_t* j = junk.const_data_ptr<int64_t>();
  int64_t* out = places.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> nan{-1}, position{-1};  // a row with it
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(match_scratch(n, P));
    for (int64_t b = begin; b < end; ++b) {
      const MatchError error = kernels().match_places(s + b * n, n, m + b * P, P, r + b * R, R, j, junk.size(0),
                                                      pessimistic, scratch.get(), out + b * P);
      if (error == MatchError::nan) nan = b;
      if (error == MatchError::position) position = b;
    }
  });
  STD_TORCH_CHECK(nan == -1, "sim must not hold NaN, got one in row ", nan.load());
  STD_TORCH_CHECK(position == -1, "matches, removed and junk must hold -1 or a position below ", n,
                  ", got another for row ", position.load());
  return places;
}

}  // namespace
}  // namespace reid3d

STABLE_TORCH_LIBRARY_IMPL(reid3d, CPU, m) { m.impl("match_places", TORCH_BOX(&reid3d::match_places)); }
